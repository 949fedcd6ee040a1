"""The network: Table 1's variants, sizes, strides, receptive field, fused against eager, compile and export."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small import randn
from torch import nn

import danet
from danet import DANet, DANetHead, Logits, ResNet, TimmBackbone, create_model, list_models, receptive_field
from danet.backbone import BasicBlock, Bottleneck
from danet_kernels import use_backend

ROOT = Path(danet.__file__).resolve().parent.parent
VARIANTS = ("danet", "pam", "cam", "fcn")
for_each_variant = pytest.mark.parametrize("variant", VARIANTS)


def images(batch=2, height=32, width=40, seed=0, dtype=torch.float32):
    return randn(batch, 3, height, width, seed=seed, dtype=dtype)


def tiny(variant="danet", classes=5, gamma=None, **options):
    """A net of a few thousand weights; the gammas are 0 unless given."""
    torch.manual_seed(0)
    model = create_model(f"{variant}_tiny", classes, **{"inter_channels": 16, **options})
    if gamma is not None:
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, gamma)
    return model


def parts(logits):
    return [part for part in logits if part is not None]


def loss_of(logits, target):
    return sum(F.cross_entropy(part, target) for part in parts(logits))


@for_each_variant
@pytest.mark.parametrize("size", [(32, 40), (33, 47), (9, 16)], ids=str)
def test_logits_come_at_the_size_of_the_image(variant, size):
    model, batch = tiny(variant), images(2, *size)
    logits = model(batch)
    assert isinstance(logits, Logits)
    assert len(parts(logits)) == (3 if variant == "danet" else 1)
    assert all(part.shape == (2, 5, *size) for part in parts(logits))
    model.eval()
    main = model(batch)
    assert torch.equal(main, model(batch, all_logits=True).main)
    features = model.backbone(batch)
    assert features.shape == (2, model.backbone.channels, -(-size[0] // 8), -(-size[1] // 8))
    expected = F.interpolate(model.head(features).main, size, mode="bilinear", align_corners=True)
    assert torch.equal(main, expected)


def test_the_branches_meet_in_the_sum():
    """Main logits see both branches added, the others one each; with one branch the main classifier sees that one."""
    head, features = tiny(gamma=0.5).eval().head, randn(1, 128, 4, 5, dtype=torch.float32)
    position = head.position_out(head.position_attention(head.position_in(features)))
    channel = head.channel_out(head.channel_attention(head.channel_in(features)))
    expected = (
        head.classifier(position + channel),
        head.position_classifier(position),
        head.channel_classifier(channel),
    )
    assert all(map(torch.equal, head(features), expected))
    for variant, branch in (("pam", position), ("cam", channel)):
        alone = DANetHead(128, 5, variant=variant, inter_channels=16).eval()
        alone.load_state_dict(head.state_dict(), strict=False)
        assert torch.equal(alone(features).main, head.classifier(branch))


def test_align_corners_is_an_option():
    model, batch = tiny("fcn").eval(), images()
    other = tiny("fcn", align_corners=False).eval()
    expected = F.interpolate(other.head(other.backbone(batch)).main, batch.shape[2:], mode="bilinear")
    assert torch.equal(other(batch), expected)
    assert not torch.equal(other(batch), model(batch))


def head_parameters(variant, channels, classes):
    """Weights of the head by hand: see section 3.4 of the paper and Table 1."""
    inter = channels // 4
    conv_in, conv_out = 9 * channels * inter + 2 * inter, 9 * inter * inter + 2 * inter  # with BatchNorm
    classifier = (inter + 1) * classes
    position = conv_in + 2 * (inter + 1) * (inter // 8) + (inter + 1) * inter + 1 + conv_out
    channel = conv_in + 1 + conv_out
    return {
        "fcn": conv_in + classifier,
        "pam": position + classifier,
        "cam": channel + classifier,
        "danet": position + channel + 3 * classifier,
    }[variant]


def bottlenecks(layers):
    """Weights of a plain ResNet without its classifier, by hand."""
    total, channels = 3 * 64 * 49 + 2 * 64, 64
    for width, blocks in zip((64, 128, 256, 512), layers, strict=True):
        total += channels * 4 * width + 8 * width  # the shortcut
        for _ in range(blocks):
            total += channels * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)
            channels = 4 * width
    return total


@pytest.mark.parametrize(("net", "layers"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
@for_each_variant
def test_numbers_of_weights(variant, net, layers):
    with torch.device("meta"):
        model = create_model(f"{variant}_{net}", 19)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == bottlenecks(layers) + head_parameters(variant, 2048, 19)


def test_danet_resnet101_is_the_authors_size():
    """torchvision's resnet101 has 44,549,160 weights, 2,049,000 of them in the classifier that is not here."""
    assert bottlenecks((3, 4, 23, 3)) == 44_549_160 - 2_049_000
    assert head_parameters("danet", 2048, 19) == 23_954_619
    with torch.device("meta"):
        model = create_model("danet_resnet101", 19)
    assert sum(parameter.numel() for parameter in model.parameters()) == 66_454_779


