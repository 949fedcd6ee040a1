"""torch.compile and torch.export: one graph, the bits of eager mode, few compilations, the backend still to choose."""

import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from danet_kernels import (
    available_backends,
    backends,
    channel_attention,
    channel_attention_map,
    position_attention,
    position_attention_map,
    use_backend,
)

# Five different sizes and three batches: equal ones would be taken for one and the same symbol.
SIZES = ((2, 7, 9), (3, 8, 11), (5, 10, 13))
D, C = 4, 6


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Attention(nn.Module):
    """Both modules of DANet on one feature map."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Conv2d(C, D, 1), nn.Conv2d(C, C, 1)
        self.gamma = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        query = self.query(x)  # [B, D, H, W]
        position = position_attention(query, query, self.value(x), x, self.gamma, scale=0.7)
        return position + channel_attention(x, self.gamma) + channel_attention(x, 0.3, variant="paper", residual=False)


def feature_map(size: tuple[int, int, int], seed: int = 0) -> Tensor:
    batch, height, width = size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, C, height, width, generator=generator)


def gradients(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    out.square().sum().backward()
    return [out.detach(), leaf.grad, *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_and_the_bits_of_eager_mode(compiler, dynamic):
    module = Attention()
    compiled = torch.compile(module, backend=compiler, fullgraph=True, dynamic=dynamic)
    x = feature_map(SIZES[0])
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    if dynamic:
        x = feature_map(SIZES[1])
    for same in (x, x.contiguous(memory_format=torch.channels_last)):
        got, expected = gradients(module, compiled, same), gradients(module, module, same)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    """One case each: what differs from aot_eager is how torch compiles the rest of the graph."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    if sys.platform == "win32":
        pytest.skip("not tried with the compiler of this platform")
    module = Attention()
    compiled = torch.compile(module, backend="inductor", fullgraph=True, dynamic=dynamic)
    for size in SIZES[: 1 + dynamic]:
        x = feature_map(size)
        got, expected = gradients(module, compiled, x), gradients(module, module, x)
        for tensor, tensor_expected in zip(got, expected, strict=True):
            torch.testing.assert_close(tensor, tensor_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_three_sizes_take_at_most_two_compilations(train):
    module = Attention()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        x = feature_map(size)
        if train:
            compiled(x).sum().backward()
        else:
            with torch.no_grad():
                compiled(x)
    assert counter.frame_count <= 2


def test_no_graph_breaks():
    explanation = torch._dynamo.explain(Attention())(feature_map(SIZES[0]))
    assert explanation.graph_break_count == 0, explanation.break_reasons
    assert explanation.graph_count == 1


def test_the_operators_are_in_the_graph():
    """Not traced through: a backend is chosen when the graph runs, not when it is made."""
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(Attention(), backend=collect, fullgraph=True)(feature_map(SIZES[0]))
    targets = [
        str(node.target) for graph in graphs for node in graph.graph.nodes if "danet_kernels" in str(node.target)
    ]
    assert targets == [
        "danet_kernels.position_attention_forward",
        *["danet_kernels.channel_attention_forward"] * 2,
    ]


def test_the_maps_compile():
    query = feature_map(SIZES[0])[:, :D]
    points = torch.tensor([0, 5, 62])
    compiled = torch.compile(position_attention_map, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, query, points), position_attention_map(query, query, points))
    compiled = torch.compile(channel_attention_map, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query), channel_attention_map(query))


def test_modes_inside_and_around_a_compiled_function():
    module, x = Attention(), feature_map(SIZES[0])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), module(x))
    assert compiled(x).dtype == torch.float32  # and not what autocast made of it

    def autocast_inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    compiled = torch.compile(autocast_inside, backend="aot_eager", fullgraph=True)
    got, expected = gradients(module, compiled, x), gradients(module, autocast_inside, x)
    assert torch.equal(got[0], expected[0])
    for gradient, gradient_expected in zip(got[1:], expected[1:], strict=True):
        # The compiler may add up the bf16 gradients of what is used twice in another order.
        torch.testing.assert_close(gradient, gradient_expected, rtol=2**-7, atol=2**-7 * float(gradient.abs().max()))

    def checkpointed(x):
        return checkpoint(module, x, use_reentrant=False)

    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    got, expected = gradients(module, compiled, x), gradients(module, module, x)
    assert all(map(torch.equal, got, expected))


def test_a_compiled_vmap():
    x = torch.stack([feature_map(SIZES[0], seed) for seed in range(2)])
    compiled = torch.compile(torch.vmap(channel_attention), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), torch.vmap(channel_attention)(x))


def test_use_backend_around_a_compiled_function(monkeypatch):
    """The choice is made at each call, without another compilation."""
    calls = []
    for name, module in backends.BACKENDS.items():

        def spy(*arguments, name=name, original=module.channel_attention_forward):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, "channel_attention_forward", spy)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(channel_attention, backend=counter, fullgraph=True)
    x = feature_map(SIZES[0])
    with torch.no_grad():
        compiled(x)
        with use_backend("eager"):
            compiled(x)
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "eager")
        compiled(x)
    default = next(name for name, reasons in available_backends("channel_attention", x).items() if not reasons)
    assert calls == [default, "eager", "eager"]
    assert counter.frame_count == 1


def test_a_wrong_call_gets_its_sentence_through_torch_compile():
    compiled = torch.compile(channel_attention, backend="eager")
    with pytest.raises(TypeError, match=r"channel_attention: x must be one of float32.*got int32"):
        compiled(torch.zeros(1, 2, 3, dtype=torch.int32))


# ---- torch.export


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    module, x = Attention().eval(), feature_map(SIZES[0])
    exported = torch.export.export(module, (x,), strict=strict)
    assert torch.equal(exported.module()(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_sizes(strict):
    module = Attention().eval()
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    dims = ({0: batch, 2: height, 3: width},)
    exported = torch.export.export(module, (feature_map(SIZES[0]),), strict=strict, dynamic_shapes=dims).module()
    for size in SIZES:
        assert torch.equal(exported(feature_map(size)), module(feature_map(size)))


def test_an_exported_program_survives_a_round_trip(tmp_path):
    module, x = Attention().eval(), feature_map(SIZES[0])
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "attention.pt2")
    assert torch.equal(torch.export.load(tmp_path / "attention.pt2").module()(x), module(x))


def test_export_of_the_maps():
    class Maps(nn.Module):
        def forward(self, x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
            return position_attention_map(x, x, points), channel_attention_map(x)

    inputs = (feature_map(SIZES[0]), torch.tensor([3, 1, 4]))
    exported = torch.export.export(Maps(), inputs).module()
    assert all(map(torch.equal, exported(*inputs), Maps()(*inputs)))
