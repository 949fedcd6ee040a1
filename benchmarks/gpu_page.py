"""A GPU record as a page to read: goals beside figures first, then the machine, the steps and every table."""

from __future__ import annotations

from typing import Any

from benchmarks import goals, gpu_goals, gpu_report
from benchmarks.goals import Row
from benchmarks.gpu_file import RecordFile

QUICK_SECONDS = 480
MOST_KERNELS_OF_THE_RACE = 44
MOST_KERNELS = 80  # with those of the self-check, in all of a quick record
_FACTS = (
    *("date", "gpu", "family", "nvidia_smi", "nvidia_smi_under_load", "driver", "clocks"),
    *("torch", "triton", "cuda", "python", "commit", "modified", "backend"),
)


def page(record: RecordFile) -> str:
    content, figures = record.content, record.figures
    environment = content["environment"]
    mode = content["identity"]["mode"]
    ours = f"danet:{environment['backend']}"
    rows = goal_rows(record)
    state = "complete" if content["complete"] else "not complete: figures are missing that a further call would add"
    parts = [
        f"# GPU record, {environment['gpu']}",
        f"{mode}; {state}. {goals.count(rows)}. {_remark(record)}",
        gpu_report.markdown(["goal", "measured", "goal", "", ""], [row.texts() for row in rows], words=(0, 3, 4)),
        "## Machine",
        gpu_report.markdown(["what", "value"], _facts(environment), words=(0, 1)),
        "## Steps",
        gpu_report.markdown(["step", "result", "seconds"], _steps(content), words=(0, 1)),
        _details(content),
        "## Race",
        gpu_report.legend(),
        *(gpu_report.tables(figures, group, ours) for group in figures.groups()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(record: RecordFile) -> str:
    """The goals on a terminal."""
    return "\n".join([_remark(record), *(goals.line(row) for row in goal_rows(record))])


def _remark(record: RecordFile) -> str:
    dry = "dry" in record.content["identity"]["mode"]
    return "DRY RUN, nothing here is a measurement" if dry else "The goals are stated for an H200."


def goal_rows(record: RecordFile) -> list[Row]:
    content = record.content
    rows = gpu_goals.rows(record.figures, content["environment"]["backend"], content["errors"])
    if content["identity"]["mode"].startswith("quick"):
        rows.append(_kernels(content, "compile", "kernels compiled for the race", MOST_KERNELS_OF_THE_RACE))
        rows.append(_kernels(content, "output errors", "kernels compiled in all", MOST_KERNELS))
    if content["identity"]["mode"] == "quick" and content["complete"]:
        calls = ", ".join(f"{seconds:.0f} s" for seconds in content["seconds"])
        total = sum(content["seconds"])
        rows.append(Row("the whole record", total, " s", QUICK_SECONDS, at_least=False, note=f"calls: {calls}"))
    return rows


def _kernels(content: dict[str, Any], step: str, name: str, most: int) -> Row:
    """How many versions of kernels there were when a step had ended."""
    kernels = content["steps"].get(step, {}).get("kernels")
    note = ", ".join(f"{kernel} {count}" for kernel, count in (kernels or {}).items())
    count = float(sum(kernels.values())) if kernels is not None else None
    return Row(name, count, "", most, at_least=False, note=note)


def _facts(environment: dict[str, Any]) -> list[list[str]]:
    hashes = [[f"sources of {op}", str(digest)] for op, digest in environment["source_hash"].items()]
    return [[name, str(environment[name])] for name in _FACTS if environment.get(name) is not None] + hashes


def _steps(content: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name in content["plan"]:
        step = content["steps"].get(name)
        counts = [f"{len(step[kind])} {kind}" for kind in ("passed", "skipped", "failures") if step and kind in step]
        result = "not run" if step is None else ": ".join([step["status"], *([", ".join(counts)] if counts else [])])
        lines.append([name, result, "" if step is None else f"{step['seconds']:.0f}"])
    return lines


def _details(content: dict[str, Any]) -> str:
    """The words of the steps that failed, and of the proof."""
    parts = []
    for name, step in content["steps"].items():
        lines = [*step.get("failures", []), *step["detail"].splitlines()]
        if lines and (step["status"] == "failed" or name == "proof"):
            parts.append(f"{name}:\n\n```text\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)
