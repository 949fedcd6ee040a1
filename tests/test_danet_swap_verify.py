"""What decides in swap: the comparison sees through weights, wrappers and precision, and leaves no trace."""

import copy
import threading

import pytest
import torch
from swap_families import KEYS, WIDTH, CAM_Module, PAM_Module, Scale, network
from swap_look_alikes import ScaledCAM
from torch import nn

from danet import ChannelAttention, Pattern, find_attention, register_pattern, swap, unswap
from danet.swap_patterns import PATTERNS


class Branch(nn.Module):
    """A container whose only parameter is the scalar of what it holds."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.relu = attention, nn.ReLU()

    def forward(self, x):
        return self.relu(self.attention(x))


class Lone(nn.Module):
    """Channel attention of an unknown class."""

    def __init__(self):
        super().__init__()
        self.strength = Scale()

    def forward(self, x):
        flat = x.flatten(2)
        return x + self.strength(((-flat @ flat.mT).softmax(-1) @ flat).view_as(x))


@pytest.mark.parametrize("attention", [lambda: CAM_Module(WIDTH), Lone], ids=["known", "unknown"])
def test_attention_in_a_container_that_looks_like_it(attention):
    report = swap(nn.Sequential(Branch(attention()), nn.Sequential(nn.Flatten())), crop=None)
    assert [(one.path, one.swapped) for one in report.found] == [("0.attention", True)]


def test_attention_in_a_network_that_is_called_like_it():
    class PAM(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, WIDTH, 1), PAM_Module(WIDTH)

        def forward(self, x):
            return self.inner(self.stem(x))

    assert [(one.path, one.swapped) for one in swap(PAM(), crop=None).found] == [("inner", True)]


def test_a_container_of_what_is_swapped_or_ours_is_none_itself():
    model = nn.Sequential(Branch(CAM_Module(WIDTH)), Branch(ChannelAttention()))
    assert len(swap(model).swapped) == 1
    assert find_attention(model) == []


@pytest.mark.parametrize("value", [0.0, torch.nan, 1e4])
def test_the_weights_do_not_decide(value):
    """With a query of zeros every scale looks right, with NaN none, and large weights make sharp maps."""
    right, wrong = PAM_Module(WIDTH), PAM_Module(WIDTH)
    wrong.softmax = nn.Softmax(1)
    for module in (right, wrong):
        with torch.no_grad():
            module.query_conv.weight.fill_(value)
            module.query_conv.bias.fill_(value)
    report = swap(nn.Sequential(right, wrong), crop=None)
    assert [one.swapped for one in report.found] == [True, False]
    assert report.found[0].detail == "scale=1.0"


@pytest.mark.parametrize("width", [KEYS, WIDTH])
def test_roots_of_either_width_are_tried(width):
    class Scaled(PAM_Module):
        def forward(self, x):
            query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
            return self.gamma * (value @ (query.mT @ key / width**0.5).softmax(-1).mT).view_as(x) + x

    assert swap(Scaled(WIDTH), crop=None).found[0].detail == f"scale={width**-0.5}"


def test_keys_made_before_queries_under_known_names():
    class PAM_Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_conv, self.key_conv, self.value_conv = (nn.Conv2d(WIDTH, n, 1) for n in (KEYS, KEYS, WIDTH))
            self.gamma = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            query, key, value = (conv(x).flatten(2) for conv in (self.key_conv, self.query_conv, self.value_conv))
            return self.gamma * (value @ (query.mT @ key).softmax(-1).mT).view_as(x) + x

    module = PAM_Module()
    plain = copy.deepcopy(module)
    assert swap(module, crop=None).swapped
    with torch.no_grad():
        module.gamma.fill_(1), plain.gamma.fill_(1)
        x = torch.randn(1, WIDTH, 5, 7)
        torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-5)


class Careful(PAM_Module):
    """Softmax in fp32 in any case."""

    def forward(self, x):
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        weights = (query.mT @ key).float().softmax(-1).to(value.dtype)
        return self.gamma * (value @ weights.mT).view_as(x) + x


def test_a_softmax_in_fp32_is_compared_as_closely_as_it_computes():
    report = swap(Careful(WIDTH), crop=None)
    assert report.swapped
    assert 1e-8 < report.found[0].error < 1e-4


class AutocastOff(nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float() if x.dtype == torch.bfloat16 else x)


class CarefulPAM(AutocastOff, PAM_Module):
    pass


class CarefulCAM(AutocastOff, CAM_Module):
    pass


@pytest.mark.parametrize("kind", [CarefulPAM, CarefulCAM])
def test_modules_that_keep_autocast_out_go_on_doing_so(kind):
    module = kind(WIDTH)
    with torch.no_grad():
        module.gamma.fill_(0.7)
    x = torch.randn(2, WIDTH, 5, 7)
    with torch.no_grad():
        expected = module(x)
        report = swap(module, crop=None)
        assert report.found[0].detail.endswith("; keeps autocast out")
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PAM_Module, CAM_Module])
def test_under_autocast_the_input_comes_back_at_gamma_0_as_before(kind):
    module, x = kind(WIDTH), torch.randn(2, WIDTH, 5, 7)
    swap(module, crop=None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_nothing_is_recorded(mode):
    with mode():
        assert len(swap(network("official").eval(), fold=True, crop=None).swapped) == 2


def test_it_works_under_autocast_and_with_another_default_device():
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with torch.device("cpu"):
            model = network("official").eval()
            careful = Careful(WIDTH)
        assert len(swap(model, fold=True, crop=None).swapped) == 2
        assert swap(careful, crop=None).swapped


def test_no_generator_is_seeded(monkeypatch):
    """Neither the CPU's nor those of GPUs; and a network that draws numbers itself draws the same ones."""

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network("official")

        def forward(self, x):
            return self.inner(x + torch.rand(1, device=x.device))

    def seeded(*_):
        raise AssertionError("a generator was seeded")

    model = Drawing()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    monkeypatch.setattr(torch.random, "manual_seed", seeded)
    state = torch.random.get_rng_state()
    assert len(swap(model, dry_run=True).found) == 2
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_every_kind_on_a_softmax_are_named(name):
    model = network("official")
    getattr(model.head.sa.softmax, name)(lambda *_: None)
    details = [one.detail for one in swap(model, crop=None).found]
    assert details == ["scale=1.0; hooks that are not called any more: softmax", "variant=official"]


