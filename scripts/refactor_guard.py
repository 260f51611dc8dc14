"""Record what the package computes, and compare later, bit for bit: a refactoring must change nothing.

    python scripts/refactor_guard.py record before.json [--only images|train|job|inspect|measure]
    python scripts/refactor_guard.py compare before.json [--only ...] [--rename pictures=images ...]

A recording is a flat table of entries: SHA-256 of pixels and of trained weights, losses, and every value that a command
prints as JSON, less times, hosts and paths. It knows the package by `ldm.Pipeline`, `ldm.Request` and the command line
alone, and holds for one machine and one set of libraries, on the CPU, by one thread. Inputs (models, images, adapters)
are made anew from fixed seeds. `--rename` is of a key of JSON, or of a whole text, that has another name by now.
`compare` prints each differing entry with both values; exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIXED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
os.environ |= {**FIXED, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}  # read by torch, and by processes
sys.path.insert(0, str(ROOT))  # the package beside this script, whatever is installed

# ruff: noqa: E402
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import Pipeline, Request
from ldm.cli import main as ldm_main

import diffusers  # isort: skip  after ldm, which mends torchvision
import transformers  # isort: skip
from open_clip.tokenizer import SimpleTokenizer  # isort: skip

Entries = dict[str, Any]  # by name: numbers, texts, truths and None
PICTO = ROOT / "weights" / "picto"
VOLATILE = {"seconds", "images_per_second", "worker", "page", "version", "words"}  # keys of JSON
LONG = "a red apple, " * 40 + "on a (blue:1.3) background"  # several chunks of any tokenizer here
FILES = {  # of prompts, for jobs of 50 items in all
    "prompts.txt": """# two images of each, one prompt twice
a {red|green|blue} apple
__animal__ on a yellow background --n blurry, dark --l 3
--prompt "two stars" --negative_prompt "a cat" --steps 5 --cfg_scale 4 --sampler_name "DPM++ 2M Karras" --seed 11
a (red:1.4) heart, [small] BREAK on a blue background --s 4 --w 64 --h 96
a banana
a banana
""",
    "prompts.yaml": """
prompt: [a cat, "a {dog|2::fish}"]
guidance: [1, 4]
sampler: [ddim, euler_ancestral]
seed: 1-3
""",
    "prompts.jsonl": f"""
{{"count": 2, "prompt": "an owl", "negative_prompt": "yellow, __animal__"}}
{{"count": 2, "prompt": "a house", "spacing": "karras", "sampler": "unipc", "guidance_rescale": 0.5}}
{{"count": 2, "prompt": "a car", "guidance_interval": [0.2, null], "seed": 40}}
{{"count": 2, "text": "a star", "sampler": "ddim", "eta": 0.5, "steps": 6}}
{{"count": 2, "prompt": "two stars", "image": "image.png", "strength": 0.8, "steps": 6}}
{{"count": 2, "prompt": "a cat", "image": "image.png", "mask": "mask.png"}}
{{"count": 2, "prompt": "a bus", "width": 64, "height": 64, "upscale": 1.5}}
{{"count": 2, "prompt": "{LONG}", "clip_skip": 1}}
""",
}
DATA = yaml.safe_load("""
samplers: [ddpm, ddim, euler, euler_ancestral, euler_maruyama, heun, lms, dpmpp_2s, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde,
  dpmpp_3m_sde, unipc_1, unipc, unipc_3, dpmpp_3m_published, lcm, tcd, rk45, predictor_corrector, langevin]
spacings: [linspace, leading, trailing, sgm_uniform, sgm_linspace, sgm_leading, karras, log_snr, exponential, beta,
  uniform, lcm]

# Networks of full size and small, in the words of diffusers and transformers.
vae: {block_out_channels: [128, 256, 512, 512], layers_per_block: 2,
  down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D],
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D]}
small_vae: &small_vae {block_out_channels: [8, 16, 16], norm_num_groups: 4, scaling_factor: 3.0,
  down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D],
  up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D]}
