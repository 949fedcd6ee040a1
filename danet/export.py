"""A network as one graph: torch.export's, with the fused operators in it, or ONNX, where plain operators write the map.

Any network: of create_model, one that swap was given, or any other.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danet_kernels import decompositions

from .swap_forward import is_swapped

OPSET, ATTENTION_OPSET = 20, 23
"""The default; and the first with an operator Attention, which is used from there on."""

OLDEST_OPSET = 18
"""What torch.onnx writes before it converts to the opset asked for."""

WRONG = 10.0
"""How many times the error of the network itself makes a file a wrong one.

Two computations in fp32 differ in their roundings, which a deep network may amplify; mistakes are larger by far.
"""

_AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class OnnxReport:
    """What export_onnx has written. Print it."""

    path: Path
    opset: int
    outputs: tuple[str, ...]  # their names; the input's is "images"
    operators: dict[str, int]  # how often each is in the graph, the most frequent first
    error: float | None  # largest, of onnxruntime's outputs against the network in fp64; None: not checked
    eager_error: float | None  # the same of the network itself

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in (self.path, _data_file(self.path)) if path.exists())
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        checked = "not checked"
        if self.error is not None:
            checked = f"largest error in onnxruntime {self.error:.2g}, of the network itself {self.eager_error:.2g}"
        return f"{self.path}: opset {self.opset}, {size / 2**20:.1f} MiB; {checked}\n{operators}"


def export_program(
    model: nn.Module,
    *,
    size: Sequence[int] | None = None,
    batch: int = 2,
    channels: int = 3,
    dynamic: bool = True,
) -> torch.export.ExportedProgram:
    """The network as torch.export writes it, in evaluation mode, without gradients and with the fused operators in it.

    Args:
        model: takes images [B, channels, H, W] alone, of the dtype and on the device of its first parameter. It is left
            as it was, its mode included.
        size: (height, width) of the images that it is traced with; None, with `dynamic` only: 64 x 96.
        batch, channels: of these images.
        dynamic: whether the graph takes other batches, heights and widths than these.

    Raises:
        ValueError: no size, or sizes below 1 (with `dynamic`, 2); torch.export does not take the network.
    """
    height, width = _size(size, dynamic)
    images = _images(model, (batch, channels, height, width), dynamic)
    axes = dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC) if dynamic else None
    if is_swapped(model):  # its forward takes whatever it is given; of the outermost module torch.export wants names
        model = nn.Sequential(model)
    with _quiet(), _evaluating(model), torch.no_grad():
        try:
            return torch.export.export(model, (images,), dynamic_shapes=(axes,) if dynamic else None)
        except torch._dynamo.exc.UserError as error:
            hint = "; with dynamic=False it may, for one batch, height and width" if dynamic else ""
            raise ValueError(f"export: torch.export does not take this network{hint}: {error}") from error


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    size: Sequence[int] | None = None,
    batch: int = 2,
    channels: int = 3,
    opset: int = OPSET,
    dynamic: bool = True,
    check: bool = True,
) -> OnnxReport:
    """Write the network as an ONNX file that needs nothing of this package: MatMul and Softmax, or Attention.

    Logits and softmax are fp32, in fp16 networks too. The graph writes the map, B x N x N numbers: see docs/export.md.
    The file appears when it is whole and right; weights of more than 2 GiB in all lie in `path` + ".data" beside it.

    Args:
        model, size, batch, channels, dynamic: as export_program.
        path: of the file, which is replaced if it exists.
        opset: 18 or later, as far as torch.onnx knows them; from 23 on both attentions are the operator Attention.
        check: whether to run the file in onnxruntime, on the CPU, and compare its error with the network's own, both
            against the network in fp64: at this size, and with `dynamic` at another. An attention whose gamma is
            0, as before training, has no part in the outputs, and none in this.

    Returns:
        What was written; `print` shows it. The input is called "images", the output "logits" ("logits_0" and so on, if
        there are several), the axes "batch", "height" and "width".

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed; the message says how to.
        ValueError: as export_program; an opset that cannot be written.
        RuntimeError: the check has failed; no file is written then.
    """
    _require("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    if opset < OLDEST_OPSET:
        raise ValueError(f"export_onnx: opset must be {OLDEST_OPSET} or later, got {opset}")
    program = export_program(model, size=size, batch=batch, channels=channels, dynamic=dynamic)
    count = len(program.graph_signature.user_outputs)
    outputs = ("logits",) if count == 1 else tuple(f"logits_{index}" for index in range(count))
    with _quiet():
        # Not as far as core operators: torch.onnx goes on from here, and knows a better way to upsample.
        program = program.run_decompositions(decompositions(attention=opset >= ATTENTION_OPSET, core=False))
        onnx_program = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=list(outputs),
            opset_version=opset,
            dynamic_shapes=(_AXES,) if dynamic else None,
            verbose=False,
        )
    assert onnx_program is not None
    written = onnx_program.model.opset_imports[""]
    if written != opset:
        raise ValueError(f"export_onnx: this network cannot be written in opset {opset}, torch.onnx chose {written}")
    operators = Counter(node.op_type for node in onnx_program.model.graph)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a directory of its own until it is known to be right; there the name of its file of weights is the final one.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        partial = Path(folder) / path.name
        onnx_program.save(partial)
        errors: tuple[float, float] | tuple[None, None] = None, None
        if check:
            height, width = _size(size, dynamic)
            shapes = [(batch, channels, height, width)]
            if dynamic:  # another, divisible by what these are divisible by
                shapes.append((1, channels, width, 2 * height))
            errors = _check(model, partial, shapes)
        if _data_file(partial).exists():
            os.replace(_data_file(partial), _data_file(path))
        else:
            _data_file(path).unlink(missing_ok=True)
        os.replace(partial, path)
    return OnnxReport(path, opset, outputs, dict(operators.most_common()), *errors)


def _check(model: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Largest errors of the file and of the network, against the network in fp64. RuntimeError if it is wrong."""
    import onnxruntime  # type: ignore[import-untyped]

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as reason:  # onnxruntime's own classes, which derive from Exception alone
        raise RuntimeError(
            f"export_onnx: onnxruntime cannot run this file on the CPU ({reason}); check=False writes it unchecked"
        ) from reason
    errors, eager_errors, magnitudes, ulps = [], [], [], []
    with _evaluating(model), torch.no_grad():
        exact_model = copy.deepcopy(model).double()
        for shape in shapes:
            images = _random(model, shape)
            got = [torch.from_numpy(array) for array in session.run(None, {"images": images.cpu().numpy()})]
            eager, exact = _tensors(model(images)), _exact(exact_model, images)
            for one, own, expected in zip(got, eager, exact, strict=True):
                errors.append(_distance(one, expected))
                eager_errors.append(_distance(own, expected))
                magnitudes.append(float(expected.abs().max()))
                ulps.append(torch.finfo(own.dtype).eps * magnitudes[-1])
    error, eager_error, largest, ulp = (_largest(values) for values in (errors, eager_errors, magnitudes, ulps))
    allowed = WRONG * eager_error + ulp
    if not error <= allowed:  # NaN is not
        raise RuntimeError(
            f"export_onnx: the outputs in onnxruntime are wrong: largest error {error:.3g} against the network in "
            f"fp64, of numbers up to {largest:.3g}; expected at most {allowed:.3g}"
        )
    return error, eager_error


