"""The flags of `limber-fast evaluate` and `predict`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_tasks(evaluate: argparse.ArgumentParser) -> None:
    """caption, vqa, zero-shot and linear-probe."""
    tasks = evaluate.add_subparsers(title="tasks", dest="task", metavar="TASK", required=True)
    caption = tasks.add_parser("caption", help="CIDEr-D, exact match, CLIPScore on COCO or NoCaps captions")
    vqa = tasks.add_parser("vqa", help="VQA accuracy and exact match on VQAv2")
    caption.add_argument("predictions", type=Path, help='JSON: [{"image_id": ..., "caption": ...}, ...]')
    caption.add_argument("--references", type=Path, required=True, metavar="JSON", help="COCO or NoCaps captions file")
    caption.add_argument("--nocaps", action="store_true", help="the references have domains: report them too")
    caption.add_argument(
        "--clip",
        type=_scorer,
        metavar="MODEL:WEIGHTS",
        help="open_clip scorer for CLIPScore, as ViT-B-32-quickgelu:openai",
    )
    vqa.add_argument("predictions", type=Path, help='JSON: [{"question_id": ..., "answer": ...}, ...]')
    vqa.add_argument("--questions", type=Path, required=True, metavar="JSON", help="VQAv2 questions file")
    vqa.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="VQAv2 annotations file")
    vqa.add_argument("--file-name", metavar="PATTERN", help="of images, default COCO_{subset}_{image_id:012d}.jpg")
    vqa.add_argument("--whole-answers", action="store_true", help="do not cut answers to the references' length")
    for task in (caption, vqa):
        task.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
        task.add_argument(
            "--against", type=_named_path, action="append", default=[], metavar="NAME=JSON",
            help="predictions to compare with, as blind=blind.json; may be given more than once",
        )  # fmt: skip
        task.add_argument("--subset", action="store_true", help="score only what has predictions")

    zero = tasks.add_parser("zero-shot", help="CLIP's zero-shot classification of images in folders of classes")
    probe = tasks.add_parser("linear-probe", help="logistic regression on frozen image features")
    probe.add_argument("--train", required=True, metavar="DIR", help="training images, DIR/CLASS/...; or 'emoji'")
    probe.add_argument("--validation", metavar="DIR", help="to choose C on; by default a fifth of the training images")
    zero.add_argument(
        "--templates", default="", metavar="SET",
        help="'openai' (CLIP's 80 prompts for ImageNet), 'simple' (7), or a file with one a line, {} being the class; "
        "by default the model's own: openai for open_clip's",
    )  # fmt: skip
    for task in (zero, probe):
        task.add_argument("model", help="open_clip:MODEL, timm:MODEL (linear-probe alone) or demo:CHECKPOINT")
        task.add_argument("--weights", default="", help="a pre-trained set's name, a file, or 'random'")
        task.add_argument("--images", required=True, metavar="DIR", help="test images, DIR/CLASS/...; or 'emoji'")
        task.add_argument("--names", metavar="JSON", help="an object from folders to what their classes are called")
        task.add_argument("--batch-size", type=positive(int), default=64, help="images at a time (%(default)s)")

    for task, what in ((caption, "the scorer"), (zero, "the model"), (probe, "the model")):
        _device(task, what)
    for task in (caption, vqa, zero, probe):
        task.add_argument("--output", type=Path, default=Path("limber_fast_evaluation"), metavar="DIR")
        task.add_argument("--examples", type=whole, default=24, help="random images on the page (default: %(default)s)")
        task.add_argument("--seed", type=whole, default=0, help="of examples and intervals (default: %(default)s)")


def add_predictions(predict: argparse.ArgumentParser) -> None:
    """caption and vqa."""
    tasks = predict.add_subparsers(title="tasks", dest="task", metavar="TASK", required=True)
    caption = tasks.add_parser("caption", help="captions of images that COCO or NoCaps files name")
    caption.add_argument("--references", type=Path, required=True, metavar="JSON", help="COCO or NoCaps captions file")
    caption.add_argument("--nocaps", action="store_true", help="the references have domains")
    caption.add_argument("--prompt", default="A picture of", help="before each caption (default: %(default)r)")
    vqa = tasks.add_parser("vqa", help="answers to VQAv2's questions")
    vqa.add_argument("--questions", type=Path, required=True, metavar="JSON", help="VQAv2 questions file")
    vqa.add_argument("--file-name", metavar="PATTERN", help="of images, default COCO_{subset}_{image_id:012d}.jpg")
    vqa.add_argument("--shots", type=whole, default=0, metavar="N", help="random answered questions before each (0)")
    vqa.add_argument("--shot-questions", type=Path, metavar="JSON", help="where shots are drawn from")
    vqa.add_argument("--shot-annotations", type=Path, metavar="JSON", help="their annotations")
    vqa.add_argument("--shot-images", type=Path, metavar="DIR", help="folder of their images")
    vqa.add_argument("--captions", type=Path, nargs="+", default=[], metavar="JSON", help="COCO captions of the images")
    for task, longest, controls in (
        (caption, 100, ("blind", "shuffled")), (vqa, 10, ("blind", "shuffled", "oracle")),
    ):  # fmt: skip
        said_by = task.add_mutually_exclusive_group(required=True)
        said_by.add_argument(
            "--limber", type=Path, metavar="MAP",
            help="what `train-limber` saved, or LiMBeR's proj.ckpt (with --encoder); with --language-model",
        )  # fmt: skip
        said_by.add_argument(
            "--magma", type=Path, metavar="FILE", help="MAGMA's checkpoint, its language model in it; with --tokenizer"
        )
        task.add_argument(
            "--language-model", default="", metavar="DIR",
            help="a GPT-J in int8 or Hugging Face's; with --magma only its config.json is read, GPT-J-6B's by default",
        )  # fmt: skip
        task.add_argument("--tokenizer", default="", help="by default the language model's")
        task.add_argument("--compute", choices=("w8a16", "w8a8"), help="of the language model; by default as saved")
        task.add_argument("--encoder", default="", metavar="NAME", help="as train-limber's; by default the saved one's")
        task.add_argument("--encoder-weights", default="", help="as train-limber's")
        task.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
        task.add_argument("--output", type=Path, required=True, metavar="JSON", help="predictions, for `evaluate`")
        task.add_argument(
            "--control", choices=controls,
            help="black images; another one's image; for vqa also oracle, images told in words by --captions",
        )  # fmt: skip
        _device(task, "all models")
        task.add_argument("--decoding", choices=("greedy", "limber"), default="greedy", help="(default: %(default)s)")
        task.add_argument("--max-new-tokens", type=positive(int), default=longest, metavar="N", help="(%(default)s)")
        task.add_argument("--batch-size", type=positive(int), default=32, help="images at a time (%(default)s)")
        task.add_argument("--seed", type=whole, default=0, help="of shots, sampling, shuffling, random weights (0)")


def _device(task: argparse.ArgumentParser, what: str) -> None:
    task.add_argument("--device", choices=("cpu", "cuda"), help=f"of {what}; by default cuda where torch sees a GPU")


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 62:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, below 2^62; got {text}")
    return int(text)


def positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive; got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse's word for the type where `kind` itself raises
    return parse


def _scorer(text: str) -> str:
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"must be MODEL:WEIGHTS, as random weights score nothing; got {text}")
    return text


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=JSON; got {text}")
    return name, Path(path)