small_text: {hidden_size: 32, num_hidden_layers: 3}
small_unet: &small_unet {sample_size: 16, block_out_channels: [32, 64], cross_attention_dim: 32, norm_num_groups: 8,
  down_block_types: [CrossAttnDownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, CrossAttnUpBlock2D],
  layers_per_block: 1, transformer_layers_per_block: 1, attention_head_dim: [2, 4]}
families:
  sd1:
    unet: {cross_attention_dim: 768}
    texts: [{hidden_size: 768, num_hidden_layers: 12, hidden_act: quick_gelu}]
    scheduler: {_class_name: PNDMScheduler, skip_prk_steps: true}
  sd2:
    unet: {cross_attention_dim: 1024, attention_head_dim: [5, 10, 20, 20], use_linear_projection: true}
    texts: [{hidden_size: 1024, num_hidden_layers: 23, hidden_act: gelu}]
    scheduler: {_class_name: DDIMScheduler, prediction_type: v_prediction}
  sdxl:
    unet: {cross_attention_dim: 2048, block_out_channels: [320, 640, 1280], attention_head_dim: [5, 10, 20],
      down_block_types: [DownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D], use_linear_projection: true,
      up_block_types: [CrossAttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D], transformer_layers_per_block: [1, 2, 10],
      addition_embed_type: text_time, addition_time_embed_dim: 256, projection_class_embeddings_input_dim: 2816}
    small: {cross_attention_dim: 64, addition_time_embed_dim: 8, projection_class_embeddings_input_dim: 80}
    texts: [{hidden_size: 768, num_hidden_layers: 12, hidden_act: quick_gelu},
      {hidden_size: 1280, num_hidden_layers: 32, hidden_act: gelu}]
    scheduler: {_class_name: EulerDiscreteScheduler}

# Recipes, and what they share.
common: &common {max_train_steps: 20, train_batch_size: 4, learning_rate: 1.0e-3, lr_warmup_steps: 2, ema_decay: 0.9,
  checkpointing_steps: 20, validation_steps: 20, logging_steps: 5, validation_prompts: [a red zorb], report_to: []}
picto: &picto {kind: tune, validation_data_dir: held-out, rank: 2}
sd1: &sd1 {<<: *picto, pretrained_model_name_or_path: sd1}
sd2: &sd2 {<<: *picto, pretrained_model_name_or_path: sd2}
sdxl: &sdxl {<<: *picto, pretrained_model_name_or_path: sdxl}
word: &word {method: textual_inversion, placeholder_token: zorb, initializer_token: red, num_vectors: 2}
folder: &folder {train_data_dir: data, resolution: 64, min_bucket_reso: 32, max_bucket_reso: 96, bucket_reso_steps: 16,
  center_crop: true}
