"""One training run: steps until the budget is spent, checkpoints on the way, resumable."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from limber_fast import info_nce
from limber_fast.models.clip import SmallClip, SmallClipConfig
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.training.batches import Batch, ConceptBatches
from limber_fast.training.checkpoint import save_checkpoint
from limber_fast.training.config import TrainConfig
from limber_fast.training.ema import WeightAverage
from limber_fast.training.history import History
from limber_fast.training.interrupt import InterruptGuard
from limber_fast.training.locked import LockedBatches
from limber_fast.training.muon import Muon
from limber_fast.training.precision import autocast
from limber_fast.training.schedule import TimeBudget, warmup_cosine

Watch = Callable[[float, dict[str, float]], None]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and filters; AdamW for first and last maps, embeddings, gains, biases and the scale.

    AdamW's weight decay spares gains, biases, positions and the scale.
    """
    hidden, decayed, free = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "positional" in name:
            free.append(parameter)
        elif name.startswith(("visual.blocks", "transformer")):
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), eps=1e-6, fused=True)
    return [Muon(hidden, config.muon_learning_rate, config.muon_momentum, config.muon_weight_decay), adamw]


class Trainer:
    """Trains `model` with id-masked InfoNCE between images and captions, and between two styles of a concept.

    When the fraction `lock_images` of the budget is spent, the averaged weights take the place of the model's, and what
    remains of the budget teaches the text tower alone, in all languages and with a schedule of its own.

    Args:
        clock: seconds; replace it only to compare settings on a busy machine.
    """

    def __init__(self, model: SmallClip, tokenizer: WordTokenizer, batches: ConceptBatches, config: TrainConfig,
                 clock: Callable[[], float] = time.perf_counter):  # fmt: skip
        self.model, self.tokenizer, self.batches, self.config = model, tokenizer, batches, config
        self.step, self.images, self.image_seconds = 0, 0, 0.0
        self.average = WeightAverage(model, config.ema)
        self.history = History()
        self.budget = TimeBudget(60 * config.minutes, clock=clock)
        self.optimizers = build_optimizers(model, config)
        self.locked: LockedBatches | None = None

    @property
    def fraction(self) -> float:
        """Share of the budget used, in [0, 1]: of the steps where they are given, else of the time."""
        return min(self.step / self.config.steps, 1.0) if self.config.steps else self.budget.fraction

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of a batch and what the progress bar shows of it."""
        config, model = self.config, self.model
        with autocast():
            image, text = model.encode_image(batch.images), model.encode_text(batch.tokens)
        scale = model.logit_scale.exp()
        options = {"normalize": True, "backend": config.backend}
        image_text, stats = info_nce(
            image, text, scale, ids=batch.ids, label_smoothing=config.label_smoothing, return_stats=True, **options
        )
        views = image.chunk(config.images_per_concept)
        pairs = [info_nce(a, b, scale, **options) for a, b in pairwise(views)]
        image_image = sum(pairs) / len(pairs)
        loss = image_text + config.image_weight * image_image
        shown = {"loss": loss, "image_text_loss": image_text, "image_image_loss": image_image, "scale": scale,
                 "accuracy": stats.image_accuracy}  # fmt: skip
        return loss, shown

    def lock_images(self) -> None:
        """From now on steps are the text tower's."""
        self.locked = LockedBatches(self.averaged_model(), self.batches, self.config)

    def text_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of image features, and what the progress bar shows of it."""
        text, scale = self.model.encode_text(batch.tokens), self.model.logit_scale.exp()
        loss, stats = info_nce(
            batch.images, text, scale, ids=batch.ids, label_smoothing=self.config.label_smoothing, return_stats=True,
            normalize=True, backend=self.config.backend,
        )  # fmt: skip
        return loss, {"loss": loss, "image_text_loss": loss, "scale": scale, "accuracy": stats.image_accuracy}

    def train_step(self) -> dict[str, float]:
        """One optimiser step at the learning rate of the share of the budget spent so far."""
        done, lock = self.fraction, self.config.lock_images
        if done < lock:
            factor = warmup_cosine(done / lock, self.config.warmup)
            self.locked = None  # a resume with a larger budget takes the image tower up again
            batch = self.batches(self.step)
            loss, shown = self.losses(batch)
            self.images += len(batch.images)
            self.image_seconds = self.budget.spent
        else:
            if self.locked is None:
                self.history.close(self.step, self.budget.spent)  # no row of the log holds steps of both kinds
                self.average.copy_to(self.model)
                self.lock_images()
            factor = warmup_cosine((done - lock) / (1 - lock), self.config.warmup)
            loss, shown = self.text_loss(self.locked(self.step))
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]
            optimizer.step()
        self.model.clamp_logit_scale_()
        self.step += 1
        self.average.update(self.model, self.step)
        return {
            **{name: float(value.detach()) for name, value in shown.items()},
            "learning_rate": factor * self.config.learning_rate,
        }

    def run(self, folder: Path, watch: Watch = lambda fraction, values: None) -> bool:
        """Train until the budget is spent or Ctrl-C; `checkpoint.pt` and `train.csv` in `folder` are then up to date.

        Returns: True when the budget was spent, False when interrupted.
        """
        self.model.train()
        saved_at = self.budget.spent
        with InterruptGuard() as guard:
            self.budget.start()
            while self.fraction < 1 and not guard.requested:
                values = self.train_step()
                self.history.add(self.step, self.budget.spent, self.fraction, values)
                watch(self.fraction, self.history.smooth)
                if self.budget.spent - saved_at >= self.config.save_every_seconds:
                    self.budget.pause()
                    self.save(folder)
                    saved_at = self.budget.spent
                    self.budget.start()
            self.budget.pause()
            self.history.close(self.step, self.budget.spent)
            self.save(folder)
        return self.fraction >= 1

    def averaged_model(self) -> SmallClip:
        """A copy of the model with averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model)
        self.average.copy_to(model)
        return model.eval()

    def save(self, folder: Path) -> None:
        """Write `checkpoint.pt` and `train.csv`."""
        state = {
            "train_config": self.config.to_dict(),
            "model_config": vars(self.model.config).copy(),
            "words": self.tokenizer.words,
            "model": self.model.state_dict(),
            "average": self.average.tensors,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.budget.spent,
            "locked": self.locked is not None,
            "images": self.images,
            "image_seconds": self.image_seconds,
            "history": self.history.rows,
        }
        save_checkpoint(folder / "checkpoint.pt", state)
        self.history.write_csv(folder / "train.csv")

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint: weights, average, optimiser, step and time spent.

        Raises: ValueError when the checkpoint is of other sizes or another vocabulary.
        """
        if SmallClipConfig(**state["model_config"]) != self.model.config or state["words"] != self.tokenizer.words:
            raise ValueError("restore: the checkpoint has other sizes or another vocabulary than this run")
        self.model.load_state_dict(state["model"])
        for name, tensor in self.average.tensors.items():
            tensor.copy_(state["average"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.images, self.image_seconds = (state[name] for name in ("step", "images", "image_seconds"))
        self.budget = TimeBudget(self.budget.seconds, state["seconds"], self.budget._clock)
        self.history = History(state["history"])
        if state["locked"]:
            self.lock_images()
