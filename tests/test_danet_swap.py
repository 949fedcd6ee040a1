"""swap: what it takes for attention, what it leaves alone, and that nothing else of a network changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import danet
from danet import Pattern, find_attention, register_pattern, swap, unswap

C, D = 16, 4


class Scale(nn.Module):
    """As mmcv's: a scalar without dimensions that multiplies."""

    def __init__(self, name="scale", value=0.0, shape=()):
        super().__init__()
        setattr(self, name, nn.Parameter(torch.full(shape, value)))
        self.name = name

    def forward(self, x):
        return getattr(self, self.name) * x


def position(class_name, projections, scalar, *, scale=1.0, returns_map=False, dim=-1, transposed=False):
    """A class of position attention with other names for its parts."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name, width in zip(projections, (D, D, C), strict=True):
                setattr(self, name, nn.Conv2d(C, width, 1))
            add_scalar(self, scalar)
            self.softmax = nn.Softmax(dim)

        def forward(self, x):
            query, key, value = (getattr(self, name)(x).flatten(2) for name in projections)
            attention = self.softmax(scale * query.mT @ key)  # [B, N, N]
            out = value @ (attention if transposed else attention.mT)
            out = times_scalar(self, scalar, out.view_as(x)) + x
            return (out, attention) if returns_map else out

    Attention.__name__ = Attention.__qualname__ = class_name
    return Attention()


def channel(class_name, scalar, sign=-1, activation=None):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            add_scalar(self, scalar)
            self.softmax = nn.Softmax(-1)

        def forward(self, x):
            flat = x.flatten(2)  # [B, C, N]
            energy = sign * flat @ flat.mT
            attention = activation(energy) if activation else self.softmax(energy - energy.amax(-1, keepdim=True))
            return times_scalar(self, scalar, (attention @ flat).view_as(x)) + x

    Attention.__name__ = Attention.__qualname__ = class_name
    return Attention()


def add_scalar(module, path):
    owner, _, name = path.rpartition(".")
    if owner:
        setattr(module, owner, Scale(name, 1.0 if name == "alpha" else 0.0, (1,) if name == "alpha" else ()))
    else:
        setattr(module, name, nn.Parameter(torch.zeros(1)))


def times_scalar(module, path, x):
    owner, _, name = path.rpartition(".")
    return getattr(module, owner)(x) if owner else getattr(module, name) * x


FAMILIES = {
    "official": ("PAM_Module", ("query_conv", "key_conv", "value_conv"), "gamma", "CAM_Module", "gamma"),
    "mmsegmentation": ("PAM", ("query_project", "key_project", "value_project"), "gamma.scale", "CAM", "gamma.scale"),
    "tramac": ("_PositionAttentionModule", ("conv_b", "conv_c", "conv_d"), "alpha", "_ChannelAttentionModule", "beta"),
    "sssegmentation": (
        "PositionAttentionModule",
        ("query_project", "key_project", "value_project"),
        "gamma.scale",
        "ChannelAttentionModule",
        "gamma.scale",
    ),
    "pytorchcv": ("PosAttBlock", ("query_conv", "key_conv", "value_conv"), "scale.alpha", "ChaAttBlock", "scale.alpha"),
    "scar": ("PAM", ("query_conv", "key_conv", "value_conv"), "para_lambda", "CAM", "para_mu"),
    "unknown": ("Spatial", ("theta", "phi", "g"), "weight", "Spectral", "weight"),
}


class Net(nn.Module):
    def __init__(self, position_attention, channel_attention):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.head = nn.Sequential(nn.ReLU(), nn.Sequential(position_attention, channel_attention))
        self.classifier = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        return self.classifier(self.head(self.stem(x)))


def family(name, sign=-1):
    torch.manual_seed(0)
    position_class, projections, scalar, channel_class, channel_scalar = FAMILIES[name]
    return Net(position(position_class, projections, scalar), channel(channel_class, channel_scalar, sign))


def learn(model, optimizer, steps=5):
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 5, 6, generator=generator)
        target = torch.randint(0, 2, (2, 5, 6), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_swapped_trained_saved_and_loaded_back(name):
    plain = family(name, sign=1 if name == "scar" else -1)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in (plain, model)]
    parameters = list(model.parameters())
    report = swap(model)
    assert [one.op for one in report.swapped] == ["position_attention", "channel_attention"]
    assert [one.path for one in report.found] == ["head.1.0", "head.1.1"]
    assert report.found[1].detail == ("variant=paper" if name == "scar" else "variant=official")
    assert max(one.error for one in report.found) < 1e-10
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert learn(model, optimizers[1]) == pytest.approx(learn(plain, optimizers[0]), rel=1e-5)
    back = family(name)
    back.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 5, 6)
    if name != "scar":
        torch.testing.assert_close(back(images), model(images), rtol=1e-4, atol=1e-5)


def test_the_fused_operation_is_what_runs(monkeypatch):
    """Else a swap that does nothing would pass all of the above."""
    model = family("official")
    softmax = []
    for module in model.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(lambda *_: softmax.append(1))
    images = torch.randn(1, 3, 5, 6)
    model(images)
    assert len(softmax) == 2
    swap(model)
    softmax.clear()
    model(images)
    assert not softmax
    assert unswap(model) == 2
    model(images)
    assert len(softmax) == 2
    assert unswap(model) == 0


def test_a_forward_that_was_put_on_the_instance_comes_back():
    module = channel("CAM_Module", "gamma")
    model, own = nn.Sequential(module), module.forward
    module.forward = own
    assert swap(model).swapped
    unswap(model)
    assert vars(module)["forward"] == own


def criss_cross():
    """The names of position attention on rows and columns alone."""
    module = position("CrissCrossAttention", ("query_conv", "key_conv", "value_conv"), "gamma")

    def forward(x):
        query, key, value = (getattr(module, name)(x) for name in ("query_conv", "key_conv", "value_conv"))
        rows = torch.einsum("bchw,bchv->bhwv", query, key).softmax(-1)
        return module.gamma * torch.einsum("bhwv,bchv->bchw", rows, value) + x

    module.forward = forward
    return module


LOOK_ALIKES = {
    "criss-cross": criss_cross,
    "sagan": lambda: position("Self_Attn", ("query_conv", "key_conv", "value_conv"), "gamma", returns_map=True),
    "softmax over queries": lambda: position("PAM_Module", ("query_conv", "key_conv", "value_conv"), "gamma", dim=1),
    "transposed map": lambda: position(
        "PAM_Module", ("query_conv", "key_conv", "value_conv"), "gamma", transposed=True
    ),
    "sigmoid": lambda: channel("CAM_Module", "gamma", activation=torch.sigmoid),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone_with_a_reason(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 1), LOOK_ALIKES[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = swap(model)
    assert [one.swapped for one in report.found] == [False]
    assert report.found[0].detail
    assert report.found[0].detail in str(report)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "module", [nn.PReLU(), nn.BatchNorm2d(1), Scale("gamma", 1.0, (1,))], ids=["prelu", "bn", "scale"]
)
def test_other_modules_with_a_scalar_are_not_reported(module):
    assert swap(nn.Sequential(nn.Conv2d(3, C, 1), module)).found == []


def test_without_the_comparison_only_known_classes_are_swapped():
    assert len(swap(family("official"), verify=False).swapped) == 2
    report = swap(family("unknown"), verify=False)
    assert not report.swapped
    assert "unknown class" in str(report)


def test_our_own_modules_and_those_already_swapped_are_left_out():
    assert find_attention(danet.create_model("danet_tiny", 3)) == []
    model = family("official")
    swap(model)
    assert find_attention(model) == []


def test_the_width_of_a_real_network(monkeypatch):
    """512 channels, and weights far from those of the start: sums are longer, and the map is sharper."""
    monkeypatch.setitem(globals(), "C", 512)
    monkeypatch.setitem(globals(), "D", 64)
    torch.manual_seed(0)
    model = nn.Sequential(position("PAM_Module", ("query_conv", "key_conv", "value_conv"), "gamma"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    report = swap(model)
    assert report.swapped, str(report)
    assert report.found[0].error < 1e-9


def test_scaled_logits_are_recognised():
    model = nn.Sequential(position("PAM", ("query_conv", "key_conv", "value_conv"), "gamma", scale=D**-0.5))
    report = swap(model)
    assert report.found[0].detail == "scale=0.5"
    assert report.swapped


def test_a_network_without_attention():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    report = swap(model)
    assert report.found == []
    assert "nothing is changed" in str(report)


def test_a_dry_run_changes_nothing():
    model = family("official")
    report = swap(model, dry_run=True)
    assert len(report.found) == 2
    assert not report.swapped
    assert not unswap(model)


def test_chance_modes_gammas_and_gradients_stay():
    model = family("tramac").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    swap(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_hooks_on_projections_are_called_and_not_by_the_comparison():
    model = family("official")
    seen = []
    model.head[1][0].query_conv.register_forward_hook(lambda *_: seen.append(1))
    swap(model)
    assert not seen
    model(torch.randn(1, 3, 5, 6))
    assert seen == [1]


def test_a_shared_module_is_swapped_once():
    attention = channel("CAM_Module", "gamma")
    model = nn.ModuleDict({"one": attention, "two": attention})
    assert [one.path for one in swap(model).swapped] == ["one"]
    assert unswap(model) == 1


def test_a_copy_of_a_swapped_network_is_swapped_on_its_own():
    model = family("official")
    swap(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head[1][0].gamma.fill_(1.0)
    images = torch.randn(1, 3, 5, 6)
    assert not torch.equal(other(images), model(images))
    assert unswap(other) == 2
    assert unswap(model) == 2


def test_data_parallel_wrappers_are_seen_through():
    assert len(swap(nn.DataParallel(family("official"))).swapped) == 2


def test_a_compiled_network_is_refused():
    with pytest.raises(ValueError, match=r"compiled; swap first, then call torch\.compile"):
        swap(torch.compile(family("official")))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_is_refused():
    with pytest.raises(ValueError, match="scripted"):
        swap(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)))


class Mine(nn.Module):
    """Projections made in another order, so that their parts alone do not tell which is which."""

    def __init__(self):
        super().__init__()
        self.values, self.queries, self.keys = (nn.Conv2d(C, width, 1) for width in (C, D, D))
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        query, key, value = (part(x).flatten(2) for part in (self.queries, self.keys, self.values))
        return self.weight * (value @ (query.mT @ key).softmax(-1).mT).view_as(x) + x


def test_a_class_of_ones_own(monkeypatch):
    monkeypatch.setattr("danet.swapping._PATTERNS", [])
    model = nn.Sequential(Mine())
    assert not swap(model).swapped
    register_pattern(Pattern(("Mine",), "weight", "queries", "keys", "values"))
    assert swap(model).swapped


def test_a_pattern_with_some_projections_is_refused():
    with pytest.raises(ValueError, match="needs query, key and value"):
        Pattern(("Mine",), "gamma", query="query")
