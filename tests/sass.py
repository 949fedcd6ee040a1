"""Reads NVIDIA machine code as cuobjdump prints it: instructions, loops, and the spills inside of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TENSOR_CORES = {"wgmma": r"HGMMA", "tcgen05": r"UTC\w*MMA", "mma.sync": r"HMMA"}
"""Names of PTX, and the instructions that they become."""


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without its predicate, as "BRA 0x200"
    conditional: bool

    def targets(self) -> list[int]:
        """Where it may jump."""
        jumps = re.match(r"(BRA|BSSY|BRX|JMP)\b", self.text)
        return [int(target, 16) for target in re.findall(r"\b0x[0-9a-f]+\b", self.text)] if jumps else []

    def ends(self) -> bool:
        """Whether what follows is reached by jumps alone."""
        return not self.conditional and bool(re.match(r"(BRA|JMP) 0x|(EXIT|RET|BRX)\b", self.text))


def parse(sass: str) -> list[Instruction]:
    """The instructions of what cuobjdump -sass prints."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;]+?)\s*;", sass, re.MULTILINE)
    return [
        Instruction(int(address, 16), text, bool(predicate) or ".U " in text or ".DIV" in text)
        for address, predicate, text in lines
    ]


def loops(code: Sequence[Instruction]) -> list[set[int]]:
    """The natural loops, as sets of indices: of each backward edge to a dominator all that can reach it from there.

    Addresses alone would not do: the compiler puts the waiting of a loop behind the end of the kernel.
    """
    blocks, successors = _blocks(code)
    dominators = _dominators(successors)
    predecessors = {block: [other for other in dominators if block in successors[other]] for block in dominators}
    bodies: dict[int, set[int]] = {}  # by the block that the loop begins with
    for block in dominators:
        for head in dominators[block].intersection(successors[block]):
            body, waiting = bodies.setdefault(head, {head}), [block]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += predecessors[inside]
    return [{i for block in body for i in blocks[block]} for body in bodies.values()]


def _blocks(code: Sequence[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Runs of instructions without a jump, and for each the runs that may follow it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following = []
    for i, instruction in enumerate(code):
        jumps = [index[target] for target in instruction.targets()]
        following.append(jumps if instruction.ends() or i + 1 == len(code) else [*jumps, i + 1])
    heads = {0}
    for i, after in enumerate(following):
        if after != [i + 1]:
            heads.update(after, range(i + 1, min(i + 2, len(code))))
    starts = sorted(heads)
    number = {head: block for block, head in enumerate(starts)}
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    return blocks, [[number[i] for i in following[block[-1]]] for block in blocks]


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """By block that can be reached from block 0: the blocks through which every way to it leads, itself among them."""
    order, seen = [0], {0}
    for block in order:
        for target in successors[block]:
            if target not in seen:
                seen.add(target)
                order.append(target)
    predecessors = {block: [other for other in order if block in successors[other]] for block in order}
    dominators = {block: set(order) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(dominators[other] for other in predecessors[block])) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def tensor_cores(code: Sequence[Instruction]) -> str:
    """Which instructions multiply tiles, by their names in PTX, joined by "+"; or "none"."""
    used = [name for name, pattern in TENSOR_CORES.items() if any(re.match(pattern, i.text) for i in code)]
    return "+".join(used) or "none"


def spills(code: Sequence[Instruction]) -> tuple[int, int]:
    """How many, and how many inside inner loops."""
    local = {i for i, instruction in enumerate(code) if re.match(r"(LDL|STL)\b", instruction.text)}
    any_of = "|".join(TENSOR_CORES.values())
    products = {i for i, instruction in enumerate(code) if re.match(any_of, instruction.text)}
    with_products = [body for body in loops(code) if body & products]
    inner = [body for body in with_products if not any(other < body for other in with_products)]
    return len(local), len(local & set().union(*inner))
