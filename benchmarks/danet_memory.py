"""What the whole network takes: DANet on a ResNet-50, on the CPU in fp32, with our attention and with eager attention.

    python benchmarks/danet_memory.py

image: one 1024 x 2048 image in one piece, evaluation. steps: two steps of SGD with momentum on one 768 x 768 crop,
three losses. The figures are the most memory that the whole process has held (VmHWM of Linux, torch itself included),
each in a process of its own, and the seconds of that one run, the first included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import record
from benchmarks.memory import GIB, peak_of_process
from benchmarks.options import Parser
from danet import create_model
from danet.loss import segmentation_loss

CASES = {"image": (1024, 2048), "steps": (768, 768)}  # pixels
CLASSES = 19


def run(case: str, backend: str) -> None:
    """Do the work of a case, and print the seconds it took and the peak of this process in bytes."""
    torch.manual_seed(0)
    model = create_model("danet_resnet50", CLASSES, attention_backend=backend)
    height, width = CASES[case]
    images = torch.randn(1, 3, height, width)
    start = time.perf_counter()
    if case == "image":
        with torch.inference_mode():
            model.eval()(images)
    else:
        target = torch.randint(0, CLASSES, (1, height, width), dtype=torch.uint8)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.003, momentum=0.9, weight_decay=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            segmentation_loss(model(images), target).total.backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    print(seconds, peak_of_process())


def measure(case: str, backend: str) -> dict[str, Any]:
    """A row of the record: `run` in a process of its own."""
    command = [sys.executable, __file__, "--run", case, "--backends", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} with {backend} failed:\n{done.stderr[-2000:]}")
    seconds, peak = done.stdout.split()[-2:]
    height, width = CASES[case]
    row = {"case": case, "height": height, "width": width, "backend": backend}
    return row | {"seconds": float(seconds), "peak_bytes": int(peak)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="danet_memory.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: both")
    parser.add_argument("--backends", nargs="+", default=["auto", "eager"], help="default: auto eager")
    parser.add_argument("--json", metavar="FILE", help="write every figure and the environment to FILE")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    record.check_writable(options.json)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.run is not None:
        run(options.run, *options.backends)
        return 0
    start = time.perf_counter()
    rows = []
    print(f"{'case':<8}{'attention':<12}{'GiB':>8}{'seconds':>10}")
    for case in options.cases:
        for backend in options.backends:
            rows.append(measure(case, backend))
            peak, seconds = rows[-1]["peak_bytes"] / GIB, rows[-1]["seconds"]
            print(f"{case:<8}{backend:<12}{peak:>8.2f}{seconds:>10.1f}", flush=True)
    if options.json is not None:
        seconds = time.perf_counter() - start
        record.write_json(options.json, "danet_memory", record.environment("cpu"), options, rows, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
