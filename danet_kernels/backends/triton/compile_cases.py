"""What each entry of the tables in configs.py is compiled to: signatures, for ahead-of-time checks without a GPU.

Nothing here imports torch. A case names everything that a launch would find out from its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import channel_attention_apply, channel_attention_gram, configs, position_attention_bwd, position_attention_fwd
from .configs import Config

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
_PRECISION = {"fp32": "tf32x3", "bf16": "ieee", "fp16": "ieee"}


@dataclass(frozen=True)
class CompileCase:
    """One compilation of one kernel."""

    name: str
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # type by argument: "*bf16", "i32", "fp32", "tensordesc<bf16[1, 64, 128]>"
    constexprs: dict[str, Any]  # value by argument, for those that are constants (an absent pointer is None)
    num_warps: int
    num_stages: int

    @property
    def divisible_by_16(self) -> list[str]:
        """The arguments that a launch on a tensor of 96 x 96 positions finds to be multiples of 16."""
        return [
            name
            for name, kind in self.signature.items()
            if name not in self.constexprs and name not in ("B", "splits", "whole_tiles") and kind[0] in "*i"
        ]


def compile_cases(architecture: int) -> Iterator[CompileCase]:
    """Every entry of the tables for one architecture, as a training step with gamma and residual launches it."""
    yield from position_cases(architecture)
    yield from channel_cases(architecture)


def position_cases(architecture: int) -> Iterator[CompileCase]:
    """Position attention: every entry in bf16 and fp32, and for the first of them what else changes the code."""
    for dtype, widths in (("bf16", (64, 128, 256)), ("fp32", (64, 128))):
        for D in widths:
            for kernel, make in (("forward", _forward), ("dvalue", _dvalue), ("dlogits", _dlogits)):
                for config in configs.position_configs(kernel, architecture, ITEMSIZE[dtype], D):
                    yield make(config, architecture, dtype, D)
    forward, dvalue, dlogits = (
        configs.position_configs(kernel, architecture, 2, 64)[0] for kernel in ("forward", "dvalue", "dlogits")
    )
    yield _forward(forward, architecture, "bf16", 64, channels_last=True)
    yield _forward(forward, architecture, "bf16", 64, MASKED=True, attn=None)
    yield _dvalue(dvalue, architecture, "bf16", 64, channels_last=True)
    yield _dlogits(dlogits, architecture, "fp16", 64, channels_last=True)
    for own_keys in (True, False):
        yield _dlogits(dlogits, architecture, "bf16", 64, alone=True, OWN_KEYS=own_keys)


def _forward(
    config: Config, architecture: int, dtype: str, D: int, channels_last: bool = False, **constexprs: Any
) -> CompileCase:
    tiles = {"query": (D, config.rows), "key": (D, config.columns), "value": (config.channels, config.columns)}
    pointers = {"residual": dtype, "out": dtype} | dict.fromkeys(
        ("gamma", "attn", "lse", "partial_acc", "partial_max", "partial_sum"), "fp32"
    )
    inner = "c" if channels_last else "n"
    constants = {
        "MASKED": False,
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        f"residual_stride_{inner}": 1,
        f"out_stride_{inner}": 1,
    }
    return _case(
        position_attention_fwd.position_attention_forward_kernel,
        *(architecture, dtype, D, config, channels_last, tiles, pointers, constants | constexprs),
    )


def _dvalue(config: Config, architecture: int, dtype: str, D: int, channels_last: bool = False) -> CompileCase:
    tiles = {"query": (D, config.columns), "key": (D, config.rows), "dout": (config.channels, config.columns)}
    pointers = {"dvalue": dtype} | dict.fromkeys(("gamma", "lse", "partial_acc"), "fp32")
    constants = {
        "BLOCK_M": config.columns,
        "BLOCK_N": config.rows,
        f"dvalue_stride_{'c' if channels_last else 'n'}": 1,
    }
    return _case(
        position_attention_bwd.position_attention_dvalue_kernel,
        *(architecture, dtype, D, config, channels_last, tiles, pointers, constants),
    )


def _dlogits(
    config: Config,
    architecture: int,
    dtype: str,
    D: int,
    channels_last: bool = False,
    alone: bool = False,
    OWN_KEYS: bool = True,
) -> CompileCase:
    tiles = {
        "own": (D, config.rows),
        "other": (D, config.columns),
        "own_values": (config.channels, config.rows),
        "other_values": (config.channels, config.columns),
    }
    pointers = dict.fromkeys(("gamma", "lse", "delta", "magnify", "down", "dother"), "fp32")
    constants: dict[str, Any] = {"OWN_KEYS": OWN_KEYS, "BLOCK_L": config.rows, "BLOCK_K": config.columns}
    if dtype != "fp16":
        constants["magnify"] = None
    if alone or not config.shares_product:
        constants["dother"] = None
    return _case(
        position_attention_bwd.position_attention_dlogits_kernel,
        *(architecture, dtype, D, config, channels_last, tiles, pointers, constants),
    )


def _case(
    kernel: Any,
    architecture: int,
    dtype: str,
    D: int,
    config: Config,
    channels_last: bool,
    tiles: dict[str, tuple[int, int]],  # [channels, positions] by argument
    pointers: dict[str, str],
    constants: dict[str, Any],
) -> CompileCase:
    """The arguments that all kernels of position attention have in common."""
    descriptors = configs.uses_descriptors(architecture, ITEMSIZE[dtype], D)
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"}
    signature |= {name: f"*{kind}" for name, kind in pointers.items()}
    for name, (channels, positions) in tiles.items():
        block = (positions, channels) if channels_last else (channels, positions)
        signature[name] = f"tensordesc<{dtype}[1, {block[0]}, {block[1]}]>" if descriptors else f"*{dtype}"
    if descriptors and "dother" in pointers:
        signature["dother"] = f"tensordesc<fp32[1, {D}, {config.columns}]>"
    constants = constants | {
        "BLOCK_C": config.channels,
        "BLOCK_D": configs.block_d(D),
        "DESCRIPTOR": descriptors,
        "CHANNELS_LAST": channels_last,
        "SCORE_PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        "VALUE_PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }
    extras = [name.lower() for name, value in constants.items() if name in ("MASKED", "dother", "OWN_KEYS") and value]
    extras += [f"no {name}" for name in ("attn", "dother") if name in constants]
    extras += ["channels_last"] * channels_last
    name = " ".join(
        [
            kernel.__name__.removesuffix("_kernel"),
            f"{dtype} D{D}",
            f"{config.rows}x{config.columns}x{config.channels} w{config.num_warps} s{config.num_stages}",
            *extras,
        ]
    )
    return CompileCase(name, kernel, signature, constants, config.num_warps, config.num_stages)


def channel_cases(architecture: int) -> Iterator[CompileCase]:
    """Channel attention: every entry in both layouts, and the small kernels with their fewest and most rows."""
    for channels_last in (False, True):
        for dtype in ("bf16", "fp32"):
            for kernel in ("gram", "forward", "backward"):
                yield _channel_product(kernel, architecture, dtype, channels_last)
    yield _channel_product("backward", architecture, "fp16")
    for rows in (configs.CHANNEL_ROWS[0], configs.CHANNEL_ROWS[-1]):
        for kernel in ("softmax", "dgram"):
            yield _channel_rows(kernel, rows)


def _channel_product(kind: str, architecture: int, dtype: str, channels_last: bool = False) -> CompileCase:
    """The Gram kernel as the backward launches it, or one of those that use its result."""
    config = configs.channel_config(kind, architecture, ITEMSIZE[dtype])
    descriptors = configs.uses_descriptors(architecture)
    module = channel_attention_gram if kind == "gram" else channel_attention_apply
    kernel = getattr(module, f"channel_attention_{kind}_kernel")
    result, inner = "out" if kind == "forward" else "dx", "c" if channels_last else "n"
    constants = {"DESCRIPTOR": descriptors, "CHANNELS_LAST": channels_last, "PRECISION": _PRECISION[dtype]}
    if kind == "gram":
        constants |= {"BLOCK_N": config.step, "GRAM_PRECISION": _PRECISION[dtype]}
        tile = (config.step, config.rows) if channels_last else (config.rows, config.step)
    else:
        constants |= {"BLOCK_C": config.rows, "BLOCK_D": config.step, "BLOCK_N": config.columns}
        constants |= {f"residual_stride_{inner}": 1, f"{result}_stride_{inner}": 1}
        tile = (config.columns, config.step) if channels_last else (config.step, config.columns)
    if kind == "backward" and dtype != "fp16":
        constants["magnify"] = None
    matrix = (config.rows, config.step)
    signature = dict.fromkeys(kernel.arg_names, "i32")
    for name in kernel.arg_names:
        if name in ("x", "dout", "logits", "dgram"):
            element, block = "fp32" if name == "logits" else dtype, tile if name in ("x", "dout") else matrix
            signature[name] = f"tensordesc<{element}[1, {block[0]}, {block[1]}]>" if descriptors else f"*{element}"
        elif name in ("residual", "out", "dx"):
            signature[name] = f"*{dtype}"
        elif name in ("partial", "row_max", "row_sum", "delta", "magnify", "gamma"):
            signature[name] = "*fp32"
    tiles = f"{config.rows}x{config.columns}x{config.step} w{config.num_warps} s{config.num_stages}"
    name = f"channel_attention_{kind} {dtype} {tiles}{' channels_last' * channels_last}"
    return CompileCase(name, kernel, signature, constants, config.num_warps, config.num_stages)


def _channel_rows(kind: str, rows: int) -> CompileCase:
    """One of the small kernels between the products; dgram as for fp16, which has most to do."""
    kernel = getattr(channel_attention_gram, f"channel_attention_{kind}_kernel")
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {"C": "i32"}
    constants = {"OFFICIAL": True, "ROWS": rows}
    if kind == "dgram":
        signature["dgram"] = "*fp16"
    else:
        signature["splits"] = "i32"
        constants["PARTS"] = configs.CHANNEL_ROWS_TIMES_PARTS // rows
    warps = configs.CHANNEL_ROW_WARPS
    return CompileCase(f"channel_attention_{kind} {rows} rows w{warps}", kernel, signature, constants, warps, 3)
