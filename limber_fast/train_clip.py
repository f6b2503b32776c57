"""`limber-fast train-clip`: any model of open_clip, trained on pictures with captions through the fused loss."""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limber_fast import checks, files
from limber_fast.console import Console
from limber_fast.data.index import Index
from limber_fast.optional import needed
from limber_fast.train_limber import kept_for_backward, pairs_of, processes, resume, tell_skipped, tensorboard
from limber_fast.training.checkpoint import CLIP
from limber_fast.training.clip import ClipTrainer
from limber_fast.training.clip_config import ClipTrainConfig
from limber_fast.training.interrupt import EXIT_CODE
from limber_fast.training.limber_config import from_flags
from limber_fast.training.limber_data import Pairs

FAILED = 1
_DRY_STEPS = 3


def main(args: argparse.Namespace, console: Console) -> int:
    """Run the command; args: a flag for each field of ClipTrainConfig, --config, --resume, --dry-run."""
    config = from_flags(ClipTrainConfig, args)
    folder = Path(config.output)
    if config.tensorboard:
        needed("tensorboard", "--tensorboard")
    with processes() as (rank, world):
        if rank:
            console.quiet = True
        if config.batch_size < world:
            found = str(config.batch_size)
            raise checks.invalid("train-clip", "batch_size", f"be at least one for each of {world} processes", found)
        pairs = pairs_of(config)
        trainer = build_trainer(config, pairs)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        console.print(f"{config.model}, {parameters / 1e6:.1f} M parameters, {len(pairs)} pictures, {world} processes")
        if args.dry_run:
            return dry_run(trainer, world, console)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint.pt"
        if args.resume and not resume(trainer, checkpoint, CLIP, console):
            return FAILED
        log = tensorboard(folder, trainer.step) if config.tensorboard and not rank else None
        with console.progress("training", config.steps) as update:

            def watch(step: int, values: dict[str, float]) -> None:
                update(step, **{name: values[name] for name in ("loss", "scale", "learning_rate")})
                for name, value in values.items() if log is not None else ():
                    log.add_scalar(name, value, step)

            done = trainer.run(folder, watch)
        tell_skipped(trainer.skipped_lines, folder, console)
        if trainer.left_out:
            console.print(f"{trainer.left_out} steps left out: a process had no readable picture")
        if not done:
            console.print(f"stopped at step {trainer.step}; {checkpoint} is whole: go on with --resume")
            return EXIT_CODE
        if not rank:
            console.print(f"{save_weights(trainer.model, folder)}")
    return 0


def build_trainer(config: ClipTrainConfig, pairs: Pairs) -> ClipTrainer:
    """Model with first weights from the seed, its own preprocessing and tokenizer, on this process's device."""
    model, transform, tokenizer = build(config)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return ClipTrainer(model.to(device), pairs, transform, tokenizer, config)


def build(config: ClipTrainConfig) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[[list[str]], Tensor]]:
    name = config.model
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file")
        file = Index(name)
        for part, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
            file.field(file.content, part, kind)
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    if name not in open_clip.list_models():
        near = [known for known in open_clip.list_models() if name.lower()[:5] in known.lower()][:5]
        raise checks.invalid("train-clip", "model", "be a name of open_clip.list_models() or a .json file", repr(name),
                             f"near it: {', '.join(near)}" if near else "")  # fmt: skip
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that the weights are random, as they are meant to be
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if config.loss == "siglip" else {}
    torch.manual_seed(config.seed)
    model, transform, _ = open_clip.create_model_and_transforms(name, output_dict=True, **bias)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    tokenizer = open_clip.get_tokenizer(name)
    words = getattr(model, "token_embedding", None) or getattr(model.text, "token_embedding", None)
    if words is not None and (token := int(tokenizer(["a picture"]).max())) >= words.num_embeddings:
        raise checks.invalid("train-clip", "model", f"have words for its tokenizer's ids, as {token}",
                             f"a vocab_size of {words.num_embeddings}")  # fmt: skip
    return model, transform, tokenizer


def save_weights(model: nn.Module, folder: Path) -> Path:
    """model.safetensors, which `open_clip.create_model(..., pretrained=path)` reads; whole or absent."""
    path = folder / "model.safetensors"
    with files.replacing(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}, temporary)
    return path


def dry_run(trainer: ClipTrainer, world: int, console: Console) -> int:
    """Shapes, memory, and an estimate of time from steps that are then forgotten; nothing is written."""
    config, batches, seconds = trainer.config, trainer.batches(), []
    trainer.model.train()
    shapes = ()
    for _ in range(min(_DRY_STEPS, config.steps)):
        started = time.perf_counter()
        batch, broken = next(batches)
        if batch is None:
            raise checks.invalid("train-clip", "data", "have a readable picture", f"{broken[0].name}: broken")
        with kept_for_backward(trainer.model.parameters()) as kept:
            trainer.train_step(batch)
        seconds.append(time.perf_counter() - started)
        shapes = tuple(tuple(x.shape) for x in batch[:2])
    with torch.no_grad():
        width = trainer.model.encode_image(batch[0][:1].to(trainer.device)).shape[1]
    parameters = sum(p.numel() for p in trainer.model.parameters())
    step, share, activations = min(seconds), len(batch[0]), sum(kept.values())
    micro = min(config.micro_batch or share, share)
    if micro < share:  # what a pass keeps when it is made again, in the backward pass
        images, tokens = (x.to(trainer.device) for x in batch[:2])
        with kept_for_backward(trainer.model.parameters()) as kept:
            found = trainer.features.one_pass(images[:micro], tokens[:micro])
        activations += sum(kept.values())
        del found
    rows = [
        ("images, tokens of a process", f"{shapes[0]}, {shapes[1]}"),
        ("batch", f"{config.batch_size} = {world} x {-(-share // micro)} x {micro} pairs, features and loss of all"),
        ("features, logits never held", f"{config.batch_size} x {width}, {config.batch_size} x {config.batch_size}"),
        ("weights, gradients, AdamW", f"{16 * parameters / 2**20:.0f} MiB a process"),
        ("activations", f"{activations / 2**20:.1f} MiB a process"),
        ("gathered features", f"{8 * config.batch_size * width / 2**20 if world > 1 else 0:.1f} MiB a process"),
        ("a step", f"{step:.2f} s"),
        (f"{config.steps} steps", f"{config.steps * step / 3600:.2f} h"),
    ]
    console.table("Dry run", ("", ""), rows)
    return 0
