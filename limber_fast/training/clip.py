"""Training any model of open_clip with `ClipLoss` or `SigLipLoss`, on one process or many, resumable at any step."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from limber_fast import ClipLoss, SigLipLoss, checks
from limber_fast.data.pictures import Broken
from limber_fast.training import skipped
from limber_fast.training.checkpoint import CLIP, save_checkpoint
from limber_fast.training.clip_config import FREE, ClipTrainConfig
from limber_fast.training.history import CLIP_COLUMNS, History
from limber_fast.training.interrupt import InterruptGuard
from limber_fast.training.limber_data import Pairs
from limber_fast.training.schedule import warmup_cosine

Watch = Callable[[int, dict[str, float]], None]
MAX_LOGIT_SCALE = math.log(100)


def ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Samples(Dataset):
    """Pictures and captions by (index, place in the run): augmentation and the choice of a caption depend on the place
    alone, whichever process or worker makes them."""

    def __init__(self, pairs: Pairs, transform: Callable[[Image], Tensor], tokenizer: Callable[[list[str]], Tensor],
                 seed: int) -> None:  # fmt: skip
        self.pairs, self.transform, self.tokenizer, self.seed = pairs, transform, tokenizer, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, int] | Broken:
        index, position = place
        image, captions = self.pairs.image(index), self.pairs.captions(index)
        if isinstance(image, Broken):
            return image
        rng = random.Random(f"{self.seed} sample {position}")
        caption = rng.choice(captions)
        seed = rng.getrandbits(62)  # torchvision draws from torch's generator, open_clip's colours from Python's
        torch.manual_seed(seed)
        random.seed(seed)
        # Pictures that share their first caption are not each other's negatives.
        same = hashlib.blake2b(captions[0].encode(), digest_size=8).digest()
        return self.transform(image), self.tokenizer([caption])[0], int.from_bytes(same, "little", signed=True)


class Places:
    """Per step, (index, place) of what this process takes of the endless sequence of shuffled epochs."""

    def __init__(self, pairs: int, config: ClipTrainConfig, start: int = 0) -> None:
        self.pairs, self.config, self.start = pairs, config, start

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        (rank, world), size = ranks(), self.config.batch_size
        known, order = -1, list(range(self.pairs))
        for step in range(self.start, self.config.steps):
            places = []
            for position in range(step * size + rank, (step + 1) * size, world):
                epoch, place = divmod(position, self.pairs)
                if epoch != known:
                    order = list(range(self.pairs))
                    random.Random(f"{self.config.seed} epoch {epoch}").shuffle(order)
                    known = epoch
                places.append((order[place], position))
            yield places


def collate(samples: Sequence[Any]) -> tuple[tuple[Tensor, Tensor, Tensor] | None, list[Broken]]:
    good = [sample for sample in samples if not isinstance(sample, Broken)]
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    if not good:
        return None, broken
    images, tokens, ids = zip(*good, strict=True)
    return (torch.stack(images), torch.stack(tokens), torch.tensor(ids)), broken


def _deaf(worker: int) -> None:
    """A terminal's Ctrl-C reaches the workers too: the step under way needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Features(nn.Module):
    """What open_clip's model returns, as a tuple, in passes of at most `micro_batch` pairs; 0: in one.

    Of several passes the features alone are kept. The backward pass of a loss of all features makes each pass again,
    with the random state that it had, and backpropagates it before the next: the gradients of the whole batch at the
    activations of a part (GradCache, Gao et al., arXiv 2101.06983).
    """

    def __init__(self, model: nn.Module, micro_batch: int = 0, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.micro_batch, self.precision = model, micro_batch, precision

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        size = self.micro_batch or len(images)
        if len(images) <= size:
            return self.one_pass(images, tokens)
        contexts = partial(_first_and_second, self.model)
        image_parts, text_parts, scales, biases = zip(*(
            checkpoint(self.one_pass, *part, use_reentrant=False, context_fn=contexts)
            for part in zip(images.split(size), tokens.split(size), strict=True)
        ), strict=True)  # fmt: skip
        return torch.cat(image_parts), torch.cat(text_parts), scales[0], biases[0]

    def one_pass(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # Autocast pass by pass: over all of them its copies of weights would be shared, and add up gradients in bf16.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = self.model(images, tokens)
        bias = out.get("logit_bias")
        # A copy: of a parameter that is itself an output DDP believes that it was not used.
        return out["image_features"], out["text_features"], out["logit_scale"], None if bias is None else bias.clone()


def _first_and_second(model: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Around a pass, and around the same made again."""
    return contextlib.nullcontext(), _statistics_kept(model)


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """A pass made again does not count twice in the running statistics of batch normalisation."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(x, x.clone()) for norm in norms for x in norm.buffers()]
    try:
        yield
    finally:
        for x, value in before:
            x.copy_(value)


class ClipTrainer:
    """Trains `model` on pairs of pictures and captions with the loss of the global batch.

    What a step does is a function of its number, so a run that was stopped goes on bit for bit; with several processes
    every one takes its share of each batch, pairs of broken pictures left out.

    Args:
        model: of open_clip, made with output_dict=True, on its device.
    """

    def __init__(self, model: nn.Module, pairs: Pairs, transform: Callable[[Image], Tensor],
                 tokenizer: Callable[[list[str]], Tensor], config: ClipTrainConfig) -> None:  # fmt: skip
        self.model, self.pairs, self.config = model, pairs, config
        self.samples = Samples(pairs, transform, tokenizer, config.seed)
        self.step, self.seconds, self.history = 0, 0.0, History(columns=CLIP_COLUMNS)
        self.skipped: dict[str, str] = {}
        self.left_out = 0
        self.device = next(model.parameters()).device
        rank, world = ranks()
        where = {"rank": rank, "world_size": world, "backend": config.backend}
        if config.loss == "clip":
            self.loss = ClipLoss(label_smoothing=config.label_smoothing, **where)
        else:
            self.loss = SigLipLoss(**where)
        # Without find_unused_parameters DDP regroups its buckets after a first step, and three processes or more add
        # in another order from then on: a resumed run would differ in its first step.
        self.features = self.parallel = Features(model, config.micro_batch, config.precision)
        if world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.features, find_unused_parameters=True)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decayed = [p for name, p in named if p.ndim >= 2 and "positional" not in name]
        free = [p for name, p in named if p.ndim < 2 or "positional" in name]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), eps=config.eps)

    def batches(self) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor] | None, list[Broken]]]:
        """From the present step to the last."""
        places = Places(len(self.pairs), self.config, self.step)
        return iter(DataLoader(self.samples, batch_sampler=places, collate_fn=collate, num_workers=self.config.workers,
                               pin_memory=self.device.type == "cuda", worker_init_fn=_deaf))  # fmt: skip

    def train_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        config, (rank, _) = self.config, ranks()
        images, tokens, ids = (x.to(self.device, non_blocking=True) for x in batch)
        # Dropout, dropped patches: of this step and process, not of what ran before.
        torch.manual_seed(random.Random(f"{config.seed} model {self.step} {rank}").getrandbits(62))
        self.optimizer.zero_grad()
        image_features, text_features, scale, bias = self.parallel(images, tokens)
        loss = self.loss(image_features, text_features, scale, bias, ids=ids)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf)
        factor = warmup_cosine((self.step + 1) / (config.steps + 1), max(config.warmup, 1e-9) / config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * config.learning_rate
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.step += 1
        return {"loss": float(loss.detach()), "scale": float(scale.detach()), "grad_norm": float(norm),
                "learning_rate": factor * config.learning_rate}  # fmt: skip

    def run(self, folder: Path, watch: Watch = lambda step, values: None) -> bool:
        """Train to the last step or to Ctrl-C; `checkpoint.pt`, `train.csv` and `skipped.txt` in `folder` are then up
        to date.

        A step in which a process has no readable picture is left out by all, and counted in `left_out`.

        Returns: True at the last step, False when interrupted.
        Raises: ValueError for a batch without one readable picture; FloatingPointError where the loss is not finite.
        """
        self.model.train()
        batches = self.batches()
        with InterruptGuard() as guard:
            while self.step < self.config.steps:
                started, asked = time.perf_counter(), guard.requested
                batch, broken = (None, []) if asked else next(batches)
                self.skipped |= {x.name: x.reason for x in broken}
                stop, without = self._how_many(asked, batch is None)
                if stop:
                    break
                if without == ranks()[1]:
                    raise checks.invalid("train-clip", "data", "have a readable picture in every batch", f"none of "
                                         f"{len(broken)} at step {self.step}, the first {broken[0].name}")  # fmt: skip
                if without:
                    self.step, self.left_out = self.step + 1, self.left_out + 1
                else:
                    values = self.train_step(batch)
                    if not math.isfinite(values["loss"]):
                        raise FloatingPointError(f"train-clip: the loss is {values['loss']} at step {self.step}; the "
                                                 "last checkpoint is whole: lower learning_rate")  # fmt: skip
                    self.seconds += time.perf_counter() - started
                    self.history.add(self.step, self.seconds, self.step / self.config.steps, values)
                if self.history.smooth:
                    watch(self.step, self.history.smooth)
                if self.step % self.config.save_every == 0 and self.step < self.config.steps:
                    self.save(folder)
            self.history.close(self.step, self.seconds)
            self.save(folder)
        return self.step >= self.config.steps

    def _how_many(self, requested: bool, empty: bool) -> list[int]:
        """Processes that were asked to stop, and that have nothing to train on: all decide alike, or those left would
        wait for ever."""
        if ranks()[1] == 1:
            return [int(requested), int(empty)]
        flags = torch.tensor([requested, empty], dtype=torch.int32, device=self.device)
        dist.all_reduce(flags)
        return flags.tolist()

    @property
    def skipped_lines(self) -> list[str]:
        return [f"{name}: {reason}" for name, reason in self.skipped.items()]

    def save(self, folder: Path) -> None:
        """checkpoint.pt, train.csv and skipped.txt, by the first process alone; all call it, as all tell of broken
        pictures."""
        self.skipped = skipped.of_all(self.skipped)
        if ranks()[0]:
            return
        state = {"config": self.config.to_dict(), "model": self.model.state_dict(), "step": self.step,
                 "optimizer": self.optimizer.state_dict(), "seconds": self.seconds,
                 "history": self.history.rows, "skipped": self.skipped, "left_out": self.left_out}  # fmt: skip
        save_checkpoint(folder / "checkpoint.pt", state, CLIP)
        self.history.write_csv(folder / "train.csv")
        skipped.write(folder, self.skipped_lines)

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint.

        Raises: ValueError naming a setting that differs from the checkpoint's.
        """
        mine = self.config.to_dict()
        for name, value in state["config"].items():
            if name not in FREE and value != mine.get(name):
                raise checks.invalid("train-clip", name, f"be the checkpoint's, {value!r}", repr(mine.get(name)),
                                     "go on with its settings, or into another output")  # fmt: skip
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = History(state["history"], columns=CLIP_COLUMNS)
        self.skipped, self.left_out = dict(state.get("skipped", {})), state.get("left_out", 0)