def dilations(stage):
    return [block.conv2.dilation[0] for block in stage]


def test_dilations():
    with torch.device("meta"):
        nets = {
            options: create_model("fcn_resnet50", 19, output_stride=options[0], multi_grid=options[1]).backbone
            for options in ((8, None), (8, (4, 8, 16)), (16, None), (32, None))
        }
    assert dilations(nets[8, None].layer2) == [1] * 4
    assert dilations(nets[8, None].layer3) == [1, 2, 2, 2, 2, 2]
    assert dilations(nets[8, None].layer4) == [2, 4, 4]
    assert dilations(nets[8, (4, 8, 16)].layer4) == [4, 8, 16]
    assert dilations(nets[16, None].layer3) == [1] * 6
    assert dilations(nets[16, None].layer4) == [1, 2, 2]
    assert dilations(nets[32, None].layer4) == [1] * 3
    assert all(conv.padding == conv.dilation for conv in nets[8, (4, 8, 16)].modules() if conv_3x3(conv))


def conv_3x3(module):
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


@pytest.mark.parametrize("stem", ["plain", "deep", "v1c"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_strides_and_stems(stem, output_stride):
    net = ResNet(Bottleneck, (1, 1, 1, 1), stem=stem, output_stride=output_stride, widths=(4, 4, 4, 8)).eval()
    assert net(images(1, 33, 64)).shape == (1, 32, -(-33 // output_stride), 64 // output_stride)
    names = [name for name in net.state_dict() if name.startswith("conv1.") and "num_batches" not in name]
    assert names == ["conv1.weight"] if stem == "plain" else {"conv1.0.weight", "conv1.4.bias"} < set(names)
    assert net.bn1.num_features == (8 if stem == "deep" else 4)
    first = net.conv1 if stem == "plain" else net.conv1[0]
    assert first.weight.shape == {"plain": (4, 3, 7, 7), "deep": (4, 3, 3, 3), "v1c": (2, 3, 3, 3)}[stem]


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_options_arrive(variant):
    model = create_model("danet_tiny", 2, channel_variant=variant, attention_backend="eager", dropout=0.25)
    head = model.head
    assert head.channel_attention.variant == variant
    assert head.position_attention.backend == head.channel_attention.backend == "eager"
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.25] * 3
    assert create_model("cam_tiny", 2, gradient_checkpointing=True).backbone.gradient_checkpointing
    assert {"danet_resnet101", "fcn_resnet50", "pam_resnet152", "cam_tiny", "danet_resnet18"} <= set(list_models())


@pytest.mark.parametrize("size", [256, 250])
def test_receptive_field_is_that_of_the_gradient(size):
    """Random weights, in fp64: the gradient of one pixel's logits is zero outside the square and not at its edges."""
    model = tiny("fcn").double().eval()
    for parameter in model.parameters():  # no ReLU is off, and no term cancels
        nn.init.uniform_(parameter, 0.1, 0.2)
    image = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    pixel = size // 2 + 3
    model(image)[0, 0, pixel, pixel].backward()
    touched = image.grad.abs().sum((0, 1))
    for axis in (0, 1):
        where = touched.sum(axis).nonzero().flatten()
        side = int(where[-1] - where[0]) + 1
        assert side <= receptive_field(model) < side + 8
        assert abs((where[0] + where[-1]) / 2 - pixel) <= 16
    with pytest.raises(ValueError, match="needs the variant 'fcn'"):
        receptive_field(tiny("pam"))


def test_checkpointing_changes_nothing_but_the_work():
    """Gradients and running statistics bit for bit; each stage runs twice."""
    plain, target = tiny(dropout=0.0, gamma=0.3), torch.randint(5, (2, 32, 40))
    checkpointed = copy.deepcopy(plain)
    checkpointed.backbone.gradient_checkpointing = True
    runs = []
    checkpointed.backbone.layer4.register_forward_pre_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        loss_of(model(images()), target).backward()
    assert len(runs) == 2
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name
    for (name, expected), got in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(got, expected), name
    with torch.no_grad():
        assert torch.equal(checkpointed.eval()(images()), plain.eval()(images()))


def fused_eager_exact(variant):
    """Three copies of a net with gammas that matter, and statistics of a batch; the last in fp64, and eager."""
    fused = tiny(variant, gamma=0.5, dropout=0.0)
    with torch.no_grad(), use_backend("eager"):
        fused(images(4, seed=7))
    return fused, copy.deepcopy(fused), copy.deepcopy(fused).double()


@pytest.mark.parametrize("variant", ["danet", "cam", "pam"])
@pytest.mark.parametrize("train", [False, True])
def test_fused_and_eager_logits_agree(variant, train):
    fused, eager, exact = (model.train(train) for model in fused_eager_exact(variant))
    batch = images(2, 64, 72)
    with torch.no_grad():
        with use_backend("native"):
            got = parts(fused(batch, all_logits=True))
        with use_backend("eager"):
            expected = parts(eager(batch, all_logits=True))
            truth = parts(exact(batch.double(), all_logits=True))
    for ours, theirs, true in zip(got, expected, truth, strict=True):
        if variant == "pam":
            assert (ours - theirs).abs().max() <= 1e-4
        assert (ours - true).norm() <= 2 * (theirs - true).norm()
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-6


def train(model, backend, steps, dtype):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    with use_backend(backend):
        for step in range(steps):
            target = torch.randint(5, (2, 24, 32), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = loss_of(model(images(2, 24, 32, seed=step, dtype=dtype)), target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def test_fifty_steps_of_training_alike():
    """fp64, gammas from their start at 0. They move, so the attention takes part."""
    fused = tiny(inter_channels=8, dropout=0.0).double()
    eager = copy.deepcopy(fused)
    got, expected = (train(*run, 50, torch.float64) for run in ((fused, "native"), (eager, "eager")))
    assert (got - expected).abs().max() <= 1e-6
    for (name, ours), theirs in zip(fused.named_parameters(), eager.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6, name
        assert not name.endswith("gamma") or ours.detach().abs() > 1e-4, name


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_first_step_in_fp32(gamma):
    fused = tiny(gamma=gamma, dropout=0.0)
    eager = copy.deepcopy(fused)
    got, expected = (train(*run, 1, torch.float32) for run in ((fused, "native"), (eager, "eager")))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_every_weight_learns():
    """Also through three losses: no branch is left out. At gamma = 0 the projections wait for gamma to move."""
    model = tiny(gamma=0.5)
    loss_of(model(images()), torch.randint(5, (2, 32, 40))).backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert silent == []
    start = tiny()
    loss_of(start(images()), torch.randint(5, (2, 32, 40))).backward()
    silent = [name for name, parameter in start.named_parameters() if not parameter.grad.abs().max() > 0]
    assert silent == [name for name, _ in start.named_parameters() if "_conv." in name]


def test_training_under_autocast():
    """bf16 convolutions in channels_last: finite gradients, in fp32, near those without."""
    model, target = tiny(gamma=0.1, dropout=0.0).to(memory_format=torch.channels_last), torch.randint(5, (2, 32, 40))
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_of(model(images().contiguous(memory_format=torch.channels_last)), target)
    got.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(got, loss_of(plain(images()), target), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [False, True])
def test_compile_makes_one_graph(training):
    torch.compiler.reset()
    model = tiny(gamma=0.5, dropout=0.0).train(training)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    target = torch.randint(5, (2, 32, 40))
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()), model(images()))
        return
    for function in (model, compiled):
        loss_of(function(images()), target).backward()
    for expected, got in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    torch.compiler.reset()


def test_export_keeps_the_fused_operators_and_any_size():
    model = tiny(gamma=0.5).eval()
    height, width = torch.export.Dim("H", min=16, max=256), torch.export.Dim("W", min=16, max=256)
    exported = torch.export.export(model, (images(2, 32, 40),), dynamic_shapes={"images": {2: height, 3: width}})
    operators = {str(node.target) for node in exported.graph.nodes}
    for op in ("position_attention_forward", "channel_attention_forward"):
        assert any(op in name for name in operators), operators
    for size in ((32, 40), (51, 64)):
        torch.testing.assert_close(exported.module()(images(2, *size)), model(images(2, *size)))


def test_one_position_is_refused_in_training_only():
    model = tiny()
    for size in ((1, 1), (8, 8), (3, 7)):
        with pytest.raises(ValueError, match=r"cannot train on images \[1, 3, .*BatchNorm needs two"):
            model(images(1, *size))
        assert model.eval()(images(1, *size)).shape == (1, 5, *size)
        assert model.train()(images(2, *size)).main.shape == (2, 5, *size)
    assert model(images(1, 8, 9)).main.shape == (1, 5, 8, 9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(images(1, 8, 8)).main.shape == (1, 5, 8, 8)


def test_synchronised_batch_norm_changes_no_names():
    """It has the positions of other processes, so a single one of its own is no reason to refuse."""
    model = tiny()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    converted._check(images(1, 8, 8))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "floating-point numbers, normalised, got torch.uint8"),
        (None, TypeError, "got NoneType"),
        (torch.zeros(3, 8, 8), ValueError, r"\[B, 3, H, W\], got \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"\[B, 3, H, W\], got \[1, 1, 8, 8\]"),
    ],
)
def test_wrong_images(wrong, error, message):
    with pytest.raises(error, match=message):
        tiny().eval()(wrong)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("danet_resnet99", {}, "unknown model 'danet_resnet99', expected one of danet_tiny, "),
        ("danet_tiny", {"num_classes": 0}, "num_classes must be a whole number >= 1, got 0"),
        ("danet_tiny", {"stem": "wide"}, "stem must be one of 'plain', 'deep', 'v1c', got 'wide'"),
        ("danet_tiny", {"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ("danet_tiny", {"multi_grid": (4, 8, 16)}, "one dilation for each of the 1 blocks of layer4"),
        ("danet_tiny", {"multi_grid": (4,), "output_stride": 32}, "multi_grid dilates layer4"),
        ("danet_tiny", {"dropout": 1.5}, "dropout must be a number from 0 to 1, got 1.5"),
        ("danet_tiny", {"channel_variant": "no"}, "variant must be 'official' or 'paper', got 'no'"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 3, **options})
    with pytest.raises(ValueError, match="variant must be one of 'danet', 'pam', 'cam', 'fcn', got 'both'"):
        DANetHead(8, 2, variant="both")


def test_a_backbone_of_timm(monkeypatch):
    """In place of timm, which may not be there: what is asked of it, and what is made of its answer."""
    asked = {}

    class Features(nn.Module):
        feature_info = SimpleNamespace(channels=lambda: [24], reduction=lambda: [8])

        def forward(self, batch):
            return [F.avg_pool2d(batch, 8, ceil_mode=True).repeat(1, 8, 1, 1)]

    def make(name, **options):
        asked.update(name=name, **options)
        return Features()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=make))
    backbone = TimmBackbone("some_net", output_stride=8)
    assert asked == {
        "name": "some_net",
        "pretrained": False,
        "features_only": True,
        "output_stride": 8,
        "out_indices": (-1,),
    }
    model = DANet(backbone, DANetHead(backbone.channels, 4)).eval()
    assert model(images(1, 33, 40)).shape == (1, 4, 33, 40)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="TimmBackbone needs timm"):
        TimmBackbone("some_net")


def test_a_block_is_what_it_says():
    """BasicBlock and Bottleneck against the definition of a residual block."""
    for block, convs in ((BasicBlock(4, 4, 1, 2), 2), (Bottleneck(16, 4, 1, 2), 3)):
        assert block.eval().downsample is None
        x = randn(1, 4 if convs == 2 else 16, 6, 6, dtype=torch.float32)
        out = x
        for index in range(1, convs + 1):
            out = getattr(block, f"bn{index}")(getattr(block, f"conv{index}")(out))
            out = F.relu(out if index < convs else out + x)
        torch.testing.assert_close(block(x), out)


IMPORT = """
import sys
import danet
assert not {"torch", "numpy", "danet_kernels", "danet.model"} & set(sys.modules)
import torch.utils.flop_counter  # which imports triton, where it is installed
before = set(sys.modules)
danet.create_model, danet.PositionAttention
unwanted = {"torchvision", "timm", "matplotlib", "PIL", "scipy", "safetensors", "triton"} & (set(sys.modules) - before)
assert not unwanted, unwanted
assert set(danet.__all__) <= set(dir(danet)) and all(hasattr(danet, name) for name in danet.__all__)
assert not hasattr(danet, "no_such_name")
"""


def test_the_import_is_light():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
