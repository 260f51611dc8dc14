"""Optimizers, each made from a model and a recipe, and learning-rate schedules in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.hub import is_repo_id
from ldm.config import Recipe, ScoreMatchingObjective
from ldm.diffusion.objective import TIME_SAMPLERS, WEIGHTINGS
from ldm.errors import choose
from ldm.installation import install_command
from ldm.nn.attention import ATTENTION_BACKENDS
from ldm.train.task import trainable_parameters

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic whose iterates drive every singular value to about 1


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer of a model's trainable parameters; ValueError for an unknown name or option."""
    try:
        return choose(OPTIMIZERS, recipe.optimizer, "optimizer")(model, recipe, **recipe.optimizer_options)
    except TypeError as error:
        raise ValueError(f"optimizer_options of {recipe.optimizer}: {error}") from None


def check_recipe(recipe: Recipe) -> None:
    """ValueError for a name or an option that a training would refuse after it has made its folder."""
    if recipe.optimizer == "muon" and recipe.text_encoder_lr is not None:
        raise ValueError("text_encoder_lr: muon has one learning rate; choose another optimizer")
    create_optimizer(nn.Linear(1, 1), recipe)
    choose(LR_SCHEDULES, recipe.lr_scheduler, "lr_scheduler")
    if recipe.hub_model_id is not None and not is_repo_id(recipe.hub_model_id):
        raise ValueError(f"hub_model_id {recipe.hub_model_id!r}: not owner/name")
    objective = recipe.objective
    if isinstance(objective, ScoreMatchingObjective):
        choose(WEIGHTINGS, objective.weighting, "weighting")
        choose(TIME_SAMPLERS, objective.times, "times")
        choose(ATTENTION_BACKENDS, objective.attention, "attention")


def adam_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments that every kind of Adam takes."""
    betas = (0.9, recipe.adam_beta2)
    return {"lr": recipe.learning_rate, "betas": betas, "weight_decay": recipe.adam_weight_decay}


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[Any]:
    """The trainable parameters, in two groups where text encoders have a learning rate of their own."""
    named = trainable_parameters(model)
    text = {name for name in named if name.startswith("text_encoder")}
    if recipe.text_encoder_lr is None or not text:
        return [*named.values()]
    others = [parameter for name, parameter in named.items() if name not in text]
    return [{"params": others}, {"params": [named[name] for name in named if name in text], "network": "text_encoder"}]


def base_learning_rate(group: Mapping[str, Any], recipe: Recipe) -> float:
    """The learning rate of a group of parameters, which the schedule multiplies."""
    rate = recipe.text_encoder_lr if group.get("network") == "text_encoder" else None
    return recipe.learning_rate if rate is None else rate


def adamw(parameters: Iterable[Any], recipe: Recipe, **options: Any) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused."""
    return torch.optim.AdamW(parameters, **{**adam_options(recipe), "fused": True, **options})


def optim_extra(module: str, name: str, model: nn.Module, recipe: Recipe, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of a package of the extra `optim`; ValueError says how to install it."""
    try:
        make = getattr(import_module(module), name)
    except ImportError:
        package = module.split(".")[0]
        raise ValueError(f"optimizer {recipe.optimizer!r} needs {package}: {install_command('optim')}") from None
    return make(parameter_groups(model, recipe), **{**adam_options(recipe), **options})


class Lion(torch.optim.Optimizer):
    """The sign of interpolated momentum (Chen et al. 2023, algorithm 2): rates are 3 to 10 times below AdamW's."""

    def __init__(self, parameters: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(state["momentum"].lerp(parameter.grad, 1 - beta1).sign_(), alpha=lr)
                state["momentum"].lerp_(parameter.grad, 1 - beta2)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for everything else (Jordan et al. 2024).

    M <- m M + (1 - m) G;  W <- (1 - lr d) W - lr .2 sqrt(max(rows, columns)) polar((1 - m) G + m M), m = .95, with the
    scale that gives Adam's usual size of step, so that one learning rate serves both (Liu et al. 2025, eq. 4). A
    convolution's weight is the matrix [out, in k k]; it must be in channels_last. Embeddings, and the modules named in
    `adamw_modules`, a network's first and last layers, are AdamW's. torch's own Muon takes matrices only.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, adamw_modules: Iterable[str] = ("conv_in", "conv_out")
    ) -> None:
        embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        named, outer = trainable_parameters(model), {*adamw_modules}
        inner = {n: p for n, p in named.items() if p.dim() > 1 and p not in embeddings and not outer & {*n.split(".")}}
        self.adamw = adamw([p for n, p in named.items() if n not in inner], recipe)
        super().__init__(inner.values(), {"lr": recipe.learning_rate, "weight_decay": recipe.adam_weight_decay})
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 0.05)
            matrix = flatten_to_matrix(parameter)
            assert matrix.data_ptr() == parameter.data_ptr(), "a convolution that is not in channels_last"
            scale = 0.2 * max(matrix.shape) ** 0.5
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            update = newton_schulz_orthogonalize(flatten_to_matrix(parameter.grad.lerp(momentum, 0.95)))
            matrix.sub_(update, alpha=group["lr"] * scale)
        # one state and one list of groups, also after load_state_dict has replaced them
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]
        self.adamw.step()


