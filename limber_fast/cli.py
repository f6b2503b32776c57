"""Command line: `limber-fast demo | reproduce | train-clip | train-limber | env | bench | predict |
evaluate`.

Parsing imports nothing heavy; each command imports its own needs.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from limber_fast import __version__
from limber_fast.evaluate_flags import add_predictions, add_tasks, positive, whole
from limber_fast.optional import how_to_install

if TYPE_CHECKING:
    from limber_fast.console import Console

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if getattr(args, "fail_over", None) is not None and args.compare is None:
        parser.error("--fail-over needs --compare OLD.json")
    if getattr(args, "modelled", None) is not None and args.compare is not None:
        parser.error("--modelled measures nothing that --compare could hold against OLD.json")

    from limber_fast.console import Console
    from limber_fast.dispatch import BackendUnavailable

    console = Console(quiet=args.quiet, stderr=getattr(args, "json", False))
    try:
        return args.run(args, console) or 0
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our pipe left (`| head`). Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("limber_fast"):
            raise
        extra = "demo" if args.command == "reproduce" else args.command
        console.error(f"{args.command} needs {error.name}: {how_to_install(error.name, extra)}")
        return FAILED
    except (BackendUnavailable, OSError) as error:
        console.error(str(error))
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser; every command's namespace carries `run(args, console) -> int | None`."""
    parser = argparse.ArgumentParser(prog="limber-fast", description="Fused kernels for CLIP training and LiMBeR.")
    parser.add_argument("--version", action="version", version=f"limber_fast {__version__}")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and JSON")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="train a small CLIP on emoji art with the fused loss and write report.html")
    reproduce = commands.add_parser(
        "reproduce", help="make the papers' tables and figures in miniature: every row, 3 seeds"
    )
    reproduce.add_argument(
        "--miniature", action="store_true", required=True, help="on the emoji that ship, as `demo --full` does"
    )
    demo.add_argument("--full", action="store_true", help="every encoder's row and 3 seeds: nine encoders to train")
    reproduce.set_defaults(full=True)
    for command, folder in ((demo, "limber_fast_demo"), (reproduce, "limber_fast_miniature")):
        command.add_argument(
            "--minutes", type=positive(float), default=5.0, help="training budget of an encoder (default: %(default)g)"
        )
        command.add_argument(
            "--steps", type=positive(int), default=0, metavar="N",
            help="train an encoder for N steps, however long they take; what follows keeps to its share of --minutes",
        )  # fmt: skip
        command.add_argument("--seed", type=whole, default=0, help="seed of weights and batches (default: %(default)s)")
        command.add_argument("--output", type=Path, default=Path(folder), metavar="DIR", help="default: %(default)s")
        command.add_argument("--resume", action="store_true", help="continue from what lies in the output folder")
        command.add_argument(
            "--loss", choices=("auto", "cpu", "eager"), default="auto", help="backend (default: %(default)s)"
        )

    env = commands.add_parser(
        "env", help="versions, CPU, threads, devices, and the backend of every op with the reasons"
    )
    env.add_argument("--json", action="store_true", help="print JSON on stdout, everything else on stderr")

    bench = commands.add_parser("bench", help="time every op against eager PyTorch and write JSON and one HTML page")
    bench.add_argument(
        "--output", type=Path, default=Path("limber_fast_bench"), metavar="DIR", help="default: %(default)s"
    )
    bench.add_argument("--quick", action="store_true", help="small shapes only")
    bench.add_argument(
        "--minutes", type=positive(float), help="start no row after so many; those left out are listed as skipped"
    )
    bench.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier run to hold this one against")
    bench.add_argument(
        "--fail-over", type=_percent, metavar="10%", help="with --compare: exit 1 where a ratio fell by more than this"
    )
    bench.add_argument(
        "--trace", action="store_true", help="also a torch.profiler trace of one call of every row, in DIR/traces"
    )
    bench.add_argument("-k", dest="select", metavar="EXPR", help="run only benchmarks that match, as in pytest")
    bench.add_argument(
        "--modelled", nargs="?", const="auto", metavar="TARGET",
        choices=("auto", "sm_80", "sm_89", "sm_90", "sm_100", "gfx942"),
        help="run nothing: compile the GPU kernels for TARGET (default: the CUDA device's chip, or sm_90) and list "
        "their modelled lower bounds; -k is then a part of a kernel's name",
    )  # fmt: skip

    evaluate = commands.add_parser("evaluate", help="score captions, answers, or an image model, and write a page")
    add_tasks(evaluate)
    predict = commands.add_parser("predict", help="write what a Limber says of images, for `evaluate`; and controls")
    add_predictions(predict)

    limber = commands.add_parser("train-limber", help="train LiMBeR's linear map between an encoder and an int8 GPT-J")
    limber.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    limber.add_argument("--dry-run", action="store_true", help="print shapes, memory and an estimate of time")
    _limber_flags(limber)

    clip = commands.add_parser(
        "train-clip", help="train a model of open_clip through the fused loss; also under torchrun"
    )
    clip.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    clip.add_argument("--dry-run", action="store_true", help="print shapes, memory and an estimate of time")
    _clip_flags(clip)

    for command in (demo, reproduce, bench, limber, clip):
        command.add_argument("--threads", type=positive(int), help="CPU threads (default: torch's choice)")
    trained = ((limber, _train_limber), (clip, _train_clip))
    shown = ((demo, _demo), (reproduce, _demo))
    for command, run in (*trained, *shown, (env, _env), (bench, _bench), (evaluate, _evaluate), (predict, _predict)):
        command.set_defaults(run=run)
        # Accepted after the command too; without a default of its own, which would undo the flag before it.
        command.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="the same")
    return parser


