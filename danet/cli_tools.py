"""Commands of the command line that go with no data set: each has its options and its function (cli.py)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def add_tools(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands by `add(name, function, purpose, example)`."""
    _quickstart_options(add("quickstart", _quickstart, "train four small models on drawn scenes: a first look", ""))
    _convert_options(
        add("convert", _convert, "rewrite a checkpoint with another project's names", "danet convert IN.pth OUT.pth")
    )
    _prepare_options(add("prepare", _prepare, "check a data set and make it ready", "danet prepare voc data --sbd SBD"))
    _swap_report_options(
        add(
            "swap-report",
            _swap_report,
            "what swap would gain in a network of yours",
            "danet swap-report my.models:danet --crop 1024x2048",
        )
    )
    add("models", _models, "names of models, recipes and data sets", "danet models")


def _convert_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="IN", help="checkpoint; its format is recognised")
    command.add_argument("target", metavar="OUT", help=".safetensors, or .pth for torch.save")
    command.add_argument("--to", default="danet", help="danet (default), official, mmsegmentation or tramac")


def _convert(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .checkpoint import convert, detect, read, write

    state = read(args.source)
    found = detect(state)
    write(convert(state, args.to), Path(args.target))
    print(f"{args.source} ({found}) -> {args.target} ({args.to})")
    return 0


def _prepare_options(command: argparse.ArgumentParser) -> None:
    names = "cityscapes, voc, context, coco-stuff, folder; or street-scenes, which are drawn"
    command.add_argument("name", metavar="NAME", help=names)
    command.add_argument("root", metavar="ROOT", help="folder of the data set")
    command.add_argument("--sbd", help="voc: folder of SBD, whose masks are written as PNG")
    command.add_argument("--annotations", help="context: folder of the .mat files with 459 labels")
    group = command.add_argument_group("street-scenes")
    group.add_argument("--train", type=int, default=400, help="number of scenes; default: %(default)s")
    group.add_argument("--val", type=int, default=100, help="default: %(default)s")
    group.add_argument("--size", type=int, nargs=2, default=(128, 256), metavar=("HEIGHT", "WIDTH"))
    group.add_argument("--seed", type=int, default=0)


def _prepare(args: argparse.Namespace) -> int:
    from .data import prepare
    from .data.street_scenes import write_street_scenes

    if args.name == "street-scenes":
        height, width = args.size
        write_street_scenes(args.root, args.train, args.val, height=height, width=width, seed=args.seed)
        print(f"{args.train} scenes to train on and {args.val} to validate on are in {args.root}")
        return 0
    print("\n".join(prepare(args.name, args.root, sbd=args.sbd, annotations=args.annotations)))
    return 0


def _models(args: argparse.Namespace) -> int:
    from .data import DATASETS
    from .model import list_models
    from .recipes import RECIPES

    for title, names in (("models", list_models()), ("recipes", RECIPES), ("data sets", DATASETS)):
        print(f"{title}:", *names, sep="\n  ")
    return 0


def _quickstart_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", "-o", default="quickstart", help="folder for all it makes; default: %(default)s")
    command.add_argument("--seeds", type=int, default=1, help="runs of each model, to see the spread; default: 1")
    command.add_argument("--steps", type=int, help="of each run; fewer: sooner done, less learnt")
    command.add_argument("--amp", default="off", help="mixed precision: off (default) or bf16")


def _quickstart(args: argparse.Namespace) -> int:
    from .quickstart import quickstart

    print(quickstart(args.output, seeds=args.seeds, steps=args.steps, amp=args.amp))
    return 0


def _swap_report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("factory", metavar="MODULE:FACTORY", help="what makes the network, such as my.models:danet")
    command.add_argument("--arguments", default="{}", metavar="JSON", help='such as {"num_classes": 19}')
    command.add_argument("--crop", default="1024x2048", help="size of the image to report on; default: %(default)s")
    command.add_argument("--fold", action="store_true", help="for inference: fold the projections too")


def _swap_report(args: argparse.Namespace) -> int:
    import json
    import re

    from .swapping import swap

    size = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", args.crop)
    if size is None:
        raise ValueError(f"--crop: {args.crop!r} is no size, expected HEIGHTxWIDTH such as 1024x2048")
    try:
        arguments = json.loads(args.arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f"--arguments: {args.arguments!r} is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"--arguments: expected a JSON object, got {args.arguments!r}")
    model = _made(args.factory, arguments)
    print(swap(model.eval(), dry_run=True, fold=args.fold, crop=(int(size[1]), int(size[2]))))
    return 0


def _made(factory: str, arguments: dict[str, Any]) -> nn.Module:
    """The network that MODULE:FACTORY makes; modules of the working directory are found too, as by python -m."""
    import sys
    from importlib import import_module

    from torch import nn

    module, separator, name = factory.partition(":")
    if not (module and separator and name):
        raise ValueError(f"{factory!r} is no factory, expected MODULE:FACTORY such as my.models:danet")
    if "" not in sys.path:
        sys.path.insert(0, "")
    made: Any = import_module(module)
    for part in name.split("."):
        if not hasattr(made, part):
            raise ValueError(f"{module} has no {name}")
        made = getattr(made, part)
    if not isinstance(made, nn.Module):
        try:
            made = made(**arguments)
        except TypeError as error:
            raise ValueError(f"{factory}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{factory} made a {type(made).__name__}, no torch.nn.Module")
    return made
