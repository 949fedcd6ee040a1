"""Whether a GPU record proves the kernels of an op, for the table of proven kernels inside the package."""

from __future__ import annotations

import re
import shutil
from typing import Any

from benchmarks.gpu_steps import RESULTS, Run, outcome
from benchmarks.implementations import OPS
from danet_kernels import proven

_NAME = re.compile(r"(?<![a-z])(position|channel)_")  # of an op or of its file of tests, no word of a shape


def enter_proof(run: Run, left: float) -> dict[str, Any]:
    """Enter every op that nothing in this record speaks against."""
    content = run.record.content
    found = {op: reasons_against(op, content, run.record.figures.cells()) for op in OPS}
    environment = content["environment"]
    for op, reasons in found.items():
        if not reasons:
            entry = run.backend, op, environment["family"], environment["source_hash"][op], run.record.path.name
            proven.record(*entry, path=run.record.path.with_name("dry-run-proven.json") if run.dry else None)
    if not run.dry and run.record.path.parent != RESULTS:  # to be carried to another checkout with the record
        shutil.copy(proven.TABLE, run.record.path.parent)
    lines = [f"{op}: {'; '.join(reasons) or 'entered'}" for op, reasons in found.items()]
    return outcome(not any(found.values()), "\n".join(lines))


def reasons_against(op: str, content: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    """Why this record does not prove the kernels of `op`. What failed without naming an op speaks against all."""
    needed = [name for name in content["plan"] if name.startswith(("compile", "self-check", "selftest", "tests:"))]
    taken = {name: content["steps"][name] for name in needed if name in content["steps"]}
    reasons = [f"{name} has not run" for name in needed if name not in taken]
    for name, step in taken.items():
        if step["status"] == "failed":
            reasons += [f"{name}: {what}" for what in step.get("failures") or [name] if op in ops_named(what)]
    if not any(op in ops_named(test) for step in taken.values() for test in step.get("passed", [])):
        reasons.append("no test of it has passed")
    for cell in cells:
        ours = cell["op"].startswith(op) and cell["implementation"].startswith("danet:")
        if ours and cell["status"] in ("wrong", "failed"):
            where = f"B = {cell['batch']}, N = {cell['positions']}, {cell['dtype']}, {cell['mode']}"
            reasons.append(f"{cell['label']}, {where}: {cell['status']}")
    return reasons


def ops_named(text: str) -> list[str]:
    """The ops that a failure is about: those that it names, else all."""
    return [f"{name}_attention" for name in dict.fromkeys(_NAME.findall(text))] or list(OPS)
