"""Optimizers: one function each, from a model and a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ldm.config import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic whose iterates drive every singular value to about 1


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused."""
    return _adamw(model.parameters(), recipe)


def _adamw(parameters: Iterable[Tensor], recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=(0.9, recipe.adam_beta2),
        weight_decay=recipe.adam_weight_decay,
        fused=True,
    )


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for everything else (Jordan et al. 2024).

    M <- m M + (1 - m) G;  W <- (1 - lr d) W - lr .2 sqrt(max(rows, columns)) polar((1 - m) G + m M), m = .95, with the
    scale that gives Adam's usual size of step, so that one learning rate serves both (Liu et al. 2025, eq. 4). A
    convolution's weight is the matrix [out, in k k]; it must be in channels_last. Embeddings, and modules named in
    `edges`, a network's first and last layers, are AdamW's. torch's own Muon takes matrices alone.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, edges: frozenset[str] = frozenset({"conv_in", "conv_out"})
    ) -> None:
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        inner = {
            n: p for n, p in model.named_parameters() if p.dim() > 1 and p not in tables and not edges & {*n.split(".")}
        }
        self.adamw = _adamw([p for n, p in model.named_parameters() if n not in inner], recipe)
        super().__init__(inner.values(), {"lr": recipe.learning_rate, "weight_decay": recipe.adam_weight_decay})
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        inner = self.param_groups[0]
        for parameter in inner["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 0.05)
            matrix = rows(parameter)
            assert matrix.data_ptr() == parameter.data_ptr(), "a convolution that is not in channels_last"
            size = 0.2 * max(matrix.shape) ** 0.5
            matrix.mul_(1 - inner["lr"] * inner["weight_decay"])
            matrix.sub_(polar(rows(parameter.grad.lerp(momentum, 0.95))), alpha=inner["lr"] * size)
        # one state and one list of groups, also after load_state_dict has replaced them
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]
        self.adamw.step()


def rows(weight: Tensor) -> Tensor:
    """A weight as a matrix [out, rest]: a view, also of a convolution in channels_last; the columns' order is free."""
    return (weight.permute(0, *range(2, weight.dim()), 1) if weight.dim() > 2 else weight).flatten(1)


def polar(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The orthogonal factor U V^T of U S V^T, nearly, by Newton and Schulz's iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16().contiguous()  # one layout, one result: strides of 1 x 1 vary
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


OPTIMIZERS: dict[str, Callable[[nn.Module, Recipe], torch.optim.Optimizer]] = {"adamw": adamw, "muon": Muon}
