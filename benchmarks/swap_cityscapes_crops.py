"""Somebody else's DANet before and after danet.swap, on crops of Cityscapes' size up to the whole image.

    python benchmarks/swap_cityscapes_crops.py

The network is DANet on a ResNet-50 with attention modules as in the authors' code, in evaluation. Without --weights its
weights are random, with the statistics of BatchNorm taken from two scenes and gammas of 0.5; without --image the image
is a drawn street scene. Memory is the most that the whole process has held, torch and the weights included (on a GPU:
that tensors have held), time the median of the runs. Every figure comes from a process of its own.

First it is checked that nothing has changed: logits, labels, and the error against fp64 beside that of the network as
it was. If one of these fails, no ratio is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import memory, plot, record
from benchmarks.official_attention import put_in
from benchmarks.options import Parser
from benchmarks.shapes import CHANNELS, CROPS, QUERY_CHANNELS, Crop, parse_crop
from benchmarks.timing import clock, median
from danet import DANet, create_model, swap
from danet.checkpoint import load
from danet.data.images import read_image
from danet.data.street_scenes import render
from danet.data.transforms import to_tensor
from danet_kernels import memory_estimate, position_attention

CLASSES = 19
GAMMA = 0.5
PAM_LIMIT = 1e-4
"""Largest difference of logits where there is position attention alone."""

CAM_LIMIT = 2.0
"""Largest error against fp64 where there is channel attention, in errors of the network as it was."""

DIFFERENCE_LIMIT = 10.0
"""Largest difference of logits there, in the same unit, which is taken on a smaller crop."""

MEMORY_LIMIT = 0.1, 2 * memory.MIB
"""How far the memory of the operation may be from its estimate: as a part of it, and in bytes for small ones."""

REFERENCE = Crop(256, 512)  # for fp64


def network(options: argparse.Namespace, variant: str) -> DANet:
    """The network before the swap, in evaluation; the same numbers each time."""
    torch.manual_seed(0)
    model = create_model(f"{variant}_{options.backbone}", CLASSES)
    if options.weights is not None:
        load(model, options.weights)
        return put_in(model).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, GAMMA)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches, which is one
    scenes = [to_tensor(render(np.random.default_rng(seed), 128, 256).image) for seed in range(2)]
    with torch.no_grad():
        model.train()(torch.stack(scenes))
    return put_in(model).eval()


def picture(options: argparse.Namespace, crop: Crop) -> torch.Tensor:
    """[1, 3, H, W], normalised: the middle of the image."""
    if options.image is None:
        height = max(crop.height, crop.width // 2)
        image = render(np.random.default_rng(7), height, max(crop.width, 2 * height)).image
    else:
        image = read_image(options.image)
    top, left = (image.shape[0] - crop.height) // 2, (image.shape[1] - crop.width) // 2
    if min(top, left) < 0:
        raise ValueError(f"--image: {image.shape[0]} x {image.shape[1]} pixels hold no crop of {crop}")
    return to_tensor(np.ascontiguousarray(image[top : top + crop.height, left : left + crop.width]))[None]


def run(options: argparse.Namespace) -> None:
    """In a process of its own: one network on one crop. Prints a line of JSON, and leaves the logits [19, H, W]."""
    (variant,), (crop,) = options.variants, options.crops
    model = network(options, variant).to(options.device)
    if options.run == "after":
        report = swap(model, backend=options.backend, crop=None)
        if any(not one.swapped for one in report.found) or not report.swapped:
            raise RuntimeError(f"not every attention module was swapped:\n{report}")
    on_gpu = torch.device(options.device).type == "cuda"
    images = picture(options, crop).to(options.device)
    with torch.inference_mode():
        model(images[..., :64, :128])  # starts the threads, compiles kernels
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = [clock(lambda: model(images), options.device) for _ in range(options.repeats)]
        peak = torch.cuda.max_memory_allocated() if on_gpu else memory.peak_of_process()
        np.save(options.logits, model(images)[0].float().cpu().numpy())
    print(json.dumps({"seconds": median(seconds), "runs": seconds, "peak_bytes": peak}))


def measure(options: argparse.Namespace, variant: str, crop: Crop, when: str, logits: Path) -> dict[str, Any]:
    """A row of the record, without the comparison."""
    command = [sys.executable, __file__, "--run", when, "--variants", variant, "--crops", f"{crop.height}x{crop.width}"]
    command += ["--logits", str(logits), "--repeats", str(options.repeats), "--device", options.device]
    command += ["--backend", options.backend, "--backbone", options.backbone]
    for name in ("weights", "image"):
        command += [f"--{name}", getattr(options, name)] if getattr(options, name) is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant} on {crop} {when} the swap failed:\n{done.stderr[-2000:]}")
    cell = {"op": variant, "crop": [crop.height, crop.width], "positions": crop.positions, "status": "measured"}
    cell |= {"implementation": "danet:swapped" if when == "after" else "eager", "label": f"{when} swap"}
    return cell | json.loads(done.stdout.splitlines()[-1])


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """What has changed from logits [classes, H, W] to others: how far, and the labels of how many pixels."""
    difference = float(max(np.abs(one - other).max() for one, other in zip(before, after, strict=True)))
    first, second = -np.partition(-before, 1, axis=0)[:2]  # the two largest, [H, W] each
    undecided = first - second <= 2 * difference  # a pixel whose label such a difference may change
    other = before.argmax(0) != after.argmax(0)
    return {
        "largest_difference": difference,
        "largest_logit": float(np.abs(before).max()),
        "labels_changed": int(other.sum()),
        "labels_changed_where_decided": int((other & ~undecided).sum()),
        "share_undecided": float(undecided.mean()),
    }


def errors_against_fp64(options: argparse.Namespace, variant: str) -> tuple[float, float]:
    """Largest errors of the logits before and after the swap, on a crop."""
    images = picture(options, REFERENCE)
    with torch.inference_mode():
        model = network(options, variant)
        before = model(images).double()
        exact = model.double()(images.double())
        model = network(options, variant).to(options.device)
        swap(model, backend=options.backend, crop=None)
        after = model(images.to(options.device)).cpu().double()
    return (before - exact).abs().max().item(), (after - exact).abs().max().item()


def memory_of_the_operation(options: argparse.Namespace, crop: Crop) -> tuple[int, int]:
    """Peak extra bytes of position attention at the crop's size, measured and as memory_estimate says."""
    measured = memory.peak_extra_memory(
        partial(_operands, crop, options.device),
        partial(_attend, options.backend),
        partial(_warm_up, options.backend, options.device),
        device=options.device,
    )
    shape = (1, CHANNELS, *crop.spatial)
    device = torch.device(options.device)
    return measured, memory_estimate("position_attention", shape, backend=options.backend, device=device).total


