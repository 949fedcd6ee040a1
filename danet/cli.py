"""The command line. What a command needs is imported when it runs, so that help comes at once."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import SegmentationDataset
    from .model import DANet

DATASETS = ("cityscapes", "voc", "context", "coco-stuff", "folder", "street-scenes")
NAMED_CLASSES = ("cityscapes", "voc", "context", "coco-stuff")
MODES = ("official", "mmseg", "probability")
FORMATS = ("danet", "official", "mmsegmentation", "tramac")
CONTEXT_MODES = ("59", "60", "59-reported")
STEMS = ("plain", "deep", "v1c")

_SPLITS = {"voc": ("train_aug", "val"), "coco-stuff": ("train", "test")}  # for training and validation
_EXTRAS = {"PIL": "model", "safetensors": "model", "scipy": "mat"}  # of the package, by the module it brings
STOPPED, INTERRUPTED = 143, 130  # exit statuses, as of a process ended by SIGTERM or SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done; 1: some images failed; 2: something the user can mend, said in one line on stderr; 130: Ctrl-C;
    143: training was stopped by a signal, and is saved. Mistakes of ours raise, with their traceback.
    """
    args = make_parser().parse_args(argv)
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"danet {args.command}: warning: {message}\n"
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        print(f"danet {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module.startswith("danet"):  # no package is missing
            raise
        hint = f': pip install "danet-kernels[{_EXTRAS[module]}]"' if module in _EXTRAS else ""
        print(f"danet {args.command}: {error}{hint}", file=sys.stderr)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"danet {args.command}: {error}", file=sys.stderr)
    finally:
        warnings.formatwarning = before
    return 2


def make_parser() -> argparse.ArgumentParser:
    """Options that are not given are absent from the result: then the defaults of the functions hold."""
    parser = argparse.ArgumentParser(
        prog="danet",
        description="DANet: train, evaluate and use it. `danet COMMAND --help` explains a command.",
        epilog="first steps: danet quickstart",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, run, add_options, about, example in _COMMANDS:
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"example: danet {name} {example}",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        add_options(command)
        command.set_defaults(run=run)
    return parser


# Options


def _train_options(parser: argparse.ArgumentParser) -> None:
    _dataset_options(parser)
    parser.add_argument("--split", help="what to learn from (default: train; voc: train_aug; of a folder, all: all)")
    parser.add_argument("--val-split", help="what to validate on; none: no validation (default: val; coco-stuff: test)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run: log, checkpoints, models")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="danet_resnet50", help="`danet models` lists them (default: %(default)s)")
    _model_options(group)
    group.add_argument("--stem", choices=STEMS, help="first layers of the ResNet (default: plain)")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--backbone-weights", type=Path, metavar="FILE", help="of torchvision's or timm's ResNet")
    weights.add_argument(
        "--init", type=Path, metavar="MODEL", help="fine-tune this model folder or checkpoint; other classes start anew"
    )

    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", help="`danet models` lists them (default: that of the data set; folder: voc)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N")
    length.add_argument("--steps", type=int, metavar="N", help="instead of epochs")
    group.add_argument("--batch-size", type=int, metavar="N", help="images a step, on all devices together")
    group.add_argument("--learning-rate", type=float, metavar="RATE")
    group.add_argument("--crop", dest="crop_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    group.add_argument("--base-size", type=int, metavar="N", help="shorter side at scale 1, in pixels")
    group.add_argument("--scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of random sizes")

    group = parser.add_argument_group("run")
    _device_option(group)
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), help="mixed precision (default: off)")
    group.add_argument("--accumulate", type=int, metavar="N", help="parts that a step is done in, to save memory")
    group.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: 0)")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument("--resume", action="store_true", help="go on with the run in --output")
    group.add_argument("--keep", type=int, metavar="N", help="checkpoints to keep (default: 2)")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="between checkpoints (default: an epoch)")
    group.add_argument("--validate-every", type=int, metavar="EPOCHS", help="between validations (default: 1)")
    group.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _trained_model_options(parser)
    _dataset_options(parser)
    parser.add_argument("--split", help="what to evaluate on (default: val; coco-stuff: test; of a folder, all: all)")
    _score_options(parser, "768 for cityscapes, 1024 with several scales; else whole")
    parser.add_argument("--max-images", type=int, metavar="N", help="only the first so many")
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    _device_option(parser)