def test_hooks_that_cannot_be_copied_are_not_copied():
    class Trainer:
        def __init__(self):
            self.lock = threading.Lock()

        def hook(self, *_):
            pass

    model = network("official")
    for module in model.modules():
        module.register_forward_hook(Trainer().hook)
    report = swap(model)
    assert len(report.swapped) == 2
    assert report.found[0].saved is not None


def test_what_a_forward_stores_is_named():
    class Storing(PAM_Module):
        def forward(self, x):
            self.attention_map = (self.query_conv(x).flatten(2).mT @ self.key_conv(x).flatten(2)).softmax(-1)
            return super().forward(x)

    assert swap(Storing(WIDTH), crop=None).found[0].detail == "scale=1.0; not stored any more: attention_map"


def test_other_arguments_reach_the_forward_that_was():
    class Masked(PAM_Module):
        def forward(self, x, mask=None):
            out = super().forward(x)
            return out if mask is None else out * mask

    module = Masked(WIDTH)
    assert swap(module, crop=None).swapped
    x = torch.randn(1, WIDTH, 5, 7)
    assert torch.equal(module(x, torch.zeros(1)), torch.zeros_like(x))
    torch.testing.assert_close(module(x=x), module(x))


def test_new_modules_of_the_class_compute_as_ever():
    module = CAM_Module(WIDTH)
    swap(module)
    other = type(module)(WIDTH)
    with torch.no_grad():
        other.gamma.fill_(1.0)
    x = torch.randn(1, WIDTH, 5, 7)
    torch.testing.assert_close(other(x), CAM_Module.forward(other, x))
    assert unswap(other) == 0


