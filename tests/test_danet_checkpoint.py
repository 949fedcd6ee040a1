"""Files: our own, those of other projects and of ImageNet, told apart, converted, refused with every mismatch named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import randn

from danet import DANet, create_model
from danet.checkpoint import FORMATS, convert, detect, load
from danet.head import VARIANTS

FOREIGN = [name for name in FORMATS if name != "danet"]


def tiny(variant="danet", classes=3, seed=0, **options):
    """Every weight and statistic random, so that two that are exchanged show."""
    model = create_model(f"{variant}_tiny", classes, **{"inter_channels": 8, **options})
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (1.0 if "running_var" in name else 0.2) + 0.01)
    return model.eval()


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def image():
    return randn(1, 3, 24, 32, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_give_the_same_model(variant, tmp_path):
    model = tiny(variant, stem="deep", output_stride=16, multi_grid=(3,), align_corners=False, channel_variant="paper")
    model.to(memory_format=torch.channels_last)  # whose weights are not contiguous
    model.classes, model.palette = ("road", "sky", "car"), [(128, 64, 128), (70, 130, 180), (0, 0, 142)]
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    again = DANet.from_pretrained(tmp_path / "a" / "b", attention_backend="eager")
    assert not again.training
    assert same(model.state_dict(), again.state_dict())
    assert (again.classes, again.palette) == (model.classes, model.palette)
    assert again.config == model.config
    assert (again.backbone.stem, again.output_stride, again.align_corners) == ("deep", 16, False)
    torch.testing.assert_close(again(image()), model(image()))
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": "import os"}, "unknown option 'code'"),
        ({"a": 1, "b": 2}, "unknown option 'a'\n.*unknown option 'b'"),
        ({"num_classes": True}, "num_classes must be a whole number >= 1, got True"),
        ({"num_classes": 4}, r"shape of head.classifier.1.weight: \[3, 8, 1, 1\], the model has \[4, 8, 1, 1\]"),
        ({"inter_channels": 10**6}, "shape of head.classifier.1.weight"),
        ({"name": "os.system"}, "unknown model 'os.system'"),
        ({"name": ["danet_tiny"]}, "name must be a name"),
        ({"multi_grid": "448"}, "multi_grid must be a list of whole numbers"),
        ({"classes": ["road"]}, "classes must have 3 entries, one a class, got 1"),
        ({"palette": [[0, 0, 256]] * 3}, r"palette must be a list of \[red, green, blue\]"),
        ({"palette": [7] * 3}, r"palette must be a list of \[red, green, blue\]"),
    ],
)
def test_a_wrong_config_is_refused(change, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DANet.from_pretrained(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config.json"):
        DANet.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.pth"):
        load(tiny(), tmp_path / "none.pth")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        DANet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model.safetensors"):
        DANet.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        DANet.from_pretrained(tmp_path)
    config.write_text('{"classes": null}')
    with pytest.raises(ValueError, match=r"(?s)missing option 'name'.*missing option 'num_classes'"):
        DANet.from_pretrained(tmp_path)
    for content in (b"", b"no pickle at all", whole[:100]):
        (tmp_path / "damaged.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.pth is (not loaded|no readable file)"):
            load(tiny(), tmp_path / "damaged.pth")


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    first, second = tiny(seed=1), tiny(seed=2)
    first.save_pretrained(tmp_path)

    def fail(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        second.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert same(DANet.from_pretrained(tmp_path).state_dict(), first.state_dict())


def test_only_models_by_name_can_be_saved(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="only models of create_model"):
        DANet(model.backbone, model.head).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Malicious:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new_format", [False, True])
def test_a_malicious_pickle_is_refused(new_format, tmp_path):
    model, proof = tiny(), tmp_path / "proof"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for content in (Malicious(proof), {"state_dict": model.state_dict(), "epoch": Malicious(proof)}):
        torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(ValueError, match="holds Python objects besides tensors"):
            load(model, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="holds Python objects besides tensors"):
            create_model("fcn_tiny", 3, backbone_weights=tmp_path / "bad.pth")
    assert not proof.exists()
    assert same(model.state_dict(), before)
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert proof.exists()  # so it would have


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("stem", ["plain", "deep", "v1c"])
def test_every_format_there_and_back(kind, stem):
    model = tiny(stem=stem)
    state = model.state_dict()
    theirs = convert(state, kind)
    assert detect(theirs) == kind
    assert len(theirs) == len(state)
    assert same(convert(theirs, "danet"), state)
    other = tiny(stem=stem, seed=1)
    assert load(other, theirs) == kind
    assert torch.equal(other(image()), model(image()))


def test_names_of_the_formats():
    """Spelled out, since a wrong name would survive the way there and back."""
    state = tiny(stem="v1c").state_dict()
    official = set(convert(state, "official"))
    assert {f"head.conv5{branch}.{part}" for branch in "ac" for part in ("0.weight", "1.running_var")} <= official
    assert {f"head.sa.{name}_conv.bias" for name in ("query", "key", "value")} <= official
    assert {"head.sa.gamma", "head.sc.gamma", "head.conv51.0.weight", "head.conv52.1.bias"} <= official
    assert {f"head.conv{number}.1.{part}" for number in (6, 7, 8) for part in ("weight", "bias")} <= official
    assert {"pretrained.conv1.0.weight", "pretrained.layer4.0.downsample.1.running_mean"} <= official
    mmseg = convert(state, "mmsegmentation")
    assert {f"backbone.stem.{index}.weight" for index in (0, 1, 3, 4, 6, 7)} <= set(mmseg)
    assert {f"decode_head.{name}.conv.weight" for name in ("pam_in_conv", "cam_out_conv")} <= set(mmseg)
    assert {f"decode_head.pam.{name}_project.weight" for name in ("query", "key", "value")} <= set(mmseg)
    assert {f"decode_head.{name}conv_seg.bias" for name in ("", "pam_", "cam_")} <= set(mmseg)
    assert mmseg["decode_head.pam.gamma.scale"].shape == mmseg["decode_head.cam.gamma.scale"].shape == ()
    assert "backbone.layer1.0.bn1.weight" in mmseg
    assert "backbone.bn1.weight" in convert(tiny().state_dict(), "mmsegmentation")
    tramac = set(convert(state, "tramac"))
    assert {"head.pam.alpha", "head.cam.beta", "head.pam.conv_b.weight", "head.pam.conv_d.bias"} <= tramac
    assert {"head.conv_p1.0.weight", "head.conv_c2.1.bias", "head.conv_p3.1.weight", "head.out.1.bias"} <= tramac


# Ours, the authors', mmsegmentation's, Tramac's: what would still have the right shape if two were exchanged.
MEANINGS = (
    ("position_in.0", "head.conv5a.0", "pam_in_conv.conv", "head.conv_p1.0"),
    ("position_in.1", "head.conv5a.1", "pam_in_conv.bn", "head.conv_p1.1"),
    ("position_attention.query_conv", "head.sa.query_conv", "pam.query_project", "head.pam.conv_b"),
    ("position_attention.key_conv", "head.sa.key_conv", "pam.key_project", "head.pam.conv_c"),
    ("position_out.0", "head.conv51.0", "pam_out_conv.conv", "head.conv_p2.0"),
    ("channel_in.0", "head.conv5c.0", "cam_in_conv.conv", "head.conv_c1.0"),
    ("channel_out.0", "head.conv52.0", "cam_out_conv.conv", "head.conv_c2.0"),
    ("position_classifier.1", "head.conv6.1", "pam_conv_seg", "head.conv_p3.1"),
    ("channel_classifier.1", "head.conv7.1", "cam_conv_seg", "head.conv_c3.1"),
    ("classifier.1", "head.conv8.1", "conv_seg", "head.out.1"),
)


def test_nothing_is_exchanged():
    state = tiny().state_dict()
    for column, kind in enumerate(FOREIGN, start=1):
        theirs = convert(state, kind)
        for row in MEANINGS:
            name = f"decode_head.{row[column]}" if kind == "mmsegmentation" else row[column]
            assert torch.equal(theirs[f"{name}.weight"], state[f"head.{row[0]}.weight"]), name
    gammas = (("sa.gamma", "pam.gamma.scale", "pam.alpha"), ("sc.gamma", "cam.gamma.scale", "cam.beta"))
    for branch, names in zip(("position", "channel"), gammas, strict=True):
        for kind, name in zip(FOREIGN, names, strict=True):
            prefix = "decode_head" if kind == "mmsegmentation" else "head"
            assert convert(state, kind)[f"{prefix}.{name}"].item() == state[f"head.{branch}_attention.gamma"].item()


@pytest.mark.parametrize("old_file", [False, True])
def test_the_authors_file(old_file, tmp_path):
    """All of a training run, with a score of numpy, a classifier of ImageNet and, if old, no counters of BatchNorm."""
    model = tiny()
    state = convert(model.state_dict(), "official")
    state |= {"pretrained.fc.weight": torch.zeros(10, 128), "pretrained.fc.bias": torch.zeros(10)}
    if old_file:
        state = {f"module.{name}": value for name, value in state.items() if "num_batches_tracked" not in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = {"epoch": 240, "state_dict": state, "optimizer": optimizer.state_dict(), "best_pred": np.float64(0.88)}
    path = tmp_path / "DANet101.pth.tar"
    torch.save(run, path, _use_new_zipfile_serialization=not old_file)
    other = tiny(seed=1)
    assert load(other, path) == "official"
    assert torch.equal(other(image()), model(image()))
    assert detect(state) == "official"
    assert not any("fc" in name for name in convert(state, "danet"))


def test_mmsegmentation_file(tmp_path):
    model = tiny(stem="v1c")
    state = convert(model.state_dict(), "mmsegmentation") | {"auxiliary_head.conv_seg.weight": torch.zeros(3, 4, 1, 1)}
    torch.save({"meta": {"CLASSES": ("road",), "epoch": 1}, "state_dict": state}, tmp_path / "mmseg.pth")
    other = tiny(stem="v1c", seed=1)
    with pytest.warns(UserWarning, match="left out 1 weights of auxiliary_head"):
        assert load(other, tmp_path / "mmseg.pth") == "mmsegmentation"
    assert torch.equal(other(image()), model(image()))


def test_our_own_files(tmp_path):
    model = tiny("fcn")
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for path in (tmp_path / "saved", str(tmp_path / "weights.pt")):
        other = tiny("fcn", seed=1)
        assert load(other, path) == "danet"
        assert same(other.state_dict(), model.state_dict())


def test_every_mismatch_is_in_one_message():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = convert(tiny(classes=4, seed=1).state_dict(), "official")
    state["head.sa.extra.weight"] = torch.zeros(1)
    del state["head.conv51.0.weight"], state["pretrained.layer2.0.conv1.weight"]
    with pytest.raises(
        ValueError, match="trained for 4 classes, the model is for 3: create it with num_classes=4"
    ) as e:
        load(model, state)
    lines = str(e.value).splitlines()[1:]
    assert [line.strip() for line in lines if "shape" not in line] == [
        "missing: backbone.layer2.0.conv1.weight",
        "missing: head.position_out.0.weight",
        "not in the model: head.sa.extra.weight",
    ]
    assert "  shape of head.classifier.1.weight: [4, 8, 1, 1], the model has [3, 8, 1, 1]" in lines
    assert len([line for line in lines if "shape" in line]) == 6
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("kind", FORMATS)
def test_another_stem_is_one_clear_line(kind):
    state = convert(tiny(stem="plain", classes=4).state_dict(), kind)
    with pytest.raises(ValueError, match=r"has the stem 'plain'.*the model has 'deep'.*with stem='plain'$"):
        load(tiny(stem="deep"), state)
    with pytest.raises(ValueError, match=r"has the stem 'v1c'.*the model has 'deep'.*with stem='v1c'$"):
        load(tiny(stem="deep"), convert(tiny(stem="v1c").state_dict(), kind))


@pytest.mark.parametrize("to", FOREIGN)
def test_what_has_no_name_in_a_format(to):
    with pytest.raises(ValueError, match=r"(?s)no name in the format.*\n  head.fcn_in.0.weight\n"):
        convert(tiny("fcn").state_dict(), to)
    with pytest.raises(ValueError, match=r"no name in the format.*\n  head.new.weight$"):
        convert(convert(tiny().state_dict(), "official") | {"head.new.weight": torch.zeros(1)}, to)
    with pytest.raises(ValueError, match="unknown format 'onnx', expected one of 'danet', "):
        convert({}, "onnx")


def test_what_is_no_danet():
    with pytest.raises(ValueError, match="but of a backbone alone, load it with backbone_weights"):
        load(tiny(), tiny().backbone.state_dict())
    with pytest.raises(ValueError, match=r"but of no DANet; the first names are encoder.weight"):
        detect({"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="epoch is no tensor"):
        load(tiny(), {"epoch": 3})
    with pytest.raises(ValueError, match="holds no state dict"):
        load(tiny(), {})


@pytest.mark.parametrize("stem", ["plain", "deep", "v1c"])
def test_imagenet_weights_load_by_name(stem, tmp_path):
    """torchvision's names, with its classifier; timm's are the same."""
    source = tiny(stem=stem).backbone
    state = source.state_dict() | {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "resnet.pth")
    save_file(state, tmp_path / "resnet.safetensors")
    assert load_file(tmp_path / "resnet.safetensors").keys() == state.keys()
    for weights in (state, tmp_path / "resnet.pth", str(tmp_path / "resnet.safetensors")):
        model = create_model("danet_tiny", 3, stem=stem, backbone_weights=weights)
        assert same(model.backbone.state_dict(), source.state_dict())


def test_imagenet_weights_that_do_not_fit():
    state = tiny().backbone.state_dict()
    with pytest.raises(
        ValueError, match=r"has the stem 'plain'.*the model has 'deep'.*create the model with stem='plain'"
    ):
        create_model("fcn_tiny", 3, stem="deep", backbone_weights=state)
    with pytest.raises(ValueError, match=r"(?s)missing: layer1.1.conv1.weight.*shape of conv1.weight: \[32, 3, 7, 7\]"):
        create_model("fcn_resnet18", 3, backbone_weights=state)


def test_torchvision_names_of_resnet50():
    """A sample, and how many there are besides the two of the classifier."""
    with torch.device("meta"):
        names = list(create_model("fcn_resnet50", 3).backbone.state_dict())
    assert names[:6] == [
        "conv1.weight",
        *(f"bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
        "bn1.num_batches_tracked",
    ]
    assert {"layer1.0.downsample.0.weight", "layer3.5.conv3.weight", "layer4.2.bn3.bias"} <= set(names)
    assert len(names) == 320 - 2
