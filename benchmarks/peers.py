"""What a GPU user would run instead of this package, each in its best configuration; and ours, as one more entry.

Position attention has one head with query and key of D = 64 and value of C = 512 channels, which is not what attention
kernels are made for. A row of the map times value can be taken C / h channels at a time: h heads with the same query
and key are exact. docs/benchmarks.md says which h each peer gets, and why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.implementations import DTYPES, Attention, eager_position
from danet_kernels import channel_attention, position_attention, reference

HALF = ("bf16", "fp16")
# The defaults are chosen for D and ask for more shared memory than there is at C = 512. These fit.
_FLEX_OPTIONS = {
    **{"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 8},
    **{"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32},
    **{"bwd_num_stages": 1, "bwd_num_warps": 8},
}


@dataclass(frozen=True)
class Peer:
    """One implementation. With `pack`, `attend` takes tensors in a layout of its own and `unpack` leads back."""

    label: str
    attend: Callable[..., Tensor]  # (query, key, value, residual, gamma) or (x, gamma); with pack: what pack returns
    pack: Callable[..., tuple[Tensor, ...]] | None = None  # of query, key [B, D, N] and value [B, C, N]
    holds_map: bool = False  # an N x N array in any form: no rival of a kernel whose memory is linear in N
    compiled: bool = False  # by Inductor: tens of seconds before the first call
    stock: bool = True  # part of torch
    dtypes: tuple[str, ...] = tuple(DTYPES)
    trains: bool = True
    infers: bool = True
    needs: str | None = None  # a module that may be missing
    context: Callable[[], AbstractContextManager] = nullcontext  # around everything it does

    def call(self, *operands: Tensor) -> Tensor:
        """From [B, C, H, W] to [B, C, H, W], gamma and residual included: the attention as a network needs it."""
        if self.pack is None:
            return self.attend(*operands)
        query, key, value, residual, gamma = operands
        out = self.attend(*self.pack(query.flatten(2), key.flatten(2), value.flatten(2)))  # [B, h, N, C / h]
        residual_heads = residual.flatten(2).unflatten(1, (out.shape[1], -1))  # [B, h, C / h, N]
        # Scaled, transposed back and added in one pass, laid out as the residual.
        return torch.addcmul(residual_heads, gamma, out.transpose(2, 3)).reshape(residual.shape)

    def why_not(self, dtype: str, train: bool) -> str | None:
        """Why it has no figure for this dtype and mode; None: it should run."""
        if dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)}, not {dtype}"
        if train and not self.trains:
            return "forward only in this configuration"
        if not train and not self.infers:
            return "differs in the backward pass alone"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


def ours(op: str, backend: str, *, deterministic: bool = False) -> Peer:
    function = {"position_attention": position_attention, "channel_attention": channel_attention}[op]
    plain = Peer(
        f"danet_kernels {backend}",
        partial(function, backend=backend),
        holds_map=backend == "eager" and op == "position_attention",
    )
    if not deterministic:
        return plain
    return replace(plain, label=f"{plain.label}, deterministic", dtypes=HALF, infers=False, context=_deterministic)


def peers(op: str) -> dict[str, Peer]:
    """By name, eager first."""
    if op == "channel_attention":
        return {
            "eager": Peer("eager", reference.channel_attention),
            "compile": Peer("torch.compile", _compiled(reference.channel_attention), compiled=True),
        }
    return {
        "eager": Peer("eager", eager_position, holds_map=True),
        "autocast": Peer("eager, autocast", autocast_position, holds_map=True, dtypes=HALF),
        "compile": Peer("torch.compile", _compiled(eager_position), holds_map=True, compiled=True),
        "compile-max": Peer(
            "torch.compile, max-autotune",
            _compiled(eager_position, mode="max-autotune-no-cudagraphs"),
            holds_map=True,
            compiled=True,
        ),
        "sdpa-efficient": Peer("SDPA efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), partial(split_heads, heads=1)),
        "sdpa-cudnn": Peer(
            "SDPA cuDNN, 4 heads", _sdpa(SDPBackend.CUDNN_ATTENTION), partial(split_heads, heads=4), dtypes=HALF
        ),
        "sdpa-flash": Peer(
            "SDPA flash, 4 heads padded",
            _sdpa(SDPBackend.FLASH_ATTENTION),
            partial(split_heads, heads=4, width=128),
            dtypes=HALF,
        ),
        "flex": Peer("FlexAttention", flex_attention, partial(split_heads, heads=1), compiled=True),
        "flash3": Peer(
            "flash-attn 3, 2 heads",
            flash3_attention,
            partial(split_heads, heads=2),
            stock=False,
            dtypes=HALF,
            trains=False,
            needs="flash_attn_interface",
        ),
    }


def find(op: str, name: str) -> Peer:
    """A peer by its name, or `danet:BACKEND`, or `danet:BACKEND:deterministic`."""
    if not name.startswith("danet:"):
        return peers(op)[name]
    _, backend, *how = name.split(":")
    return ours(op, backend, deterministic=how == ["deterministic"])


def split_heads(
    query: Tensor,  # [B, D, N]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    *,
    heads: int,  # h
    width: int | None = None,
) -> tuple[Tensor, ...]:  # [B, h, N, D], twice, and [B, h, N, C / h], channels innermost in all
    """Value cut into `heads` parts; query and key, with zeros up to `width` channels, repeated in memory for each."""
    rows = [tensor.transpose(1, 2).unsqueeze(1) for tensor in (query, key)]  # [B, 1, N, D]
    if width is not None:
        rows = [F.pad(row, (0, width - row.shape[-1])) for row in rows]  # [B, 1, N, width]
    repeated = [row.expand(-1, heads, -1, -1).contiguous() for row in rows]  # [B, h, N, D or width]
    parts = value.transpose(1, 2).contiguous().unflatten(2, (heads, -1)).transpose(1, 2)  # [B, h, N, C / h]
    return *repeated, parts


def autocast_position(query: Tensor, key: Tensor, value: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
    """Eager as networks are trained: products in 16 bits, softmax in fp32."""
    with torch.autocast(query.device.type, dtype=query.dtype):
        return eager_position(query, key, value, residual, gamma)


def flex_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, 1, N, C]
    return _compiled_flex()(query, key, value, scale=1.0, kernel_options=_FLEX_OPTIONS)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex, dynamic=False)


def flash3_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, h, N, C / h]
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(tensor.transpose(1, 2) for tensor in (query, key, value)), softmax_scale=1.0)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # some versions return lse as well


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, h, N, C / h]
        with sdpa_kernel(backend):  # no other kernel may step in unseen
            return F.scaled_dot_product_attention(query, key, value, scale=1.0)

    return attend


def _compiled(function: Attention, mode: str | None = None) -> Attention:
    """Compiled for the shapes of its first call; a new process per size keeps it at that."""

    @cache
    def compiled() -> Attention:
        return torch.compile(function, dynamic=False, mode=mode)

    return lambda *operands: compiled()(*operands)


@contextmanager
def _deterministic() -> Iterator[None]:
    """As a user asks for it, but without filling every new tensor with NaN, which is a debugging aid."""
    was, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = filled