def _predict_options(parser: argparse.ArgumentParser) -> None:
    _trained_model_options(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an image, or a folder of images")
    parser.add_argument("--output", type=Path, required=True, help="folder for masks, overlays and the legend")
    parser.add_argument("--label-ids", action="store_true", help="masks in Cityscapes' labelIds, as its server takes")
    _score_options(parser, "whole")
    _device_option(parser)


def _attention_options(parser: argparse.ArgumentParser) -> None:
    _trained_model_options(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--points", type=_point, nargs="+", metavar="X,Y", help="in pixels (default: the middle)")
    parser.add_argument("--channels", type=int, nargs="+", metavar="N", help="default: the two that vary most")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="MODEL", help="draw results of these beside it")
    parser.add_argument("--truth", type=Path, metavar="MASK", help="class numbers, or Cityscapes' *_labelIds.png")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    _device_option(parser)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a checkpoint of any format, or a model folder")
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="*.pth, *.pth.tar, *.pt or *.safetensors; else a model folder"
    )
    parser.add_argument("--to", choices=FORMATS, default="danet", help="format of OUT (default: %(default)s)")
    _file_options(parser)


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("root", type=Path, metavar="ROOT", help="where it lies; for street-scenes: a new folder")
    parser.add_argument("--sbd", type=Path, help="voc: the folder of SBD")
    parser.add_argument("--annotations", type=Path, help="context: the folder of the .mat files")
    group = parser.add_argument_group("street-scenes, which are drawn")
    group.add_argument("--train", type=int, metavar="N", help="scenes (default: 400)")
    group.add_argument("--val", type=int, metavar="N", help="scenes (default: 100)")
    group.add_argument("--height", type=int, metavar="PIXELS", help="default: 128")
    group.add_argument("--width", type=int, metavar="PIXELS", help="at least twice the height (default: 256)")
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")


def _models_options(parser: argparse.ArgumentParser) -> None:
    del parser  # none