scenes: &scenes {sprites: sprites, size: 32}
tower: &tower {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
recipes:
  full: {<<: *common, objective: {<<: *sd1, method: full, weighting: min_snr, noise_offset: 0.05},
    data: {<<: *folder, center_crop: false, random_flip: true, shuffle_caption: true},
    gradient_accumulation_steps: 2, posthoc_steps: 10, lr_scheduler: cosine}
  lora: {<<: *common, objective: {<<: *picto, targets: [attention, feed-forward, convolutions]},
    data: {<<: *folder, random_flip: true}, mixed_precision: "no"}
  lora-text-encoder: {<<: *common, objective: {<<: *sdxl, train_text_encoder: true}, data: *folder}
  dora: {<<: *common, objective: {<<: *sd2, dora: true, times: log_normal, alpha: 4}, data: *folder,
    gradient_checkpointing: true}
  dreambooth: {<<: *common, objective: {<<: *sd1, prior_preservation: true, class_prompt: a star, num_class_images: 4,
    prior_loss_weight: 0.5, input_perturbation: 0.1}, data: *folder}
  textual-inversion: {<<: *common, objective: {<<: [*word, *picto]}, data: *folder, mixed_precision: "no"}
  textual-inversion-xl: {<<: *common, objective: {<<: [*word, *sdxl]}, data: *folder}
  autoencoder: {<<: *common, objective: {kind: autoencoder, model: *small_vae, crop: 16}, data: *scenes}
  clip: {<<: *common, objective: {kind: clip, vocab_size: 600, context_length: 16, projection_dim: 16, text: *tower,
    vision: {<<: *tower, image_size: 16, patch_size: 8}}, data: *scenes}
  diffusion: {<<: *common, objective: {kind: diffusion, vae: sd1/vae, text: sd1,
    unet: {<<: *small_unet, sample_size: 8}}, data: {<<: *scenes, latents: 64}, optimizer: muon}
""")


# ------------------------------------------------------------------------------------------------------------- inputs
def networks(family: str, small: bool) -> dict[str, Any]:
    """The networks of a family by their folders, as diffusers and transformers make them."""
    known, texts = DATA["families"][family], {}
    for k, fields in enumerate(known["texts"]):
        width = (fields := fields | (DATA["small_text"] if small else {}))["hidden_size"]
        sizes = {"intermediate_size": 4 * width, "projection_dim": width, "num_attention_heads": max(2, width // 64)}
        config = transformers.CLIPTextConfig(**fields, **sizes, bos_token_id=49406, eos_token_id=49407)
        kind = transformers.CLIPTextModelWithProjection if k else transformers.CLIPTextModel
        texts[f"text_encoder{'_2' * k}"] = kind(config)
    unet = known["unet"] | (DATA["small_unet"] | known.get("small", {}) if small else {})
    vae = DATA["small_vae"] if small else DATA["vae"] | {"scaling_factor": 0.13025 if len(texts) > 1 else 0.18215}
    return {"unet": diffusers.UNet2DConditionModel(**unet), "vae": diffusers.AutoencoderKL(**vae), **texts}


def write_model(folder: Path, family: str, small: bool = True) -> None:
    """A model in diffusers' layout: small with random weights, or of full size, its numbers but a few of them zeros."""
    torch.manual_seed(0)
    with torch.device("cpu" if small else "meta"):
        parts = networks(family, small)
    scheduler = DATA["families"][family]["scheduler"]
    index: dict[str, Any] = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    index["_class_name"] = f"StableDiffusion{'XL' * ('text_encoder_2' in parts)}Pipeline"
    for name, network in parts.items():
        index[name] = [type(network).__module__.partition(".")[0], type(network).__name__]
        stem = "diffusion_pytorch_model"
        if name.startswith("text_encoder"):
            stem, beside = "model", name.replace("text_encoder", "tokenizer")
            index[beside] = ["transformers", "CLIPTokenizer"]
            last = family == "sd2" or name == "text_encoder_2"
            clip_tokenizer("!" if last else "<|endoftext|>").save_pretrained(folder / beside)
            network.config.save_pretrained(folder / name)
        else:
            network.save_config(folder / name)
        (save_file if small else save_sparse)(network.state_dict(), folder / name / f"{stem}.safetensors")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(betas | scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))