def _demo(args: argparse.Namespace, console: Console) -> int | None:
    from limber_fast import demo

    return demo.main(args, console)


def _limber_flags(parser: argparse.ArgumentParser) -> None:
    from limber_fast.training.limber_config import LimberTrainConfig, add_flags

    add_flags(parser, LimberTrainConfig)


def _clip_flags(parser: argparse.ArgumentParser) -> None:
    from limber_fast.training.clip_config import ClipTrainConfig
    from limber_fast.training.limber_config import add_flags

    add_flags(parser, ClipTrainConfig)


def _train_clip(args: argparse.Namespace, console: Console) -> int | None:
    return _train("train_clip", args, console)


def _train_limber(args: argparse.Namespace, console: Console) -> int | None:
    return _train("train_limber", args, console)


def _train(module: str, args: argparse.Namespace, console: Console) -> int | None:
    import torch

    command = import_module(f"limber_fast.{module}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return command.main(args, console)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        console.error(str(error))
        return FAILED


def _env(args: argparse.Namespace, console: Console) -> int | None:
    from limber_fast import environment

    info = environment.collect()
    if args.json:
        print(json.dumps(info, indent=2), flush=True)
    else:
        environment.render(info, console)
    if (reason := environment.override_error()) is not None:
        console.error(reason)
        return FAILED
    return None


def _bench(args: argparse.Namespace, console: Console) -> int | None:
    if args.modelled is not None:
        from limber_fast.report import modelled

        return modelled.main(args, console)

    checkout = Path(__file__).resolve().parent.parent
    # A wheel's parent folder is site-packages, where some other package may own the name: look for our files.
    folders = [root / "benchmarks" for root in (checkout, Path.cwd()) if any(root.glob("benchmarks/bench_*.py"))]
    if not folders:
        console.error("the benchmarks are in the source checkout, not in the wheel: run `limber-fast bench` there")
        return FAILED
    args.benchmarks = folders[0]

    from limber_fast.report import bench

    return bench.main(args, console)


def _evaluate(args: argparse.Namespace, console: Console) -> int | None:
    from limber_fast import evaluate

    return evaluate.main(args, console)


def _predict(args: argparse.Namespace, console: Console) -> int | None:
    from limber_fast import predict

    return predict.main(args, console)


def _percent(text: str) -> float:
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"must be a percentage such as 10%; got {text}")
    return positive(float)(text[:-1]) / 100