def _exact(model: nn.Module, images: Tensor) -> list[Tensor]:
    try:
        return _tensors(model(images.double()))
    except Exception as reason:  # the network's own, whatever it is
        raise RuntimeError(
            f"export_onnx: the network does not run in fp64, which the check compares with ({reason}); check=False "
            "writes the file unchecked"
        ) from reason


def _distance(tensor: Tensor, exact: Tensor) -> float:
    return float((tensor.cpu().double() - exact.cpu()).abs().max())


def _largest(values: Sequence[float]) -> float:
    """NaN if one is, which Python's max may lose."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of whatever a network returns, in the order of an exported program's outputs."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _size(size: Sequence[int] | None, dynamic: bool) -> Sequence[int]:
    if size is None and not dynamic:
        raise ValueError("export: dynamic=False fixes the size of the images, expected size=(height, width), got None")
    return (64, 96) if size is None else size


def _images(model: nn.Module, shape: tuple[int, ...], dynamic: bool) -> Tensor:
    for name, value, least in zip(("batch", "channels", "height", "width"), shape, (2, 1, 2, 2), strict=True):
        least = least if dynamic else 1  # torch.export takes a size of 1 for a constant
        if value < least:
            raise ValueError(f"export: {name} must be at least {least}, got {value}")
    return _random(model, shape)


def _random(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_parameter(model))


def _parameter(model: nn.Module) -> Tensor:
    """One that tells dtype and device."""
    return next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says on every call: that there is no torchvision, and that it uses a class of its own."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _data_file(path: Path) -> Path:
    """Where torch.onnx puts weights that do not fit into the file."""
    return path.with_name(f"{path.name}.data")


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f'export_onnx: {package} is not installed: pip install -e ".[onnx]"')