def clip_tokenizer(pad: str) -> Any:
    """CLIP's tokenizer, from the vocabulary in open_clip's package."""
    clip = SimpleTokenizer()
    words = [*list(clip.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    made = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(clip.bpe_ranks), model_max_length=77)
    made.pad_token = pad
    return made


def save_sparse(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors of the meta device as 8-bit numbers: each begins with a hash of its name, all else are holes."""
    ends = np.cumsum([a.numel() for a in tensors.values()]).tolist()
    places = {name: [end - a.numel(), end] for (name, a), end in zip(tensors.items(), ends, strict=True)}
    header = {n: {"dtype": "F8_E4M3", "shape": list(a.shape), "data_offsets": places[n]} for n, a in tensors.items()}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends[-1])
        for name, (start, end) in places.items():
            file.seek(8 + len(text) + start)
            file.write(bytes(b & 0x77 for b in hashlib.sha256(name.encode()).digest())[: end - start])  # no NaN


def write_lora(path: str, model: Path) -> None:
    """A random LoRA of rank 2 in kohya's names, on some layers of each kind."""
    ends = "attn1.to_q.weight", "attn2.to_k.weight", "ff.net.2.weight", "conv1.weight", "v_proj.weight", "fc1.weight"
    generator, tensors = torch.Generator().manual_seed(1), {}
    texts = ("te1", "te2") if (model / "text_encoder_2").is_dir() else ("te",)
    for prefix, folder in zip(("unet", *texts), ("unet", "text_encoder", "text_encoder_2"), strict=False):
        with safe_open(next((model / folder).glob("*.safetensors")), "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys()) if name.endswith(ends)}
        for name, (rows, columns, *kernel) in shapes.items():
            module = name.removesuffix(".weight").removeprefix("text_model.").replace(".", "_")
            key = f"lora_{prefix}_{'' if folder == 'unet' else 'text_model_'}{module}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, columns, *kernel, generator=generator)
            tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 2, *len(kernel) * [1], generator=generator) / 20
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def patches(seed: int, width: int, height: int) -> Image.Image:
    """An image of soft random patches."""
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """Images of three shapes with captions beside them."""
    folder.mkdir()
    for k in range(count):
        patches(seed + k, *((64, 64), (96, 56), (72, 96))[k % 3]).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a {('red', 'blue', 'green')[k % 3]} zorb, number {k}")


def write_sprites(folder: Path) -> None:
    """Discs of 100 colours in two styles, of which `ldm train` composes scenes."""
    folder.mkdir()
    y, x = np.mgrid[:32, :32] - 15.5
    records, pixels = [], np.zeros((200, 32, 32, 4), np.uint8)
    for k in range(200):
        name, colour = f"thing{k // 2}", np.random.default_rng(k // 2).integers(0, 256, 3).tolist()
        pixels[k, x**2 + y**2 < (10 + 3 * (k % 2)) ** 2] = (*colour, 255)
        known = {"concept": name, "names": [name], "code": str(k), "style": ("flat", "noto")[k % 2]}
        records.append(json.dumps({**known, "group": "objects", "mean": colour, "paint": [k, 200, 200]}))
    np.save(folder / "sprites.npy", pixels)
    (folder / "sprites.jsonl").write_text("\n".join(records) + "\n")


def write_inputs() -> None:
    """All that the parts read, in the working folder, but for models of full size."""
    for family in DATA["families"]:
        write_model(Path(family), family)
    write_lora("lora.safetensors", PICTO)
    write_lora("lora-xl.safetensors", Path("sdxl"))
    a, b, c = torch.randn(3, 2, 256, generator=torch.Generator().manual_seed(2))
    save_file({"<zorb>": a}, "word.safetensors")
    save_file({"clip_l": b[:, :32].contiguous(), "clip_g": c[:, :32].contiguous()}, "word-xl.safetensors")
    write_images(Path("data"), 10)
    write_images(Path("held-out"), 3, 50)
    write_sprites(Path("sprites"))
    patches(100, 96, 64).save("image.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 24:64] = 255
    Image.fromarray(mask).save("mask.png")
    Path("wildcards").mkdir()
    Path("wildcards/animal.txt").write_text("a cat\n2::a dog\nan {owl|eagle}\n")


# --------------------------------------------------------------------------------------------------------- recordings
def ldm(*words: object, status: int = 0) -> str:
    """What `ldm WORDS...` prints, run in this process; RuntimeError where it ends with another status."""
    sys.argv, out = ["ldm", *map(str, words)], io.StringIO()
    try:
        with redirect_stdout(out):
            ldm_main()
    except SystemExit as end:
        if end.code != status:
            raise RuntimeError(f"{' '.join(sys.argv)}: status {end.code}") from None
    return out.getvalue()


def ldm_process(*words: object) -> None:
    """Run `ldm WORDS...` as a process; RuntimeError with its errors where it fails."""
    done = subprocess.run([sys.executable, "-m", "ldm.cli", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values of nested JSON by the path of their keys, less what is volatile."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield name, value.replace(str(ROOT), "") if isinstance(value, str) else value
    for key, inner in items:
        if key not in VOLATILE:
            yield from leaves(inner, f"{name}/{key}")


def pixels(image: Image.Image) -> str:
    """Size, mode and the SHA-256 of an image's pixels."""
    return f"{image.width}x{image.height} {image.mode} {hashlib.sha256(image.tobytes()).hexdigest()}"


def tensors(file: Path) -> str:
    """The SHA-256 of a safetensors file's tensors by their names: not of its metadata."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def images() -> Entries:
    """Pixels by the Python API: picto by each sampler and each feature, alone and in one mixed batch; small models."""
    entries: Entries = {}

    def sample(name: str, pipe: Pipeline, **requests: Request) -> None:
        entries.update({f"{name}/{key}": pixels(pipe.generate([request])[0]) for key, request in requests.items()})

    def request(prompt: str = "a red apple on a blue background", **changes: Any) -> Request:
        return Request(prompt, **{"num_inference_steps": 5, "seed": 3, **changes})

    image, mask = Image.open("image.png"), Image.open("mask.png")
    samplers = {}
    for k, name in enumerate(DATA["samplers"]):
        varied: dict[str, Any] = {"guidance_scale": (1, 2.5, 6)[k % 3], "num_inference_steps": 4 + k % 5, "seed": k}
        samplers[name] = request(sampler=name, spacing=DATA["spacings"][k % 8], **varied)
    features = {
        "default": request(num_inference_steps=None),
        "negative": request(negative_prompt="green, a cat", guidance_scale=5),
        "rescale": request(guidance_scale=7, guidance_rescale=0.7, spacing="karras"),
        "interval": request(guidance_interval=(0.3, 5.0), guidance_scale=6),
        "weighted": request("a (red:1.4) apple [on a blue background] BREAK ((two stars))"),
        "long": request(LONG, negative_prompt="blurry, " * 30),
        "clip_skip": request(clip_skip=1),
        "eta": request(sampler="ddim", eta=0.6),
        "size": request(width=96, height=64),
        "image": request(image=image, strength=0.7, num_inference_steps=8),
        "inpaint": request("two stars", image=image, mask=mask, num_inference_steps=8),
        "inpaint_part": request("a cat", image=image, mask=mask, strength=0.6, sampler="euler_ancestral"),
        "upscale": request(width=64, height=64, upscale=1.5, upscale_strength=0.6),
    }
    pipe = Pipeline.from_pretrained(PICTO, device="cpu", dtype="float32")
    sample("picto", pipe, **samplers, **features)
    mixed = zip(features, pipe.generate([*features.values()]), strict=True)
    entries |= {f"mixed/{name}": pixels(image) for name, image in mixed}
    several = pipe(["two stars", "a cat"], num_images_per_prompt=2, seed=[5, 9], num_inference_steps=4)
    entries |= {f"call/{seed}": pixels(image) for seed, image in zip(several.seeds, several.images, strict=True)}
    pipe.load_lora_weights("lora.safetensors", (0.8, 0.5), "style")
    sample("lora", pipe, loaded=request(), negative=features["negative"])
    pipe.set_adapters(["style"], [1.5])
    sample("lora", pipe, set=request())
    pipe.unload_lora_weights()
    entries["embedding/token"] = pipe.load_textual_inversion("word.safetensors")
    sample("embedding", pipe, one=request("a <zorb> on a (<zorb>:1.2) background"))
    sample("bfloat16", Pipeline.from_pretrained(PICTO, device="cpu", dtype="bfloat16"), one=request())
    some = "weighted", "long", "clip_skip", "image", "inpaint", "negative"
    strong = {name: replace(features[name], guidance_scale=40) for name in some}  # random networks hear texts faintly
    for family in DATA["families"]:
        pipe = Pipeline.from_pretrained(family, device="cpu", dtype="float32")
        sample(family, pipe, **strong, plain=request(), empty=request(negative_prompt="", sampler="unipc"))
    pipe.load_lora_weights("lora-xl.safetensors", 0.7)
    pipe.load_textual_inversion("word-xl.safetensors", "<zorb>")
    sizes = {"original_size": (100, 90), "crops_coords_top_left": (4, 8), "target_size": (64, 64)}
    sample("sdxl", pipe, lora=request(), lora_and_embedding=request("a <zorb>", **sizes))
    return entries


def train() -> Entries:
    """Weights, sampled images and losses of all trainings, each in a process of its own, and of one's average."""
    entries: Entries = {}
    for name, recipe in DATA["recipes"].items():
        run, file = Path("runs") / name, Path(f"{name}.yaml")
        file.write_text(yaml.safe_dump(recipe | {"output_dir": str(run)}))
        ldm_process("train", file)
        if "posthoc_steps" in recipe:
            ldm_process("average", run, "--sigma-rel", 0.08, "--out", run / "average")
        entries |= {f"{name}/{path.relative_to(run)}": tensors(path) for path in run.rglob("*.safetensors")}
        entries |= {f"{name}/{path.relative_to(run)}": pixels(Image.open(path)) for path in run.rglob("*.png")}
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        entries |= leaves(log, f"{name}/log")
    return entries


def job() -> Entries:
    """Manifest, images and texts of batch-invariant jobs: the pixels of others depend on when items come."""
    entries: Entries = {}
    for name, content in FILES.items():
        Path(name).write_text(content)
        folder = Path("jobs") / name
        more = [] if name.endswith("yaml") else ["--negative", "blurry", "--lora", "lora.safetensors:0.5"]
        ldm(
            "batch",
            name,
            "--out",
            folder,
            "--steps",
            4,
            "--batch-invariant",
            "--count",
            2 if name.endswith("txt") else 1,
            *more,
        )
        entries |= leaves(json.loads((folder / "job.json").read_text()), f"{name}/job")
        entries[f"{name}/items"] = hashlib.sha256((folder / "items.jsonl").read_bytes()).hexdigest()
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        lines.sort(key=lambda line: (line["line"], line["id"]))
        entries[f"{name}/bytes"] = hashlib.sha256("".join(line.pop("sha256") for line in lines).encode()).hexdigest()
        for k, line in enumerate(lines):
            image = Image.open(folder / line["file"])
            entries |= leaves({**line, "image": pixels(image), "parameters": image.info["parameters"]}, f"{name}/{k}")
        entries |= leaves(json.loads(image.info["ldm"]), f"{name}/ldm")
    return entries


def inspect() -> Entries:
    """What `ldm inspect` says of models, adapters and other files, some of them written by `ldm convert`."""
    entries: Entries = {}

    def say(path: Path | str, *options: str) -> None:
        name = str(path).removeprefix(f"{ROOT}/")
        entries.update(leaves(json.loads(ldm("inspect", path, "--json", *options)), name))

    def convert(source: str, destination: str, *options: str) -> None:
        report = json.loads(ldm("convert", source, destination, "--json", *options))
        entries.update(leaves(report, f"convert {destination}"))

    convert("sdxl/vae/diffusion_pytorch_model.safetensors", "vae.safetensors", "--dtype", "bfloat16")
    convert("sd2", "half", "--dtype", "float16")
    files = "sd1/vae", "vae.safetensors", "lora-xl.safetensors", "word.safetensors", "word-xl.safetensors"
    for path in (PICTO, *DATA["families"], "half", *files):
        say(path)
    for family in DATA["families"]:
        write_model(Path("large"), family, small=False)  # a single file is of full size, or of no family
        if family == "sd1":
            write_lora("kohya.safetensors", Path("large"))
            convert("kohya.safetensors", "diffusers.safetensors", "--to", "diffusers")
            convert("kohya.safetensors", "peft", "--to", "peft")
            for path in ("kohya.safetensors", "diffusers.safetensors", "peft"):
                say(path)
        single = f"{family}.safetensors"
        convert("large", single)
        say(single, "--no-probe")
        shutil.rmtree("large")
        if family == "sd2":
            convert(single, "large")
            say("large", "--no-probe")
            shutil.rmtree("large")
        Path(single).unlink()
    return entries


def measure() -> Entries:
    """What `ldm check` says of a recipe whose data have faults, and figures of `ldm likelihood` and `ldm invert`."""
    folder = Path("faults")
    write_images(folder, 9)
    whole = (folder / "4.png").read_bytes()
    texts = {"0": "IMG_0042", "1": "None", "2": "a red star<br>" + 60 * " very", "3": " \n", "9": "no image"}
    files = {f"{name}.txt": text.encode() for name, text in (texts | {"again": "a cat", "torn": "a dog"}).items()}
    for name, data in (files | {"again.png": whole, "torn.png": whole[:300], "alone.CR2": b"raw"}).items():
        (folder / name).write_bytes(data)
    shown = {"tiny": patches(7, 24, 24), "grey": patches(8, 64, 64).convert("L"), "wide": patches(9, 640, 64)}
    for name, image in shown.items():
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} image")
    Path("faults.yaml").write_text(yaml.safe_dump(DATA["recipes"]["lora"] | {"output_dir": "runs/faults"}))
    found = ldm("check", "faults.yaml", "--set", "data.train_data_dir=faults", "--json", status=2)
    entries = dict(leaves(json.loads(found), "check"))
    about = "image.png", "--prompt", "a red apple", "--json"
    entries |= leaves(json.loads(ldm("likelihood", *about, "--steps", 4, "--probes", 2)), "likelihood")
    adaptive = ldm("likelihood", *about, "--method", "ode", "--tolerance", 0.01)
    entries |= leaves(json.loads(adaptive), "likelihood-adaptive")
    for scheme, options in {"exact": ("--steps", 6, "--guidance", 2), "ode": ("--rtol", 0.01, "--atol", 0.01)}.items():
        report = json.loads(ldm("invert", *about, "--scheme", scheme, "--out", scheme, *options))
        entries |= leaves(report, f"invert-{scheme}")
        entries[f"invert-{scheme}/noise"] = tensors(Path(scheme) / "image-noise.safetensors")
        entries[f"invert-{scheme}/back"] = pixels(Image.open(Path(scheme) / "image-back.png"))
    return entries


# --------------------------------------------------------------------------------------------------------- comparison
PARTS: dict[str, Callable[[], Entries]] = {part.__name__: part for part in (images, train, job, inspect, measure)}


def run(names: Iterable[str]) -> Entries:
    """The entries of some parts, made in a new working folder; the trainings run beside all others."""
    home = Path.cwd()
    with TemporaryDirectory(prefix="guard-") as folder, ThreadPoolExecutor(1) as beside:
        os.chdir(folder)
        try:
            write_inputs()
            training = beside.submit(train if "train" in names else dict)
            made = {name: PARTS[name]() for name in names if name != "train"} | {"train": training.result()}
        finally:
            os.chdir(home)
    made["machine"] = {library.__name__: library.__version__ for library in (torch, np, diffusers, transformers)}
    made["machine"]["cpu"] = torch.backends.cpu.get_cpu_capability()
    return {f"{part}/{name}": value for part, entries in made.items() for name, value in sorted(entries.items())}


def compare(old: Entries, new: Entries) -> bool:
    """Print each entry that differs, and how many agree; do all?"""
    both = {name: (repr(old.get(name, "absent")), repr(new.get(name, "absent"))) for name in sorted(old | new)}
    differing = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    for name, (was, now) in differing.items():
        print(f"{name}\n  was {was}\n  is  {now}")
    print(f"{len(both) - len(differing)} of {len(both)} entries agree")
    return not differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--rename", metavar="OLD=NEW", action="append", default=[], help="may be repeated")
    args = parser.parse_args()
    parts = args.only or list(PARTS)
    new = run(parts)
    if args.action == "record":
        args.file.write_text(json.dumps(new, indent=0) + "\n")
        print(f"{len(new)} entries")
        return
    names = dict(rename.split("=", 1) for rename in args.rename)
    old = {
        "/".join(names.get(key, key) for key in name.split("/")): names.get(value, value)
        if isinstance(value, str)
        else value
        for name, value in json.loads(args.file.read_text()).items()
        if name.split("/")[0] in (*parts, "machine")
    }
    sys.exit(0 if compare(old, new) else 1)


if __name__ == "__main__":
    main()
