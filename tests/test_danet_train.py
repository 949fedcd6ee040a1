"""Training: what a step computes, and that a run can be stopped and resumed anywhere."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from danet import DANet, create_model
from danet.batches import Batch
from danet.data import IGNORE, open_dataset
from danet.data.street_scenes import write_street_scenes
from danet.recipes import find_recipe
from danet.run_folder import RunFolder
from danet.train import accumulate_gradients, train

RECIPE = find_recipe("street-scenes", batch_size=2, crop_size=(32, 64), scale=(0.8, 1.5), epochs=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Five to train on: two steps of two an epoch; two to validate on."""
    root = tmp_path_factory.mktemp("scenes")
    write_street_scenes(root, train=5, val=2, height=32, width=64)
    return root


@pytest.fixture
def dataset(scenes):
    return open_dataset("street-scenes", scenes, "train")


@pytest.fixture
def validation(scenes):
    return open_dataset("street-scenes", scenes, "val")


def tiny(variant="danet", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(f"{variant}_tiny", 19, **options)


def run(dataset, output, recipe=RECIPE, model=None, **options):
    model = tiny() if model is None else model
    return model, train(model, dataset, recipe, output, progress=False, **options)


def log(output, kind="step"):
    text = (Path(output) / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.split("\n")[:-1]]  # what follows the last end is still being written
    return [line for line in lines if line["kind"] == kind]


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# A step


def frozen(model):
    """In training, but for BatchNorm and dropout: then a gradient does not depend on how a batch is cut up."""
    model.train()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Dropout2d)):
            module.eval()
    return model


def batch_of(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 19, (images, 16, 24), generator=generator).to(torch.uint8)
    target[0, :, :18] = IGNORE  # so that a mean of means is another number
    return Batch(torch.randn(images, 3, 16, 24, generator=generator, dtype=torch.float64), target)


def gradients(model, parts):
    model.zero_grad()
    losses = accumulate_gradients(model, parts)
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_parts_give_the_gradient_of_the_whole_step():
    model = frozen(tiny().double())
    with torch.no_grad():
        model.head.position_attention.gamma.fill_(0.5)
    batch = batch_of(4)
    whole_losses, whole = gradients(model, [batch])
    parts = [Batch(*(tensor[start : start + 2] for tensor in batch)) for start in (0, 2)]
    losses, cut = gradients(model, parts)
    assert losses == pytest.approx(whole_losses, rel=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-9, atol=1e-13, msg=name)
    mean_of_means = [gradients(model, [part])[0].main for part in parts]
    assert abs(sum(mean_of_means) / 2 - losses.main) > 1e-5  # what the loss must not be


DDP = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_danet_train import batch_of, frozen, gradients, tiny
from danet.batches import Batch
from danet.distributed import process_group, rank_and_world

with process_group() as device:
    rank, world = rank_and_world()
    model = frozen(tiny(seed=rank).double())  # DistributedDataParallel starts them alike
    with torch.no_grad():
        model.head.position_attention.gamma.fill_(0.5)
    net = torch.nn.parallel.DistributedDataParallel(model)
    whole = batch_of(8)
    cut = [Batch(*(tensor[start : start + 2] for tensor in whole)) for start in range(0, 8, 2)]
    losses, found = gradients(net, [cut[rank], cut[world + rank]])
    if rank == 0:
        torch.save({"losses": tuple(losses[:4]), "gradients": found, "model": model.state_dict()}, sys.argv[2])
"""


def processes(script, *arguments, world=2):
    """Run a script in so many processes, as torchrun would start them."""
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000), "WORLD_SIZE": str(world)}
    root = str(Path(__file__).resolve().parent.parent)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=os.environ | store | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": root},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(errors)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    processes(DDP, Path(__file__).parent, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    model = frozen(tiny().double())
    model.load_state_dict(found["model"])
    losses, expected = gradients(model, [batch_of(8)])
    assert found["losses"] == pytest.approx(losses[:4], rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][f"module.{name}"], gradient, rtol=1e-8, atol=1e-12, msg=name)


DDP_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from test_danet_train import RECIPE, log, run
from danet.data import open_dataset
from danet.distributed import process_group

with process_group() as device:
    dataset, validation = (open_dataset("street-scenes", sys.argv[2], split) for split in ("train", "val"))
    _, result = run(dataset, sys.argv[3], validation=validation, device=device, validate_every=2)
    assert result.finished and result.mean_iou is not None
"""


def test_a_run_in_two_processes(scenes, tmp_path):
    processes(DDP_RUN, Path(__file__).parent, scenes, tmp_path / "run")
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4]  # one of the two writes
    assert log(tmp_path / "run", "start")[0]["processes"] == 2
    assert DANet.from_pretrained(tmp_path / "run" / "last").num_classes == 19


# Runs


