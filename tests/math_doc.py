"""Reads the blocks, formulas and tables of docs/math.md, and holds the definitions they are checked with.

A definition here is the shortest eager form, differentiated by autograd.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "math.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())
VARIANTS = ("official", "paper")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run_blocks(name: str) -> dict[str, object]:
    namespace: dict[str, object] = {}
    for block in fenced((DOCS / name).read_text(encoding="utf-8"), "python"):
        exec(compile(block, f"docs/{name}", "exec"), namespace)
    return namespace


def table(first_header: str, text: str = TEXT) -> list[dict[str, str]]:
    """Rows of the table whose first column has this header, as {column: cell}."""
    start = re.search(rf"^\| {re.escape(first_header)} \|", text, flags=re.MULTILINE).start()
    lines = text[start:].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def evaluate(block: str, sizes: dict[str, int], known: dict[str, object]) -> dict[str, torch.Tensor]:
    """`known` with the left sides of index formulas: `a_ij` is an element of a, `sum_j(...)` a sum over j."""
    scope = {"exp": math.exp, "total": lambda index, term: sum(map(term, range(sizes[index])))} | known
    for line in block.splitlines():
        left, right = line.split(" = ")
        name, _, indices = left.partition("_")
        right = re.sub(r"\bsum_([a-z])\(", r'total("\1", lambda \1: ', right)
        right = re.sub(r"\b([A-Za-z]+)_([a-z]{1,2})\b", lambda m: f"{m[1]}[{','.join(m[2])}]", right)
        code = compile(right, "docs/math.md", "eval")
        values = torch.empty([sizes[index] for index in indices], dtype=torch.float64)
        for at in itertools.product(*(range(sizes[index]) for index in indices)):
            values[at] = eval(code, scope | dict(zip(indices, at, strict=True)))
        scope[name] = values
    return scope


DOC = run_blocks("math.md")
FORMULAS = fenced(TEXT, "formulas")


def define_position(q, k, v, residual, gamma, scale=1.0):
    P = torch.softmax(scale * (q.mT @ k), dim=-1)  # [B, M, N]
    return gamma * (v @ P.mT) + residual


def define_channel(x, gamma, variant, residual=True):
    G = x @ x.mT  # [B, C, C]
    G = G.amax(-1, keepdim=True) - G if variant == "official" else G
    P = torch.softmax(G, dim=-1)
    return gamma * (P @ x) + x if residual else gamma * (P @ x)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def position_inputs(B=2, D=3, C=4, M=5, N=7, dtype=torch.float64):
    """q, k, v, residual, dout"""
    shapes = (B, D, M), (B, D, N), (B, C, N), (B, C, M), (B, C, M)
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def channel_inputs(B=2, C=4, N=6, dtype=torch.float64):
    """x, dout"""
    return [random(B, C, N, dtype=dtype, seed=seed) for seed in (0, 1)]


def gradients(function, inputs, dout):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def number(value):
    return torch.tensor(value, dtype=torch.float64)