def _operands(crop: Crop, device: str) -> list[torch.Tensor]:
    widths = (QUERY_CHANNELS, QUERY_CHANNELS, CHANNELS, CHANNELS)
    return [torch.randn(1, width, *crop.spatial, device=device) for width in widths] + [torch.ones(1, device=device)]


def _attend(backend: str, operands: list[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return position_attention(*operands, backend=backend)


def _warm_up(backend: str, device: str) -> None:
    _attend(backend, _operands(Crop(128, 128), device))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="swap_cityscapes_crops.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--crops", nargs="+", help="HEIGHTxWIDTH; default: 512x512 to 1024x2048")
    parser.add_argument("--variants", nargs="+", choices=("danet", "pam", "cam"), default=["danet", "pam"])
    parser.add_argument("--backbone", default="resnet50", help="as in the names of models; default: %(default)s")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of a DANet with 19 classes (docs/checkpoints.md)")
    parser.add_argument("--image", metavar="FILE", help="photograph, at least as large as the crops")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each network; default: %(default)s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", help="of danet_kernels; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write every figure and the environment to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw memory against the crop")
    parser.add_argument("--run", choices=("before", "after"), help=argparse.SUPPRESS)
    parser.add_argument("--logits", help=argparse.SUPPRESS)

    def validate(options: argparse.Namespace) -> None:
        options.crops = list(CROPS) if options.crops is None else [parse_crop(text) for text in options.crops]
        if options.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
        record.check_writable(options.json)
        if options.plot is not None:
            record.check_writable(options.plot)
            plot.check(options.plot)

    return parser.validated(arguments, validate)


def check(variant: str, changes: dict[str, Any]) -> list[str]:
    """What is wrong, in sentences. A label that changes where it was decided would be a mistake of the comparison."""
    wrong = []
    allowed = PAM_LIMIT if variant == "pam" else DIFFERENCE_LIMIT * changes["fp64_error_before"]
    if not changes["largest_difference"] <= allowed:
        wrong.append(f"logits differ by {changes['largest_difference']:.1e}, allowed are {allowed:.1e}")
    if changes["labels_changed_where_decided"]:
        wrong.append(f"{changes['labels_changed_where_decided']} labels changed that were decided")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.run is not None:
        run(options)
        return 0
    start = time.perf_counter()
    environment = record.environment(options.device)
    print(f"{record.machine(environment)}, DANet on {options.backbone} in fp32, batch 1, evaluation")
    cells, wrong = [], []
    for variant in options.variants:
        before, after = errors_against_fp64(options, variant)
        print(f"\n{variant}: errors against fp64 on {REFERENCE}: {before:.1e} before, {after:.1e} after the swap")
        if not after <= CAM_LIMIT * before:
            wrong.append(f"{variant}: an error of {after:.1e}, before the swap {before:.1e}")
        print(f"{'crop':>12}{'before':>22}{'after':>22}{'difference':>12}{'labels changed':>16}{'undecided':>12}")
        for crop in options.crops:
            pair = _pair(options, variant, crop)
            pair[1] |= {"fp64_error": after, "fp64_error_before": before}
            cells += pair
            wrong += [f"{variant} on {crop}: {text}" for text in check(variant, pair[1])]
            print(_line(crop, *pair), flush=True)
    measured, estimated = memory_of_the_operation(options, options.crops[-1])
    text = f"position attention at {options.crops[-1]}: {measured / memory.MIB:.0f} MiB beyond its inputs"
    print(f"\n{text}, estimated {estimated / memory.MIB:.0f} MiB")
    if abs(measured - estimated) > max(MEMORY_LIMIT[0] * estimated, MEMORY_LIMIT[1]):
        wrong.append(f"{text}, memory_estimate says {estimated / memory.MIB:.0f} MiB")
    for text in wrong:
        print(f"WRONG: {text}")
    if not wrong:
        for theirs, ours in zip(cells[::2], cells[1::2], strict=True):
            less, faster = (theirs[name] / ours[name] for name in ("peak_bytes", "seconds"))
            print(f"{theirs['op']} on {Crop(*theirs['crop'])}: {less:.1f}x less memory, {faster:.2f}x as fast")
    if options.json is not None:
        cells[-1] |= {"op_extra_bytes": measured, "op_estimated_bytes": estimated}
        seconds = time.perf_counter() - start
        record.write_json(options.json, "swap_cityscapes_crops", environment, options, cells, seconds)
    if options.plot is not None:
        plot.draw_networks(options.plot, cells, environment)
    return 1 if wrong else 0


def _pair(options: argparse.Namespace, variant: str, crop: Crop) -> list[dict[str, Any]]:
    """The rows before and after the swap; the comparison is in the second."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{when}.npy" for when in ("before", "after")]
        pair = [measure(options, variant, crop, file.stem, file) for file in files]
        pair[1] |= compare(*(np.load(file, mmap_mode="r") for file in files))
    return pair


def _line(crop: Crop, before: dict[str, Any], after: dict[str, Any]) -> str:
    figures = "".join(
        f"{one['peak_bytes'] / memory.GIB:>11.2f} GiB {one['seconds']:>5.1f} s" for one in (before, after)
    )
    changed = f"{after['largest_difference']:>12.1e}{after['labels_changed']:>16}{after['share_undecided']:>11.3%}"
    return f"{crop!s:>12}{figures}{changed}"


if __name__ == "__main__":
    sys.exit(main())
