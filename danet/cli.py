"""The command line: `danet COMMAND ...`, or `python -m danet COMMAND ...`.

Packages are imported by the command that needs them, so that help comes at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .cli_tools import add_tools

if TYPE_CHECKING:
    from .data import SegmentationDataset
    from .model import DANet

_Command = Callable[[argparse.Namespace], int]

STOPPED = 143
"""Exit status of a training run that a signal has stopped, after saving."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0; 1, some images of `predict` failed; 2, the command cannot be done, with one message on stderr;
        STOPPED; 130, interrupted.
    """
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if isinstance(error, ImportError) and (error.name or "").startswith("danet"):
            raise  # no missing extra, but a fault of ours
        print(f"danet {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Of all commands; `run` is the function for the chosen one."""
    top = argparse.ArgumentParser("danet", description="Dual attention segmentation: train, evaluate, use.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = _Adder(commands)
    _train_options(
        add(
            "train",
            _train,
            "train a model by a recipe",
            "danet train --data cityscapes --root data/cityscapes --model danet_resnet101 --multi-grid 4 8 16 "
            "--backbone-weights resnet101.pth --output runs/first",
        )
    )
    _evaluate_options(
        add(
            "evaluate",
            _evaluate,
            "IoU of every class on a data set",
            "danet evaluate runs/first/best --data cityscapes --root data/cityscapes --base 2048",
        )
    )
    _predict_options(
        add("predict", _predict, "masks and overlays of photographs", "danet predict MODEL photos/ -o out")
    )
    _attention_options(
        add(
            "attention",
            _attention,
            "draw what chosen points attend to",
            "danet attention runs/first/best street.png --points 300,400 900,420 -o panel.png",
        )
    )
    _export_options(
        add(
            "export",
            _export,
            "write a model for onnxruntime or TensorRT",
            "danet export runs/first/best danet.onnx",
        )
    )
    add_tools(add)
    return top


class _Adder:
    def __init__(self, commands: Any) -> None:
        self.commands = commands

    def __call__(self, name: str, run: _Command, purpose: str, example: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = self.commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog=f"example: {example}" if example else None,
        )
        command.set_defaults(run=run)
        return command


# Options that several commands share


def _device_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")


def _data_options(command: argparse.ArgumentParser, split: str) -> None:
    names = "cityscapes, voc, context, coco-stuff, folder or street-scenes"
    command.add_argument("--data", required=True, metavar="NAME", help=names)
    command.add_argument("--root", required=True, help="folder of the data set")
    command.add_argument("--split", help=f"default: {split}; none: all of a folder")
    command.add_argument("--sbd", help="voc: folder of SBD, for the split train_aug")
    command.add_argument("--context-mode", metavar="MODE", help="context: 59, 60 or 59-reported")


def _architecture_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--stem", default="plain", help="of the ResNet: plain (default) or deep")
    command.add_argument("--output-stride", type=int, default=8, help="8 (default), 16 or 32")
    command.add_argument("--multi-grid", type=int, nargs="+", metavar="N", help="such as 4 8 16, the authors'")


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="folder that training wrote, or a checkpoint file")
    group = command.add_argument_group("for a checkpoint file, which does not tell its architecture")
    group.add_argument("--name", default="danet_resnet101", help="see `danet models`; default: %(default)s")
    group.add_argument("--num-classes", type=int, default=19, help="default: 19, with Cityscapes' names and colours")
    _architecture_options(group)  # type: ignore[arg-type]
    command.add_argument("--attention-backend", default="auto", help="see python -m danet_kernels.info")


def _inference_options(command: argparse.ArgumentParser, crop: str) -> None:
    command.add_argument("--mode", default="official", help="official (default), mmseg or probability")
    command.add_argument("--scales", nargs="+", default=["1"], help="such as 0.75 1 1.25; paper: its eight")
    command.add_argument("--crop", help=f"side of the windows, or none: whole images; default: {crop}")
    command.add_argument("--stride", type=int, help="pixels between windows; default: 2/3 of the crop")
    command.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirrored views too")
    command.add_argument("--base", type=int, help="long side in pixels at scale 1; Cityscapes: 2048; default: its own")
    command.add_argument("--batch", type=int, default=1, help="windows at a time")


def _open(args: argparse.Namespace, split: str) -> SegmentationDataset:
    from .data import open_dataset

    options = {"sbd": args.sbd, "mode": args.context_mode}
    given = {name: value for name, value in options.items() if value is not None}
    return open_dataset(args.data, args.root, None if split == "none" else split, **given)


def _load(args: argparse.Namespace, path: str) -> DANet:
    from pathlib import Path

    from .checkpoint import load
    from .model import DANet, create_model

    if Path(path).is_dir() or not Path(path).exists():
        return DANet.from_pretrained(path, attention_backend=args.attention_backend)
    model = create_model(
        args.name,
        args.num_classes,
        stem=args.stem,
        output_stride=args.output_stride,
        multi_grid=args.multi_grid,
        attention_backend=args.attention_backend,
    )
    load(model, path)
    if args.num_classes == 19:  # no checkpoint tells; what it nearly always is
        from .data.cityscapes import CLASSES, PALETTE

        model.classes, model.palette = tuple(CLASSES), list(PALETTE)
    return model.eval()