@pytest.mark.parametrize(  # in mid-epoch, between epochs
    ("at", "workers", "amp"), [(1, 0, "off"), (1, 2, "off"), (1, 0, "fp16"), (2, 0, "off"), (3, 0, "off")]
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(dataset, tmp_path, at, workers, amp):
    whole, _ = run(dataset, tmp_path / "whole", amp=amp)
    _, first = run(Interrupted(dataset, after=2 * at), tmp_path / "parts", amp=amp)
    assert (first.steps, first.finished) == (at, False)
    parts, second = run(dataset, tmp_path / "parts", model=tiny(seed=9), resume=True, workers=workers, amp=amp)
    assert (second.steps, second.finished) == (4, True)
    assert same(whole, parts)
    assert [line["total"] for line in log(tmp_path / "parts")] == [line["total"] for line in log(tmp_path / "whole")]


class Interrupted:
    """A data set that sends SIGTERM to this process while the last image of a step is read."""

    def __init__(self, dataset, after):
        self.dataset, self.left = dataset, after
        self.classes, self.palette = dataset.classes, dataset.palette

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.dataset[index]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves(scenes, tmp_path, number):
    """As a terminal sends Ctrl-C, and a cluster SIGTERM: to the workers too."""
    small = ["--crop", "32", "64", "--batch-size", "2", "--steps", "100000", "--workers", "2"]
    arguments = ["--data", "street-scenes", "--model", "fcn_tiny", *small]
    command = [sys.executable, "-m", "danet", "train", *arguments, "--root", str(scenes), "--output", str(tmp_path)]
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": root}, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "log.jsonl").exists() and log(tmp_path)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    steps = len(log(tmp_path))
    assert process.returncode == 143, out
    assert f"stopped after {steps} steps" in out
    assert RunFolder(tmp_path, 1).newest()["step"] == steps


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(dataset, tmp_path):
    recipe = replace(RECIPE, steps=1)
    run(dataset, tmp_path, recipe)
    (tmp_path / "checkpoints" / "step_00000001.pt").unlink()
    run(dataset, tmp_path, recipe, resume=True)
    assert [line["step"] for line in log(tmp_path)] == [1]


def test_signals_are_handled_as_before_after_a_run(dataset, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(Interrupted(dataset, after=2), tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_training_in_a_thread_leaves_signals_alone(dataset, tmp_path):
    results = []
    recipe = replace(RECIPE, steps=1)
    thread = threading.Thread(target=lambda: results.append(run(dataset, tmp_path, recipe)))
    thread.start()
    thread.join()
    assert results[0][1].finished


def test_chance_outside_of_the_run_neither_matters_nor_changes(dataset, tmp_path):
    recipe = replace(RECIPE, steps=1)
    one, _ = run(dataset, tmp_path / "one", recipe)
    model = tiny()
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    run(dataset, tmp_path / "two", recipe, model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(one, model)
    other, _ = run(dataset, tmp_path / "three", recipe, seed=1)
    assert not same(one, other)


def test_what_a_run_leaves(dataset, validation, tmp_path):
    recipe = replace(RECIPE, epochs=3)
    model, result = run(dataset, tmp_path, recipe, validation=validation)
    assert (result.steps, result.finished) == (6, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints", "last", "log.jsonl", "pictures"]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000004.pt",
        "step_00000006.pt",
    ]
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    assert same(DANet.from_pretrained(tmp_path / "last"), model)
    validations = log(tmp_path, "validation")
    assert [line["step"] for line in validations] == [2, 4, 6]
    assert result.mean_iou == validations[-1]["mean_iou"]
    assert result.best_mean_iou == max(line["mean_iou"] for line in validations)
    assert {"gamma_position", "gamma_channel", "pixel_accuracy"} <= validations[0].keys()
    steps = log(tmp_path)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["total"] == pytest.approx(sum(steps[0][name] for name in ("main", "position", "channel")))
    assert steps[0]["pixels"] <= 2 * 32 * 64
    assert log(tmp_path, "finished")


def test_the_model_learns(dataset, tmp_path):
    recipe = replace(RECIPE, steps=12, scale=(1.0, 1.0), warmup=2)
    run(dataset, tmp_path, recipe)
    losses = [line["main"] for line in log(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(dataset, tmp_path, amp):
    recipe = replace(RECIPE, steps=2)
    run(dataset, tmp_path / "off", recipe)
    run(dataset, tmp_path / amp, recipe, amp=amp)
    full, mixed = (log(tmp_path / name)[0]["total"] for name in ("off", amp))
    assert mixed == pytest.approx(full, rel=0.02)
    assert mixed != full
    state = RunFolder(tmp_path / amp, 1).newest()
    assert bool(state["scaler"]) == (amp == "fp16")


def test_accumulated_steps_resume_too(dataset, tmp_path):
    whole, _ = run(dataset, tmp_path / "whole", accumulate=2)
    run(Interrupted(dataset, after=6), tmp_path / "parts", accumulate=2)
    parts, _ = run(dataset, tmp_path / "parts", model=tiny(seed=9), resume=True, accumulate=2)
    assert same(whole, parts)


def test_a_finished_run_that_is_resumed_does_nothing(dataset, tmp_path):
    model, _ = run(dataset, tmp_path)
    again, result = run(dataset, tmp_path, model=tiny(seed=9), resume=True)
    assert same(model, again)
    assert (result.steps, result.finished) == (4, True)


def test_a_model_without_a_config_leaves_its_state(dataset, tmp_path):
    made = tiny("fcn")
    model = DANet(made.backbone, made.head)
    run(dataset, tmp_path, replace(RECIPE, steps=1), model)
    assert torch.load(tmp_path / "last.pt").keys() == model.state_dict().keys()


def test_tensorboard_is_named_where_it_is_missing(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        run(dataset, tmp_path, tensorboard=True)


def test_tensorboard(dataset, tmp_path, monkeypatch):
    """The package is an extra, and large: here its writer is a list."""
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *scalar):
            seen.append(scalar)

        def close(self):
            seen.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(dataset, tmp_path, replace(RECIPE, steps=2), tensorboard=True)
    (first, second) = (line["total"] for line in log(tmp_path))
    assert {("step/total", first, 1), ("step/total", second, 2)} <= set(seen)
    assert seen[-1] == "closed"


# Checkpoints


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, keep=2)
    folder.save(1, {"step": 1})

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            folder.save(2, {"step": 2})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001.pt"]
    assert folder.newest() == {"step": 1}


def test_a_half_written_line_of_the_log_is_dropped(tmp_path):
    folder = RunFolder(tmp_path, keep=1)
    for step in (1, 2, 3):
        folder.log("step", step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')
    folder.forget_after(2)
    assert [line["step"] for line in log(tmp_path)] == [1, 2]


class Runs:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_malicious_checkpoint_runs_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"step": Runs()}, tmp_path / "checkpoints" / "step_00000001.pt")
    with pytest.raises(ValueError, match=r"step_00000001\.pt cannot be read"):
        run(dataset, tmp_path, resume=True)
    assert not (tmp_path / "hacked").exists()


# What is refused


def test_a_run_is_not_overwritten(dataset, tmp_path):
    recipe = replace(RECIPE, steps=1)
    run(dataset, tmp_path, recipe)
    with pytest.raises(FileExistsError, match="holds a training run"):
        run(dataset, tmp_path, recipe)


def test_a_run_begun_otherwise_is_not_resumed(dataset, tmp_path):
    run(dataset, tmp_path, replace(RECIPE, steps=1))
    with pytest.raises(ValueError, match=r"(?s)begun otherwise.*steps: 1, now 2.*seed: 0, now 5"):
        run(dataset, tmp_path, replace(RECIPE, steps=2), resume=True, seed=5)
    with pytest.raises(ValueError, match="missing: head"):
        run(dataset, tmp_path, replace(RECIPE, steps=1), model=tiny("fcn"), resume=True)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({}, {"amp": "half"}, "amp must be one of off, bf16, fp16, got 'half'"),
        ({}, {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({}, {"workers": -1}, "workers must be at least 0"),
        ({}, {"seed": -1}, "seed must be at least 0"),
        ({}, {"keep": 0}, "keep must be at least 1"),
        ({}, {"save_every": 0}, "save_every must be at least 1"),
        ({}, {"accumulate": 4}, "a batch of 2 cannot be dealt out to 1 processes in 4 equal parts"),
        ({"batch_size": 6}, {}, "5 images do not fill a batch of 6"),
        ({"crop_size": (4, 64)}, {}, "the crop of 4 x 64 is smaller than the output stride of 8"),
    ],
)
def test_arguments_that_are_refused(dataset, tmp_path, recipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(dataset, tmp_path / "run", replace(RECIPE, **recipe), **options)
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused(dataset, validation, tmp_path):
    model = create_model("fcn_tiny", 5)
    with pytest.raises(ValueError, match=r"(?s)5 classes, the data set 19.*5 classes, the validation set 19"):
        run(dataset, tmp_path / "run", model=model, validation=validation)
    assert not (tmp_path / "run").exists()


def test_a_single_position_is_refused(dataset, tmp_path):
    recipe = replace(RECIPE, batch_size=1, crop_size=(8, 8))
    with pytest.raises(ValueError, match="the feature map has one position"):
        run(dataset, tmp_path, recipe)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(scenes, tmp_path, workers):
    write_street_scenes(tmp_path / "scenes", train=2, val=0, height=32, width=64)
    dataset = open_dataset("street-scenes", tmp_path / "scenes", "train")
    dataset.items[1].image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"drawn_000001_000019_leftImg8bit.png") as caught:
        run(dataset, tmp_path / "run", workers=workers)
    assert "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []  # although the exception is still held


def test_a_split_without_masks_is_refused(dataset, tmp_path):
    dataset.items = [item._replace(mask=None) for item in dataset.items]
    with pytest.raises(ValueError, match="has no mask to learn from"):
        run(dataset, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path):
    model = tiny("fcn")
    with torch.no_grad():
        model.head.classifier[1].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan in step 0"):
        run(dataset, tmp_path, model=model)
