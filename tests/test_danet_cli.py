"""The command line: every command once, what it refuses, and that the commands of the documentation exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from danet import DANet, cli, cli_tools, create_model
from danet.data.images import read_image, read_labels, write_image
from danet.data.street_scenes import write_street_scenes

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("quickstart", "train", "evaluate", "predict", "attention", "export"),
    *("convert", "prepare", "swap-report", "models"),
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_street_scenes(root, train=4, val=2, height=32, width=64)
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in a folder, as training leaves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    create_model("danet_tiny", 19).save_pretrained(path)
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def train(scenes, output, *more):
    small = ("--crop", 32, 64, "--batch-size", 2, "--steps", 2, "--workers", 0)
    data = ("--data", "street-scenes", "--root", scenes, "--model", "fcn_tiny")
    return run("train", *data, "--output", output, *small, *more)


# Help


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in COMMANDS)], ids=lambda command: "".join(command) or "top"
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*command, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: danet" in text
    for name in () if command else COMMANDS:
        assert name in text


def test_help_comes_without_torch():
    script = "import sys, danet.cli; danet.cli.parser(); assert not {'torch', 'PIL', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_it_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "danet", "models"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "danet_resnet101" in done.stdout
    assert "cityscapes-ablation" in done.stdout


def commands_of_documents():
    """What follows `danet`, or `-m danet` of python and torchrun, in the shell commands of README and docs."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["danet"] or (words[:1] in (["python"], ["torchrun"]) and "danet" in words):
                    yield pytest.param(words[words.index("danet") + 1 :], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("words", list(commands_of_documents()))
def test_commands_of_the_documentation_exist(words):
    assert cli.parser().parse_args(words).run


def test_the_documentation_has_every_command():
    assert {parameters.values[0][0] for parameters in commands_of_documents()} == set(COMMANDS)


# Commands


def test_train_then_resume(scenes, tmp_path, capsys):
    assert train(scenes, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "recipe street-scenes" in out
    assert "done after 2 steps" in out
    assert "best mean IoU" in out
    model = DANet.from_pretrained(tmp_path / "run" / "best")
    assert model.classes is not None
    assert model.classes[0] == "road"
    assert train(scenes, tmp_path / "run") == 2
    assert "holds a training run" in capsys.readouterr().err
    assert train(scenes, tmp_path / "run", "--resume") == 0


def test_a_stopped_run_has_a_status_of_its_own(scenes, tmp_path, monkeypatch, capsys):
    from danet.train import Result

    monkeypatch.setattr("danet.train.train", lambda *_, **__: Result(1, False, None, None))
    assert train(scenes, tmp_path / "run") == cli.STOPPED
    assert "--resume" in capsys.readouterr().out


def test_what_train_hands_on(scenes, tmp_path, monkeypatch):
    from danet.train import Result

    given = {}

    def fake(model, dataset, recipe, output, **options):
        given.update(options, model=model, recipe=recipe)
        return Result(1, True, None, None)

    monkeypatch.setattr("danet.train.train", fake)
    options = ("--amp", "bf16", "--accumulate", 2, "--seed", 4, "--keep", 7, "--save-every", 9, "--val-split", "off")
    assert train(scenes, tmp_path, *options, "--scale", 0.5, 2, "--output-stride", 16, "--dropout", 0) == 0
    assert (given["amp"], given["accumulate"], given["seed"], given["keep"]) == ("bf16", 2, 4, 7)
    assert (given["save_every"], given["validation"], given["workers"]) == (9, None, 0)
    assert (given["recipe"].scale, given["recipe"].crop_size, given["recipe"].steps) == ((0.5, 2.0), (32, 64), 2)
    assert given["model"].output_stride == 16


def test_train_begins_with_a_checkpoint(scenes, tmp_path, monkeypatch):
    model = create_model("fcn_tiny", 19)
    torch.save(model.state_dict(), tmp_path / "begin.pth")
    from danet.train import Result

    seen = []
    monkeypatch.setattr("danet.train.train", lambda model, *_, **__: seen.append(model) or Result(1, True, None, None))
    assert train(scenes, tmp_path / "run", "--init", tmp_path / "begin.pth") == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in seen[0].state_dict().items())


def test_evaluate(scenes, saved, tmp_path, capsys):
    picture = tmp_path / "confusion.png"
    data = ("--data", "street-scenes", "--root", scenes)
    assert run("evaluate", saved, *data, "--mode", "mmseg", "--crop", "none", "--confusion", picture) == 0
    out = capsys.readouterr().out
    assert "mIoU (absent classes count 0)" in out
    assert "mIoU (absent classes left out)" in out
    assert read_image(picture).ndim == 3


def test_the_scales_of_the_paper(saved):
    from danet.inference import EVALUATION_SCALES

    words = ["evaluate", str(saved), "--data", "voc", "--root", ".", "--scales", "paper", "--crop", "1024"]
    options = cli._inference(cli.parser().parse_args(words))
    assert options["scales"] == EVALUATION_SCALES
    assert options["crop"] == 1024


@pytest.mark.parametrize(
    ("words", "crop"),
    [
        (["evaluate", "m", "--data", "cityscapes", "--root", "r"], 768),
        (["evaluate", "m", "--data", "voc", "--root", "r"], None),
        (["evaluate", "m", "--data", "cityscapes", "--root", "r", "--crop", "none"], None),
        (["predict", "m", "photo.png", "-o", "out"], None),
    ],
)
def test_windows_by_default(words, crop):
    assert cli._inference(cli.parser().parse_args(words))["crop"] == crop


def test_voc_is_trained_on_train_aug(monkeypatch, capsys):
    """Which has SBD's masks and nothing of val; the other data sets on train."""
    opened = []

    def opening(name, root, split=None, **options):
        opened.append((name, split))
        raise ValueError("far enough")

    monkeypatch.setattr("danet.data.open_dataset", opening)
    for name in ("voc", "context"):
        assert run("train", "--data", name, "--root", "r", "-o", "o") == 2
    assert run("train", "--data", "voc", "--root", "r", "-o", "o", "--split", "trainval") == 2
    assert opened == [("voc", "train_aug"), ("context", "train"), ("voc", "trainval")]
    assert "far enough" in capsys.readouterr().err


def test_predict(scenes, saved, tmp_path, capsys):
    images = scenes / "leftImg8bit" / "val"
    assert run("predict", saved, images, "-o", tmp_path / "out", "--label-ids") == 0
    assert "2 of 2 images predicted" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 2


def test_predict_goes_on_after_a_bad_image(scenes, saved, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a.png", "c.png"):
        write_image(folder / name, np.zeros((32, 64, 3), np.uint8))
    (folder / "b.png").write_bytes(b"no image")
    assert run("predict", saved, folder, "-o", tmp_path / "out") == 1
    assert "b.png" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("?.png")} == {"a.png", "c.png"}


def test_a_checkpoint_file_needs_its_architecture(scenes, tmp_path, capsys):
    torch.save(create_model("pam_tiny", 19).state_dict(), tmp_path / "pam.pth")
    image = next((scenes / "leftImg8bit" / "val").rglob("*.png"))
    assert run("predict", tmp_path / "pam.pth", image, "-o", tmp_path / "out", "--name", "pam_tiny") == 0
    assert run("predict", tmp_path / "pam.pth", image, "-o", tmp_path / "out", "--name", "danet_tiny") == 2
    assert "missing: head.channel_in" in capsys.readouterr().err


def test_export(saved, tmp_path, capsys):
    assert run("export", saved, tmp_path / "model.onnx", "--size", 32, 64, "--opset", 23) == 0
    assert "opset 23" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").exists()
    assert run("export", saved, tmp_path / "model.onnx", "--opset", 11) == 2
    assert "opset must be 18 or later, got 11" in capsys.readouterr().err


def test_attention(scenes, saved, tmp_path, capsys):
    image = next((scenes / "leftImg8bit" / "val").rglob("*.png"))
    output = tmp_path / "panel.png"
    assert run("attention", saved, image, "--points", "3,4", "60,30", "-o", output) == 0
    assert "channel attention, variant official" in capsys.readouterr().out
    first = read_image(output)
    assert run("attention", saved, image, "-o", output) == 0  # a point in the middle
    assert not np.array_equal(read_image(output), first)
    assert run("attention", saved, image, "--points", "3", "-o", output) == 2
    assert "'3' is no point, expected X,Y" in capsys.readouterr().err


def test_attention_with_truth_and_comparison(scenes, saved, tmp_path):
    image = next((scenes / "leftImg8bit" / "val").rglob("*.png"))
    truth = tmp_path / "truth.png"
    write_image(truth, np.zeros((32, 64), np.uint8))
    create_model("fcn_tiny", 19).save_pretrained(tmp_path / "fcn")
    output = tmp_path / "panel.png"
    assert run("attention", saved, image, "--compare", tmp_path / "fcn", "--truth", truth, "-o", output) == 0
    assert run("attention", tmp_path / "fcn", image, "--truth", truth, "-o", output) == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert(tmp_path, capsys, suffix):
    model = create_model("danet_resnet18", 5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours.pth")
    assert run("convert", tmp_path / "ours.pth", tmp_path / f"theirs{suffix}", "--to", "official") == 0
    assert "(danet) ->" in capsys.readouterr().out
    assert run("convert", tmp_path / f"theirs{suffix}", tmp_path / "back.safetensors") == 0
    from danet.checkpoint import read

    back = read(tmp_path / "back.safetensors")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_prepare_draws_scenes_and_checks_others(tmp_path, capsys):
    size = ("--train", 1, "--val", 1, "--size", 32, 64)
    assert run("prepare", "street-scenes", tmp_path, *size) == 0
    mask = next((tmp_path / "gtFine" / "train").rglob("*.png"))
    assert read_labels(mask).shape == (32, 64)
    assert run("prepare", "cityscapes", tmp_path) == 0
    assert "train" in capsys.readouterr().out


def test_quickstart(tmp_path, monkeypatch, capsys):
    """The real one takes minutes: here with small scenes and two steps."""
    from danet import quickstart

    small = {"train": 8, "val": 2, "height": 32, "width": 64}
    monkeypatch.setattr(
        quickstart, "write_street_scenes", lambda root, seed: write_street_scenes(root, seed=seed, **small)
    )
    find = quickstart.find_recipe
    monkeypatch.setattr(
        quickstart, "find_recipe", lambda *names, **changes: find(*names, **changes, crop_size=(32, 64), batch_size=2)
    )
    assert run("quickstart", "-o", tmp_path, "--steps", 2, "--seeds", 2) == 0
    out = capsys.readouterr().out
    for variant in ("danet", "pam", "cam", "fcn"):
        assert re.search(rf"\n *{variant} +0\.\d+ \(0\.\d+ to 0\.\d+\)", out), variant
    assert "learning_rate   0.002 *" in out
    assert read_image(tmp_path / "results.png").ndim == 3
    assert read_image(tmp_path / "attention.png").ndim == 3
    assert (tmp_path / "seed-1" / "fcn" / "last" / "model.safetensors").is_file()


def test_the_far_pair_is_judged_between_its_two_classes():
    from danet.metrics import ConfusionMatrix
    from danet.quickstart import far_pair_accuracy

    matrix = ConfusionMatrix(19)
    matrix.update(np.array([1, 9, 9, 9, 5, 1]), np.array([1, 1, 9, 9, 9, 0]))
    assert far_pair_accuracy(matrix) == 0.75


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "nowhere", "--data", "voc", "--root", "nowhere"), "nowhere"),
        (("predict", "{saved}", "nowhere.png", "-o", "{tmp}"), "nowhere.png"),
        (("convert", "nowhere.pth", "out.pth"), "there is no file nowhere.pth"),
        (("prepare", "imagenet", "nowhere"), "expected one of cityscapes"),
        (("train", "--data", "folder", "--root", "x", "-o", "y"), "has no recipe of its own"),
        (("train", "--data", "voc", "--root", "x", "-o", "y", "--recipe", "best"), "unknown recipe 'best'"),
        (("quickstart", "--seeds", "0"), "seeds must be at least 1"),
        (("predict", "{saved}", "x.png", "-o", "y", "--crop", "wide"), "--crop: 'wide' is no number"),
        (("predict", "{saved}", "{image}", "-o", "{tmp}", "--crop", "64", "--stride", "80"), "smaller than the stride"),
        (("predict", "{saved}", "{image}", "-o", "{tmp}", "--device", "cuda:99"), "device cuda:99 is wanted"),
        (("predict", "{saved}", "{image}", "-o", "{tmp}", "--device", "gpu"), "'gpu' is no device"),
    ],
)
def test_one_line_says_what_is_wrong(words, message, saved, scenes, tmp_path, capsys):
    image = next((scenes / "leftImg8bit" / "val").rglob("*.png"))
    status = run(*(word.format(saved=saved, image=image, tmp=tmp_path / "out") for word in words))
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert re.match(rf"(.*\n)?danet {words[0]}: ", error)
    assert "Traceback" not in error


def test_a_bug_is_not_hidden(monkeypatch):
    def broken(args):
        raise AttributeError("a bug")

    monkeypatch.setattr(cli_tools, "_models", broken)
    with pytest.raises(AttributeError):
        run("models")


def test_only_a_missing_extra_is_told_in_one_line(monkeypatch, capsys):
    def missing(name):
        def command(args):
            raise ImportError(f"no {name}", name=name)

        return command

    monkeypatch.setattr(cli_tools, "_models", missing("scipy"))
    assert run("models") == 2
    assert "danet models: no scipy" in capsys.readouterr().err
    monkeypatch.setattr(cli_tools, "_models", missing("danet.modle"))
    with pytest.raises(ImportError):
        run("models")


def test_an_interruption_is_no_error(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_tools, "_models", interrupted)
    assert run("models") == 130
