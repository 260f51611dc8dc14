"""Memory at the peak of full-size models (random weights), measured in a process of its own, beside the forecast.

    python scripts/bench_memory.py --folder DIR [--family sd1] [CASE ...]

DIR keeps the models between calls (2.1 GB for sd1, 6.9 GB for sdxl, in float16): normal values of deviation 0.02 from
seed 0, in diffusers' layout.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.audit.audit import audit_dataset
from ldm.audit.estimates import estimate_generation
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.formats import MODEL_INDEX, load_checkpoint, read_model_spec
from ldm.checkpoints.keys import build_meta_state_dicts
from ldm.checkpoints.tensors import DIFFUSERS_WEIGHTS_NAME, TRANSFORMERS_WEIGHTS_NAME, SafetensorsWriter
from ldm.commands.train import create_task, preflight
from ldm.config import Recipe
from ldm.files import atomic_write, write_json
from ldm.nn.tokenizer import build_clip_tokenizer, save_clip_tokenizer
from ldm.pipeline.pipeline import PIPELINE_DTYPES, Pipeline
from ldm.train.trainer import train_model

WORD: dict[str, object] = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "star"}
TRAININGS: dict[str, dict[str, object]] = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "dreambooth": {"method": "lora", "prior_preservation": True, "class_prompt": "a thing", "num_class_images": 1},
    "word": WORD,
}
CASES = (  # kind, side in pixels, dtype or optimizer
    *(f"load 0 {dtype}" for dtype in ("bfloat16", "float32")),
    *(f"generate {side} {dtype}" for side in (512, 1024) for dtype in ("bfloat16", "float32")),
    *(f"{kind} {side} adamw" for kind in ("lora", "word") for side in (64, 512)),
)


def write_model(name: str, folder: Path) -> None:
    """A family's model with random weights in float16, tensor by tensor."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)
    index = {**MODEL_INDEX, "_class_name": family.pipeline_class}
    index["scheduler"] = ["diffusers", family.scheduler["_class_name"]]
    for component, tensors in build_meta_state_dicts(family).items():
        is_text = component in family.text_encoders
        file = TRANSFORMERS_WEIGHTS_NAME if is_text else DIFFUSERS_WEIGHTS_NAME
        with SafetensorsWriter(folder / component / file, tensors, {"format": "pt"}, torch.float16) as writer:
            for key, like in tensors.items():
                writer.write(key, torch.empty(like.shape).normal_(0, 0.02, generator=generator))
        write_json(family.configs[component], folder / component / "config.json")
        if is_text:
            spec, number = family.text_encoders[component], component.removeprefix("text_encoder")
            tokenizer = build_clip_tokenizer(spec.pad_token_id)
            save_clip_tokenizer(tokenizer, folder / f"tokenizer{number}")
            encoder_class = "CLIPTextModelWithProjection" if spec.with_projection else "CLIPTextModel"
            index |= {f"tokenizer{number}": ["transformers", "CLIPTokenizer"]}
            index |= {component: ["transformers", encoder_class]}
    (folder / "scheduler").mkdir()
    write_json(family.scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json(index, folder / "model_index.json")


def measure(case: str, model: Path) -> None:
    """Run a case in this process, and print the gigabytes at its peak."""
    kind, size, setting = case.split()
    if kind == "generate":
        pipe = Pipeline.from_pretrained(model, device="cpu", dtype=setting)
        pipe("a red apple", num_inference_steps=1, height=int(size), width=int(size), spacing="trailing")
    elif kind == "load":
        load_checkpoint(model, torch.device("cpu"), PIPELINE_DTYPES[setting])
    else:
        with tempfile.TemporaryDirectory(dir=model.parent) as folder:
            recipe = write_recipe(Path(folder), model, case)
            preflight(recipe)
            train_model(recipe, create_task(recipe))
    print(peak())


def forecast(case: str, model: Path) -> float:
    """The gigabytes that the library foresees for a case."""
    kind, size, setting = case.split()
    if kind in ("load", "generate"):
        images = [(int(size), int(size))] if kind == "generate" else []
        return max(estimate_generation(read_model_spec(model), PIPELINE_DTYPES[setting], images).values()) / 1e9
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        recipe = write_recipe(Path(folder), model, case)
        return audit_dataset(recipe).estimates["memory"]["total"] / 1e9


def write_recipe(folder: Path, model: Path, case: str) -> Recipe:
    """A recipe of two steps on two images of noise."""
    kind, size, optimizer = case.split()
    (folder / "images").mkdir()
    for k in range(2):
        noise = np.random.default_rng(k).integers(0, 255, (int(size), int(size), 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{k}.png")
        (folder / "images" / f"{k}.txt").write_text("a <x> thing")
    data = {"train_data_dir": str(folder / "images"), "resolution": int(size), "min_bucket_reso": 64}
    return Recipe.model_validate(
        {
            "objective": {"kind": "tune", "pretrained_model_name_or_path": str(model), **TRAININGS[kind]},
            "data": data,
            "output_dir": str(folder / "run"),
            "max_train_steps": 2,
            "train_batch_size": 1,
            "learning_rate": 1e-5,
            "optimizer": optimizer,
            "report_to": [],
            "dataloader_num_workers": 0,
        }
    )


def peak() -> float:
    """Gigabytes of memory at the most, since this program began."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help='such as "generate 512 float32" or "lora 64 adamw"')
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    model = args.folder / args.family
    if args.measure:
        return measure(args.cases[0], model)
    if not model.exists():
        with atomic_write(model) as draft:
            draft.mkdir()
            write_model(args.family, draft)
    print("| model | case | measured GB | forecast GB | forecast / measured |\n|---|---|---|---|---|")
    for case in args.cases or CASES:
        command = [sys.executable, __file__, "--measure", "--folder", args.folder, "--family", args.family, case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured, foreseen = float(done.stdout.split()[-1]), forecast(case, model)
        print(f"| {args.family} | {case} | {measured:.2f} | {foreseen:.2f} | {foreseen / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
