"""The two attention blocks of DANet as a network runs them, and the implementations that are compared inside them.

PAM: 1 x 1 convolutions with bias make query, key (64 channels) and value (512); attention, gamma, residual. CAM: no
convolution. Everything around the attention is the same for every implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import danet_kernels
from benchmarks.shapes import CHANNELS, QUERY_CHANNELS, Crop
from danet_kernels import reference
from danet_kernels.backends import BACKENDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("position_attention", "channel_attention")
PEERS = ("eager", "sdpa", "sdpa-padded")  # what runs without this package, slowest memory first
BLOCK_NAMES = {"position_attention": "PAM", "channel_attention": "CAM"}

Attention = Callable[..., Tensor]


def eager_position(query: Tensor, key: Tensor, value: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
    """The authors' formulation: bmm, softmax, bmm.

    `reference.position_attention` also multiplies the map by `scale`, a pass over it that the authors do not make and
    that the baseline must not pay for.
    """
    logits = torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2))  # [B, M, N]
    probabilities = torch.softmax(logits, dim=-1)  # [B, M, N]
    attn = torch.bmm(value.flatten(2), probabilities.transpose(1, 2))  # [B, C, M]
    return gamma * attn.view_as(residual) + residual


def sdpa_position(
    query: Tensor, key: Tensor, value: Tensor, residual: Tensor, gamma: Tensor, *, padded: bool
) -> Tensor:
    """`scaled_dot_product_attention` with one head and no 1 / sqrt(D).

    As called, value is wider than query, which torch's CPU flash kernel refuses: the math path runs, map included.
    `padded` widens query and key to C with zeros, which changes no logit and lets the flash kernel run; that one also
    wants the channels innermost.
    """
    rows = [tensor.flatten(2).transpose(1, 2).unsqueeze(1) for tensor in (query, key, value)]  # [B, 1, N, D or C]
    if padded:
        channels = value.shape[1]
        rows = [F.pad(row.contiguous(), (0, channels - row.shape[-1])) for row in rows]  # [B, 1, N, C]
    attn = F.scaled_dot_product_attention(*rows, scale=1.0)  # [B, 1, M, C]
    return gamma * attn.squeeze(1).transpose(1, 2).reshape(residual.shape) + residual


def sdpa_channel(x: Tensor, gamma: Tensor) -> Tensor:
    """Channel attention as attention over C tokens of N features: softmax(-G) is that of the negated query."""
    rows = x.flatten(2).unsqueeze(1)  # [B, 1, C, N]
    attn = F.scaled_dot_product_attention(-rows, rows, rows, scale=1.0)  # [B, 1, C, N]
    return gamma * attn.view_as(x) + x


def attention(op: str, name: str) -> Attention | None:
    """The function behind a name: a peer (None where it has no such op), or a backend of ours as `danet:NAME`."""
    if name.startswith("danet:"):
        return partial(getattr(danet_kernels, op), backend=name.removeprefix("danet:"))
    position: dict[str, Attention] = {
        "eager": eager_position,
        "sdpa": partial(sdpa_position, padded=False),
        "sdpa-padded": partial(sdpa_position, padded=True),
    }
    channel: dict[str, Attention] = {"eager": reference.channel_attention, "sdpa": sdpa_channel}
    return (position if op == "position_attention" else channel).get(name)


def on_tensor_cores(name: str) -> bool:
    """Whether it is a backend of ours that rounds the operands of its products, as the error rule then allows."""
    return name.startswith("danet:") and getattr(BACKENDS.get(name.split(":")[1]), "TENSOR_CORES", False)


def label(name: str) -> str:
    if name.startswith("danet:"):
        return "danet_kernels " + name.removeprefix("danet:")
    return {"eager": "eager", "sdpa": "SDPA", "sdpa-padded": "SDPA, q k padded"}[name]


@dataclass(frozen=True)
class Case:
    """One cell of the table; small and picklable, since it travels to the process that measures it."""

    op: str
    name: str
    crop: Crop
    dtype: str = "fp32"
    batch: int = 1
    train: bool = False
    device: str = "cpu"


@dataclass
class Block:
    """One attention block with its inputs in memory: `run(attention)` is the measured call."""

    op: str
    train: bool
    features: Tensor  # [B, C, H, W]
    dout: Tensor | None  # [B, C, H, W] when training
    gamma: Tensor  # [1]
    projections: nn.ModuleDict | None  # query, key, value; PAM only

    def operands(self) -> tuple[Tensor, ...]:
        """What the attention function takes, before it."""
        if self.projections is None:
            return self.features, self.gamma
        query, key, value = (self.projections[name](self.features) for name in ("query", "key", "value"))
        return query, key, value, self.features, self.gamma

    def run(self, attention: Attention) -> tuple[Tensor, ...]:
        """(out,), or (out, gradients of the features and of every parameter) when training."""
        if not self.train:
            with torch.no_grad():
                return (attention(*self.operands()),)
        parameters = [] if self.projections is None else list(self.projections.parameters())
        out = attention(*self.operands())
        return out, *torch.autograd.grad(out, [self.features, self.gamma, *parameters], self.dout)


def make_block(case: Case) -> Block:
    """The block of a case with fixed pseudo-random features: like DANet's they come out of a ReLU."""
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, CHANNELS, *case.crop.spatial)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    features = normal().relu_()
    if case.op == "channel_attention":
        # Logits with a deviation of about 3. Unscaled, 10 to 20 % of the map would be subnormal numbers, which make the
        # eager product up to 15 times slower on a CPU: a true but separate story (docs/benchmarks.md).
        features *= (6 / case.crop.positions**0.5) ** 0.5
    features = features.to(dtype).requires_grad_(case.train)
    dout = normal().to(dtype) if case.train else None
    gamma = torch.full((1,), 0.5, device=device, dtype=dtype, requires_grad=case.train)
    projections = None
    if case.op == "position_attention":
        widths = {"query": QUERY_CHANNELS, "key": QUERY_CHANNELS, "value": CHANNELS}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            projections = nn.ModuleDict({name: nn.Conv2d(CHANNELS, width, 1) for name, width in widths.items()})
        projections["query"].weight.data *= 2  # logits with a deviation of about 3: rows neither flat nor one-hot
        projections["value"].weight.data *= 8  # attention outweighs the residual, whose rounding would hide its errors
        projections.to(device=device, dtype=dtype).requires_grad_(case.train)
    return Block(case.op, case.train, features, dout, gamma, projections)


def run_block(name: str, block: Block) -> tuple[Tensor, ...]:
    function = attention(block.op, name)
    if function is None:
        raise ValueError(f"{name} has no {block.op}")
    return block.run(function)


def warm_up(case: Case) -> None:
    """The same case on a 128 x 128 crop: starts the threads and fills the one-off caches."""
    small = Case(case.op, case.name, Crop(128, 128), case.dtype, case.batch, case.train, case.device)
    run_block(small.name, make_block(small))
