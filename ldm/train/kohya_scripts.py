"""The command lines of kohya's sd-scripts as recipes: `train_network.py --network_dim 16 ...`, with TOML files."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.train.command_lines import CommandLine, ForeignRecipe, from_values, parse_command_line, translate_arguments
from ldm.train.kohya_arguments import KOHYA_ARGUMENTS, ONE_RATE
from ldm.train.kohya_datasets import (
    DATASET_ARGUMENTS,
    combine_subsets,
    list_folder_subsets,
    load_toml,
    read_dataset_config,
)

SCRIPTS = {  # a script: what it trains, and whether it trains the text encoders too unless it is told not to
    "train_network.py": ("lora", True),
    "sdxl_train_network.py": ("lora", True),
    "train_db.py": ("full", True),
    "fine_tune.py": ("full", False),
    "sdxl_train.py": ("full", False),
    "train_textual_inversion.py": ("textual_inversion", False),
    "sdxl_train_textual_inversion.py": ("textual_inversion", False),
}
DEFAULTS = {
    "learning_rate": "2e-6",
    "lr_scheduler": "constant",
    "lr_warmup_steps": "0",
    "train_batch_size": "1",
    "max_train_steps": "1600",
    "max_grad_norm": "1.0",
    "optimizer_type": "AdamW",
}
OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {  # kohya's name: ours, and its classes' own defaults
    "adamw": ("adamw", {"adam_beta2": 0.999, "adam_weight_decay": 0.01}),
    "adamw8bit": ("adamw8bit", {"adam_beta2": 0.999, "adam_weight_decay": 0.01}),
    "lion": ("lion", {"adam_beta2": 0.99, "adam_weight_decay": 0.0}),
    "prodigy": ("prodigy", {"adam_beta2": 0.999, "adam_weight_decay": 0.0}),
}
SCHEDULERS = {"warmup_stable_decay": "wsd"}  # kohya's names that are not ours
NO_CLIPPING = 1e9  # of the gradient's norm: kohya's 0


class Run(NamedTuple):
    """What is known of a command: its words, and what it trains."""

    command: CommandLine
    values: dict[str, Any]
    options: dict[str, Any]
    method: str
    trains_text: bool


def read_kohya_command(words: Sequence[str]) -> ForeignRecipe:
    """The recipe of a command line of sd-scripts; ValueError names the option."""
    command = parse_command_line(words, SCRIPTS, KOHYA_ARGUMENTS)
    if file := command.given.get("config_file"):
        command = command._replace(given={**read_config_file(Path(file)), **command.given})
    if "pretrained_model_name_or_path" not in command.given:
        raise ValueError("--pretrained_model_name_or_path is needed")
    data = {name: value for name, value in command.given.items() if name in DATASET_ARGUMENTS}
    others = {name: value for name, value in command.given.items() if name not in data}
    options, values, notes = translate_arguments({**DEFAULTS, **others}, KOHYA_ARGUMENTS)
    data_options, batch, data_notes = _read_data(values, data)
    method, trains_text = SCRIPTS[command.script]
    run = Run(command, {**values, "batch_size": batch}, options, method, _trains_text(values, method, trains_text))
    own = {
        "objective.kind": "tune",
        "objective.method": method,
        "objective.times": "discrete",
        "objective.caption_dropout": 0.0,
        "objective.train_text_encoder": run.trains_text,
        "mixed_precision": command.mixed_precision or "no",
        "seed": 0,
        "ema_decay": 0.0,
        "validation_guidance": 7.5,
    }
    merged = {**own, **data_options, **options, **_read_network(run), **_read_schedule(run), **_read_optimizer(run)}
    merged |= _read_output(run, notes)
    if method == "textual_inversion":
        merged |= _read_template(merged, values)
    epochs = {"checkpointing_steps": "save_every_n_epochs", "validation_steps": "sample_every_n_epochs"}
    intervals = {ours: values[name] for ours, name in epochs.items() if values.get(name)}
    return ForeignRecipe(merged, [*notes, *data_notes, *command.notes], intervals)


def read_config_file(path: Path) -> dict[str, Any]:
    """What a TOML file of --config_file gives, whatever its sections are called."""
    path = path if path.suffix == ".toml" else path.with_name(path.name + ".toml")
    given: dict[str, Any] = {}
    for name, value in load_toml(path).items():
        given |= from_values(value if isinstance(value, dict) else {name: value}, KOHYA_ARGUMENTS, str(path))
    return given


def _read_data(values: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], int | None, list[str]]:
    """The data, the batch size of a TOML file, and notes."""
    if file := values.get("dataset_config"):
        subsets = [*read_dataset_config(Path(file), given)]
    elif folder := values.get("train_data_dir"):
        repeats = values.get("dataset_repeats")
        subsets = [*list_folder_subsets(folder, values.get("reg_data_dir"), values.get("in_json"), repeats, given)]
    else:
        raise ValueError("--train_data_dir or --dataset_config is needed")
    (options, _, notes), batch = combine_subsets(subsets)
    return options, batch, notes


def _trains_text(values: dict[str, Any], method: str, default: bool) -> bool:
    """Whether text encoders are trained: kohya's scripts have four ways to say so."""
    rates = [*map(_number, values.get("text_encoder_lr", ())), *_text_rates(values)]
    cached = values.get("cache_text_encoder_outputs") or values.get("cache_text_encoder_outputs_to_disk")
    if values.get("network_train_unet_only") or cached or (rates and not any(rates)):
        return False
    if (stop := values.get("stop_text_encoder_training")) is not None and stop < 0:
        return False
    if (stop or 0) > 0:
        raise ValueError("--stop_text_encoder_training is not supported: write -1, which never trains them")
    return method != "textual_inversion" and (default or bool(values.get("train_text_encoder")))


