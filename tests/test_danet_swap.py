"""swap: what it takes for attention, what it leaves alone, and that nothing else of a network changes."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from swap_families import FAMILIES, PATHS, WIDTH, CAM_Module, PAM_Module, Scale, network
from swap_look_alikes import LOOK_ALIKES
from torch import nn

import danet
from danet import Pattern, find_attention, register_pattern, swap, unswap
from danet.swap_patterns import PATTERNS


def learn(model, optimizer, steps=5):
    """The losses of some steps on random images, in which every output takes part."""
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 40, 48, generator=generator)
        target = torch.randint(0, 3, (2, 5, 6), generator=generator)
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(logits, target) for logits in model(images))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model


def scalars(model):
    return [parameter for parameter in model.parameters() if parameter.numel() == 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_swapped_trained_saved_and_loaded_back(name):
    plain = without_dropout(network(name))
    with torch.no_grad():
        for scalar in scalars(plain):
            scalar.fill_(0.4)  # at 0 the first step would not show a difference
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(one.parameters(), 0.05, momentum=0.9) for one in (plain, model)]
    parameters = list(model.parameters())
    report = swap(model)
    assert [one.op for one in report.swapped] == ["position_attention", "channel_attention"]
    assert [one.path for one in report.found] == [f"head.{path}" for path in PATHS[name]]
    scale, variant = (one.detail for one in report.found)
    assert scale == ("scale=0.5" if name == "unknown" else "scale=1.0")
    assert variant == ("variant=paper" if name == "scar" else "variant=official")
    assert max(one.error for one in report.found) < 1e-9
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == plain.state_dict().keys()
    before = [scalar.item() for scalar in scalars(model)]
    assert learn(model, optimizers[1]) == pytest.approx(learn(plain, optimizers[0]), rel=1e-4)
    assert all(scalar.item() != value for scalar, value in zip(scalars(model), before, strict=True))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    back = network(name).eval()
    back.load_state_dict(torch.load(file, weights_only=True))
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(back(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_fused_operation_is_what_runs():
    """Else a swap that does nothing would pass all of the above."""
    model = network("official")
    softmax = []
    for module in model.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(lambda *_: softmax.append(1))
    images = torch.randn(1, 3, 40, 48)
    model(images)
    assert len(softmax) == 2
    report = swap(model)
    assert [one.detail.partition("; ")[2] for one in report.found] == [
        "hooks that are not called any more: softmax"
    ] * 2
    softmax.clear()
    model(images)
    assert not softmax
    assert unswap(model) == 2
    model(images)
    assert len(softmax) == 2
    assert unswap(model) == 0


def test_unswap_leaves_nothing_behind():
    model = network("official")
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    swap(model)
    assert isinstance(model.head.sa, PAM_Module)
    assert type(model.head.sa).__qualname__ == "PAM_Module"
    unswap(model)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before


def test_a_module_whose_forward_was_put_on_the_instance_is_left_alone():
    """By a wrapper, as accelerate does it, that would no longer be called."""
    module = CAM_Module(WIDTH)
    module.forward = functools.partial(module.forward)
    for verify in (True, False):
        report = swap(nn.Sequential(module), verify=verify)
        assert not report.swapped
        assert "its forward was put on the instance" in str(report)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone_with_a_reason(name):
    torch.manual_seed(0)
    make, reason = LOOK_ALIKES[name]
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forward, cls = model[1].forward, type(model[1])
    report = swap(model)
    assert [(one.path, one.swapped) for one in report.found] == [("1", False)]
    assert reason in report.found[0].detail
    assert reason in str(report)
    assert "left alone" in str(report)
    assert type(model[1]) is cls
    assert model[1].forward == forward
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not unswap(model)


@pytest.mark.parametrize(
    "module", [nn.PReLU(), nn.BatchNorm2d(1), Scale(1.0), nn.Sequential(nn.PReLU())], ids=["prelu", "bn", "scale", "in"]
)
def test_other_modules_with_a_scalar_are_not_reported(module):
    assert swap(nn.Sequential(nn.Conv2d(3, WIDTH, 1), module)).found == []


def test_without_the_comparison_only_the_very_classes_are_swapped(monkeypatch):
    model = network("official")
    report = swap(model, verify=False)
    assert not report.swapped
    assert "recognised by its name only, which needs verify=True" in str(report)
    monkeypatch.setattr(PAM_Module, "__module__", "encoding.nn.da_att")
    monkeypatch.setattr(CAM_Module, "__module__", "encoding.nn.da_att")
    assert [one.by for one in swap(model, verify=False).swapped] == ["class", "class"]


def test_our_own_modules_and_those_already_swapped_are_left_out():
    assert find_attention(danet.create_model("danet_tiny", 3)) == []
    model = network("official")
    assert [one.path for one in find_attention(model)] == ["head.sa", "head.sc"]
    swap(model)
    assert find_attention(model) == []


def test_the_width_of_a_real_network():
    """512 channels, and weights far from those of the start: sums are longer, and the map is sharper."""
    torch.manual_seed(0)
    model = nn.Sequential(PAM_Module(512), CAM_Module(512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    report = swap(model, crop=None)
    assert len(report.swapped) == 2, str(report)
    assert max(one.error for one in report.found) < 1e-9


def test_a_module_that_fails_to_run_says_how():
    class PAM_Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_conv, self.key_conv, self.value_conv = (nn.Conv2d(8, width, 1) for width in (2, 2, 8))
            self.gamma = nn.Parameter(torch.zeros(1))

        def forward(self, x, mask):
            return x

    report = swap(nn.Sequential(PAM_Module()))
    assert report.found[0].detail.startswith("cannot be compared: ")
    assert "mask" in report.found[0].detail


def test_not_a_number_is_no_agreement():
    class CAM_Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.gamma * x * torch.nan

    report = swap(nn.Sequential(CAM_Module()))
    assert [one.detail for one in report.found] == ["computes something else"]


def test_a_network_without_attention():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    report = swap(model)
    assert report.found == []
    assert "nothing is changed" in str(report)


def test_a_network_that_is_an_attention_module():
    model = PAM_Module(WIDTH)
    assert [one.path for one in swap(model).swapped] == [""]
    assert unswap(model) == 1


def test_a_dry_run_changes_nothing():
    model = network("official")
    report = swap(model, dry_run=True)
    assert len(report.found) == 2
    assert "would swap" in str(report)
    assert not report.swapped
    assert not unswap(model)


def test_chance_modes_gammas_and_gradients_stay():
    model = network("tramac").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert len(swap(model).swapped) == 2
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_stay(dtype):
    model = network("official").to(dtype).eval()
    assert len(swap(model).swapped) == 2
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.head.sa(torch.randn(1, WIDTH, 5, 7, dtype=dtype)).dtype == dtype


def test_hooks_on_projections_are_called_and_not_by_the_comparison():
    model = network("official")
    seen = []
    model.head.sa.query_conv.register_forward_hook(lambda *_: seen.append("query"))
    model.head.sa.register_forward_hook(lambda *_: seen.append("attention"))
    swap(model)
    assert not seen
    model(torch.randn(1, 3, 40, 48))
    assert seen == ["query", "attention"]


def test_a_shared_module_is_swapped_once():
    attention = CAM_Module(WIDTH)
    model = nn.ModuleDict({"one": attention, "two": attention})
    assert [one.path for one in swap(model).swapped] == ["one"]
    assert unswap(model) == 1


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_of_a_swapped_network_is_a_network_of_its_own(how):
    model = network("official")
    swap(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    images = torch.randn(1, 3, 40, 48)
    model.eval(), other.eval()
    torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)
    with torch.no_grad():
        other.head.sa.gamma.fill_(1.0)
    assert not torch.equal(other(images)[0], model(images)[0])
    assert unswap(other) == 2
    assert unswap(model) == 2


def test_replicas_of_data_parallel_use_their_own_parameters():
    """What DataParallel makes for every other GPU: a shallow copy whose parameters are put in afterwards."""
    model = nn.DataParallel(network("official"))
    assert [one.path for one in swap(model).swapped] == ["module.head.sa", "module.head.sc"]
    module = model.module.head.sc
    replica = module._replicate_for_data_parallel()
    replica._parameters = {}
    replica.gamma = torch.full((1,), 2.0)
    x = torch.randn(1, WIDTH, 5, 7)
    assert torch.equal(module(x), x)
    assert not torch.equal(replica(x), x)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel_is_seen_through(one_process):
    plain = without_dropout(network("mmsegmentation"))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    assert [one.path for one in swap(wrapped).swapped] == ["module.head.pam", "module.head.cam"]
    optimizers = [torch.optim.SGD(one.parameters(), 0.05, momentum=0.9) for one in (plain, wrapped)]
    assert learn(wrapped, optimizers[1]) == pytest.approx(learn(plain, optimizers[0]), rel=1e-4)


def test_a_compiled_network_is_refused():
    model = network("official")
    with pytest.raises(ValueError, match=r"the network is compiled; swap first, then call torch\.compile"):
        swap(torch.compile(model))
    model.head.compile()
    with pytest.raises(ValueError, match=r"head is compiled; swap first"):
        swap(model)


def test_a_swapped_network_compiles_without_a_break():
    model = network("official").eval()
    with torch.no_grad():
        for scalar in scalars(model):
            scalar.fill_(0.5)
        images = torch.randn(1, 3, 40, 56)
        expected = model(images)
        swap(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_is_refused():
    with pytest.raises(ValueError, match="scripted"):
        swap(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)))


class Mine(nn.Module):
    """With a second scalar, so that its parts alone do not tell."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(WIDTH, width, 1) for width in (4, 4, WIDTH))
        self.weight, self.temperature = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        query, key, value = (part(x).flatten(2) for part in (self.to_q, self.to_k, self.to_v))
        return self.weight * (value @ (query.mT @ key).softmax(-1).mT).view_as(x) + x


@pytest.mark.parametrize("name", [Mine, f"{Mine.__module__}.Mine", "Mine"], ids=["class", "qualified name", "name"])
def test_a_class_of_ones_own(name):
    before = list(PATTERNS)
    model = nn.Sequential(Mine())
    assert not swap(model).found
    register_pattern(Pattern((name,), "weight", "to_q", "to_k", "to_v"))
    try:
        assert swap(model).swapped
    finally:
        PATTERNS[:] = before


def test_a_pattern_with_some_projections_is_refused():
    with pytest.raises(ValueError, match="needs query, key and value"):
        Pattern(("Mine",), "gamma", query="query")
