"""The settings of an image of ComfyUI: its metadata hold the graph of nodes that made it (`prompt`, the API's format).

Nodes are read by the names of their inputs rather than by their classes, so that those of extensions, which are named
alike, are read too: https://docs.comfy.org, comfy_extras/nodes_custom_sampler.py and nodes.py of ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ldm.jobs.schema import short_repr

MAX_HOPS = 100  # links that are followed one after the other, and texts that are joined
MAX_PASSES = 20  # samplers one after the other
TEXT_NAMES = "text", "text_g", "text_l", "string", "value", "prompt", "wildcard_text", "populated_text"
SEPARATOR_NAMES = "delimiter", "separator"
NUMBER_NAMES = "value", "seed", "noise_seed", "int", "float", "number", "width", "height"
LATENT_NAMES = "latent_image", "samples", "latent", "optional_latent", "pixels", "image", "images"
PART_NAMES = "guider", "noise", "sampler", "sigmas"  # links of a custom sampler, which hold what KSampler has itself
MODEL_NAMES = "ckpt_name", "unet_name", "base_ckpt_name", "model_name"
LORA_KEY = re.compile(r"lora_\d+")  # of rgthree's Power Lora Loader
IGNORED_NODES = re.compile(r"ModelSampling|Reroute|PatchModel|TorchCompile|ModelMerge", re.IGNORECASE)


class ComfyNode(NamedTuple):
    """A node: its key in the graph, its class, and its inputs: values, or links [key, output]."""

    key: str
    kind: str
    inputs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.kind:.40} ({self.key:.10})"


@dataclass
class ComfyGraph:
    """A graph of nodes by key, and in words what of it cannot be taken over."""

    nodes: Mapping[str, ComfyNode]
    notes: list[str] = field(default_factory=list)
    texts_left: int = MAX_HOPS

    def link(self, node: ComfyNode, name: str) -> ComfyNode | None:
        """The node that an input comes from; None where it is a value, or absent."""
        value = node.inputs.get(name)
        return self.nodes.get(str(value[0])) if isinstance(value, list) and _is_link(value) else None

    def value(self, node: ComfyNode, name: str, names: Sequence[str] = NUMBER_NAMES) -> Any:
        """An input, followed through nodes that hold one value, by one of `names` or the input's own."""
        for _ in range(MAX_HOPS):
            if (source := self.link(node, name)) is None:
                value = node.inputs.get(name)
                return None if isinstance(value, list | dict) else value
            node = source
            name = next((n for n in (name, *names) if n in node.inputs), next(iter(node.inputs), ""))
        return None

    def upstream(self, *starts: ComfyNode | None, names: Sequence[str] = ()) -> Iterator[ComfyNode]:
        """Nodes and all that they depend on, breadth first, by inputs of some names or by all."""
        waiting, seen = [start for start in starts if start], set[str]()
        for node in waiting:
            if node.key in seen:
                continue
            seen.add(node.key)
            yield node
            for name in node.inputs:
                if (not names or name in names) and (source := self.link(node, name)):
                    waiting.append(source)

    def sampler_chain(self) -> list[ComfyNode]:
        """The samplers of the saved image from the first pass on, along their latents and images."""
        referenced = {str(v[0]) for node in self.nodes.values() for v in node.inputs.values() if _is_link(v)}
        sinks = [node for key, node in self.nodes.items() if key not in referenced]
        sinks.sort(key=lambda node: "SaveImage" not in node.kind)
        chain, found = list[ComfyNode](), (*self.upstream(*sinks), *self.nodes.values())
        node = next(filter(is_sampler, found), None)
        while node is not None and node not in chain and len(chain) < MAX_PASSES:
            chain.append(node)
            node = next(filter(is_sampler, self.sources_of_latents(node)), None)
        others = sum(map(is_sampler, self.nodes.values())) - len(chain)
        if others:
            self.notes.append(f"{others} more samplers of the graph, which do not lead to the saved image")
        return chain[::-1]

    def sources_of_latents(self, *nodes: ComfyNode) -> Iterator[ComfyNode]:
        """What the latents and images that nodes begin with come from."""
        return self.upstream(*(self.link(node, name) for node in nodes for name in LATENT_NAMES), names=LATENT_NAMES)

    def parts(self, sampler: ComfyNode) -> list[ComfyNode]:
        """A sampler and the nodes that hold its settings."""
        return list(self.upstream(sampler, names=PART_NAMES))

    def setting(self, parts: Sequence[ComfyNode], *names: str) -> Any:
        """The first input of these names among a sampler's parts."""
        return next((self.value(node, name) for node in parts for name in names if name in node.inputs), None)

    def text(self, node: ComfyNode, name: str) -> str:
        """A text, through nodes that hold or join texts; a note of one that is none of these."""
        self.texts_left -= 1
        if not isinstance(value := node.inputs.get(name), list):
            return value if isinstance(value, str) else ""
        if self.texts_left < 0 or (source := self.link(node, name)) is None:
            self.notes.append(f"{name} of {node}, which comes from no node")
            return ""
        if re.search(r"concat|join", source.kind, re.IGNORECASE):
            others = [n for n, v in source.inputs.items() if isinstance(v, str | list) and n not in SEPARATOR_NAMES]
            names = [n for n in others if re.match(r"string|text", n, re.IGNORECASE)] or others
            parts = [self.text(source, n) for n in names]
            separator = next((source.inputs[n] for n in SEPARATOR_NAMES if n in source.inputs), "")
            return str(separator).join(filter(None, parts))
        names = [n for n in (name, *TEXT_NAMES) if n in source.inputs]
        names += [n for n, value in source.inputs.items() if isinstance(value, str)]
        if not names:
            self.notes.append(f"{name} of {node}, which {source} makes")
        return self.text(source, names[0]) if names else ""

    def conditioning(self, node: ComfyNode, role: str) -> tuple[str | None, ComfyNode | None]:
        """The text behind a conditioning, with BREAK where texts are joined, and the node that encodes it.

        `role` is "positive" or "negative"; None for zeros in the place of a text.
        """
        for _ in range(MAX_HOPS):
            if node.kind == "ConditioningZeroOut":
                return None, None
            if name := next((n for n in TEXT_NAMES if n in node.inputs), None):
                return self.encoded_text(node, name), node
            if isinstance(node.inputs.get(role), str):  # a loader of everything
                return escape_brackets(node.inputs[role]), node
            names = [n for n in (role, "conditioning_to", "conditioning", "conditioning_1") if self.link(node, n)]
            names += [n for n in node.inputs if n.startswith("conditioning") and self.link(node, n) and n not in names]
            if not names:
                return "", None
            if node.kind == "ConditioningConcat" and len(names) > 1:
                pair = [self.link(node, n) for n in ("conditioning_to", "conditioning_from")]
                texts = [self.text(n, "text") for n in pair if n and "text" in n.inputs]
                return escape_brackets(" BREAK ".join(texts)), pair[0]
            if len(names) > 1 or not re.match(r"Reroute|Conditioning(Concat|SetTimestepRange)?$", node.kind):
                self.notes.append(str(node))
            node = self.link(node, names[0]) or node
        return "", None

    def encoded_text(self, node: ComfyNode, name: str) -> str:
        """The text of a node that encodes it; SDXL's have two, for its two text encoders."""
        text, other = self.text(node, name), self.text(node, "text_l") if name == "text_g" else ""
        if other and text and other != text:
            self.notes.append(f"text_l {short_repr(other)}, which is another than text_g")
        return escape_brackets(text or other)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


