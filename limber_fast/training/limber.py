"""Training LiMBeR's linear map: AdamW steps over micro-batches, on one process or many, resumable at any step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limber_fast.models.limber import Limber
from limber_fast.training import skipped
from limber_fast.training.checkpoint import LIMBER, save_checkpoint
from limber_fast.training.history import LIMBER_COLUMNS, History
from limber_fast.training.interrupt import InterruptGuard
from limber_fast.training.limber_config import LimberTrainConfig
from limber_fast.training.limber_data import Features, Pairs, read_image

Watch = Callable[[int, dict[str, float]], None]


# What may change between a checkpoint and the run that goes on from it: nothing of these reaches a weight.
FREE = {"output", "save_every", "tensorboard", "grad_checkpointing"}


def linear_decay(step: int, warmup: int, steps: int) -> float:
    """Learning-rate factor of a step: rises linearly over `warmup` steps, falls linearly to 0 at `steps`."""
    return min((step + 1) / max(warmup, 1), (steps - step) / (steps - warmup), 1.0)


class LimberTrainer:
    """Trains a Limber's projection (with its LayerNorm, and a tuned encoder) on pairs of pictures and captions.

    What a step does is a function of its number, of micro_batch and of the number of processes: pictures, captions and
    dropout come from (seed, position), so a run that was stopped goes on bit for bit. Every process takes its share of
    a batch; the loss is the mean over all caption tokens of the batch, whichever process and micro-batch they are in
    (LiMBeR's own engine takes the mean of micro-batches' means), and gradients are that loss's.

    Args:
        features: of a frozen encoder, where they were cached; else the encoder runs in every step.
    """

    def __init__(self, limber: Limber, pairs: Pairs, config: LimberTrainConfig, features: Features | None = None):
        self.limber, self.pairs, self.config, self.features = limber, pairs, config, features
        self.rows: Sequence[int] = range(len(pairs)) if features is None else features.rows
        self.step, self.seconds, self.history = 0, 0.0, History(columns=LIMBER_COLUMNS)
        self.skipped: dict[int, str] = {}
        self.stop_wanted = self.stopped = False
        if limber.encoder is not None:
            limber.encoder.requires_grad_(config.tuned)
        if limber.language_model.config.adapter_width is not None:
            limber.language_model.train_adapters(config.adapters > 0)
        groups = [{"params": self.trained_of(limber), "lr": config.learning_rate}]
        if config.tuned:
            groups.append({"params": list(limber.encoder.parameters()), "lr": config.encoder_learning_rate})
        self.parameters = [p for group in groups for p in group["params"]]
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate, betas, weight_decay=config.weight_decay)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._order: tuple[int, list[int]] = (-1, [])

    @staticmethod
    def trained_of(limber: Limber) -> list[nn.Parameter]:
        parts = [limber.projection, *([] if limber.layer_norm is None else [limber.layer_norm])]
        adapters = [p for p in limber.language_model.adapters.parameters() if p.requires_grad]
        return [*(p for part in parts for p in part.parameters()), *adapters]

    def positions(self, step: int) -> range:
        """What this process takes of a step: places in the endless sequence of shuffled epochs."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        size = self.config.batch_size
        return range(step * size + rank, (step + 1) * size, world)

    def draw(self, position: int) -> tuple[int, str]:
        """(index into `rows`, caption) at a place of the sequence."""
        epoch, place = divmod(position, len(self.rows))
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.config.seed} epoch {epoch}").shuffle(order)
            self._order = (epoch, order)
        index = self._order[1][place]
        captions = self.pairs.captions(self.rows[index])
        return index, random.Random(f"{self.config.seed} caption {position}").choice(captions)

    def micro_loss(self, positions: Sequence[int]) -> tuple[Tensor, int] | None:
        """Mean cross entropy of a micro-batch and its number of tokens; None where no picture of it could be read."""
        drawn = [self.draw(position) for position in positions]
        if self.features is not None:
            images = self.features.values[[self.rows[index] for index, _ in drawn]]
            captions = [text for _, text in drawn]
        else:
            read = [(read_image(self.pairs, self.rows[i], self.skipped), text) for i, text in drawn]
            images, captions = ([pair[at] for pair in read if pair[0] is not None] for at in (0, 1))
            if not images:
                return None
        seed = random.Random(f"{self.config.seed} dropout {positions[0]}").getrandbits(62)
        if not self.config.tuned:
            return self.limber.loss(images, captions, seed=seed)
        with torch.random.fork_rng():  # an encoder in training may draw for itself
            torch.manual_seed(seed)
            return self.limber.loss(images, captions, seed=seed)

    def train_step(self) -> dict[str, float]:
        """Gradients of a batch and one AdamW step.

        Raises: ValueError where no picture of the batch could be read, or the loss is not finite; nothing has moved.
        """
        config, positions = self.config, self.positions(self.step)
        total, tokens = 0.0, 0
        self.optimizer.zero_grad()
        for start in range(0, len(positions), config.micro_batch):
            found = self.micro_loss(positions[start : start + config.micro_batch])
            if found is not None:
                loss, count = found
                (loss * count).backward()
                total, tokens = total + loss.item() * count, tokens + count
        total, tokens = self._add_up(total, tokens)
        if not tokens:
            raise ValueError(f"train-limber: step {self.step + 1}: none of its pictures could be read")
        if not math.isfinite(total):
            raise ValueError(f"train-limber: step {self.step + 1}: the loss is {total}; the last checkpoint is whole")
        for p in self.parameters:
            if p.grad is not None:
                p.grad /= tokens
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        factor = linear_decay(self.step, config.warmup, config.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        self.optimizer.step()
        self.step += 1
        rate = factor * config.learning_rate
        return {"loss": total / tokens, "grad_norm": float(norm), "learning_rate": rate}

    def _add_up(self, loss: float, tokens: int) -> tuple[float, int]:
        """Sums over all processes: of the gradients in place, of loss and tokens, and of the wish to stop, so that all
        stop behind the same step; in one flat exchange."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.stopped = self.stop_wanted
            return loss, tokens
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        numbers = torch.tensor([loss, tokens, float(self.stop_wanted)], device=gradients[0].device)
        flat = torch.cat([*(x.flatten().float() for x in gradients), numbers])
        dist.all_reduce(flat)
        for p, summed in zip(self.parameters, flat[:-3].split([x.numel() for x in gradients]), strict=True):
            p.grad = summed.view_as(p).to(p.dtype)
        loss, tokens, stop = flat[-3:].tolist()
        self.stopped = stop > 0
        return loss, round(tokens)

    def run(self, folder: Path, watch: Watch = lambda step, values: None) -> bool:
        """Train to the last step or to Ctrl-C; `checkpoint.pt`, `train.csv` and, without cached features, `skipped.txt`
        in `folder` are then up to date.

        Returns: True at the last step, False when interrupted.
        """
        self.limber.train()
        with InterruptGuard() as guard:
            while self.step < self.config.steps and not self.stopped:
                started, self.stop_wanted = time.perf_counter(), guard.requested
                values = self.train_step()
                self.seconds += time.perf_counter() - started
                self.history.add(self.step, self.seconds, self.step / self.config.steps, values)
                watch(self.step, self.history.smooth)
                if self.step % self.config.save_every == 0 and self.step < self.config.steps:
                    self.save(folder)
            self.history.close(self.step, self.seconds)
            self.save(folder)
        self.limber.eval()
        return self.step >= self.config.steps

    def save(self, folder: Path) -> None:
        """checkpoint.pt, train.csv and, without cached features, skipped.txt, by the first process alone; all call it,
        as all tell of broken pictures."""
        self.skipped = skipped.of_all(self.skipped)
        if dist.is_initialized() and dist.get_rank():
            return
        state = {
            "config": self.config.to_dict(),
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "parameters": [p.detach().cpu() for p in self.trained_of(self.limber)],
            "encoder": self.limber.encoder.trunk.state_dict() if self.config.tuned else {},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history.rows,
            "skipped": self.skipped,
        }
        save_checkpoint(folder / "checkpoint.pt", state, LIMBER)
        self.history.write_csv(folder / "train.csv")
        if self.features is None:
            skipped.write(folder, self.skipped.values())

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint.

        Raises: ValueError where it was made with other settings than these (but for steps saved, and where to).
        """
        ours, theirs = self.config.to_dict(), state["config"]
        for name in sorted(set(ours) - FREE):
            if ours[name] != theirs.get(name):
                raise ValueError(f"restore: {name} was {theirs.get(name)!r} in the checkpoint; got {ours[name]!r}")
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes != state["processes"]:
            raise ValueError(f"restore: {state['processes']} processes made the checkpoint; got {processes}")
        ours, theirs = self.trained_of(self.limber), state["parameters"]
        if [p.shape for p in ours] != [p.shape for p in theirs]:
            shapes = [[tuple(p.shape) for p in found] for found in (theirs, ours)]
            raise ValueError(f"restore: the checkpoint trains {shapes[0]}; the models at hand need {shapes[1]}")
        with torch.no_grad():
            for p, saved in zip(ours, theirs, strict=True):
                p.copy_(saved)
        if self.config.tuned:
            self.limber.encoder.trunk.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = History(state["history"], columns=LIMBER_COLUMNS)
        self.skipped = dict(state.get("skipped", {}))
