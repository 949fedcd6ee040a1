"""swap(fold=True): one product for query, key and value, in inference only."""

import copy

import pytest
import torch
from swap_families import KEYS, WIDTH, PAM_Module, network

from danet import swap, unswap
from danet.swap_forward import _folded
from danet.swap_patterns import Pattern

PATTERN = Pattern((), "gamma", "query_conv", "key_conv", "value_conv")


def folded(name="official", dtype=torch.float32):
    """The network as it was, and swapped with folded projections; gammas away from 0."""
    plain = network(name).to(dtype).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.6)
    model = copy.deepcopy(plain)
    report = swap(model, fold=True, crop=None)
    assert [one.detail for one in report.swapped] == ["scale=1.0; folded", "variant=official"]
    assert max(one.error for one in report.swapped) < 1e-9
    return plain, model


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", ["official", "mmsegmentation", "tramac", "pytorchcv"])
def test_it_is_exact_to_rounding(name, layout):
    plain, model = folded(name, torch.float64)
    images = torch.randn(2, 3, 40, 72, dtype=torch.float64).to(memory_format=layout)
    plain, model = plain.to(memory_format=layout), model.to(memory_format=layout)
    with torch.no_grad():
        for expected, logits in zip(plain(images), model(images), strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_projection_is_that_of_its_convolution(dtype):
    torch.manual_seed(0)
    module = PAM_Module(WIDTH).to(dtype).eval()
    module.key_conv.bias = None
    swap(module, fold=True, crop=None)
    x = torch.randn(2, WIDTH, 3, 7, dtype=dtype)
    with torch.no_grad():
        parts = _folded(module, x, PATTERN)
        for part, name in zip(parts, ("query_conv", "key_conv", "value_conv"), strict=True):
            expected = getattr(module, name).double()(x.double()).flatten(2)
            allowed = 4 * torch.finfo(dtype).eps * expected.abs().max()
            assert (part.double() - expected).abs().max() < allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", range(5, 14))
def test_rows_begin_aligned_for_any_width(width, dtype):
    module = PAM_Module(WIDTH).to(dtype).eval()
    swap(module, fold=True, crop=None)
    with torch.no_grad():
        query, key, value = _folded(module, torch.randn(2, WIDTH, 3, width, dtype=dtype), PATTERN)
    for part, channels in ((query, KEYS), (key, KEYS), (value, WIDTH)):
        assert part.shape == (2, channels, 3 * width)
        assert part.stride(2) == 1
        assert not part.stride(1) * part.element_size() % 16
        assert not part.data_ptr() % 16


def test_buffers_are_no_part_of_the_state():
    plain, model = folded()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.head.sa.danet_folded_weight.shape == (2 * KEYS + WIDTH, WIDTH)
    assert unswap(model) == 2
    assert "danet_folded_weight" not in dict(model.named_buffers())
    assert [sorted(vars(part)) for part in model.modules()] == [sorted(vars(part)) for part in plain.modules()]
    model.load_state_dict(plain.state_dict())  # folds nothing any more


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_folds_again(assign):
    _, model = folded()
    other = network("official").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05)
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        before = model(images)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert not torch.allclose(model(images)[0], before[0])
        torch.testing.assert_close(model(images), other(images), rtol=1e-4, atol=1e-5)


def test_copies_fold_again_too():
    _, model = folded()
    copied = copy.deepcopy(model)
    state = {name: value + 0.05 for name, value in model.state_dict().items()}
    copied.load_state_dict(state)
    expected = torch.cat([state[f"head.sa.{name}_conv.weight"].flatten(1) for name in ("query", "key", "value")])
    assert torch.equal(copied.head.sa.danet_folded_weight, expected)
    assert not torch.equal(model.head.sa.danet_folded_weight, expected)


def test_other_dtypes_take_the_buffers_along():
    _, model = folded()
    model.bfloat16()
    assert model.head.sa.danet_folded_weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 56, dtype=torch.bfloat16))[0].isfinite().all()


def test_autocast_reaches_the_product():
    plain, model = folded()
    x = torch.randn(1, WIDTH, 5, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in _folded(model.head.sa, x, PATTERN)} == {torch.bfloat16}
        torch.testing.assert_close(model.head.sa(x), plain.head.sa(x), rtol=0.05, atol=0.05, check_dtype=False)


def test_it_is_refused_in_training():
    with pytest.raises(ValueError, match=r"fold=True is for inference, and head.sa is in training mode; call eval"):
        swap(network("official"), fold=True)
    model = network("official").eval()
    model.head.sa.train()
    with pytest.raises(ValueError, match=r"head.sa is in training mode"):
        swap(model, fold=True)
    _, model = folded()
    model.train()
    with pytest.raises(RuntimeError, match=r"folded for inference: danet\.unswap"):
        model(torch.randn(2, 3, 40, 56))


def test_gradients_in_evaluation_are_those_of_the_parameters():
    plain, model = folded()
    images = torch.randn(1, 3, 40, 56)
    for one in (plain, model):
        sum(part.sum() for part in one(images)).backward()
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_it_compiles_without_a_break():
    plain, model = folded()
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["hook", "spectral_norm", "parametrization"])
def test_projections_with_hooks_are_not_folded(how):
    plain = network("official").double().eval()
    projection, called = plain.head.sa.query_conv, []
    with torch.no_grad():
        plain.head.sa.gamma.fill_(0.6)
    if how == "hook":
        projection.register_forward_hook(lambda *_: called.append(1))
    elif how == "spectral_norm":
        torch.nn.utils.spectral_norm(projection)
    else:
        torch.nn.utils.parametrizations.spectral_norm(projection)
    model = copy.deepcopy(plain)
    report = swap(model, fold=True, crop=None)
    assert report.found[0].detail.startswith("scale=1.0; not folded")
    images = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-10, atol=1e-10)
    assert len(called) == (2 if how == "hook" else 0)


def test_weights_that_change_are_not_those_that_were_folded():
    """In place, for one call, and by the projection's own load_state_dict."""
    plain, model = folded()
    images = torch.randn(1, 3, 40, 56)

    def agree(**weights):
        with torch.no_grad():
            expected, got = (torch.func.functional_call(one, weights, (images,)) for one in (plain, model))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    agree()
    agree(**{"head.sa.query_conv.weight": torch.randn(KEYS, WIDTH, 1, 1)})
    for one in (plain, model):
        state = {name: value + 0.5 for name, value in one.head.sa.value_conv.state_dict().items()}
        one.head.sa.value_conv.load_state_dict(state)
    agree()
    for one in (plain, model):
        optimizer = torch.optim.SGD(one.parameters(), 0.5)
        sum(part.sum() for part in one(images)).backward()
        optimizer.step()
    agree()


def test_other_ways_to_call():
    """Under autocast in fp64, without numbers, and mapped."""
    module = PAM_Module(WIDTH).double().eval()
    swap(module, fold=True, crop=None)
    x = torch.randn(2, WIDTH, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert _folded(module, x, PATTERN)[0].dtype == torch.float64
        expected = module(x)
        assert module(x[:0]).shape == (0, WIDTH, 5, 7)
        mapped = torch.vmap(lambda one: module(one[None])[0])(x)
        torch.testing.assert_close(mapped, expected)
        copied = copy.deepcopy(module).to("meta")
        assert copied(x.to("meta")).shape == x.shape
