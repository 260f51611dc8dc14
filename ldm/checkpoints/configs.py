"""Configurations: each field is heeded, has the one value that is understood, or is superfluous for a stated reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ldm.files import read_json

BuildResult = TypeVar("BuildResult")


@dataclass(frozen=True)
class ConfigSchema:
    """The fields that a kind of configuration may have, each name once.

    `heeded` are names with spaces between them; `only` has the values that are understood, by name; `moot` the names,
    likewise, that are not read, by the reason.
    """

    config_kind: str
    supported: str
    allowed_values: Mapping[str, tuple[Any, ...]]
    ignored: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def field_names(self) -> frozenset[str]:
        """All of them."""
        return frozenset([*self.supported.split(), *self.allowed_values, *" ".join(self.ignored.values()).split()])

    def validate(self, config: Mapping[str, Any]) -> None:
        """ValueError names the first field that would go unheeded."""
        for name, value in config.items():
            if name in self.allowed_values and value not in self.allowed_values[name]:
                understood = " or ".join(map(repr, self.allowed_values[name]))
                raise ValueError(f"{self.config_kind} config: {name} = {value!r} is not supported, only {understood}")
            if not (name in self.field_names or name.startswith("_")):
                raise ValueError(f"{self.config_kind} config: unknown field {name} = {value!r}")


VAE_CONFIG_SCHEMA = ConfigSchema(
    "VAE",
    """in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn
    latent_channels norm_num_groups sample_size scaling_factor force_upcast use_quant_conv use_post_quant_conv
    mid_block_add_attention""",
    {
        "shift_factor": (None, 0),  # later families move their latents as well as scale them
        "latents_mean": (None,),
        "latents_std": (None,),
    },
)
TEXT_ENCODER_CONFIG_SCHEMA = ConfigSchema(
    "text encoder",
    """vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads
    max_position_embeddings layer_norm_eps bos_token_id eos_token_id pad_token_id""",
    {
        "hidden_act": ("quick_gelu", "gelu"),
        "model_type": ("clip_text_model",),
        "is_decoder": (False,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "chunk_size_feed_forward": (0,),
        "quantization_config": (None,),
        "auto_map": (None,),  # code of the file's own
    },
    {
        "the model's index names the class": "architectures",
        "the caller chooses": "dtype torch_dtype",
        "who wrote the file": "transformers_version",
        "of training": "attention_dropout dropout initializer_factor initializer_range gradient_checkpointing",
        "of other uses of the class": """use_cache return_dict output_attentions output_hidden_states torchscript
        tie_word_embeddings problem_type id2label label2id""",
    },
)


def build_from_config(path: Path, build: Callable[[dict[str, Any]], BuildResult]) -> BuildResult:
    """What is built from the configuration in a file; ValueError in one line that names the file."""
    config = read_json(path)
    try:
        return build(config)
    except Exception as error:  # values of any kind, in three libraries' hands
        said = str(error) if type(error) is ValueError else f"nothing can be built from it: {error!r}"
        raise ValueError(f"{path}: {' '.join(said.split())}") from None


def get_config_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of a configuration."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} {value!r}: a finite number is needed")
    return value
