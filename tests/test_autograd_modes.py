"""Both operators under every mode of autograd: which gradients, how often, in what order, refused derivatives, vmap."""

import contextlib
import itertools

import pytest
import torch
from on_backend import BACKENDS, GPU_BACKENDS, backend_params, is_slow
from small import both, close, inputs, randn_for, randn_like
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from danet_kernels import (
    available_backends,
    backends,
    channel_attention,
    position_attention,
    reference,
    use_backend,
)

pytestmark = [
    pytest.mark.parametrize("backend", backend_params(*BACKENDS)),
    pytest.mark.usefixtures("deterministic"),
]
OPS = torch.ops.danet_kernels
NAMES = ("query", "key", "value", "residual", "gamma")
SUBSETS = ["".join(subset) for n in range(1, 6) for subset in itertools.combinations("qkvrg", n)]


# ---- without gradients


@pytest.mark.parametrize("size", [(3, 4), (30, 30)], ids=str)
def test_no_grad_and_inference_mode_give_the_same_bits(size, backend):
    """The larger map makes several tasks: what a worker thread allocates must not depend on the mode of its caller."""
    size = min(size, (12, 12)) if is_slow(backend) else size
    given = inputs(backend, size=size, dtype=torch.float32)
    for function, _ in both(backend):
        expected = function(*given)
        assert expected.requires_grad
        with torch.no_grad():
            out = function(*given)
        assert torch.equal(out, expected)
        assert not out.requires_grad
        with torch.inference_mode():
            assert torch.equal(function(*given), expected)
            inferred = [tensor.clone() for tensor in given]
            out = function(*inferred)
            assert out.is_inference()
            assert torch.equal(out, expected)
        assert torch.equal(function(*inferred), expected)  # inference tensors outside the mode


def test_nothing_is_saved_without_gradients(backend):
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        position_attention(*inputs(backend, gradients=""), backend=backend)
        with torch.no_grad():
            position_attention(*inputs(backend), backend=backend)
        assert not saved
        position_attention(*inputs(backend)[:3], backend=backend)
        assert [tuple(tensor.shape) for tensor in saved] == [
            (2, 3, 12),
            (2, 3, 12),
            (2, 5, 12),
            (2, 5, 12),
            (2, 12),
        ]
        saved.clear()
        channel_attention(*inputs(backend)[3:], backend=backend)
        assert sorted(tuple(tensor.shape) for tensor in saved) == [(1,), (2, 5), (2, 5), (2, 5, 12)]


def test_backward_without_saved_tensors_is_refused(backend):
    query, key, value, residual, gamma = (
        tensor.flatten(2) if tensor.dim() > 1 else tensor for tensor in inputs(backend)
    )
    out, _, _ = OPS.position_attention_forward(query, key, value, residual, gamma, 1.0, False, backend)
    with pytest.raises(RuntimeError, match="save_for_backward=False"):
        out.sum().backward()


# ---- which gradients


@pytest.mark.parametrize("gradients", SUBSETS)
def test_every_subset_of_gradients(gradients, backend):
    whole = inputs(backend)
    expected = torch.autograd.grad(reference.position_attention(*whole, scale=0.7).square().sum(), whole)
    given = inputs(backend, gradients)
    position_attention(*given, scale=0.7, backend=backend).square().sum().backward()
    for name, tensor, gradient in zip("qkvrg", given, expected, strict=True):
        if name in gradients:
            assert tensor.grad is not None
            close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("gradients", ["r", "g", "rg"])