def test_a_class_that_was_changed_after_the_swap_is_not_undone():
    module = CAM_Module(WIDTH)
    swap(module)
    torch.nn.utils.parametrize.register_parametrization(module, "gamma", nn.Identity())
    module(torch.randn(1, WIDTH, 5, 7))
    with pytest.raises(RuntimeError, match="the class of a CAM_Module was changed after the swap"):
        unswap(module)


def test_a_class_that_refuses_to_be_derived_from_is_left_alone():
    class Final(CAM_Module):
        def __init_subclass__(cls):
            raise TypeError("Final is final")

    report = swap(Final(WIDTH))
    assert report.found[0].detail == "its class does not let itself be derived from: Final is final"


def test_a_class_with_its_own_pickling():
    class Locked(CAM_Module):
        def __init__(self, in_dim):
            super().__init__(in_dim)
            self.lock = threading.Lock()

        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if name != "lock"}

    module = Locked(WIDTH)
    assert swap(module, crop=None).swapped
    assert not hasattr(copy.deepcopy(module), "lock")
    assert unswap(copy.deepcopy(module)) == 1


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_spectral_norm_is_no_obstacle(kind):
    """Its power iteration goes on at every call in training, so the calls are made from the same state."""
    module = PAM_Module(WIDTH)
    norm = torch.nn.utils.parametrizations.spectral_norm if kind == "parametrization" else torch.nn.utils.spectral_norm
    for projection in (module.query_conv, module.key_conv, module.value_conv):
        norm(projection)
    report = swap(module.double(), crop=None)
    assert report.swapped, str(report)


def test_lazy_layers_are_passed_over():
    model = nn.Sequential(nn.LazyConv2d(WIDTH, 1), PAM_Module(WIDTH), nn.LazyLinear(3))
    assert [one.path for one in swap(model, crop=None).swapped] == ["1"]


def test_modules_that_answer_to_every_name():
    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = CAM_Module(WIDTH)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return None

    assert [one.path for one in swap(Open(), crop=None).swapped] == ["inner"]


def test_channel_attention_that_cannot_be_compared_or_differs_has_a_line():
    class Fixed(CAM_Module):
        def forward(self, x):
            return super().forward(x.view(-1, 24, *x.shape[2:]))

    for module, detail in ((Fixed(WIDTH), "cannot be compared"), (ScaledCAM(WIDTH), "computes something else")):
        type(module).__name__ = "CAM_Module"
        report = swap(module, crop=None)
        assert [one.detail.partition(":")[0] for one in report.found] == [detail]


def test_what_a_registered_pattern_lacks_is_said():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.gamma, self.other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))

    before = list(PATTERNS)
    try:
        for scalar, reason in (
            ("gama", "it has no gama"),
            ("other", "its other is no scalar"),
            ("gamma", "a, b and c are not all 1x1 convolutions"),
        ):
            register_pattern(Pattern((Mine,), scalar, "a", "b", "c"))
            assert swap(Mine()).found[0].detail == f"called like attention of DANet, but {reason}"
    finally:
        PATTERNS[:] = before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cudnn"}, "unknown backend 'cudnn'"),
        ({"crop": 512}, r"crop must be \(height, width\) in pixels or None, got 512"),
        ({"crop": (0, 8)}, r"got \(0, 8\)"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    model = network("official")
    with pytest.raises(ValueError, match=message):
        swap(model, **options)
    assert not unswap(model)


def test_classes_of_a_pattern_are_a_tuple():
    with pytest.raises(TypeError, match="classes must be a tuple of classes and names, got 'Mine'"):
        Pattern("Mine", "gamma")


def test_a_second_swap_says_that_there_was_a_first():
    model = network("official").eval()
    swap(model)
    assert "2 modules were swapped before" in str(swap(model, fold=True))