def _inference(args: argparse.Namespace) -> dict[str, Any]:
    """Options of predict_scores."""
    from .inference import EVALUATION_SCALES

    paper = args.scales == ["paper"]
    crop = args.crop or ("768" if getattr(args, "data", None) == "cityscapes" else "none")
    return {
        "mode": args.mode,
        "scales": EVALUATION_SCALES if paper else [_number(scale, "--scales") for scale in args.scales],
        "crop": None if crop == "none" else int(_number(crop, "--crop")),
        "stride": args.stride,
        "flip": args.flip,
        "base": args.base,
        "batch": args.batch,
    }


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no number") from None


# train


def _train_options(command: argparse.ArgumentParser) -> None:
    _data_options(command, "train, for voc train_aug")
    command.add_argument("--val-split", default="val", help="split to validate on, or off; default: %(default)s")
    command.add_argument("--model", default="danet_resnet50", help="see `danet models`; default: %(default)s")
    command.add_argument("--output", "-o", required=True, help="folder for checkpoints, log, pictures and models")
    command.add_argument("--backbone-weights", metavar="FILE", help="torchvision's or timm's ResNet, on ImageNet")
    command.add_argument("--init", metavar="FILE", help="checkpoint of a whole model to begin with")
    _architecture_options(command)
    command.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    command.add_argument("--attention-backend", default="auto", help="see python -m danet_kernels.info")
    command.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group = command.add_argument_group("recipe")
    group.add_argument("--recipe", help="see `danet models`; default: that of the data set")
    group.add_argument("--epochs", type=int)
    group.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument("--batch-size", type=int, help="images a step, over all devices")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--head-rate", type=float, help="factor on it for the head")
    group.add_argument("--optimizer", help="sgd or adamw")
    group.add_argument("--crop", type=int, nargs=2, dest="crop_size", metavar=("HEIGHT", "WIDTH"))
    group.add_argument("--base-size", type=int, help="shorter side in pixels at scale 1")
    group.add_argument("--scale", type=float, nargs=2, metavar=("FROM", "TO"), help="random factor on it")
    group.add_argument("--validation-crop", type=int, help="side of validation's windows in pixels")
    group = command.add_argument_group("how it is run")
    _device_option(group)  # type: ignore[arg-type]
    group.add_argument("--amp", default="off", help="mixed precision: off (default), bf16 or fp16")
    group.add_argument("--accumulate", type=int, default=1, help="parts that a step is done in; takes less memory")
    group.add_argument("--workers", type=int, default=4, help="processes that read images; default: %(default)s")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--resume", action="store_true", help="go on where the run in the output folder was stopped")
    group.add_argument("--keep", type=int, default=2, help="checkpoints to keep; default: %(default)s")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="default: an epoch")
    group.add_argument("--validate-every", type=int, default=1, metavar="EPOCHS", help="default: 1")
    group.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")


_CHANGES = (
    *("epochs", "steps", "batch_size", "learning_rate", "head_rate", "optimizer"),
    *("crop_size", "base_size", "scale", "validation_crop"),
)


def _train(args: argparse.Namespace) -> int:
    import torch

    from .checkpoint import load
    from .distributed import process_group, rank_and_world
    from .model import create_model
    from .recipes import RECIPES, find_recipe
    from .train import train

    if args.recipe is None and args.data not in RECIPES:
        raise ValueError(f"--data {args.data} has no recipe of its own: name one with --recipe ({', '.join(RECIPES)})")
    changes = {name: getattr(args, name) for name in _CHANGES if getattr(args, name) is not None}
    changes |= {name: tuple(changes[name]) for name in ("crop_size", "scale") if name in changes}
    recipe = find_recipe(args.recipe or args.data, args.model.partition("_")[0], **changes)
    dataset = _open(args, args.split or ("train_aug" if args.data == "voc" else "train"))
    validation = None if args.val_split == "off" else _open(args, args.val_split)
    torch.manual_seed(args.seed)  # of the first weights
    model = create_model(
        args.model,
        len(dataset.classes),
        stem=args.stem,
        output_stride=args.output_stride,
        multi_grid=args.multi_grid,
        dropout=args.dropout,
        attention_backend=args.attention_backend,
        gradient_checkpointing=args.gradient_checkpointing,
        backbone_weights=args.backbone_weights,
    )
    if args.init is not None:
        load(model, args.init)
    model.classes, model.palette = dataset.classes, dataset.palette
    with process_group(args.device) as device:
        speaks = rank_and_world()[0] == 0
        if speaks:
            print(recipe)
        result = train(
            model,
            dataset,
            recipe,
            args.output,
            validation=validation,
            device=device,
            amp=args.amp,
            accumulate=args.accumulate,
            workers=args.workers,
            seed=args.seed,
            resume=args.resume,
            keep=args.keep,
            save_every=args.save_every,
            validate_every=args.validate_every,
            tensorboard=args.tensorboard,
        )
        if speaks and result.finished:
            print(f"done after {result.steps} steps; the model is in {args.output}/last")
            if result.best_mean_iou is not None:
                print(f"best mean IoU {100 * result.best_mean_iou:.2f}, in {args.output}/best")
        elif speaks:
            print(f"stopped after {result.steps} steps, which are saved; go on with the same command and --resume")
    return 0 if result.finished else STOPPED


