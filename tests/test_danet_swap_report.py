"""The report of swap: its table, what it says is saved, and `danet swap-report`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from swap_families import WIDTH, CAM_Module, PAM_Module, network
from swap_look_alikes import ChannelAttention
from torch import nn

from danet import cli, find_attention, swap
from danet_kernels import memory_estimate


def run(*arguments):
    return cli.main(["swap-report", *map(str, arguments)])


def test_savings_are_those_of_the_estimates_at_the_size_of_the_features():
    report = swap(network("official"), crop=(400, 720))
    for one, channels in zip(report.found, (4, None), strict=True):
        assert one.shape == (1, WIDTH, 50, 90)  # features at an eighth
        for training, saved in zip((False, True), one.saved, strict=True):
            options = {"training": training, "query_channels": channels}
            eager, ours = (
                memory_estimate(one.op, one.shape, backend=name, **options).total for name in ("eager", "auto")
            )
            assert saved == eager - ours
    position = report.found[0].saved
    assert position[0] > 2 * 4 * (50 * 90) ** 2 * 0.9  # maps in fp32
    assert position[1] > position[0]
    assert f"{position[0] / 2**20:.0f} MiB" in str(report)
    assert "one image of 400 x 720 pixels, by estimate" in str(report)
    assert [one.widths for one in report.found] == [(WIDTH, 4), (WIDTH, None)]


def test_the_network_is_shown_no_numbers():
    """Its statistics, hooks and modes are not touched, and no copy of its weights is made."""
    model = network("official")
    seen = []
    model.backbone.register_forward_hook(lambda *_: seen.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    swap(model, dry_run=True)
    assert not seen
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_network_that_cannot_be_shown_an_image_is_reported_without_savings():
    class Needy(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = PAM_Module(WIDTH)

        def forward(self, x, annotations):
            return self.attention(x)

    report = swap(Needy())
    assert report.swapped
    assert report.found[0].saved is None
    assert "unknown: the network cannot be run on a tensor [1, 16, 1024, 2048] without numbers" in str(report)
    assert "annotations" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_shown_half_precision(dtype):
    report = swap(network("official").to(dtype), dry_run=True)
    assert report.found[0].shape == (1, WIDTH, 128, 256)
    assert report.found[0].saved[0] > 2**30


def test_wrappers_of_parallel_training_are_taken_off():
    report = swap(nn.DataParallel(network("official")), dry_run=True)
    assert [one.saved is not None for one in report.found] == [True, True]


def test_a_module_that_is_called_twice_counts_where_it_is_largest():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = CAM_Module(WIDTH)
            self.first, self.second = nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(WIDTH, WIDTH, 4, 4)

        def forward(self, x):
            return self.attention(self.second(self.attention(self.first(x))))

    assert swap(Twice()).found[0].shape == (1, WIDTH, 128, 256)


def test_a_head_made_before_its_backbone_does_not_set_the_channels():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            inner = network("official")
            self.head, self.backbone = inner.head, inner.backbone

        def forward(self, x):
            return self.head(self.backbone(x))

    assert swap(Reversed()).found[0].saved is not None


def test_a_head_alone_is_no_network_to_show_an_image():
    report = swap(network("official").head)
    assert report.found[0].saved is None
    assert "attention sees the image at its full size" in str(report)


def test_modules_that_are_left_alone_save_nothing():
    model = network("official")
    model.head.sa.softmax = nn.Sigmoid()
    assert [one.saved is None for one in swap(model).found] == [True, False]


def test_without_a_crop_nothing_is_said_of_savings():
    text = str(swap(network("official"), crop=None))
    assert "saves" not in text
    assert len({len(re.split("  +", line)) for line in text.splitlines()[1:]}) == 1


def test_dozens_of_look_alikes_take_one_line():
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), *(ChannelAttention() for _ in range(20)), CAM_Module(WIDTH))
    report = swap(model)
    assert len(report.found) == 21
    assert "1 and 19 more" in str(report)
    assert len(str(report).splitlines()) == 4


def test_finding_changes_nothing():
    model = network("tramac")
    classes = [type(module) for module in model.modules()]
    found = find_attention(model)
    assert [(one.path, one.op, one.by) for one in found] == [
        ("head.pam", "position_attention", "name"),
        ("head.cam", "channel_attention", "name"),
    ]
    assert [type(module) for module in model.modules()] == classes


def test_the_command(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert run("swap_families:network", "--arguments", '{"name": "mmsegmentation"}', "--crop", "400x720") == 0
    out = capsys.readouterr().out
    assert out.count("would swap") == 2
    assert "head.pam" in out
    assert "one image of 400 x 720 pixels" in out
    assert run("swap_families:network", "--arguments", '{"name": "scar"}', "--fold") == 0
    assert "folded" in capsys.readouterr().out


def test_the_command_finds_modules_of_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\n\nclass Models:\n    plain = torch.nn.Conv2d(3, 4, 1)\n")
    command = [sys.executable, "-m", "danet", "swap-report", "mine:Models.plain"]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=True)
    assert "nothing is changed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swap_families"], "'swap_families' is no factory, expected MODULE:FACTORY"),
        (["nowhere_to_be_found:x"], "No module named 'nowhere_to_be_found'"),
        (["swap_families:missing"], "swap_families has no missing"),
        (["swap_families:FAMILIES.keys"], "swap_families:FAMILIES.keys made a dict_keys, no torch.nn.Module"),
        (["swap_families:DANetHead", "--crop", "large"], "--crop: 'large' is no size, expected HEIGHTxWIDTH"),
        (["swap_families:DANetHead", "--crop", "0x8"], "--crop: '0x8' is no size, expected HEIGHTxWIDTH"),
        (["swap_families:network", "--arguments", '{"nme": 1}'], "swap_families:network: network() got an unexpected"),
        (["swap_families:DANetHead", "--arguments", "{"], "--arguments: '{' is no JSON"),
        (["swap_families:DANetHead", "--arguments", "[1]"], "--arguments: expected a JSON object, got '[1]'"),
    ],
)
def test_what_the_command_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert run(*arguments) == 2
    assert f"danet swap-report: {message}" in capsys.readouterr().err
