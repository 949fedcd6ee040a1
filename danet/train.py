"""Training by a recipe: on one device or several, in mixed precision, resumed where it was stopped."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ._weights import assign, listed
from .batches import Batch, Order, load
from .data.images import write_image
from .data.sample import IGNORE, SegmentationDataset
from .data.transforms import to_tensor
from .distributed import rank_and_world, sum_over_processes, wait_for_all
from .evaluate import evaluate
from .inference import predict_scores
from .loss import segmentation_loss
from .model import DANet
from .pictures import colourise, panel
from .progress import Progress
from .recipes import Recipe
from .run_folder import RunFolder

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of autocast by their names."""

PICTURES = 4
"""Images of the validation set that are drawn after every validation."""


class Result(NamedTuple):
    """Of a training run."""

    steps: int  # done so far, those before a resumption included
    finished: bool  # False: a signal stopped it; the state is saved
    mean_iou: float | None  # of the last validation, absent classes left out; None: there was none
    best_mean_iou: float | None


class StepLosses(NamedTuple):
    """Of one step, means over the labelled pixels of all its images; None for branches that the variant lacks."""

    total: float
    main: float
    position: float | None
    channel: float | None
    pixels: int  # labelled
    stop: bool  # whether any process was told to stop


def train(
    model: DANet,
    dataset: SegmentationDataset,
    recipe: Recipe,
    output: Path | str,
    *,
    validation: SegmentationDataset | None = None,
    device: torch.device | str = "cpu",
    amp: str = "off",
    accumulate: int = 1,
    workers: int = 0,
    seed: int = 0,
    resume: bool = False,
    keep: int = 2,
    save_every: int | None = None,
    validate_every: int = 1,
    tensorboard: bool = False,
    progress: bool = True,
) -> Result:
    """Train a model. Where torch.distributed is initialised, all processes call this with the same arguments.

    `output` receives log.jsonl (a line for every step and validation), checkpoints/ (the newest few, to resume from),
    pictures/ (image, result and truth after each validation), best/ (the model with the best mean IoU so far) and, at
    the end, last/; DANet.from_pretrained reads these two. SIGTERM and Ctrl-C let the step end, save and return.

    All chance in a step follows from the seed and the number of the step: a run that is resumed, also in mid-epoch and
    with another number of workers, computes what it would have computed. On the CPU that holds to the last bit.

    Args:
        model: is trained in place, on `device`, in channels_last; on several GPUs with SyncBatchNorm.
        dataset: what to learn from, with a mask for each image.
        recipe: see danet.recipes.find_recipe.
        output: folder of the run.
        validation: a data set of the same classes; images of any size, seen whole or in recipe.validation_crop windows.
        device: of this process.
        amp: autocast to "bf16" or "fp16" (with loss scaling), or "off".
        accumulate: parts that a step's images go through the model in. The gradient is that of the whole step, apart
            from BatchNorm, whose statistics are of a part.
        workers: processes that read and augment images.
        seed: a number >= 0.
        resume: whether to go on from the newest checkpoint in `output`, if there is one.
        keep: checkpoints to keep.
        save_every: steps between checkpoints; None: an epoch.
        validate_every: epochs between validations; there is always one at the end.
        tensorboard: whether to log for TensorBoard too; needs the package tensorboard.
        progress: whether to write to stderr how far it is.

    Raises:
        ValueError: arguments that do not fit each other; a checkpoint of another recipe, seed or model; an image or a
            mask that is wrong.
        FileExistsError: `output` holds a run already, and resume is False.
        FloatingPointError: the loss is NaN or infinite.
        OSError: a file cannot be read or written.
    """
    rank, world = rank_and_world()
    device = torch.device(device)
    total = recipe.total_steps(len(dataset))
    _check(model, dataset, validation, recipe, amp, accumulate, workers, seed, keep, save_every, validate_every, world)
    folder = RunFolder(output, keep, tensorboard=tensorboard, writes=rank == 0)
    if not resume and folder.holds_a_run():
        raise FileExistsError(f"{output} holds a training run: resume it, or choose another folder")
    saved = folder.newest() if resume else None
    wait_for_all()  # the folder is looked at by all before one of them writes

    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    net: nn.Module = model
    if world > 1:
        if device.type == "cuda":  # on the CPU there is none
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    optimizer = recipe.make_optimizer(model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    identity = {"recipe": asdict(recipe), "seed": seed, "amp": amp, "images": len(dataset)}
    first, best, last = 0, None, None
    if saved is not None:
        first, best = _restore(saved, identity, str(output), model, optimizer, scaler)
    folder.forget_after(first)
    folder.log("start", first, total=total, processes=world, accumulate=accumulate, **identity)

    an_epoch = max(1, len(dataset) // recipe.batch_size)
    order = Order(len(dataset), recipe, seed, first=first, steps=total, parts=accumulate, rank=rank, world=world)
    batches = iter(load(dataset, recipe, order, seed=seed, workers=workers, pin_memory=device.type == "cuda"))
    report = Progress("train", total if progress and rank == 0 else None, "steps", first)

    def save(step: int) -> None:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        folder.save(step, state | {"scaler": scaler.state_dict(), "best_mean_iou": best} | identity)

    stopped = False
    try:
        with _told_to_stop() as told, torch.random.fork_rng([device] if device.type == "cuda" else []):
            step = first
            while step < total and not stopped:
                start = time.monotonic()
                parts = [_on(next(batches), device) for _ in range(accumulate)]
                torch.manual_seed(_seed_of(seed, step, rank))  # of dropout
                recipe.set_rate(optimizer, step, total)
                optimizer.zero_grad()
                losses = accumulate_gradients(
                    net, parts, weights=recipe.loss_weights, amp=amp, scaler=scaler, stop=told.is_set()
                )
                if not math.isfinite(losses.total) and (amp != "fp16" or scaler.get_scale() < 1):
                    raise FloatingPointError(
                        f"the loss is {losses.total} in step {step}; try a lower learning rate or another precision"
                    )
                scaler.step(optimizer)  # leaves a step out whose fp16 gradients have overflowed
                scaler.update()
                step += 1
                _log_step(folder, losses, step, recipe, optimizer, time.monotonic() - start)
                report.done(step, f", loss {losses.total:.3f}")
                stopped = losses.stop

                epoch, within = divmod(step, an_epoch)
                due = step == total or (within == 0 and epoch % validate_every == 0)
                if validation is not None and due and not stopped:
                    last = _validate(model, validation, recipe, device, amp, folder, step)
                    if best is None or last > best:
                        best = last
                        folder.save_model("best", model)
                if stopped or step == total or (within == 0 if save_every is None else step % save_every == 0):
                    save(step)
        if not stopped:
            folder.save_model("last", model)
        folder.log("stopped" if stopped else "finished", step)
    finally:
        del batches  # ends its workers, also where a traceback keeps this frame
        folder.close()
    return Result(step, not stopped, last, best)


def accumulate_gradients(
    net: nn.Module,
    parts: Sequence[Batch],
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    amp: str = "off",
    scaler: torch.amp.GradScaler | None = None,
    stop: bool = False,
) -> StepLosses:
    """Add the gradients of one step: of the mean loss over the labelled pixels of all parts and all processes.

    Args:
        net: a DANet in training, or DistributedDataParallel around one.
        parts: what this process has of the step's images, on the device of net.
        weights: as segmentation_loss.
        amp: a key of AMP.
        scaler: of the loss, for fp16.
        stop: whether this process was told to stop.
    """
    _, world = rank_and_world()
    device = parts[0].images.device
    pixels = sum((batch.target != IGNORE).sum() for batch in parts)
    shared = torch.tensor([float(pixels), float(stop)], dtype=torch.float64, device=device)
    labelled, stops = sum_over_processes(shared).tolist()
    # DistributedDataParallel takes the mean of the gradients over the processes, where their sum is wanted.
    divisor = max(labelled, 1.0) / world
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # total, main, position, channel
    absent = [False] * 4
    for number, batch in enumerate(parts, 1):
        last = number == len(parts)
        waits = isinstance(net, nn.parallel.DistributedDataParallel) and not last
        with net.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
                logits = net(batch.images)
            losses = segmentation_loss(logits, batch.target, weights=weights, pixels=divisor)
            (losses.total if scaler is None else scaler.scale(losses.total)).backward()
        absent = [loss is None for loss in losses]
        sums += torch.stack([sums.new_zeros(()) if loss is None else loss.detach().double() for loss in losses])
    total, main, position, channel = (
        None if missing else value / world
        for value, missing in zip(sum_over_processes(sums).tolist(), absent, strict=True)
    )
    assert total is not None
    assert main is not None
    return StepLosses(total, main, position, channel, int(labelled), stops > 0)


def _validate(
    model: DANet,
    validation: SegmentationDataset,
    recipe: Recipe,
    device: torch.device,
    amp: str,
    folder: RunFolder,
    step: int,
) -> float:
    """Mean IoU over the classes that occur; logged, with pictures."""
    options: dict[str, Any] = {"mode": "mmseg", "crop": recipe.validation_crop}
    with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
        matrix = evaluate(model, validation, device=device, progress=False, **options)
        if folder.writes:
            rows = []
            for index in range(min(PICTURES, len(validation))):
                sample = validation[index]
                assert sample.mask is not None  # evaluate has seen to it
                scores = predict_scores(model, to_tensor(sample.image).to(device), **options)
                result = scores.argmax(0).cpu().numpy()
                masks = [colourise(mask, validation.palette) for mask in (result, sample.mask)]
                rows.append(list(zip((sample.name, "result", "truth"), (sample.image, *masks), strict=True)))
            write_image(folder.path / "pictures" / f"step_{step:08d}.png", panel(rows))
    mean = matrix.mean_iou("skip")
    folder.log(
        "validation",
        step,
        mean_iou=mean,
        mean_iou_absent_zero=matrix.mean_iou("zero"),
        pixel_accuracy=matrix.pixel_accuracy(),
        **gammas(model),
    )
    return mean


def gammas(model: DANet) -> dict[str, float]:
    """The learned scales of the attention modules that the model has; 0 at the start."""
    modules = {name: getattr(model.head, f"{name}_attention", None) for name in ("position", "channel")}
    return {f"gamma_{name}": module.gamma.item() for name, module in modules.items() if module is not None}


def _log_step(
    folder: RunFolder,
    losses: StepLosses,
    step: int,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    seconds: float,
) -> None:
    values = {name: value for name, value in losses._asdict().items() if value is not None and name != "stop"}
    rate = optimizer.param_groups[0]["lr"]
    folder.log("step", step, **values, learning_rate=rate, images_per_second=round(recipe.batch_size / seconds, 3))


def _restore(
    saved: dict[str, Any],
    identity: dict[str, Any],
    source: str,
    model: DANet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, float | None]:
    """Steps done and best mean IoU of a checkpoint; the rest of it into the model, the optimizer and the scaler."""
    before = {**saved["recipe"], **{key: saved[key] for key in identity if key != "recipe"}}
    now = {**identity["recipe"], **{key: identity[key] for key in identity if key != "recipe"}}
    changes = [f"{key}: {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changes:
        raise ValueError(listed(f"{source}: this run was begun otherwise, so it cannot be resumed", changes))
    assign(model, saved["model"], source)
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["best_mean_iou"]


def _on(batch: Batch | Exception, device: torch.device) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return Batch(images, batch.target.to(device, non_blocking=True))


def _seed_of(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Is set by the first SIGTERM or Ctrl-C; a second one acts as it always does."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: Any) -> None:
        told.set()
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, stop)
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check(
    model: DANet,
    dataset: SegmentationDataset,
    validation: SegmentationDataset | None,
    recipe: Recipe,
    amp: str,
    accumulate: int,
    workers: int,
    seed: int,
    keep: int,
    save_every: int | None,
    validate_every: int,
    world: int,
) -> None:
    complaints = []
    if amp not in AMP:
        complaints.append(f"amp must be one of {', '.join(AMP)}, got {amp!r}")
    at_least = (("accumulate", accumulate, 1), ("workers", workers, 0), ("seed", seed, 0), ("keep", keep, 1))
    for name, value, least in (*at_least, ("save_every", save_every, 1), ("validate_every", validate_every, 1)):
        if value is not None and value < least:
            complaints.append(f"{name} must be at least {least}, got {value}")
    for name, some in (("data set", dataset), ("validation set", validation)):
        if some is not None and len(some.classes) != model.num_classes:
            complaints.append(f"the model has {model.num_classes} classes, the {name} {len(some.classes)}")
    if len(dataset) < recipe.batch_size:
        complaints.append(f"{len(dataset)} images do not fill a batch of {recipe.batch_size}")
    if accumulate >= 1 and recipe.batch_size % (accumulate * world):
        complaints.append(
            f"a batch of {recipe.batch_size} cannot be dealt out to {world} processes in {accumulate} equal parts"
        )
    if min(recipe.crop_size) < model.output_stride:
        height, width = recipe.crop_size
        complaints.append(f"the crop of {height} x {width} is smaller than the output stride of {model.output_stride}")
    if complaints:
        raise ValueError(listed("train", complaints))
