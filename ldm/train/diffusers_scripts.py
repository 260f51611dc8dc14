"""The command lines of diffusers' example scripts as recipes: `train_text_to_image_lora.py --rank 8 ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.checkpoints.hub import download_dataset, is_repo_id
from ldm.pipeline.compat import Automatic, Missing, Ours
from ldm.train.command_lines import (
    Argument,
    CommandLine,
    ForeignRecipe,
    arguments,
    parse_command_line,
    read,
    same,
    switches,
    translate_arguments,
)

PRECISION = Automatic("set by mixed_precision")
CHECKPOINTS = "checkpoints are made by checkpointing_steps"


class Script(NamedTuple):
    """What a script trains, and its defaults where they differ from `DEFAULTS`."""

    method: str
    defaults: dict[str, str]


DEFAULTS = {  # the same in all scripts
    "resolution": "512",
    "train_batch_size": "16",
    "num_train_epochs": "100",
    "learning_rate": "1e-4",
    "lr_scheduler": "constant",
    "lr_warmup_steps": "500",
    "adam_beta2": "0.999",
    "adam_weight_decay": "0.01",
    "report_to": "tensorboard",
    "checkpointing_steps": "500",
}
DREAMBOOTH = {"train_batch_size": "4", "num_train_epochs": "1", "num_class_images": "100"}
LORA_OUT = {"output_dir": "sd-model-finetuned-lora", "rank": "4", "validation_epochs": "1"}
DREAMBOOTH_LORA = {**DREAMBOOTH, "output_dir": "lora-dreambooth-model", "rank": "4", "validation_epochs": "50"}
INVERSION = {"output_dir": "text-inversion-model", "max_train_steps": "5000", "validation_steps": "100"}
XL = {"resolution": "1024"}
SCRIPTS = {
    "train_text_to_image.py": Script("full", {"output_dir": "sd-model-finetuned", "validation_epochs": "5"}),
    "train_text_to_image_lora.py": Script("lora", LORA_OUT),
    "train_text_to_image_sdxl.py": Script(
        "full", {**XL, "output_dir": "sdxl-model-finetuned", "validation_epochs": "1"}
    ),
    "train_text_to_image_lora_sdxl.py": Script("lora", {**XL, **LORA_OUT}),
    "train_dreambooth.py": Script(
        "full", {**DREAMBOOTH, "output_dir": "dreambooth-model", "learning_rate": "5e-6", "validation_steps": "100"}
    ),
    "train_dreambooth_lora.py": Script("lora", {**DREAMBOOTH_LORA, "learning_rate": "5e-4"}),
    "train_dreambooth_lora_sdxl.py": Script("lora", {**XL, **DREAMBOOTH_LORA, "adam_weight_decay": "1e-4"}),
    "textual_inversion.py": Script("textual_inversion", INVERSION),
    "textual_inversion_sdxl.py": Script("textual_inversion", INVERSION),
}
TEMPLATES = {"object": "a photo of {}", "style": "a painting in the style of {}"}


def as_trackers(value: str) -> list[str]:
    """`report_to` as a list."""
    return [] if value == "none" else value.split(",")


def as_bool(value: str) -> bool:
    """argparse's bool: every text but "" is True; people mean what they write."""
    return value.strip().lower() not in ("", "0", "false", "no")