def _text_rates(values: dict[str, Any]) -> list[float]:
    names = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
    return [values[name] for name in names if name in values]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--text_encoder_lr {text}: not a number") from None


def _read_network(run: Run) -> dict[str, Any]:
    """Rank, alpha and targets of a LoRA: kohya's has attention and feed-forward layers, and convolutions if asked."""
    if run.method != "lora":
        return {}
    module, network = run.values.get("network_module", "networks.lora"), _pairs("network_args", run.values)
    if module not in ("networks.lora", "lycoris.kohya"):
        raise ValueError(f"--network_module {module} is not supported: write networks.lora")
    if (kind := network.pop("algo", "lora")) not in ("lora", "locon"):
        raise ValueError(f"--network_args algo={kind} is not supported: LoRA (lora, locon) and DoRA are trained")
    rank = run.options.get("objective.rank", 4)
    alpha = run.values.get("network_alpha", 1.0) or float(rank)
    targets = ["attention", "feed-forward"]
    if conv_rank := network.pop("conv_dim", None):
        if (conv_rank, network.pop("conv_alpha", 1)) != (rank, alpha):
            raise ValueError(
                f"--network_args: conv_dim and conv_alpha must be network_dim {rank} and network_alpha {alpha:g}"
            )
        targets.append("convolutions")
    dora = bool(network.pop("dora_wd", False) or network.pop("use_dora", False))
    network.pop("conv_alpha", None)
    if rest := [name for name, value in network.items() if value not in (0, 0.0, None, "", "full", False)]:
        raise ValueError(f"--network_args {rest[0]}= is not supported: {ONE_RATE.instead}")
    return {"objective.rank": rank, "objective.alpha": alpha, "objective.targets": targets, "objective.dora": dora}