# evaluate, predict, attention


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    _data_options(command, "val")
    _inference_options(command, "768 for cityscapes, else none")
    _device_option(command)
    command.add_argument("--max-images", type=int, help="only the first so many")
    command.add_argument("--confusion", metavar="FILE", help="write the confusion matrix as a picture")


def _evaluate(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .data.images import write_image
    from .distributed import process_group, rank_and_world
    from .evaluate import evaluate
    from .metrics import confusion_picture

    dataset = _open(args, args.split or "val")
    model = _load(args, args.model)
    with process_group(args.device) as device:
        matrix = evaluate(model, dataset, device=device, max_images=args.max_images, **_inference(args))
        if rank_and_world()[0] == 0:
            print(matrix.table(dataset.classes, getattr(dataset, "background_counts_as_zero", False)))
            if args.confusion is not None:
                write_image(Path(args.confusion), confusion_picture(matrix, dataset.classes))
    return 0


def _predict_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    command.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    command.add_argument("--output", "-o", required=True, help="folder for masks, overlays and the legend")
    command.add_argument("--label-ids", action="store_true", help="masks as Cityscapes' server takes them")
    _inference_options(command, "none")
    _device_option(command)


def _predict(args: argparse.Namespace) -> int:
    from .distributed import process_group
    from .predict import predict

    with process_group(args.device) as device:
        report = predict(
            _load(args, args.model),
            args.paths,
            args.output,
            device=device,
            label_ids=args.label_ids,
            progress=lambda line: print(line, file=sys.stderr),
            **_inference(args),
        )
    print(report)
    return 1 if report.failures else 0


def _attention_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("--points", nargs="+", metavar="X,Y", help="pixels, from the upper left; default: the middle")
    command.add_argument("--channels", type=int, nargs="+", metavar="N", help="default: the two that vary most")
    command.add_argument("--truth", metavar="MASK", help="class numbers, to show beside the result")
    command.add_argument("--compare", metavar="MODEL", help="instead: results with and without, side by side")
    command.add_argument("--output", "-o", default="attention.png", help="default: %(default)s")
    _device_option(command)


def _attention(args: argparse.Namespace) -> int:
    from pathlib import Path

    import numpy as np

    from .data.images import read_image, read_labels, write_image
    from .distributed import process_group
    from .visualize import attention_panel, channel_attention_report, compare_panel

    with process_group(args.device) as device:
        image = read_image(Path(args.image))  # uint8 [H, W, 3]
        truth = None if args.truth is None else read_labels(Path(args.truth)).astype(np.uint8)  # [H, W]
        model = _load(args, args.model).to(device)
        if args.compare is not None:
            other = _load(args, args.compare).to(device)
            models = [
                (f"{path} ({one.head.variant})", one) for path, one in ((args.model, model), (args.compare, other))
            ]
            picture = compare_panel(models, image, truth)
        else:
            if args.points is not None:
                points = [_point(text) for text in args.points]
            else:
                middle = (image.shape[1] // 2, image.shape[0] // 2)
                points = [middle] if hasattr(model.head, "position_attention") else []
            picture = attention_panel(model, image, points, channels=args.channels, truth=truth)
            if hasattr(model.head, "channel_attention"):
                print(channel_attention_report(model, image))
    write_image(Path(args.output), picture)
    print(f"wrote {args.output}")
    return 0


def _export_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    command.add_argument("output", metavar="OUT.onnx")
    command.add_argument("--opset", type=int, default=20, help="20 (default): MatMul and Softmax; from 23 on Attention")
    command.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="fix the images' size to this")
    command.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="run it in onnxruntime")


def _export(args: argparse.Namespace) -> int:
    from .export import export_onnx

    fixed = args.size is not None
    options = {"size": args.size, "batch": 1, "dynamic": False} if fixed else {}
    model = _load(args, args.model)
    try:
        print(export_onnx(model, args.output, opset=args.opset, check=args.check, **options))
    except RuntimeError as error:  # onnxruntime's results are wrong, or it cannot run the file
        raise ValueError(str(error)) from error
    return 0


def _point(text: str) -> tuple[int, int]:
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"--points: {text!r} is no point, expected X,Y such as 300,400") from None
    return x, y