ARGUMENTS: dict[str, Argument] = {
    **same("objective.", str, "pretrained_model_name_or_path", "revision", "variant"),
    **same("objective.", str, "pretrained_vae_model_name_or_path", "placeholder_token", "initializer_token"),
    **same("objective.", str, "class_prompt"),
    **same("objective.", int, "rank", "num_vectors", "num_class_images"),
    **same("objective.", float, "noise_offset", "input_perturbation", "snr_gamma", "prior_loss_weight"),
    **switches("objective.", "train_text_encoder"),
    "use_dora": Argument(Ours("objective.dora", bool), 0),
    "with_prior_preservation": Argument(Ours("objective.prior_preservation", bool), 0),
    "proportion_empty_prompts": Argument(Ours("objective.caption_dropout", float)),
    "offset_noise": Argument(Ours("objective.noise_offset", lambda _: 0.1), 0),
    **same("data.", int, "resolution"),
    **same("data.", str, "caption_column", "instance_prompt"),
    "image_column": Argument(Ours("data.image_column", lambda name: None if name == "image" else name)),
    **switches("data.", "center_crop", "random_flip"),
    **same("", str, "output_dir", "tracker_project_name", "mixed_precision"),
    **same("", int, "seed", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers"),
    **same("", int, "gradient_accumulation_steps", "lr_num_cycles", "validation_steps"),
    **same("", float, "adam_beta2", "adam_weight_decay", "max_grad_norm", "lr_power"),
    **switches("", "gradient_checkpointing"),
    "report_to": Argument(Ours("report_to", as_trackers)),
    **arguments("dataset_name dataset_config_name train_data_dir instance_data_dir class_data_dir", read()),
    **arguments("validation_prompt learnable_property lr_scheduler optimizer hub_model_id", read()),
    **arguments("resume_from_checkpoint", read()),
    **arguments("max_train_steps num_train_epochs train_batch_size repeats lr_warmup_steps", read(int)),
    **arguments("num_validation_images validation_epochs", read(int)),
    **arguments("learning_rate text_encoder_lr adam_beta1 adam_epsilon prodigy_beta3", read(float)),
    **arguments("prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup", read(as_bool)),
    **arguments("scale_lr use_8bit_adam use_ema push_to_hub", Ours("", bool), 0),
    "validation_prompts": Argument(Ours("", list), -1),
    # accepted without effect
    **arguments("local_rank", Automatic("torchrun says it")),
    **arguments("logging_dir", Automatic("logs lie in output_dir")),
    **arguments("allow_tf32", Automatic("torch's own setting"), 0),
    **arguments(
        "enable_xformers_memory_efficient_attention enable_npu_flash_attention",
        Automatic("PyTorch's own attention; objective.attention chooses another"),
        0,
    ),
    **arguments("offload_ema foreach_ema", Automatic("the average stays on the device"), 0),
    **arguments("set_grads_to_none debug_loss", Automatic(), 0),
    **arguments("pre_compute_text_embeddings", Automatic("embeddings of frozen text encoders are cached"), 0),
    **arguments("skip_save_text_encoder", Automatic("exports are whole models"), 0),
    **arguments("no_safe_serialization", Automatic("exports are safetensors"), 0),
    **arguments("save_as_full_pipeline", Automatic("the embedding alone is exported"), 0),
    **arguments("output_kohya_format", Automatic("always written"), 0),
    **arguments("sample_batch_size prior_generation_precision", Automatic("chosen by the memory and the device")),
    **arguments("validation_scheduler", Automatic("samples use the model's own sampler")),
    **arguments("save_steps", Automatic(CHECKPOINTS)),
    # not here
    **arguments("cache_dir", Missing("set the environment variable HF_HOME")),
    **arguments("hub_token", Missing("set the environment variable HF_TOKEN: a recipe holds no secrets")),
    **arguments("max_train_samples", Missing("give a folder that holds as many images as you want")),
    **arguments("prediction_type", Missing("leave it out: a model keeps the prediction that it was trained with")),
    **arguments("non_ema_revision", Missing("leave it out: training starts from --revision")),
    **arguments("dream_training", Missing("leave it out: DREAM is not here; --snr_gamma 5 weights the loss"), 0),
    **arguments("dream_detail_preservation", Missing("leave it out"), 1, ("1.0", "1")),
    **arguments("timestep_bias_strategy", Missing("write a recipe: objective.times chooses how times are sampled")),
    **arguments("timestep_bias_begin timestep_bias_end", Automatic("of timestep_bias_strategy")),
    **arguments("timestep_bias_multiplier timestep_bias_portion", Automatic("of timestep_bias_strategy")),
    **arguments("do_edm_style_training", Missing("leave it out: models keep their own schedule"), 0),
    **arguments("image_interpolation_mode", Missing("leave it out: images are resized by lanczos"), 1, ("lanczos",)),
    **arguments("lora_dropout", Missing("leave it out: factors are trained without dropout")),
    **arguments(
        "adam_weight_decay_text_encoder", Missing("write --adam_weight_decay, which is for all"), 1, ("1e-3", "0.001")
    ),
    **arguments("tokenizer_name", Missing("put the tokenizer into the model's folder")),
    **arguments("tokenizer_max_length", Missing("leave it out: captions have 75 tokens"), 1, ("77",)),
    **arguments("text_encoder_use_attention_mask", Missing("leave it out: CLIP reads padding too"), 0),
    **arguments("class_labels_conditioning", Missing("leave it out: it is for DeepFloyd IF")),
    **arguments("validation_images", Missing("write objective.validation_data_dir into the recipe"), -1),
}


def read_diffusers_command(words: Sequence[str]) -> ForeignRecipe:
    """The recipe of a command line of diffusers' scripts; ValueError names the option."""
    command = parse_command_line(words, SCRIPTS, ARGUMENTS)
    script = SCRIPTS[command.script]
    defaults = {**DEFAULTS, **script.defaults}
    options, values, notes = translate_arguments({**defaults, **command.given}, ARGUMENTS)
    if "pretrained_model_name_or_path" not in command.given:
        raise ValueError("--pretrained_model_name_or_path is needed")
    is_xl = "sdxl" in command.script
    own = {
        "objective.kind": "tune",
        "objective.method": script.method,
        "objective.times": "discrete",
        "objective.caption_dropout": 0.0,
        "data.center_crop": False,
        "mixed_precision": command.mixed_precision or "no",
        "seed": 0,
        "validation_guidance": 5.0 if is_xl else 7.5,
    }
    data = _read_data(script, values, options["data.resolution"])
    schedule = _read_schedule(command, values, options)
    merged = {**own, **options, **data, **schedule, **_read_optimizer(script, values, options), **_read_hub(values)}
    merged["validation_prompts"] = _read_prompts(values)
    merged = _resolve_dependent_options(script, merged, values, notes)
    by_epochs = merged["validation_prompts"] and "validation_epochs" in values
    epochs = {"validation_steps": values["validation_epochs"]} if by_epochs else {}
    return ForeignRecipe(merged, [*notes, *command.notes], epochs)


def _read_data(script: Script, values: dict[str, Any], resolution: int) -> dict[str, Any]:
    """The folder of the images, and the one size that they are cropped to."""
    folder = values.get("instance_data_dir") or values.get("train_data_dir") or values.get("dataset_name")
    if folder is None:
        raise ValueError("--train_data_dir, --instance_data_dir or --dataset_name is needed")
    if folder == values.get("dataset_name") and not Path(folder).exists():
        if not is_repo_id(folder):
            raise ValueError(f"--dataset_name {folder}: neither a folder nor owner/name of the hub")
        folder = str(download_dataset(folder))
    if config := values.get("dataset_config_name"):
        folder = str(Path(folder) / config)
        if not Path(folder).is_dir():
            raise ValueError(f"--dataset_config_name {config}: no such folder in the data set: write --train_data_dir")
    sides = {f"data.{side}_bucket_reso": resolution for side in ("min", "max")}
    step = next(step for step in (64, 32, 16, 8, resolution) if resolution % step == 0)
    options = {"data.train_data_dir": [folder], **sides, "data.bucket_reso_steps": step}
    if script.method == "textual_inversion":
        template = TEMPLATES.get(values.get("learnable_property", "object"), TEMPLATES["object"])
        options |= {"data.instance_prompt": template, "data.random_flip": True}
    if (repeats := values.get("repeats", 1)) != 1:
        options["data.subsets"] = [{"repeats": repeats}]
    return options


def _read_schedule(command: CommandLine, values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Steps, batches and learning rates: ours are of the whole batch of an optimizer step."""
    parts = options.get("gradient_accumulation_steps", 1) * command.num_processes
    batch = values["train_batch_size"] * parts
    factor = batch if values.get("scale_lr") else 1
    steps, name = values.get("max_train_steps"), values["lr_scheduler"]
    if name == "piecewise_constant":
        raise ValueError("--lr_scheduler piecewise_constant is not supported: write constant or cosine_with_restarts")
    text_rate = values.get("text_encoder_lr", 5e-6 if "dreambooth_lora_sdxl" in command.script else None)
    return {
        "train_batch_size": batch,
        "learning_rate": values["learning_rate"] * factor,
        "text_encoder_lr": text_rate and text_rate * factor if options.get("objective.train_text_encoder") else None,
        "max_train_steps": steps,
        "num_train_epochs": None if steps else values["num_train_epochs"],
        "lr_scheduler": name,
        "lr_warmup_steps": 0 if name == "constant" else values["lr_warmup_steps"],  # diffusers' constant has none
    }


def _read_optimizer(script: Script, values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The optimizer and what differs from its defaults; `--use_ema` is a decay of 0.9999."""
    name = values.get("optimizer", "AdamW").lower()
    more: dict[str, Any] = {}
    if (beta1 := values.get("adam_beta1", 0.9)) != 0.9:
        more["betas"] = [beta1, options["adam_beta2"]]
    if (eps := values.get("adam_epsilon", 1e-8)) != 1e-8:
        more["eps"] = eps
    if name == "prodigy":
        defaults = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        more |= {key: values.get(f"prodigy_{key}", value) for key, value in defaults.items()}
        more |= {"beta3": values["prodigy_beta3"]} if "prodigy_beta3" in values else {}
    elif values.get("use_8bit_adam"):
        name = "adamw8bit"
    ema = {"ema_decay": 0.9999 if values.get("use_ema") else 0.0}
    return {"optimizer": name, "optimizer_options": more or None, **ema}


def _read_hub(values: dict[str, Any]) -> dict[str, Any]:
    if not values.get("push_to_hub"):
        return {}
    if "/" not in values.get("hub_model_id", ""):
        raise ValueError("--push_to_hub: --hub_model_id owner/name is needed")
    return {"hub_model_id": values["hub_model_id"]}


def _read_prompts(values: dict[str, Any]) -> list[str] | None:
    prompt = values.get("validation_prompt")
    repeated = [prompt] * values.get("num_validation_images", 4) if prompt else []
    return values.get("validation_prompts") or repeated or None


def _resolve_dependent_options(
    script: Script, options: dict[str, Any], values: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The options that belong together: what one means depends on another."""
    if script.method == "textual_inversion":
        template, token = options["data.instance_prompt"], options.get("objective.placeholder_token", "")
        options["data.instance_prompt"] = template.format(token)
        notes.append(f"templates of captions (every image's is {options['data.instance_prompt']!r})")
    if not options.get("objective.prior_preservation"):
        options.pop("objective.num_class_images", None)
    elif (folder := values.get("class_data_dir")) and Path(folder).is_dir():
        options["objective.class_data_dir"] = folder
    elif folder:
        notes.append(f"--class_data_dir {folder} (not there: images of the class are generated into output_dir)")
    resume = values.get("resume_from_checkpoint", "latest")
    if resume != "latest" and Path(resume).parent not in (Path("."), Path(options["output_dir"])):
        raise ValueError(
            f"--resume_from_checkpoint {resume}: copy it into {options['output_dir']}: a run resumes by itself"
        )
    return options
