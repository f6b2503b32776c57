"""Muon: momentum whose matrices are replaced by the nearest orthogonal ones, so that every direction moves alike.

On the validation vendors 500 steps of it end 8 points above 500 steps of AdamW alone (SETTINGS.md).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# The source's quintic and number of rounds: steep at 0, and singular values end within 0.7..1.2.
_QUINTIC, _ROUNDS = (3.4445, -4.7750, 2.0315), 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V' of each U S V', singular values roughly 1: [..., R, C] fp32 -> same shape.

    Newton-Schulz X <- (a + b X X' + c (X X')^2) X, carried out on the small Gram matrix: with P_k the k-th round's
    polynomial in G = X X', X_n = (P_n ... P_1) X_0 and G <- P G P. The long side is multiplied twice, not ten times.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT
    a, b, c = _QUINTIC
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1])
    product = a * eye + b * gram + c * (gram @ gram)
    polynomial = product
    for _ in range(_ROUNDS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = a * eye + b * gram + c * (gram @ gram)
        product = polynomial @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """w <- (1 - lr * weight_decay) w - lr * sqrt(max(1, R / C)) * orthogonalise(nesterov(gradient)).

    Args:
        parameters: matrices [R, C] and filters [O, I, H, W], which count as [O, I H W]. A matrix of three square blocks
            (attention's packed query, key and value) is taken as three.
        momentum: of the running mean of gradients.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = _blocks(parameter.grad.lerp(mean, group["momentum"]))
                stretch = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalise(update).reshape(parameter.shape), alpha=-group["lr"] * stretch)


def _blocks(tensor: Tensor) -> Tensor:
    matrix = tensor.flatten(1)
    rows, columns = matrix.shape
    return matrix.view(3, columns, columns) if rows == 3 * columns else matrix
