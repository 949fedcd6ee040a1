"""One command for minutes on a GPU: checks, tests and measures everything, and writes a dated record of it.

    python benchmarks/gpu_record.py --quick                      under 8 minutes on an H200
    python benchmarks/gpu_record.py --full [--part tests ...]    everything, in parts that fit into one call
    python benchmarks/gpu_record.py --dry-run                    rehearses without a GPU

The record is JSON, complete after every cell, and a page of Markdown beside it. A call that is cut off or runs out of
time is repeated as it was: the steps that are done are not done again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu_checks, gpu_page, gpu_plan, memory
from benchmarks.gpu_file import RecordFile, open_record
from benchmarks.gpu_plan import PARTS, Step
from benchmarks.gpu_steps import RESULTS, ROOT, Cut, Run
from benchmarks.options import Parser

BUDGETS = {"quick": 430.0, "full": 540.0}  # seconds after which no step is begun, with 50 for the one that runs
GRACE = 50.0
UNFINISHED = 3  # exit status: the same command goes on


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="gpu_record.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="the sizes that matter (default)")
    add("--full", action="store_true", help="the whole suite, sanitizers, every size and dtype")
    add("--part", nargs="+", metavar="PART", help=f"of --full: {', '.join(PARTS)} (default: all)")
    add("--dry-run", action="store_true", help="on the CPU, with a clock that is a fake; writes nothing into the tree")
    add("--output", metavar="DIR", help="where the record is written and looked for (default: benchmarks/results)")
    add("--backend", help="backend of danet_kernels (default: triton; eager in a dry run)")
    add("--budget", type=float, metavar="SECONDS", help="begin no step later than this (default: 430, --full: 540)")
    return parser.validated(arguments, _validate)


def _validate(options: argparse.Namespace) -> None:
    if options.quick and options.full:
        raise ValueError("--quick and --full: one of them")
    if options.part and not options.full:
        raise ValueError("--part is for --full")
    for part in options.part or []:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}, expected one of {', '.join(PARTS)}")
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU; --dry-run rehearses without one")
    options.backend = options.backend or ("eager" if options.dry_run else "triton")
    if options.budget is None:
        options.budget = BUDGETS["full" if options.full else "quick"]
    if options.output is None:
        options.output = tempfile.mkdtemp(prefix="danet-dry-run-") if options.dry_run else RESULTS
    options.output = Path(options.output).resolve()
    if options.dry_run and options.output == RESULTS:
        raise ValueError("a dry run measures nothing and leaves benchmarks/results alone")
    options.output.mkdir(parents=True, exist_ok=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    if options.dry_run:
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors, on a machine that may be busy
    mode = ("full" if options.full else "quick") + (", dry run" if options.dry_run else "")
    # Before any process is started that inherits it. A cache for these sources alone tells how many kernels they make.
    cache = ROOT / "build" / "gpu_record" / "-".join((mode, *gpu_checks.source_hashes(options.backend).values()))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache))
    environment = memory.run_isolated(gpu_checks.facts, options.backend, "cpu" if options.dry_run else "cuda")
    steps = gpu_plan.steps(options.backend, full=options.full, dry=options.dry_run)
    record = open_record(options.output, mode, environment, [step.name for step in steps])
    if not record.content["steps"]:
        shutil.rmtree(cache, ignore_errors=True)
    run = Run(record, options.backend, options.dry_run)
    print(f"{mode}: {environment['gpu']}, backend {options.backend}, {record.path}", flush=True)
    chosen = [step for step in steps if not options.part or step.part in (*options.part, "")]
    go_on(run, chosen, options.budget, start)
    record.content["complete"] = not left_over(record)
    record.content["seconds"].append(round(time.perf_counter() - start, 1))
    record.save()
    page = record.path.with_suffix(".md")
    page.write_text(gpu_page.page(record))
    return close(record, chosen, page)


def go_on(run: Run, steps: list[Step], budget: float, start: float) -> None:
    """Run the steps that are not done; stop where the time ends."""
    done = run.record.content["steps"]
    for step in steps:
        last = step.name == "proof"  # takes no time; asked again in each call, once all the rest is there
        if left_over(run.record) if last else step.name in done:
            continue
        elapsed = time.perf_counter() - start
        if not last and (elapsed + step.least > budget + GRACE or elapsed > budget):
            print(f"{elapsed:5.0f} s  no time is left for: {step.name}")
            return
        print(f"{elapsed:5.0f} s  {step.name}", end="", flush=True)
        try:
            result = step.run(run, budget + GRACE - elapsed)
        except Cut:
            print(": cut off, to be run again")
            return
        done[step.name] = result | {"seconds": round(time.perf_counter() - start - elapsed, 1)}
        run.record.save()
        print(f": {result['status']}", flush=True)


def left_over(record: RecordFile) -> list[str]:
    """The steps that are to be run, the proof aside, which follows from the others."""
    return [name for name in record.content["plan"] if name not in (*record.content["steps"], "proof")]


def close(record: RecordFile, steps: list[Step], page: Path) -> int:
    """Last words, and the exit status: 0 if nothing failed, 1 if something did, 3 if there is more to run."""
    done = record.content["steps"]
    left = [step.name for step in steps if step.name in left_over(record)]
    failed = [name for name, step in done.items() if step["status"] == "failed"]
    print(f"\n{gpu_page.summary(record)}\n{page}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if left:
        print(f"{len(left)} steps are left: run the same command again.")
        return UNFINISHED
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
