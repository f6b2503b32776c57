"""`limber-fast train-limber`: a frozen encoder, a frozen int8 GPT-J, and the linear map between them, trained."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limber_fast import GPTJ, Limber, checks
from limber_fast.console import Console
from limber_fast.data.captions import read_coco_captions, read_limber_folder
from limber_fast.data.shard_index import ShardIndex
from limber_fast.devices import device_of
from limber_fast.models.encoders import encoder as make_encoder
from limber_fast.models.encoders import weights_of
from limber_fast.models.tokenizer import pretrained_tokenizer
from limber_fast.optional import needed
from limber_fast.training import skipped
from limber_fast.training.checkpoint import LIMBER, CheckpointError, Layout, load_alike
from limber_fast.training.interrupt import EXIT_CODE
from limber_fast.training.limber import LimberTrainer
from limber_fast.training.limber_config import LimberTrainConfig, from_flags
from limber_fast.training.limber_data import (
    EmojiPairs,
    Features,
    FilePairs,
    Pairs,
    ShardPairs,
    cached_features,
    features_key,
)

FAILED = 1


def main(args: argparse.Namespace, console: Console) -> int:
    """Run the command; args: a flag for each field of LimberTrainConfig, --config, --resume, --dry-run."""
    config = from_flags(LimberTrainConfig, args)
    folder = Path(config.output)
    if config.tensorboard:
        needed("tensorboard", "--tensorboard")  # before the work, not behind it
    with processes() as (rank, world):
        if rank:
            console.quiet = True
        limber, pairs = build(config), pairs_of(config)
        shape = tuple(limber.projection.weight.shape)
        console.print(f"{limber.encoder.extra_repr()}, map {shape}, {len(pairs)} pictures")
        if args.dry_run:
            return dry_run(limber, pairs, config, world, console)
        folder.mkdir(parents=True, exist_ok=True)
        features = _features(limber, pairs, config, folder, console)
        trainer = LimberTrainer(limber, pairs, config, features)
        checkpoint = folder / "checkpoint.pt"
        if args.resume and not resume(trainer, checkpoint, LIMBER, console):
            return FAILED
        log = tensorboard(folder, trainer.step) if config.tensorboard and not rank else None
        with console.progress("training", config.steps) as update:

            def watch(step: int, values: dict[str, float]) -> None:
                update(step, **{name: values[name] for name in ("loss", "learning_rate")})
                if log is not None:
                    for name, value in values.items():
                        log.add_scalar(name, value, step)

            done = trainer.run(folder, watch)
        if features is None:
            tell_skipped(trainer.skipped.values(), folder, console)
        if not done:
            console.print(f"stopped at step {trainer.step}; {checkpoint} is whole: go on with --resume")
            return EXIT_CODE
        if not rank:
            limber.save_pretrained(folder / "map")
            console.print(f"{folder / 'map'}")
    return 0


def resume(trainer: Any, checkpoint: Path, layout: Layout, console: Console) -> bool:
    """Goes on from the checkpoint where there is one; False, told in a line, where it is none to go on from."""
    try:
        state = load_alike(checkpoint, layout)
    except CheckpointError as error:
        console.error(f"{error}; run without --resume to start anew")
        return False
    if state is not None:
        trainer.restore(state)
        console.print(f"resumed at step {trainer.step}")
    return True


def tell_skipped(lines: Iterable[str], folder: Path, console: Console) -> None:
    """How many broken pictures all processes met, of a resumed run before too."""
    if lines := sorted(lines):
        path = folder / "skipped.txt"
        console.print(f"{len(lines)} pictures could not be read, the first: {lines[0]}; all of them: {path}")


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(rank, world): torchrun's processes, by nccl where there are GPUs and gloo elsewhere; (0, 1) without."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Shares of the encoding end at different times, and millions of pictures take hours.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=2))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def build(config: LimberTrainConfig) -> Limber:
    """Encoder, language model, tokenizer, and a map whose first weights come from the seed."""
    device = device_of("train-limber", None)
    language_model = GPTJ.from_pretrained(config.language_model, device=device)
    tokenizer = pretrained_tokenizer("train-limber", config.tokenizer or config.language_model)
    weights = weights_of(config.encoder_weights)
    encoder = make_encoder(config.encoder, weights=weights, seed=config.seed)
    given = language_model.config.adapter_width
    if config.adapters and given is None:
        language_model.add_adapters(config.adapters, seed=config.seed)
    elif config.adapters and config.adapters != given:
        raise checks.invalid("train-limber", "adapters", f"be {given}, as the language model's", repr(config.adapters))
    language_model.gradient_checkpointing = config.grad_checkpointing
    torch.manual_seed(config.seed)
    limber = Limber(encoder, language_model, tokenizer, dropout=config.dropout, layer_norm=config.layer_norm)
    return limber.to(device)


def pairs_of(config: LimberTrainConfig) -> Pairs:
    if config.data == "emoji":
        return EmojiPairs()
    if config.data.endswith(".tar"):
        return ShardPairs(ShardIndex(config.data.split(",")))
    if config.data.endswith(".json"):
        return FilePairs(read_coco_captions(config.data, config.images))
    return FilePairs(list(read_limber_folder(config.data)))


def _features(
    limber: Limber, pairs: Pairs, config: LimberTrainConfig, folder: Path, console: Console
) -> Features | None:
    """The cache; every process encodes its share."""
    if config.tuned or not config.cache_features:
        return None
    key = features_key(limber, pairs)
    with console.progress("encoding", 1) as update:
        features = cached_features(limber, pairs, folder, key, lambda done, of: update(done / of))
    if not dist.is_initialized() or not dist.get_rank():
        skipped.write(folder, features.skipped)
    tell_skipped(features.skipped, folder, console)
    return features


def dry_run(limber: Limber, pairs: Pairs, config: LimberTrainConfig, world: int, console: Console) -> int:
    """Shapes, memory, and a time estimate from one micro-batch; nothing is written."""
    encoder, gptj = limber.encoder, limber.language_model
    trainer = LimberTrainer(limber, pairs, config)
    limber.train()
    kept = activation_bytes(trainer)  # and the first call pays for what later ones reuse
    started = time.perf_counter()
    share = -(-config.batch_size // world)
    micro = min(config.micro_batch, share)
    found = trainer.micro_loss(range(micro))
    if found is not None:
        found[0].backward()
    seconds = time.perf_counter() - started
    micros = -(-share // micro)
    trained = sum(p.numel() for p in trainer.parameters)
    frozen = [_frozen_bytes(part, trainer.parameters) / 2**20 for part in (encoder, gptj)]
    together = sum(frozen) + (16 * trained + kept * micro) / 2**20
    cache = 2 * len(pairs) * encoder.tokens * encoder.width
    rows = [
        ("soft prompts of a picture", f"{encoder.tokens} x {encoder.width} -> {encoder.tokens} x {gptj.config.n_embd}"),
        ("trained", f"{trained / 1e6:.2f} M parameters, {16 * trained / 2**20:.1f} MiB with gradients and optimizer"),
        ("frozen weights", f"encoder {frozen[0]:.1f} MiB, language model {frozen[1]:.1f} MiB"),
        ("activations", f"{kept * micro / 2**20:.0f} MiB kept for the backward pass of {micro} such captions"),
        ("these together", f"{together:.1f} MiB a process"),
        ("features on disk", f"{cache / 2**20:.0f} MiB" if config.cache_features and not config.tuned else "not kept"),
        ("batch", f"{config.batch_size} = {world} x {micros} x {micro} pictures"),
        ("a step", f"{micros * seconds:.1f} s, with the encoder's time"),
        (f"{config.steps} steps", f"{config.steps * micros * seconds / 3600:.1f} h"),
    ]
    console.table("Dry run", ("", ""), rows)
    return 0


def _frozen_bytes(part: nn.Module, trained: Iterable[Tensor]) -> int:
    own = {id(x) for x in trained}
    return sum(x.nbytes for x in (*part.parameters(), *part.buffers()) if id(x) not in own)


@contextlib.contextmanager
def kept_for_backward(but: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes by address of what autograd keeps within the block, but for those tensors."""
    weights, kept = {x.untyped_storage().data_ptr() for x in but}, {}

    def pack(x: Tensor) -> Tensor:
        if (at := (storage := x.untyped_storage()).data_ptr()) not in weights:
            kept[at] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def activation_bytes(trainer: LimberTrainer) -> int:
    """What the first picture's forward pass keeps for the backward pass, without parameters and frozen weights; with
    gradient checkpointing the inputs of all blocks and one block's own, as that is what there is at a time."""
    limber, model = trainer.limber, trainer.limber.language_model
    inputs: list[int] = []
    hook = model.h[0].register_forward_pre_hook(lambda block, given: inputs.append(given[0].nbytes))
    again, model.gradient_checkpointing = model.gradient_checkpointing, False
    try:
        with kept_for_backward((*limber.parameters(), *limber.buffers())) as kept:
            found = trainer.micro_loss(range(1))  # alive until the sum is taken: no storage takes another's place
        total = sum(kept.values())
        del found
    finally:
        hook.remove()
        model.gradient_checkpointing = again
    return total // len(model.h) + sum(inputs) * len(model.h) if again else total


def tensorboard(folder: Path, step: int):
    """A writer of the steps after `step`; what a killed run wrote of them does not count."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
