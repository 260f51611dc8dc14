"""Optimizers: one function each, from a model and a recipe.

Learning-rate schedules: factors of the rate, in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import Recipe
from ldm.errors import choose
from ldm.installation import install_command

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic whose iterates drive every singular value to about 1


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer of what learns in a model; ValueError for a name or an option that there is not."""
    try:
        return choose(OPTIMIZERS, recipe.optimizer, "optimizer")(model, recipe)
    except TypeError as error:
        raise ValueError(f"optimizer_options of {recipe.optimizer}: {error}") from None


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused."""
    return _make_adamw(trainable_parameters(model), recipe, **recipe.optimizer_options)


def _make_adamw(parameters: Iterable[Tensor], recipe: Recipe, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **{**adam_options(recipe), "fused": True, **options})


def adamw8bit(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits, a scale for each block (Dettmers et al. 2022)."""
    make = import_optim_extra("bitsandbytes.optim", "adamw8bit").AdamW8bit
    return make(trainable_parameters(model), **{**adam_options(recipe), **recipe.optimizer_options})


def prodigy(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Prodigy finds the rate itself (Mishchenko & Defazio 2024); `learning_rate`, usually 1, is a factor of it."""
    make = import_optim_extra("prodigyopt", "prodigy").Prodigy
    return make(trainable_parameters(model), **{**adam_options(recipe), **recipe.optimizer_options})


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adam_options(recipe: Recipe) -> dict[str, Any]:
    """The options that every kind of Adam has."""
    return {
        "lr": recipe.learning_rate,
        "betas": (0.9, recipe.adam_beta2),
        "weight_decay": recipe.adam_weight_decay,
    }


def import_optim_extra(module: str, optimizer: str) -> Any:
    """A module of the extra `optim`; ValueError says how to get it."""
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f"optimizer {optimizer!r} needs {module.split('.')[0]}: {install_command('optim')}") from None


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for everything else (Jordan et al. 2024).

    M <- m M + (1 - m) G;  W <- (1 - lr d) W - lr .2 sqrt(max(rows, columns)) polar((1 - m) G + m M), m = .95, with the
    scale that gives Adam's usual size of step, so that one learning rate serves both (Liu et al. 2025, eq. 4). A
    convolution's weight is the matrix [out, in k k]; it must be in channels_last. Embeddings, and modules named in
    `image_gradient_loss`, a network's first and last layers, are AdamW's. torch's own Muon takes matrices alone.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, edges: frozenset[str] = frozenset({"conv_in", "conv_out"})
    ) -> None:
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        inner = {n: p for n, p in named.items() if p.dim() > 1 and p not in tables and not edges & {*n.split(".")}}
        self.adamw = _make_adamw([p for n, p in named.items() if n not in inner], recipe)
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
            matrix = flatten_to_matrix(parameter)
            assert matrix.data_ptr() == parameter.data_ptr(), "a convolution that is not in channels_last"
            size = 0.2 * max(matrix.shape) ** 0.5
            matrix.mul_(1 - inner["lr"] * inner["weight_decay"])
            matrix.sub_(
                newton_schulz_orthogonalize(flatten_to_matrix(parameter.grad.lerp(momentum, 0.95))),
                alpha=inner["lr"] * size,
            )
        # one state and one list of groups, also after load_state_dict has replaced them
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]
        self.adamw.step()


def flatten_to_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix [out, rest]: a view, also of a convolution in channels_last; the columns' order is free."""
    return (weight.permute(0, *range(2, weight.dim()), 1) if weight.dim() > 2 else weight).flatten(1)


def newton_schulz_orthogonalize(matrix: Tensor, num_iterations: int = 5) -> Tensor:
    """The orthogonal factor U V^T of U S V^T, nearly, by Newton and Schulz's iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16().contiguous()  # one layout, one result: strides of 1 x 1 vary
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def muon(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Muon with the options `image_gradient_loss`, names of modules."""
    options = {name: frozenset(value) for name, value in recipe.optimizer_options.items()}
    return Muon(model, recipe, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module, Recipe], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "prodigy": prodigy,
    "muon": muon,
}


def compute_lr_factor(step: int, recipe: Recipe) -> float:
    """The learning rate's factor for the update after `step` others: linear warm-up times the recipe's schedule."""
    warmup = min(1.0, (step + 1) / max(1, recipe.lr_warmup_steps))
    return warmup * choose(LR_SCHEDULES, recipe.lr_scheduler, "lr_scheduler")(step, recipe)


def _decay_progress(step: int, recipe: Recipe) -> float:
    """The share of the steps after the warm-up that are done, 0 to 1."""
    warmup = recipe.lr_warmup_steps
    return max(0.0, (step - warmup) / max(1, recipe.max_train_steps - warmup))


def _warmup_stable_decay(step: int, recipe: Recipe) -> float:
    """Warm-up, stable, decay: constant, then half a cosine to zero over the last `lr_decay` of the steps."""
    falling = max(1.0, recipe.lr_decay * recipe.max_train_steps)
    left = min(1.0, (recipe.max_train_steps - step) / falling)
    return 0.5 * (1 - math.cos(math.pi * left))


LR_SCHEDULES: dict[str, Callable[[int, Recipe], float]] = {
    "constant": lambda step, recipe: 1.0,
    "linear": lambda step, recipe: 1 - _decay_progress(step, recipe),
    "cosine": lambda step, recipe: 0.5 * (1 + math.cos(math.pi * _decay_progress(step, recipe))),
    "wsd": _warmup_stable_decay,
}
