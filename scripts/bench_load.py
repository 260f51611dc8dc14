"""A full-size Stable Diffusion 1.5, random, in bfloat16: how long loading takes, how much memory, how many bytes.

    python scripts/bench_load.py [--rounds 3] [--folder DIR]

Ours and diffusers' own loaders, as a folder and as a single file (2.1 GB each), in turn, each in a process of its own;
the files lie in the page cache. Ours also hashes what it reads. `read` is what the process asked the system for,
`rchar` of /proc/self/io: what is mapped into memory, as diffusers does, is not counted. At the end ours draws 2 steps
at 256x256 from the single file. Status 1 where ours needs more than 8 GB of memory at the peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm import Pipeline
from ldm.checkpoints.families import FAMILIES, LoadOptions
from ldm.checkpoints.formats import MODEL_INDEX, Checkpoint, load_checkpoint
from ldm.checkpoints.keys import build_meta_state_dicts
from ldm.checkpoints.tensors import save_tensors
from ldm.convert.convert import convert_checkpoint
from ldm.files import write_json
from ldm.nn.tokenizer import build_clip_tokenizer, save_clip_tokenizer

from diffusers import StableDiffusionPipeline  # isort: skip

FAMILY = FAMILIES["sd1"]
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FOLDER, SINGLE = "folder", "model.safetensors"
MOST = 8.0  # gigabytes of memory that ours may need


def write(root: Path) -> None:
    """The model as a folder and as a single file; deviations small enough that nothing overflows."""
    folder, g = root / FOLDER, torch.Generator().manual_seed(0)
    configs = {"unet": FAMILY.unet, "vae": FAMILY.vae, "text_encoder": FAMILY.text_encoders["text_encoder"].config}
    for name, tensors in build_meta_state_dicts(FAMILY).items():
        (folder / name).mkdir(parents=True)
        values = {n: torch.empty(a.shape, dtype=DTYPE).normal_(0, 0.02, generator=g) for n, a in tensors.items()}
        save_tensors(values, folder / name / f"{NAMES[name]}.safetensors", DTYPE)
        write_json(configs[name], folder / name / "config.json")
    save_clip_tokenizer(build_clip_tokenizer(FAMILY.text_encoders["text_encoder"].pad_token_id), folder / "tokenizer")
    (folder / "scheduler").mkdir()
    write_json(FAMILY.scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json({**MODEL_INDEX, "scheduler": ["diffusers", "PNDMScheduler"]}, folder / "model_index.json")
    convert_checkpoint(folder, root / SINGLE)


def draw(root: Path) -> Checkpoint:
    pipe = Pipeline.from_pretrained(root / SINGLE, device="cpu", dtype=DTYPE, prediction="eps")
    pipe("a red apple", num_inference_steps=2, height=256, width=256)
    return pipe.model


LOADERS: dict[str, Callable[[Path], Any]] = {
    "ldm, folder": lambda root: load_checkpoint(root / FOLDER, CPU, DTYPE),
    "diffusers, folder": lambda root: StableDiffusionPipeline.from_pretrained(
        root / FOLDER, torch_dtype=DTYPE, local_files_only=True
    ),
    "ldm, single file": lambda root: load_checkpoint(root / SINGLE, CPU, DTYPE, LoadOptions(prediction="eps")),
    "diffusers, single file": lambda root: StableDiffusionPipeline.from_single_file(
        str(root / SINGLE), config=str(root / FOLDER), torch_dtype=DTYPE, local_files_only=True
    ),
    "ldm, and 2 steps at 256x256": draw,
}


def measured(name: str, root: Path) -> dict[str, float]:
    """Seconds, gigabytes read, and gigabytes of memory before and at the peak, of one loader in this process."""
    before, start, read = peak(), time.perf_counter(), rchar()
    touch(LOADERS[name](root))
    return {"s": time.perf_counter() - start, "read": rchar() - read, "before": before, "peak": peak()}


def touch(model: Any) -> None:
    """Look at each page of the weights: what is only mapped into memory is not there yet."""
    text_encoder = model.text_encoders[0].model if isinstance(model, Checkpoint) else model.text_encoder
    for network in (model.unet, model.vae, text_encoder):
        for parameter in network.parameters():
            torch.empty(0, dtype=torch.uint8).set_(parameter.untyped_storage())[::4096].sum()


def peak() -> float:
    """Gigabytes of memory at the most, since this program began (ru_maxrss would begin with its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def rchar() -> float:
    """Gigabytes read so far."""
    return int(Path("/proc/self/io").read_text().split()[1]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the 4.3 GB of files; the default is a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one loader, in a process of its own
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measured(args.measure, args.folder)))
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        write(Path(root))
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(args.rounds):
            for name, figures in rounds.items():
                command = [sys.executable, __file__, "--measure", name, "--folder", root]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                figures.append(json.loads(done.stdout.splitlines()[-1]))
        sizes = sum(f.stat().st_size for f in (Path(root) / FOLDER).rglob("*")), (Path(root) / SINGLE).stat().st_size
    print(f"folder {sizes[0] / 1e9:.3f} GB, single file {sizes[1] / 1e9:.3f} GB; medians of {args.rounds}\n")
    print("| loader | seconds | GB read | GB before | GB at the peak |\n|---|---|---|---|---|")
    for name, figures in rounds.items():
        s, read, before, most = (statistics.median(f[k] for f in figures) for k in ("s", "read", "before", "peak"))
        print(f"| {name} | {s:.2f} | {read:.3f} | {before:.2f} | {most:.2f} |")
    worst = max(f["peak"] for name, figures in rounds.items() if name.startswith("ldm") for f in figures)
    if worst > MOST:
        sys.exit(f"{worst:.2f} GB of memory at the peak, at most {MOST:g} are allowed")


if __name__ == "__main__":
    main()
