"""The modules of a network under the names of both layouts: the directory's and the single file's.

A single file (CompVis' LDM, Stability's SGM) counts a U-Net's blocks from its input on, a directory by resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ldm.checkpoints.families import TextEncoderSpec
from ldm.nn.unet import UP_BLOCKS, UNetConfig

ConversionMap = Mapping[str, str]  # modules of the directory: the same of the single file

UNET_CONVERSION_MAP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_CONVERSION_MAP_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_CONVERSION_MAP = {f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")}
VAE_CONVERSION_MAP_RESNET = {
    "conv_shortcut": "nin_shortcut",
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
}
VAE_CONVERSION_MAP_ATTN = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_CONVERSION_MAP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_CONVERSION_MAP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}" for x in "qkv" for kind in ("weight", "bias")},
}


def map_unet_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Modules of a U-Net: blocks are counted through all resolutions, a change of size among them."""
    yield from UNET_CONVERSION_MAP.items()
    layers, n = config.per_level("layers_per_block"), 1
    for i, count in enumerate(layers):
        for j in range(count):
            yield from _prefix_pairs(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", UNET_CONVERSION_MAP_RESNET)
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
        n += 1
    for j in range(2):
        yield from _prefix_pairs(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", UNET_CONVERSION_MAP_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    n = 0
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            yield from _prefix_pairs(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", UNET_CONVERSION_MAP_RESNET)
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        place = 2 if UP_BLOCKS[config.up_block_types[i]] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"


def map_vae_modules(num_blocks: int, layers_per_block: int) -> Iterator[tuple[str, str]]:
    """Modules of an autoencoder; a single file counts the decoder's resolutions from the finest on."""
    yield from VAE_CONVERSION_MAP.items()
    for i in range(num_blocks):
        up = num_blocks - 1 - i
        for j in range(layers_per_block + 1):
            yield from _prefix_pairs(
                f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_CONVERSION_MAP_RESNET
            )
            yield from _prefix_pairs(
                f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", VAE_CONVERSION_MAP_RESNET
            )
        yield f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample"
        yield f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{up}.upsample"
    for half in ("encoder", "decoder"):
        for j in range(2):
            yield from _prefix_pairs(
                f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", VAE_CONVERSION_MAP_RESNET
            )
        yield from _prefix_pairs(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_CONVERSION_MAP_ATTN)


def map_text_encoder_modules(text_encoder: TextEncoderSpec) -> Iterator[tuple[str, str]]:
    """Modules of a text tower; a single file has transformers' own names for CLIP-L, open_clip's for the others."""
    if text_encoder.layout == "open_clip":
        yield from OPEN_CLIP_CONVERSION_MAP.items()
        for k in range(text_encoder.config["num_hidden_layers"]):
            yield from _prefix_pairs(
                f"text_model.encoder.layers.{k}", f"transformer.resblocks.{k}", OPEN_CLIP_CONVERSION_MAP_LAYER
            )


def _prefix_pairs(
    diffusers_prefix: str, original_prefix: str, conversion_map: ConversionMap
) -> Iterator[tuple[str, str]]:
    return ((f"{diffusers_prefix}.{a}", f"{original_prefix}.{b}") for a, b in conversion_map.items())