def _pairs(option: str, values: dict[str, Any]) -> dict[str, Any]:
    """`name=value` words, values as Python writes them."""
    pairs = {}
    for word in values.get(option, ()):
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--{option} {word}: name=value was expected")
        try:
            pairs[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pairs[name] = text
    return pairs


def _read_schedule(run: Run) -> dict[str, Any]:
    """Steps, batches and learning rates: ours are of the whole batch of an optimizer step."""
    values = run.values
    batch = values["batch_size"] or values["train_batch_size"]
    epochs = values.get("max_train_epochs")
    steps = None if epochs else values["max_train_steps"]
    name = SCHEDULERS.get(values["lr_scheduler"].lower(), values["lr_scheduler"])
    lengths = {
        key: _in_steps(key, values[key], steps) for key in ("lr_warmup_steps", "lr_decay_steps") if key in values
    }
    options: dict[str, Any] = {
        "train_batch_size": batch * run.options.get("gradient_accumulation_steps", 1) * run.command.num_processes,
        "max_train_steps": steps,
        "num_train_epochs": epochs,
        "lr_scheduler": name,
        "lr_warmup_steps": 0 if name == "constant" else lengths["lr_warmup_steps"],  # kohya's constant has none
    }
    if name == "wsd" and lengths.get("lr_decay_steps") and steps:
        options["lr_decay"] = lengths["lr_decay_steps"] / steps
    text = [rate for rate in [*map(_number, values.get("text_encoder_lr", ())), *_text_rates(values)] if rate]
    if len({*text}) > 1:
        raise ValueError(f"text encoders: {' and '.join(map(str, text))}: one learning rate for both")
    options["learning_rate"] = values.get("unet_lr") or values["learning_rate"]
    if run.trains_text and (rate := text[0] if text else values["learning_rate"]) != options["learning_rate"]:
        options["text_encoder_lr"] = rate
    return options


def _in_steps(name: str, length: float, steps: int | None) -> int:
    """A number of steps, or a fraction of all, as below 1."""
    if 0 < length < 1 and steps is None:
        raise ValueError(f"--{name} {length:g}: a fraction needs --max_train_steps; write a number of steps")
    return round(length * (steps or 1)) if 0 < length < 1 else round(length)


def _read_optimizer(run: Run) -> dict[str, Any]:
    """The optimizer with the defaults of its class, and what --optimizer_args change."""
    values, more = run.values, _pairs("optimizer_args", run.values)
    old = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
    kind = next((name for flag, name in old.items() if values.get(flag)), values["optimizer_type"])
    if kind.lower() not in OPTIMIZERS:
        raise ValueError(f"--optimizer_type {kind} is not supported: write AdamW, AdamW8bit, Lion or Prodigy")
    name, defaults = OPTIMIZERS[kind.lower()]
    options = {"optimizer": name, **defaults, "max_grad_norm": values["max_grad_norm"] or NO_CLIPPING}
    if "weight_decay" in more:
        options["adam_weight_decay"] = more.pop("weight_decay")
    if "betas" in more:
        options["adam_beta2"] = more["betas"][-1]
    return {**options, "optimizer_options": {k: [*v] if isinstance(v, tuple) else v for k, v in more.items()} or None}


def _read_output(run: Run, notes: list[str]) -> dict[str, Any]:
    """Folder, checkpoints, trackers and samples."""
    values, options = run.values, run.options
    if "output_dir" not in values:
        raise ValueError("--output_dir is needed")
    name = values.get("output_name", "last")
    folder = Path(values["output_dir"]) / name
    if (resume := values.get("resume")) and Path(resume).parent != folder:
        raise ValueError(f"--resume {resume}: copy the checkpoint into {folder}: a run resumes by itself")
    keys = {"save_every_n_epochs": "save_last_n_epochs", "save_every_n_steps": "save_last_n_steps"}
    every = {
        "save_every_n_epochs": values.get("save_every_n_epochs"),
        "save_every_n_steps": options.get("checkpointing_steps"),
    }
    limits = [(values.get(f"{keys[k]}_state") or values.get(keys[k]) or 0) // n for k, n in every.items() if n]
    tracker = values.get("log_with") or ("tensorboard" if values.get("logging_dir") else None)
    prompts, path = None, values.get("sample_prompts")
    if path:
        prompts, dropped = read_sample_prompts(Path(path))
        notes += [f"{path}: options of {dropped} prompts (--n, --w, ...)"] if dropped else []
    if values.get("logging_dir"):
        notes.append("--logging_dir (logs lie in output_dir)")
    return {
        "output_dir": str(folder),
        "card.title": options.get("card.title", name),
        "checkpoints_total_limit": max([*limits, 0]) or None,
        "report_to": [tracker] if tracker else [],
        "validation_prompts": prompts,
        "hub_private_repo": options.get("hub_private_repo", True) if "hub_model_id" in options else None,
    }


def read_sample_prompts(path: Path) -> tuple[list[str], int]:
    """The prompts of a text file, without what follows " --", and how many have such options."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--sample_prompts {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if path.suffix.lower() in (".toml", ".json"):
        raise ValueError(f"--sample_prompts {path}: write the prompts as lines of a .txt file")
    prompts = [line for line in lines if line and not line.startswith("#")]
    return [prompt.split(" --")[0].strip() for prompt in prompts], sum(" --" in prompt for prompt in prompts)


def _read_template(options: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The caption of a textual inversion's images: of a template, or the class tokens."""
    token = options.get("objective.placeholder_token", "")
    template = "a painting in the style of {}" if values.get("use_style_template") else "a photo of {}"
    chosen = values.get("use_style_template") or values.get("use_object_template")
    return {"data.instance_prompt": template.format(token)} if chosen or "data.instance_prompt" not in options else {}