def _quickstart_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("danet-quickstart"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of every variant (default: 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="of each run (default: 300)")
    parser.add_argument("--fp32", action="store_true", help="not bf16, where the CPU has it")


def _dataset_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument("--data", choices=DATASETS, required=True, metavar="NAME", help=", ".join(DATASETS))
    group.add_argument("--root", type=Path, required=True, help="where it lies")
    group.add_argument("--sbd", type=Path, help="voc: the folder of SBD")
    group.add_argument("--context-mode", choices=CONTEXT_MODES, help="context: its classes (default: 59)")


def _trained_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trained", type=Path, metavar="MODEL", help="a model folder, or a file of weights")
    _file_options(parser)


def _file_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model, if it is a file of weights")
    group.add_argument("--model", help="its name; `danet models` lists them")
    _model_options(group)
    group.add_argument("--classes-of", choices=NAMED_CLASSES, help="names and colours of the classes")


def _model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output-stride", type=int, choices=(8, 16, 32), help="default: 8")
    group.add_argument(
        "--multi-grid", type=int, nargs="+", metavar="N", help="dilations of the last stage; 4 8 16: the authors' model"
    )
    group.add_argument("--channel-variant", choices=("official", "paper"), help="sign in channel attention")
    group.add_argument(
        "--no-align-corners", dest="align_corners", action="store_false", help="as some mmsegmentation's"
    )


def _score_options(parser: argparse.ArgumentParser, crop: str) -> None:
    group = parser.add_argument_group("how scores come about")
    group.add_argument("--mode", choices=MODES, help="how views are fused (default: official)")
    group.add_argument("--scales", type=_scale, nargs="+", metavar="SCALE", help="sizes; paper: its eight (default: 1)")
    group.add_argument("--crop", type=_crop, metavar="N", help=f"side of the windows; whole: none (default: {crop})")
    group.add_argument("--stride", type=int, metavar="N", help="from window to window (default: about 2/3 of the crop)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror images too; official always does")
    group.add_argument("--base", type=int, metavar="N", help="long side at scale 1 (default: the image's own)")
    group.add_argument("--batch", type=int, metavar="N", help="windows at once (default: 1)")


def _device_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", type=_device, default="auto", help="cpu, cuda or cuda:1 (default: a GPU, if any)")


def _crop(text: str) -> int | None:
    return None if text in ("whole", "none") else int(text)


def _scale(text: str) -> float | str:
    return text if text == "paper" else float(text)


def _point(text: str) -> tuple[int, int]:
    x, y = text.split(",")
    return int(x), int(y)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError
    return text


for _type, _name in ((_crop, "size"), (_scale, "scale"), (_point, "point X,Y"), (_device, "device")):
    _type.__name__ = _name  # in argparse's messages


# Commands


def _train(args: argparse.Namespace) -> int:
    import torch

    from .distributed import process_group, rank_and_world
    from .model import create_model
    from .recipes import RECIPES, find_recipe
    from .train import train

    first, second = _SPLITS.get(args.data, ("train", "val"))
    wanted = getattr(args, "val_split", second)
    with process_group(_found_device(args)) as device:
        dataset = _dataset(args, getattr(args, "split", first))
        validation = None if wanted == "none" else _dataset(args, wanted)
        changes = _given(args, "epochs", "steps", "batch_size", "learning_rate", "crop_size", "base_size", "scale")
        changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
        name = getattr(args, "recipe", args.data if args.data in RECIPES else "voc")
        recipe = find_recipe(name, args.model.partition("_")[0], **changes)
        torch.manual_seed(args.seed)
        model = create_model(
            args.model,
            len(dataset.classes),
            **_given(args, *_MODEL_OPTIONS, "stem", "gradient_checkpointing", "backbone_weights"),
        )
        model.classes, model.palette = dataset.classes, dataset.palette
        if "init" in args:
            _initialise(model, args.init)
        leads = rank_and_world()[0] == 0
        if leads:
            print(f"{args.model}, {len(dataset.classes)} classes, {len(dataset)} images, on {device}\n{recipe}")
        options = ("amp", "accumulate", "workers", "seed", "resume", "keep", "save_every", "validate_every")
        result = train(
            model,
            dataset,
            recipe,
            args.output,
            validation=validation,
            device=device,
            **_given(args, *options, "tensorboard"),
        )
    if not leads:
        return 0 if result.finished else STOPPED
    if not result.finished:
        print(f"danet train: stopped by a signal after step {result.steps}, saved; --resume goes on", file=sys.stderr)
        return STOPPED
    score = "" if result.mean_iou is None else f", mIoU {result.mean_iou:.2%}, at best {result.best_mean_iou:.2%}"
    print(f"{result.steps} steps done{score}; the model is in {args.output / 'last'}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from .data.images import write_image
    from .distributed import process_group, rank_and_world
    from .evaluate import evaluate
    from .metrics import confusion_picture

    options = _scores(args)
    if "crop" not in options:
        several = len(options.get("scales", ())) > 1
        options["crop"] = (1024 if several else 768) if args.data == "cityscapes" else None
    with process_group(_found_device(args)) as device:
        dataset = _dataset(args, getattr(args, "split", _SPLITS.get(args.data, ("train", "val"))[1]))
        model = _model(args.trained, args)
        matrix = evaluate(model, dataset, device=device, **_given(args, "max_images"), **options)
        if rank_and_world()[0] != 0:
            return 0
    said = ", ".join(f"{name} {'whole' if value is None else value}" for name, value in options.items())
    print(f"{args.trained} on {args.root}: {said}")
    print(matrix.table(dataset.classes, getattr(dataset, "background_counts_as_zero", False)))
    if "confusion" in args:
        write_image(args.confusion, confusion_picture(matrix, dataset.classes))
    return 0


def _predict(args: argparse.Namespace) -> int:
    from .distributed import process_group
    from .predict import predict

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    with process_group(_found_device(args)) as device:
        report = predict(
            _model(args.trained, args),
            args.paths,
            args.output,
            device=device,
            progress=progress,
            **_given(args, "label_ids"),
            **({"crop": None} | _scores(args)),
        )
    print(report)
    return 1 if report.failures else 0


def _attention(args: argparse.Namespace) -> int:
    from .data.images import read_image, write_image
    from .distributed import process_group
    from .visualize import attention_panel, channel_attention_report, compare_panel

    if "compare" in args and ("points" in args or "channels" in args):
        raise ValueError("--compare draws results alone; leave out --points and --channels")
    image = read_image(args.image)  # uint8 [H, W, 3]
    truth = _truth(args.truth) if "truth" in args else None
    with process_group(_found_device(args)) as device:
        models = [_model(path, args).to(device) for path in (args.trained, *getattr(args, "compare", ()))]
        model = models[0]
        if "compare" in args:
            captions = _captions(models, [args.trained, *args.compare])
            picture = compare_panel(list(zip(captions, models, strict=True)), image, truth)
        else:
            middle = [(image.shape[1] // 2, image.shape[0] // 2)] if hasattr(model.head, "position_attention") else []
            points = getattr(args, "points", middle)
            picture = attention_panel(model, image, points, truth=truth, **_given(args, "channels"))
        write_image(args.output, picture)
        if hasattr(model.head, "channel_attention") and "compare" not in args:
            print(channel_attention_report(model, image))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoint import convert, detect, read

    source, target = args.source, args.target
    if target.exists():
        raise FileExistsError(f"{target} is there already; choose another name")
    state = read(_weights_file(source))
    kind = detect(state)
    if target.suffix in (".pth", ".pt", ".tar", ".safetensors"):
        _write_weights(convert(state, args.to), target, args.to)
    elif args.to == "danet":
        _model(source, args).save_pretrained(target)
    else:
        raise ValueError(f"{target}: weights of the format {args.to!r} need a file name, such as {target}.pth")
    print(f"{source} ({kind}) -> {target} ({args.to})")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from .data import open_dataset, prepare
    from .data.street_scenes import write_street_scenes

    drawing = _given(args, "train", "val", "height", "width", "seed")
    steps = _given(args, "sbd", "annotations")
    if args.name != "street-scenes":
        if drawing:
            raise ValueError(f"--{next(iter(drawing))} is for street-scenes, not for {args.name}")
        lines = prepare(args.name, args.root, **steps)
    else:
        if steps:
            raise ValueError(f"--{next(iter(steps))} is not for street-scenes")
        write_street_scenes(args.root, **drawing)
        counts = [f"{len(open_dataset('street-scenes', args.root, split))} {split}" for split in ("train", "val")]
        lines = [f"{args.root}: {' and '.join(counts)} scenes, in Cityscapes' layout"]
    print("\n".join(lines))
    return 0


def _models(args: argparse.Namespace) -> int:
    from .model import list_models
    from .recipes import RECIPES

    for title, names in (("models, for --model:", list_models()), ("recipes, for --recipe:", RECIPES)):
        print("\n  ".join([title, *names]))
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from .quickstart import quickstart

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    print(
        quickstart(
            args.output, bf16=False if "fp32" in args else None, progress=progress, **_given(args, "seeds", "steps")
        )
    )
    return 0


# name, what runs it, its options, what it does, an example without its first two words
_COMMANDS: tuple[
    tuple[str, Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str, str], ...
] = (
    (
        "quickstart",
        _quickstart,
        _quickstart_options,
        "draw street scenes, train four small models on them and compare these; minutes on a CPU",
        "--output first-run",
    ),
    (
        "prepare",
        _prepare,
        _prepare_options,
        "check a data set, and write what is still missing; or draw street scenes",
        "street-scenes scenes --train 400 --val 100",
    ),
    (
        "train",
        _train,
        _train_options,
        "train a model on a data set",
        "--data street-scenes --root scenes --model danet_tiny --output run",
    ),
    (
        "evaluate",
        _evaluate,
        _evaluate_options,
        "print the IoU of every class on a data set",
        "run/best --data street-scenes --root scenes",
    ),
    (
        "predict",
        _predict,
        _predict_options,
        "write masks and coloured overlays of photographs",
        "run/best photographs --output masks",
    ),
    (
        "attention",
        _attention,
        _attention_options,
        "draw what points of an image attend to, or results of several models side by side",
        "run/best photograph.png --points 60,90 200,100 --output attention.png",
    ),
    (
        "convert",
        _convert,
        _convert_options,
        "convert weights between this package, the authors' code, mmsegmentation and Tramac",
        "DANet101.pth.tar danet101 --model danet_resnet101 --multi-grid 4 8 16 --classes-of cityscapes",
    ),
    ("models", _models, _models_options, "list the names of models and recipes", ""),
)


# What commands share

_MODEL_OPTIONS = ("output_stride", "multi_grid", "channel_variant", "align_corners")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that the user gave."""
    return {name: getattr(args, name) for name in names if name in args}


def _found_device(args: argparse.Namespace) -> str:
    import torch

    found: str = args.device
    if found == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return found


def _dataset(args: argparse.Namespace, split: str) -> SegmentationDataset:
    from .data import open_dataset

    options = _given(args, "sbd") | ({"mode": args.context_mode} if "context_mode" in args else {})
    return open_dataset(args.data, args.root, None if (args.data, split) == ("folder", "all") else split, **options)


def _scores(args: argparse.Namespace) -> dict[str, Any]:
    """The options of predict_scores that were given."""
    from .inference import EVALUATION_SCALES

    options = _given(args, "mode", "scales", "crop", "stride", "flip", "base", "batch")
    if "scales" in options:
        if "paper" in options["scales"] and len(options["scales"]) > 1:
            raise ValueError("--scales paper stands for all eight scales; leave out the others")
        options["scales"] = EVALUATION_SCALES if options["scales"] == ["paper"] else tuple(options["scales"])
    return options


def _model(path: Path, args: argparse.Namespace) -> DANet:
    """A model of a folder, or of a file of weights with the options that the user gave."""
    from .backbone import stem_of
    from .checkpoint import convert, load, read
    from .model import DANet, create_model

    if path.is_dir():
        needless = _given(args, "model", *_MODEL_OPTIONS)
        if needless:
            raise ValueError(f"{path} is a model folder, which knows its {next(iter(needless))}; leave out that option")
        model = DANet.from_pretrained(path)
    else:
        state = convert(read(path), "danet")
        if "model" not in args:
            raise ValueError(
                f"{path} is a file of weights: say of what, as --model danet_resnet101; `danet models` lists them"
            )
        stem = stem_of({name.removeprefix("backbone."): tensor for name, tensor in state.items()})
        classes = len(state["head.classifier.1.bias"])
        model = create_model(args.model, classes, stem=stem or "plain", **_given(args, *_MODEL_OPTIONS))
        load(model, path)
    if "classes_of" in args:
        model.classes, model.palette = _classes_of(args.classes_of, model.num_classes)
    return model.eval()
