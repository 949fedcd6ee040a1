"""How fast attention alone is, without projections, against what could be run instead.

    python benchmarks/attention_speed.py

On a machine with a GPU: the race of gpu_speed.py against every way that plain torch has. Elsewhere: the speed goals of
the CPU kernels, cpu_speed.py. A kernel that breaks the error rule gets WRONG instead of a time.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import cpu_speed, goals, gpu_report, gpu_speed, memory, plot, record
from benchmarks.gpu_cells import POSITION, Group
from benchmarks.implementations import DTYPES
from benchmarks.options import Parser
from benchmarks.peers import peers
from benchmarks.shapes import SPEED_CROP, parse_crop, parse_size
from danet_kernels import available_backends

CPU_ONLY = {"crop": f"{SPEED_CROP.height}x{SPEED_CROP.width}", "large": False}
GPU_ONLY = {"sizes": None, "dtypes": list(DTYPES), "peers": None, "plot": None}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="attention_speed.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--backend", help="backend of danet_kernels (default: native on the CPU, triton on a GPU)")
    add("--repeats", type=int, help="interleaved runs per figure (default: 5 on the CPU, at most 25 on a GPU)")
    add("--json", metavar="FILE", help="write every figure and the environment to FILE")
    cpu = parser.add_argument_group("on the CPU")
    cpu.add_argument("--crop", help="crop in pixels; the goals are for the default, 768x768")
    cpu.add_argument("--large", action="store_true", default=None, help="also N = 32768, where eager needs 8.5 GiB")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--sizes", nargs="+", metavar="BxN", help="batches and positions, such as 8x9216 (default: all)")
    gpu.add_argument("--dtypes", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: all)")
    gpu.add_argument("--peers", nargs="+", metavar="NAME", help=f"of {', '.join(peers(POSITION))} (default: all)")
    gpu.add_argument("--plot", metavar="FILE", help="draw TFLOP/s against N (needs matplotlib)")
    return parser.validated(arguments, _validate)


def _validate(options: argparse.Namespace) -> None:
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"unknown device {options.device!r}, expected cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    here, elsewhere = (CPU_ONLY, GPU_ONLY) if options.device == "cpu" else (GPU_ONLY, CPU_ONLY)
    for name in elsewhere:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} has no meaning on device {options.device}")
        delattr(options, name)
    for name, default in here.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.repeats is None:
        options.repeats = 5 if options.device == "cpu" else gpu_speed.REPEATS
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    options.backend = options.backend or ("native" if options.device == "cpu" else "triton")
    known = available_backends(POSITION)
    if options.backend not in known:
        raise ValueError(f"unknown backend {options.backend!r}, expected one of {', '.join(known)}")
    if known[options.backend]:
        raise ValueError(f"backend {options.backend!r} cannot run: {'; '.join(known[options.backend])}")
    record.check_writable(options.json)
    if options.device == "cpu":
        options.crop = parse_crop(options.crop)
        return
    options.sizes = options.sizes and sorted(map(parse_size, options.sizes))
    for what, chosen, known_names in (("dtype", options.dtypes, DTYPES), ("peer", options.peers, peers(POSITION))):
        for name in chosen or []:
            if name not in known_names:
                raise ValueError(f"unknown {what} {name!r}, expected one of {', '.join(known_names)}")
    record.check_writable(options.plot)
    if options.plot is not None:
        plot.check(options.plot)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return race_on_cpu(options) if options.device == "cpu" else race_on_gpu(options)


def race_on_cpu(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    environment = record.environment("cpu")
    print(f"{record.machine(environment)}, backend {options.backend}\n")
    rows = cpu_speed.measure(options, lambda row: print(goals.line(row), flush=True))
    seconds = time.perf_counter() - start
    print(f"\n{goals.count(rows)}, in {seconds:.0f} s.")
    if options.json is not None:
        cells = [asdict(row) | {"unit": row.unit.strip(), "met": row.met} for row in rows]
        record.write_json(options.json, "attention_speed", environment, options, cells, seconds)
    return int(any(row.value is None for row in rows))


def race_on_gpu(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    environment = memory.run_isolated(record.environment, options.device)
    print(f"{record.machine(environment)}, backend {options.backend}\n\n{gpu_report.legend()}\n")
    figures = gpu_report.Figures([], {})
    for group in gpu_speed.plan(options.backend, options.sizes, options.dtypes, options.peers, options.repeats):
        run_and_show(group, figures, f"danet:{options.backend}")
    seconds = time.perf_counter() - start
    if options.json is not None:
        found = environment | {"ceilings": figures.ceilings}
        record.write_json(options.json, "attention_speed_gpu", found, options, figures.cells(), seconds)
    if options.plot is not None:
        plot.draw_rates(options.plot, figures, environment)
    print(f"All of this took {seconds:.0f} s.")
    return int(
        any(cell["status"] == "wrong" and cell["implementation"].startswith("danet:") for cell in figures.cells())
    )


def run_and_show(group: Group, figures: gpu_report.Figures, ours: str) -> None:
    gpu_speed.run_group(group, figures.add, lambda seconds: figures.ceilings.__setitem__(str(group), seconds))
    print(gpu_report.tables(figures, (group.op, group.size, group.dtype), ours) + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
