"""How much memory a call will need beyond its inputs."""
from __future__ import annotations
from dataclasses import dataclass
@dataclass(frozen=True)
class MemoryEstimate:
    items: dict[str, int]
def memory_estimate(*a, **k): raise NotImplementedError