@pytest.mark.parametrize("residual", [True, False])
def test_every_subset_of_gradients_of_channel_attention(gradients, residual, backend):
    x, gamma = inputs(backend)[3:]
    expected = torch.autograd.grad(reference.channel_attention(x, gamma, residual=residual).square().sum(), (x, gamma))
    given = inputs(backend, gradients)[3:]
    channel_attention(*given, residual=residual, backend=backend).square().sum().backward()
    for name, tensor, gradient in zip("rg", given, expected, strict=True):
        if name in gradients:
            assert tensor.grad is not None
            close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_one_tensor_in_several_places(backend):
    """DANet computes query, key and value from one feature map; here they are that map."""
    x = randn_for(backend, 2, 4, 3, 3).requires_grad_()
    expected = torch.autograd.grad(reference.position_attention(x, x, x, x, 0.5).square().sum(), x)
    close(
        torch.autograd.grad(position_attention(x, x, x, x, 0.5, backend=backend).square().sum(), x)[0],
        expected[0],
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("gamma_dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dgamma_has_the_shape_and_dtype_of_gamma(shape, gamma_dtype, backend):
    given = inputs(backend, dtype=torch.float32)[:4]
    gamma = torch.full(shape, 0.5, dtype=gamma_dtype, device=given[0].device, requires_grad=True)
    for out in (
        position_attention(*given, gamma, backend=backend),
        channel_attention(given[3], gamma, backend=backend),
    ):
        (dgamma,) = torch.autograd.grad(out.sum(), gamma)
        assert (dgamma.shape, dgamma.dtype) == (gamma.shape, gamma_dtype)


def test_a_python_gamma_is_the_tensor_gamma(backend):
    given = inputs(backend, dtype=torch.float32)[:4]
    gamma = torch.tensor([0.3], device=given[0].device)
    assert torch.equal(
        position_attention(*given, 0.3, backend=backend), position_attention(*given, gamma, backend=backend)
    )
    assert torch.equal(
        channel_attention(given[3], 0.3, backend=backend), channel_attention(given[3], gamma, backend=backend)
    )


# ---- how often, and what happens in between


def test_retain_graph_twice(backend):
    for function, used in both(backend):
        given = inputs(backend)
        loss = function(*given).square().sum()
        loss.backward(retain_graph=True)
        once = [given[i].grad.clone() for i in used]
        loss.backward()
        assert all(torch.equal(given[i].grad, 2 * gradient) for i, gradient in zip(used, once, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(use_reentrant, backend):
    for function, used in both(backend):
        plain, checkpointed = inputs(backend), inputs(backend)
        function(*plain).square().sum().backward()
        checkpoint(function, *checkpointed, use_reentrant=use_reentrant).square().sum().backward()
        assert all(torch.equal(plain[i].grad, checkpointed[i].grad) for i in used)


@pytest.mark.parametrize("name", ["query", "key", "value", "gamma"])
def test_changing_a_saved_input_is_noticed(name, backend):
    given = inputs(backend, gradients="")
    leaf = randn_for(backend, 1, seed=9).requires_grad_()
    given[0] = given[0] * leaf  # so that there is something to differentiate, and no input is a leaf
    out = position_attention(*given, backend=backend)
    with torch.no_grad():
        given[NAMES.index(name)].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changing_a_saved_input_of_channel_attention_is_noticed(backend):
    for changed in (0, 1):
        leaf = randn_for(backend, 1, seed=9).requires_grad_()
        given = [tensor.detach() * leaf for tensor in inputs(backend)[3:]]
        out = channel_attention(*given, backend=backend)
        with torch.no_grad():
            given[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_changing_what_is_not_saved_is_allowed(backend):
    """The residual, and the output where attn is saved apart from it (a ReLU in place after the head, say)."""
    whole = inputs(backend)
    expected = torch.autograd.grad(reference.position_attention(*whole).relu().square().sum(), whole)
    given = inputs(backend)
    residual = given[3] * 1
    out = position_attention(*given[:3], residual, given[4], backend=backend)
    with torch.no_grad():
        residual.zero_()
    got = torch.autograd.grad(out.relu_().square().sum(), given)
    for gradient, gradient_expected in zip(got, expected, strict=True):
        close(gradient, gradient_expected)


def test_changing_an_output_that_stands_for_attn_is_noticed(backend):
    out = position_attention(*inputs(backend)[:3], backend=backend)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(backend):
    """It looks for NaN in every gradient, also in what stands for one that is not needed."""
    for function, used in both(backend):
        given = inputs(backend)
        leaves = [given[i] for i in used]
        plain = torch.autograd.grad(function(*given).square().sum(), leaves)
        with torch.autograd.detect_anomaly():
            checked = torch.autograd.grad(function(*given).square().sum(), leaves)
            torch.autograd.grad(function(*given).square().sum(), leaves[:1])
        assert all(map(torch.equal, plain, checked))


def test_gradients_of_any_layout(backend):
    """What a sum (strides 0), a transposition or a slice hands back."""
    for function, used in both(backend):
        given = inputs(backend)
        out = function(*given)
        dout = randn_like(out, seed=11)
        wide = out.new_empty(*out.shape[:-1], 2 * out.shape[-1])
        wide[..., ::2] = dout
        leaves = [given[i] for i in used]
        expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        for same in (
            dout.contiguous(memory_format=torch.channels_last),
            dout.mT.contiguous().mT,
            wide[..., ::2],
        ):
            for got, wanted in zip(torch.autograd.grad(out, leaves, same, retain_graph=True), expected, strict=True):
                close(got, wanted)
        ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        for got, wanted in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True):
            close(got, wanted)


# ---- refused derivatives


def test_double_backward_is_refused(backend):
    for function, used in both(backend):
        given = inputs(backend)
        gradients = torch.autograd.grad(function(*given).square().sum(), [given[i] for i in used], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            sum(gradient.sum() for gradient in gradients).backward()


def test_forward_mode_is_refused(backend):
    """Left alone, torch returns zeros for the tangent."""
    for function, used in both(backend):
        for i in used:
            given = inputs(backend, gradients="")
            with forward_ad.dual_level():
                given[i] = forward_ad.make_dual(given[i], torch.ones_like(given[i]))
                with pytest.raises(NotImplementedError, match="forward-mode"):
                    function(*given)
            given = inputs(backend, gradients="")

            def of_one(tensor, function=function, given=given, i=i):
                return function(*given[:i], tensor, *given[i + 1 :])

            with pytest.raises(NotImplementedError, match="forward-mode"):
                torch.func.jvp(of_one, (given[i],), (given[i],))
        with forward_ad.dual_level():
            assert function(*inputs(backend)).requires_grad  # a level without a tangent changes nothing


def test_functional_transforms_are_right_or_refused(backend):
    """torch 2.13 refuses torch.func.grad through a torch.library formula; a version that does not must get it right."""
    x = randn_for(backend, 2, 4, 6)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(channel_attention(leaf, backend=backend).square().sum(), leaf)
    got = None
    with contextlib.suppress(RuntimeError):
        got = torch.func.grad(lambda x: channel_attention(x, backend=backend).square().sum())(x)
    if got is not None:
        close(got, expected)


# ---- one backend's forward, another's backward


@pytest.mark.parametrize("other", backend_params(*BACKENDS))
def test_any_backend_runs_the_backward_of_another(other, backend):
    given = inputs(other if other in GPU_BACKENDS else backend, gradients="")
    query, key, value, residual, gamma = (t.flatten(2) if t.dim() > 1 else t for t in given)
    for name in (backend, other):
        if reasons := available_backends("position_attention", query)[name]:
            pytest.skip("; ".join(reasons))
    dout = randn_like(value, seed=14)
    gradients = []
    for forward in (backend, other):
        _, attn, lse = OPS.position_attention_forward(query, key, value, residual, gamma, 0.7, True, forward)
        _, *statistics = OPS.channel_attention_forward(value, gamma, "official", True, forward)
        saved = (dout, query, key, value, attn, lse, gamma, 0.7)
        position = OPS.position_attention_backward(*saved, True, True, True, True, other)
        channel = OPS.channel_attention_backward(dout, value, gamma, *statistics, "official", True, True, True, other)
        gradients.append((*position, *channel))
    for got, wanted in zip(*gradients, strict=True):
        close(got, wanted)


def test_the_backward_runs_on_the_backend_of_the_forward(monkeypatch, backend):
    """Also when the context that chose it has ended."""
    calls: list[str] = []

    def spy(name, original):
        return lambda *arguments: (calls.append(name), original(*arguments))[1]

    for name, module in backends.BACKENDS.items():
        for op in ("position_attention_backward", "channel_attention_backward"):
            monkeypatch.setattr(module, op, spy(name, getattr(module, op)))
    given = inputs(backend)
    with use_backend(backend):
        out = position_attention(*given).sum() + channel_attention(*given[3:]).sum()
    out.backward()
    assert calls == [backend, backend]
