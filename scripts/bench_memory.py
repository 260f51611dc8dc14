"""Memory at the peak of the commands on full-size models (random weights), beside the forecast.

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
from ldm.checkpoints.formats import MODEL_INDEX, read_model_spec
from ldm.checkpoints.keys import build_meta_state_dicts
from ldm.checkpoints.tensors import DIFFUSERS_WEIGHTS_NAME, TRANSFORMERS_WEIGHTS_NAME, SafetensorsWriter
from ldm.config import Recipe
from ldm.files import atomic_write, write_json
from ldm.nn.tokenizer import build_clip_tokenizer, save_clip_tokenizer
from ldm.pipeline.pipeline import PIPELINE_DTYPES

REPORT = """import atexit, sys
from pathlib import Path
file = Path(sys.argv.pop(1))
atexit.register(lambda: file.write_text(Path("/proc/self/status").read_text()))
"""
WORD: dict[str, object] = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "star"}
TRAININGS: dict[str, dict[str, object]] = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "dreambooth": {"method": "lora", "prior_preservation": True, "class_prompt": "a thing", "num_class_images": 1},
    "word": WORD,
    "samples": {"method": "lora"},  # of a validation prompt, as the model card has them
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
    write_json({"num_inference_steps": 2}, folder / "generation_config.json")  # of samples
    write_json(index, folder / "model_index.json")


def measure(case: str, model: Path) -> float:
    """The gigabytes at the peak of a case's command, in a process of its own that imports what the command does."""
    kind, size, setting = case.split()
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        folder = Path(name)
        words = (
            f"generate apple --model {model} --dtype {setting} --width {size} --height {size} --out {folder / 'out'}"
        )
        words += " --steps 1 --spacing trailing"
        code = "from ldm.cli import main; main()"
        if kind == "load":
            code = f"from ldm import Pipeline; Pipeline.from_pretrained({str(model)!r}, dtype={setting!r})"
        elif kind != "generate":
            write_json(write_recipe(folder, model, case).model_dump(mode="json"), folder / "recipe.yaml")
            words = f"train {folder / 'recipe.yaml'}"
        command: list[str | Path] = [sys.executable, "-c", REPORT + code, folder / "status", *words.split()]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return int((folder / "status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


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
            "validation_prompts": ["a thing"] * (kind == "samples"),
            "dataloader_num_workers": 0,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help='such as "generate 512 float32" or "lora 64 adamw"')
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    args = parser.parse_args()
    model = args.folder / args.family
    if not model.exists():
        with atomic_write(model) as draft:
            draft.mkdir()
            write_model(args.family, draft)
    print("| model | case | measured GB | forecast GB | forecast / measured |\n|---|---|---|---|---|")
    for case in args.cases or CASES:
        measured, foreseen = measure(case, model), forecast(case, model)
        print(f"| {args.family} | {case} | {measured:.2f} | {foreseen:.2f} | {foreseen / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
