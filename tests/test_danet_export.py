"""Networks as one graph: native and swapped, in torch and in onnxruntime, at other sizes than the one traced."""

import copy
import sys
from functools import cache

import pytest
import torch
from math_doc import DOCS, run_blocks, table
from onnx_files import Errors, File
from swap_families import PATHS, WIDTH, network
from torch import nn

import danet
from danet import export_onnx, export_program, swap
from danet.export import _evaluating, _largest, _tensors
from danet_kernels import decompositions

FORMS = ("Attention", "MatMul", "Softmax")
SIZES = [(1, 40, 112), (3, 96, 24), (1, 64, 64), (2, 48, 72)]


def images(shape, dtype=torch.float32, seed=0):
    batch, *size = shape
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Backbone(nn.Sequential):
    """A convolution that rounds sizes up, as a ResNet does. test_the_page_about_it exports a model of create_model."""

    channels, output_stride = 16, 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 9, stride=8, padding=4), nn.BatchNorm2d(16), nn.ReLU(inplace=True))


@cache
def native():
    """With gammas other than 0, at which nobody would notice an attention that is wrong, and statistics that are."""
    torch.manual_seed(0)
    model = danet.DANet(Backbone(), danet.DANetHead(16, 5, inter_channels=16))
    with torch.no_grad():
        model.head.position_attention.gamma.fill_(0.7)
        model.head.channel_attention.gamma.fill_(-0.4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


@cache
def networks(name):
    """The network as its authors wrote it, and the same with the fused operations in it."""
    plain = network(name).eval()
    with torch.no_grad():
        for path, parameter in plain.named_parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.7 if path.startswith(f"head.{PATHS[name][0]}.") else -0.4)
    model = copy.deepcopy(plain)
    assert len(swap(model).swapped) == 2
    return plain, model


def compare(run, model, sizes, dtype=torch.float32):
    """`run` against `model`, which is some eager form of the same network, by their errors against it in fp64."""
    errors = Errors()
    with _evaluating(model), torch.no_grad():
        exact = copy.deepcopy(model).double()
        for seed, size in enumerate(sizes):
            x = images(size, dtype, seed)
            for parts in zip(*map(_tensors, (run(x), model(x), exact(x.double()))), strict=True):
                errors.add(*parts)
    errors.check(dtype)


# ---- torch.export


def test_a_native_model_as_a_program():
    model = native()
    model.train()
    model.head.classifier.eval()
    modes = [module.training for module in model.modules()]
    program = export_program(model)
    assert [module.training for module in model.modules()] == modes
    calls = [node for node in program.graph.nodes if "danet_kernels" in str(node.target)]
    assert [str(node.target).split(".")[1] for node in calls] == [
        "position_attention_forward",
        "channel_attention_forward",
    ]
    assert calls[0].args[6] is False  # nothing is saved for a backward
    run = program.module()
    with _evaluating(model), torch.no_grad():
        for size in [(1, 33, 71), (3, 64, 64), (1, 65, 40)]:
            x = images(size)
            assert torch.equal(run(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_swapped_network_as_a_program(strict):
    _, model = networks("official")
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (images((2, 48, 72)),), dynamic_shapes=(axes,), strict=strict)
        assert sum("danet_kernels" in str(node.target) for node in program.graph.nodes) == 2
        for size in SIZES:
            for one, other in zip(program.module()(images(size)), model(images(size)), strict=True):
                assert torch.equal(one, other)


def test_a_module_that_was_swapped_itself():
    attention = networks("tramac")[1].head.pam
    program = export_program(attention, channels=WIDTH, size=(5, 6))
    x = torch.randn(1, WIDTH, 7, 4)
    with torch.no_grad():
        assert torch.equal(program.module()(x), attention(x))


# ---- ONNX


@pytest.mark.parametrize("opset", [20, 23])
def test_a_native_model_in_onnxruntime(opset, tmp_path):
    report = export_onnx(native(), tmp_path / "new" / "model.onnx", opset=opset)
    file = File(report.path)
    assert file.opsets == {"": opset}
    assert file.operators == report.operators
    if opset == 20:
        assert (file.operators["MatMul"], file.operators["Softmax"]) == (4, 2)
    else:
        assert file.operators["Attention"] == 2
    assert file.operators["Resize"] == 1  # and not what a bilinear upsampling consists of
    (given,), (logits,) = file.session.get_inputs(), file.session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, "height", "width"])
    assert (logits.name, logits.shape) == ("logits", ["batch", 5, "height", "width"])
    assert list(report.path.parent.iterdir()) == [report.path]
    assert 0 < report.error < 1e-5
    assert f"{report.error:.2g}" in str(report)
    compare(file, native(), [(1, 33, 71), (3, 64, 64), (1, 65, 40), (2, 64, 96)])