def is_sampler(node: ComfyNode) -> bool:
    """Does a node sample: by KSampler's inputs, or those of a custom sampler?"""
    names = node.inputs.keys()
    return {"sampler_name", "steps", "cfg"} <= names or {"sampler", "sigmas"} <= names


def escape_brackets(text: str) -> str:
    """A prompt of ComfyUI in the web UI's grammar: [ ] are text there, and an embedding has a prefix."""
    return re.sub(r"(?<!\\)([\[\]])", r"\\\1", re.sub(r"\bembedding:", "", text))


def parse_graph(values: Any) -> ComfyGraph:
    """The graph in the text `prompt`; ValueError where there are no nodes in it."""
    rows = values.items() if isinstance(values, dict) else ()
    nodes = {
        key: ComfyNode(key, str(row.get("class_type", "")), row["inputs"])
        for key, row in rows
        if isinstance(row, dict) and isinstance(row.get("inputs"), dict)
    }
    if not any(map(is_sampler, nodes.values())):
        raise ValueError("no sampler in its graph")
    return ComfyGraph(nodes)


def read_comfy_settings(values: Any) -> tuple[dict[str, Any], list[tuple[str, Any, Any]], str, list[str]]:
    """A graph's settings by `Request`'s fields, its adapters (name, U-Net's weight, text encoders'), model, and notes.

    Samplers have ComfyUI's names. What has another type than it must have is for the caller to find.
    """
    graph = parse_graph(values)
    base, *later = graph.sampler_chain()
    parts = graph.parts(base)
    guider = next((node for node in parts if graph.link(node, "model")), base)
    settings = {
        "seed": graph.setting(parts, "seed", "noise_seed"),
        "num_inference_steps": graph.setting(parts, "steps"),
        "guidance_scale": 1.0 if guider.kind == "BasicGuider" else graph.setting(parts, "cfg"),
        "sampler": graph.setting(parts, "sampler_name") or class_setting(parts, "Sampler"),
        "spacing": graph.setting(parts, "scheduler") or class_setting(parts, "Scheduler"),
    }
    if base.inputs.get("start_at_step"):
        graph.notes.append(f"start_at_step {base.inputs['start_at_step']!r:.20}")
    encoder = None
    for role, name in (("positive", "prompt"), ("negative", "negative_prompt")):
        holder = next((node for node in parts if role in node.inputs), guider)
        if source := graph.link(holder, role) or (graph.link(holder, "conditioning") if role == "positive" else None):
            settings[name], node = graph.conditioning(source, role)
            encoder = encoder or node
    settings |= micro_conditioning(encoder) | latent_settings(graph, base, parts)
    loras, model, rescale = model_settings(graph, guider)
    settings["guidance_rescale"] = rescale
    settings["a1111_clip_skip"] = clip_skip(graph, encoder)
    settings |= second_pass(graph, later, settings)
    return {name: v for name, v in settings.items() if v is not None}, loras, model, graph.notes


