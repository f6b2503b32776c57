"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics. Other buffers stay out: the -inf of an attention mask averages to NaN."""
    running = {name: tensor for name, tensor in model.named_buffers() if ".running_" in name}
    return {**{name: p.detach() for name, p in model.named_parameters()}, **running}


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, with a smaller decay in the first steps."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: tensor.clone() for name, tensor in averaged_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = averaged_tensors(model)
        torch._foreach_lerp_(list(self.tensors.values()), [current[name] for name in self.tensors], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, tensor in averaged_tensors(model).items():
            tensor.copy_(self.tensors[name])