@pytest.mark.parametrize(("name", "opset"), [("mmsegmentation", 23), ("scar", 20)])
def test_a_swapped_network_in_onnxruntime(name, opset, tmp_path):
    """Against the network as its authors wrote it."""
    plain, model = networks(name)
    report = export_onnx(model, tmp_path / "model.onnx", size=(48, 72), opset=opset)
    expected = {"Attention": 2} if opset == 23 else {"MatMul": 4, "Softmax": 2}
    assert {name: report.operators[name] for name in report.operators if name in FORMS} == expected
    compare(File(report.path), plain, SIZES)


def test_a_network_in_fp16(tmp_path):
    plain, model = (copy.deepcopy(network).half() for network in networks("official"))
    file = File(export_onnx(model, tmp_path / "model.onnx", size=(48, 72)).path)
    assert file.operand_types("MatMul", "Softmax") == {"FLOAT"}
    compare(file, plain, SIZES, torch.float16)
    bright = 1000 * images(SIZES[0], torch.float16)
    assert not plain(bright)[0].isfinite().all()
    assert file(bright)[0].isfinite().all()


class Several(nn.Module):
    """Returns what networks of other projects return, and takes one number of channels more."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return {"main": self.convolution(x), "others": [x.mean(1), x]}


def test_several_outputs_and_a_fixed_size(tmp_path):
    (tmp_path / "model.onnx.data").touch()  # of a larger network, exported before
    report = export_onnx(Several(), tmp_path / "model.onnx", size=(1, 3), batch=1, channels=4, dynamic=False)
    assert report.outputs == ("logits_0", "logits_1", "logits_2")
    file, x = File(report.path), torch.randn(1, 4, 1, 3)
    assert file.session.get_inputs()[0].shape == [1, 4, 1, 3]
    torch.testing.assert_close(file(x)[1], x.mean(1))
    assert list(tmp_path.iterdir()) == [report.path]


def test_weights_beside_the_file(monkeypatch, tmp_path):
    """As torch.onnx puts them from 2 GiB on."""
    path, model = tmp_path / "model.onnx", Several()
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1)
    export_onnx(model, path, channels=4)
    assert {one.name for one in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    x = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(File(path)(x)[0], model(x)["main"])


def test_a_wrong_file_is_not_kept(monkeypatch, tmp_path):
    def slightly_wrong(**options):
        table = decompositions(**options)
        (operator,) = (one for one in table if "position" in str(one))

        def forward(query, *others):
            return right(1.01 * query, *others)

        right, table[operator] = table[operator], forward
        return table

    _, model = networks("official")
    monkeypatch.setattr("danet.export.decompositions", slightly_wrong)
    with pytest.raises(RuntimeError, match=r"the outputs in onnxruntime are wrong: largest error .* expected at most"):
        export_onnx(model, tmp_path / "model.onnx", size=(48, 72))
    assert not list(tmp_path.iterdir())


class Picky(nn.Module):
    """Works for one height."""

    def forward(self, x):
        return x + 1 if x.shape[2] == 64 else x


class OnlyFp32(nn.Module):
    def forward(self, x):
        return x @ torch.ones(96, 2)


def test_what_it_refuses(monkeypatch, tmp_path):
    path, model = tmp_path / "model.onnx", Several()
    with pytest.raises(ValueError, match="does not take this network; with dynamic=False it may"):
        export_onnx(Picky(), path)
    with pytest.raises(ValueError, match="opset must be 18 or later, got 17"):
        export_onnx(model, path, opset=17)
    with pytest.raises(ValueError, match="batch must be at least 2, got 1"):
        export_onnx(model, path, batch=1, channels=4)
    with pytest.raises(ValueError, match="height must be at least 1, got 0"):
        export_onnx(model, path, size=(0, 3), channels=4, dynamic=False)
    with pytest.raises(ValueError, match=r"expected size=\(height, width\), got None"):
        export_onnx(model, path, dynamic=False)
    with pytest.raises(RuntimeError, match="does not run in fp64"):
        export_onnx(OnlyFp32(), path, size=(64, 96), dynamic=False)
    with pytest.raises(RuntimeError, match="cannot run this file on the CPU"):
        export_onnx(copy.deepcopy(model).bfloat16(), path, channels=4)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf'{package} is not installed: pip install -e "\.\[onnx\]"'):
                export_onnx(model, path, channels=4)
    assert not path.exists()


def test_nan_is_no_small_error():
    assert not _largest([0.0, float("nan"), 1.0]) <= 10


@pytest.mark.slow
def test_the_page_about_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks("export.md")
    assert namespace["measure"](64, 96) >= 0
    # The table of docs/export.md: N and the bytes of the map, by the formula above it.
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    rows = table("image", page)
    assert len(rows) == 3
    for row in rows:
        height, width = (-(-int(side) // 8) for side in row["image"].split(" x "))
        positions = height * width
        assert row["N"] == f"{positions:,}"
        assert row["map, fp32"] == f"{4 * positions**2 / 2**20:,.0f} MiB"
