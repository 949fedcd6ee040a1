"""C++ kernels, loaded from the extension library built from csrc/.

Python owns the schemas; the library only registers implementations for them (csrc/ops_cpu.cpp), so the operators exist
without it and this module can say what is missing.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_DIRECTORY = Path(__file__).resolve().parent.parent
_CPU_LIBRARY = _DIRECTORY / "_danet_cpu.so"
_BUILD_INFO = _DIRECTORY / "_build_info.json"

_library = torch.library.Library("danet_kernels", "FRAGMENT")
_library.define(
    "position_attention_forward_native(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool needs_attn) -> (Tensor out, Tensor attn, Tensor lse)"
)
_library.define(
    "position_attention_backward_native(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor attn, Tensor lse, "
    "Tensor? gamma, float scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgamma)"
)
_library.define(
    "channel_attention_forward_native(Tensor x, Tensor? gamma, bool official, bool residual) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)"
)
_library.define(
    "channel_attention_backward_native(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, "
    "bool official, bool residual, bool needs_x, bool needs_gamma) -> (Tensor dx, Tensor dgamma)"
)


def build_info() -> dict[str, object]:
    """What the build wrote about itself; empty if the package was never built."""
    return json.loads(_BUILD_INFO.read_text(encoding="utf-8")) if _BUILD_INFO.exists() else {}


def _load() -> str | None:
    """Load the CPU library. Returns the reason if there is none, or it does not load."""
    if not _CPU_LIBRARY.exists():
        reasons = build_info().get("reasons")
        built = reasons.get("native") if isinstance(reasons, dict) else None
        return f"the C++ extension is not built ({built or 'run pip install -e . in the source tree'})"
    try:
        torch.ops.load_library(str(_CPU_LIBRARY))
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return None


_not_loaded = _load()


def plans() -> ModuleType:
    """The tile and workspace plans of csrc/plan.h. Call only where `why_not` has no reasons."""
    return import_module("danet_kernels._C")


def why_not(op: str, *inputs: Tensor) -> list[str]:
    """Reasons why the C++ kernels cannot run `op` on these inputs."""
    reasons = [] if _not_loaded is None else [_not_loaded]
    if inputs and inputs[0].device.type != "cpu":
        reasons.append(f"there are C++ kernels for the CPU, not for {inputs[0].device.type}")
    return reasons


def position_attention_forward(
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    residual: Tensor | None,  # [B, C, M]
    gamma: Tensor | None,
    scale: float,
    needs_attn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, M], attn [B, C, M] or [0], lse [B, M]."""
    return torch.ops.danet_kernels.position_attention_forward_native(
        query, key, value, residual, gamma, scale, needs_attn
    )


def position_attention_backward(
    dout: Tensor,  # [B, C, M]
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    attn: Tensor,  # [B, C, M]
    lse: Tensor,  # [B, M]
    gamma: Tensor | None,
    scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery [B, D, M], dkey [B, D, N], dvalue [B, C, N], dgamma like gamma; [0] for what is not needed."""
    return torch.ops.danet_kernels.position_attention_backward_native(
        dout, query, key, value, attn, lse, gamma, scale, *needs
    )


def channel_attention_forward(
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, N], row_max [B, C] and row_sum [B, C] of the softmax over the signed Gram matrix."""
    return torch.ops.danet_kernels.channel_attention_forward_native(x, gamma, variant == "official", residual)


def channel_attention_backward(
    dout: Tensor,  # [B, C, N]
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    row_max: Tensor,  # [B, C]
    row_sum: Tensor,  # [B, C]
    variant: str,
    residual: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """dx [B, C, N], dgamma like gamma; [0] for what is not needed."""
    return torch.ops.danet_kernels.channel_attention_backward_native(
        dout, x, gamma, row_max, row_sum, variant == "official", residual, *needs
    )