def flatten_to_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix [out, rest]: a view, also of a convolution in channels_last; columns in any order."""
    return (weight.permute(0, *range(2, weight.dim()), 1) if weight.dim() > 2 else weight).flatten(1)


def newton_schulz_orthogonalize(matrix: Tensor, num_iterations: int = 5) -> Tensor:
    """Approximately the orthogonal factor U V^T of U S V^T, by Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16().contiguous()  # one layout, one result: strides of 1 x 1 vary
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # (model, recipe, **optimizer_options)
    "adamw": lambda model, recipe, **options: adamw(parameter_groups(model, recipe), recipe, **options),
    "adamw8bit": partial(optim_extra, "bitsandbytes.optim", "AdamW8bit"),  # Dettmers et al. 2022
    "prodigy": partial(optim_extra, "prodigyopt", "Prodigy"),  # learning_rate is a factor of its own: Mishchenko 2024
    "lion": lambda model, recipe, **options: Lion(
        parameter_groups(model, recipe), **{**adam_options(recipe), **options}
    ),
    "muon": Muon,
}


def compute_lr_factor(step: int, recipe: Recipe) -> float:
    """The factor of the learning rate after `step` updates (as lr_lambda of LambdaLR): warm-up times the schedule."""
    warmup = min(1.0, (step + 1) / max(1, recipe.lr_warmup_steps))
    return warmup * choose(LR_SCHEDULES, recipe.lr_scheduler, "lr_scheduler")(step, recipe)


def _decay_progress(step: int, recipe: Recipe) -> float:
    """The fraction of the steps after the warm-up that are done, 0 to 1."""
    warmup = recipe.lr_warmup_steps
    return max(0.0, (step - warmup) / max(1, recipe.max_train_steps - warmup))


def warmup_stable_decay(step: int, recipe: Recipe) -> float:
    """Constant, then half a cosine to zero over the last `lr_decay` of the steps."""
    decay_steps = max(1.0, recipe.lr_decay * recipe.max_train_steps)
    return 0.5 * (1 - math.cos(math.pi * min(1.0, (recipe.max_train_steps - step) / decay_steps)))


def cosine_with_restarts(step: int, recipe: Recipe) -> float:
    """`lr_num_cycles` half cosines from 1 to 0, zero after the last."""
    progress = _decay_progress(step, recipe)
    return 0.5 * (1 + math.cos(math.pi * (recipe.lr_num_cycles * progress % 1.0))) if progress < 1 else 0.0


LR_SCHEDULES: dict[str, Callable[[int, Recipe], float]] = {
    "constant": lambda step, recipe: 1.0,
    "constant_with_warmup": lambda step, recipe: 1.0,  # lr_warmup_steps count for every schedule
    "linear": lambda step, recipe: 1 - _decay_progress(step, recipe),
    "polynomial": lambda step, recipe: (1 - _decay_progress(step, recipe)) ** recipe.lr_power,
    "cosine": lambda step, recipe: 0.5 * (1 + math.cos(math.pi * _decay_progress(step, recipe))),
    "cosine_with_restarts": cosine_with_restarts,
    "wsd": warmup_stable_decay,
}