def class_setting(parts: Sequence[ComfyNode], ending: str) -> str | None:
    """A sampler or scheduler that its node's class names: SamplerDPMPP_2M_SDE, KarrasScheduler."""
    kinds = (node.kind for node in parts if not node.kind.startswith(("SamplerCustom", "KSampler", "Basic")))
    return next((kind.replace(ending, "").lower() for kind in kinds if ending in kind), None)


def micro_conditioning(encoder: ComfyNode | None) -> dict[str, Any]:
    """SDXL's sizes (height, width) and crop (top, left) of a text's node."""
    names = {
        "original_size": ("height", "width"),
        "crops_coords_top_left": ("crop_h", "crop_w"),
        "target_size": ("target_height", "target_width"),
    }
    inputs = encoder.inputs if encoder and "target_width" in encoder.inputs else {}
    pairs = {field: tuple(inputs.get(name) for name in pair) for field, pair in names.items()}
    return {field: pair for field, pair in pairs.items() if all(type(n) is int for n in pair)}


def latent_settings(graph: ComfyGraph, base: ComfyNode, parts: Sequence[ComfyNode]) -> dict[str, Any]:
    """The size of the empty latent that a sampler begins with, or the strength where it is an image."""
    denoise = graph.setting(parts, "denoise")
    for node in graph.sources_of_latents(base):
        sides = ("width", "empty_latent_width"), ("height", "empty_latent_height")  # the latter of a loader of all
        width, height = (next(filter(None, (graph.value(node, name) for name in names)), None) for names in sides)
        if width and height and "samples" not in node.inputs:
            if (batch := node.inputs.get("batch_size", 1)) not in (1, None):
                graph.notes.append(f"batch_size {batch!r:.20}: which image of the batch it is")
            return {"width": width, "height": height}
        if isinstance(name := node.inputs.get("image"), str):
            return {"strength": 1.0 if denoise is None else denoise, "image": name}
        if node.kind not in ("VAEEncode", "Reroute"):
            graph.notes.append(str(node))
    return {}


def model_settings(graph: ComfyGraph, guider: ComfyNode) -> tuple[list[tuple[str, Any, Any]], str, Any]:
    """The adapters on the way from a sampler to its model, the model's name, and the guidance rescale."""
    loras, model, rescale = list[tuple[str, Any, Any]](), "", None
    for node in graph.upstream(graph.link(guider, "model"), names=("model", "model1")):
        inputs = node.inputs
        if "lora_name" in inputs and inputs["lora_name"] != "None":
            weight = inputs.get("strength_model", inputs.get("lora_model_strength", 1.0))
            loras.append((str(inputs["lora_name"]), weight, inputs.get("strength_clip", weight)))
        rows = [row for key, row in inputs.items() if LORA_KEY.fullmatch(key) and isinstance(row, dict)]
        for row in rows:
            if row.get("on"):
                loras.append((str(row.get("lora")), row.get("strength"), row.get("strengthTwo") or row.get("strength")))
        name = next((inputs[n] for n in MODEL_NAMES if isinstance(inputs.get(n), str)), None)
        model = model or name or ""
        if node.kind == "RescaleCFG":
            rescale = inputs.get("multiplier")
        elif not (name or rows or "lora_name" in inputs or IGNORED_NODES.search(node.kind)):
            graph.notes.append(str(node))
    return loras[::-1], model, rescale


def clip_skip(graph: ComfyGraph, encoder: ComfyNode | None) -> int | None:
    """The clip skip of the web UI: the last layer is 1 there, and -1 in ComfyUI."""
    for node in graph.upstream(encoder, names=("clip",)):
        layer = node.inputs.get("stop_at_clip_layer", node.inputs.get("clip_skip"))
        if type(layer) is int:
            return abs(layer)
    return None


def second_pass(graph: ComfyGraph, later: Sequence[ComfyNode], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A second sampler behind an upscaling as our hires pass; what else follows is noted."""
    result: dict[str, Any] = {}
    for node in later:
        between = list(graph.sources_of_latents(node))
        factor = next((n.inputs["scale_by"] for n in between if "scale_by" in n.inputs), None)
        width = next((n.inputs["width"] for n in between if "upscale_method" in n.inputs and "width" in n.inputs), None)
        if factor is None and isinstance(width, int) and isinstance(settings.get("width"), int):
            factor = width / max(1, settings["width"])
        strength = graph.setting(graph.parts(node), "denoise")
        if result or factor is None or strength is None:
            graph.notes.append(str(node))
        else:
            result = {"upscale": factor, "upscale_strength": strength}
    return result
