"""Modules as ONNX files by the route that docs/export.md shows, and what onnxruntime makes of them."""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from danet_kernels import decompositions


class File:
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, path: Path):
        import onnx
        import onnxruntime

        model = onnx.load(path)
        self.model = onnx.shape_inference.infer_shapes(model)
        self.opsets = {one.domain: one.version for one in model.opset_import}
        self.domains = {node.domain for node in model.graph.node}
        self.operators = Counter(node.op_type for node in model.graph.node)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def operand_types(self, *operators: str) -> set[str]:
        """Names, such as FLOAT16, of the types of all inputs of these operators."""
        from onnx import TensorProto

        graph = self.model.graph
        types = {one.name: one.type.tensor_type.elem_type for one in (*graph.value_info, *graph.input)}
        types |= {one.name: one.data_type for one in graph.initializer}
        inputs = {name for node in graph.node if node.op_type in operators for name in node.input}
        return {TensorProto.DataType.Name(types[name]) for name in inputs}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [one.name for one in self.session.get_inputs()]
        arrays = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self.session.run(None, arrays)]


def exported(module: nn.Module, inputs: tuple[Tensor, ...], **options) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, inputs, **options)


def written(program: torch.export.ExportedProgram, opset: int, path: Path) -> File:
    """`program` at `path`: through our table, and torch.onnx."""
    program = program.run_decompositions(decompositions(attention=opset >= 23, core=False))
    torch.onnx.export(program, (), path, opset_version=opset, external_data=False, verbose=False)
    return File(path)


class Errors:
    """The largest errors of two computations against fp64, relative to the largest number of each tensor."""

    def __init__(self):
        self.onnx = self.eager = 0.0

    def add(self, got: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert got.shape == exact.shape
        assert got.dtype == eager.dtype
        assert got.isfinite().all()
        scale = exact.abs().max().item()
        self.onnx = max(self.onnx, (got.double() - exact).abs().max().item() / scale)
        self.eager = max(self.eager, (eager.double() - exact).abs().max().item() / scale)

    def check(self, dtype: torch.dtype) -> None:
        """At most twice the other's, and one ULP: over several sizes, since one tensor may be right by luck."""
        assert self.onnx <= 2 * self.eager + torch.finfo(dtype).eps, f"{self.onnx:.3g}, eager's {self.eager:.3g}"
