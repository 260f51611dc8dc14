"""Fuzz all parsers: mutated files go through the command line, each in a forked child with limits.

    python scripts/fuzz.py [--cases 10000] [--seed 0] [--target NAME] [--keep FOLDER]

A case is a function of the seed and its number. It fails with a status other than 0, 1, 2, a traceback, two `error:`
lines, control characters in its output, more than 10 s of CPU, or memory beyond 2 GB; its files are kept and named.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pickle
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import save

import ldm
from ldm import cli
from ldm.checkpoints.formats import PICTO_PATH
from ldm.commands import batch, train
from ldm.convert import unpickle
from ldm.jobs.gallery import write_gallery
from ldm.metadata import save_png
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.pipeline.scheduler import BatchScheduler

CPU_LIMIT, MEMORY_LIMIT = 10, 2**31  # seconds; bytes beside what the parent has
UNPRINTABLE = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**64,
    1e308,
    -1e-308,
    "",
    "x",
    "x" * 5000,
    "\x1b[2J\nok",
    "../../x",
    "\ud800",
]
VALUES += ["/dev/zero", "~nosuchuser/x", "1e400", "__x__", "{a|b", [], {}, [[]], [None], {"x": {}}, ["x"] * 99, 10**30]
TOKENS = [
    b"\0",
    b"\xff\xfe",
    b"\n",
    b'"',
    b"{",
    b"}}",
    b"[" * 3000,
    b"9" * 50,
    b"-",
    b"null",
    b"NaN",
    b"1e999",
    b"--",
    b"__",
]
TOKENS += [b": ", b"&a *a", b"!!int ''", b"\x1b[2J", b"../", b"\xf0\x9f\x92\xa9", b"%s", b"|", b"$$", b"\t", b","]


COMFY: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {  # nodes: class, values, links
    "1": ("KSampler", {"seed": 7, "steps": 2, "cfg": 8.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1},
          {"model": "2", "positive": "3", "negative": "4", "latent_image": "5"}),
    "2": ("LoraLoader", {"lora_name": "x", "strength_model": 0.8, "strength_clip": 0.5}, {"model": "6"}),
    "3": ("ConditioningConcat", {}, {"conditioning_to": "4", "conditioning_from": "7"}),
    "4": ("CLIPTextEncode", {"text": "a cat"}, {"clip": "8"}),
    "5": ("LatentUpscaleBy", {"scale_by": 1.5}, {"samples": "9"}),
    "6": ("CheckpointLoaderSimple", {"ckpt_name": "x.ckpt"}, {}),
    "7": ("CLIPTextEncode", {}, {"text": "10"}),
    "8": ("CLIPSetLastLayer", {"stop_at_clip_layer": -2}, {}),
    "9": ("SamplerCustomAdvanced", {}, {"noise": "11", "guider": "12", "sampler": "13", "sigmas": "14",
                                        "latent_image": "15"}),
    "10": ("StringConcatenate", {"string_a": "a", "delimiter": " "}, {"string_b": "10"}),
    "11": ("RandomNoise", {"noise_seed": 7}, {}),
    "12": ("CFGGuider", {"cfg": 3}, {"positive": "4", "negative": "4", "model": "2"}),
    "13": ("SamplerDPMPP_2M_SDE", {"eta": 1}, {}),
    "14": ("KarrasScheduler", {"steps": 3}, {}),
    "15": ("EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 1}, {}),
    "16": ("SaveImage", {}, {"images": "1"}),
}  # fmt: skip
OTHER_TOOLS = [  # the key and text of metadata
    ("parameters", "a cat <lora:x:0.5>\nNegative prompt: dog\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 7, "
     'Seed: 1, Size: 32x32, Denoising strength: 0.5, Hires upscale: 2, Clip skip: 2, Lora hashes: "x: abc"'),
    ("parameters", json.dumps({"prompt": "a", "sampler": "euler", "scheduler": "karras", "resolution": "(32, 32)",
                               "steps": 3, "seed": "5", "loras": [["x.safetensors", 0.1, "h"]], "styles": "[]"})),
    ("prompt", json.dumps({key: {"class_type": kind, "inputs": values | {n: [to, 0] for n, to in links.items()}}
                           for key, (kind, values, links) in COMFY.items()})),
    ("invokeai_metadata", json.dumps({"positive_prompt": "a (b c)1.3 d++", "negative_prompt": "x", "steps": 3,
                                      "seed": 1, "cfg_scale": 3, "scheduler": "euler_k", "width": 32, "height": 32,
                                      "clip_skip": 1, "model": {"name": "m"},
                                      "loras": [{"model": {"name": "l"}, "weight": 0.5}]})),
    ("sd-metadata", json.dumps({"image": {"prompt": [{"prompt": "a [b]"}], "steps": 3, "sampler": "k_lms"}})),
    ("Dream", '"a [b]" -s 3 -S 1 -W 32 -H 32 -C 7.5 -A k_lms'),
]  # fmt: skip


class Seed(NamedTuple):
    """What is mutated, and how the file is made of it."""

    payload: bytes
    wrap: Callable[[bytes], bytes] = lambda payload: payload


class Target(NamedTuple):
    """Files by name, a `Path` for a link, of which one `Seed` is mutated; and the words of commands that read them."""

    files: Mapping[str, Seed | bytes | Path]
    commands: list[str]


def encode_image(form: str, texts: Mapping[str, str] | None = None, size: int = 32) -> bytes:
    image, file = Image.effect_noise((size, size), 60).convert("RGB"), io.BytesIO()
    if texts is None:
        image.save(file, form)
        return file.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        save_png(image, Path(folder) / "x.png", texts)
        return (Path(folder) / "x.png").read_bytes()


def encode_text(key: str, text: bytes) -> bytes:
    return encode_image("", {key: text.decode("utf-8", "replace")})


def tensors(*names: str, shape: tuple[int, ...] = (4, 4)) -> Iterator[tuple[str, Seed]]:
    """A safetensors file, its header and the whole mutated."""
    data = save({name: torch.ones(shape) for name in names}, {"ss_network_dim": "4", "modelspec.title": "x"})
    size = int.from_bytes(data[:8], "little")
    yield "x.safetensors", Seed(data[8 : 8 + size], lambda h: len(h).to_bytes(8, "little") + h + data[8 + size :])
    yield "y.safetensors", Seed(data)


def make_tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def make_parquet(**columns: list[Any]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def make_zip_pickle() -> tuple[bytes, Callable[[bytes], bytes]]:
    """The pickle in a file of torch.save, and the file with another one."""
    file = io.BytesIO()
    torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}, "epoch": 3}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))

    def wrap(payload: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for member, content in {**members, name: payload}.items():
                archive.writestr(member, content)
        return out.getvalue()

    return members[name], wrap


def make_targets(pipe: Pipeline) -> dict[str, Target]:
    """All parsers, each with small valid files."""
    png, request = encode_image("PNG"), pipe.resolve(Request("a red apple", num_inference_steps=2, height=32, width=32))
    texts = pipe.metadata(request, "picto")
    generate = "generate a --steps 1 --width 32 --height 32 --out o"
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = [f"{module}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
    row = {"prompt": "a {red|blue} cat", "seed": "1-3", "steps": 4, "guidance": 7.5, "size": "64x64", "negative": "dog"}
    jsonl = (json.dumps(row) + "\n").encode()
    table = b'prompt,seed,steps,sampler\na cat,1,4,ddim\n"two, stars",2-3,5,euler a\n'
    prompts = {
        "p.txt": b'a cat --n dog --s 4 --d 1 --l 7.5\n--prompt "a dog" --steps 4\n# x\n(a:1.2) [b] BREAK c\n',
        "p.csv": table,
        "p.tsv": table.replace(b",", b"\t"),
        "p.json": json.dumps([row, row]).encode(),
        "p.jsonl": jsonl * 2,
        "p.yaml": b"prompts: [a cat, {prompt: a dog, seed: 3}]\nseed: [1, 2]\nsteps: 4\n",
        "p.parquet": make_parquet(prompt=["a cat", "two stars"], seed=[1, 2], steps=[4, None]),
    }
    wildcards = {
        "wildcards/colour.txt": b"red\nblue::2\n__animals/*__\n# x\n",
        "wildcards/animals/all.yaml": b"big: [cat, {dog: 2}]\nsmall:\n- mouse\n",
        "wildcards/b.json": b'{"x": ["a", "b"], "y": {"z": ["c"]}}',
    }
    recipe = {
        "objective": {"kind": "tune", "pretrained_model_name_or_path": str(PICTO_PATH), "method": "lora", "rank": 2},
        "data": {"train_data_dir": "data", "resolution": 32, "bucket_reso_steps": 16, "min_bucket_reso": 32},
        "output_dir": "run",
        "train_batch_size": 1,
        "max_train_steps": 2,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "report_to": [],
    }
    plain = json.dumps(recipe).encode()
    caption = {"data/a.png": png, "data/b.png": png, "data/b.txt": b"a dog"}
    item = {"id": "ab12", "status": "done", "line": 1, "file": "images/ab/ab12.png", "sha256": "0" * 64, "seconds": 1.0}
    manifest = json.dumps(item | {"request": request.to_record(), "worker": "w"}).encode() + b"\n"
    job = {"model": "picto", "source": "p.txt", "words": ["--ema"], "weights": batch_identity(pipe), "version": "0"}
    model = {
        f"m/{path.relative_to(PICTO_PATH)}": path if path.stat().st_size > 10**5 else Seed(path.read_bytes())
        for path in PICTO_PATH.rglob("*")
        if path.suffix in (".json", ".safetensors", ".txt") and "image_encoder" not in path.parts
    }
    payload, wrap = make_zip_pickle()
    forms = {form: f"x.{form.lower()}" for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "DDS", "AVIF")}
    Image.init()
    return {
        "single files": Target(
            dict(tensors("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x", "model_ema.y")),
            [
                "inspect --no-probe x.safetensors",
                "inspect --no-probe y.safetensors",
                f"{generate} --model x.safetensors",
            ],
        ),
        "model folders": Target(model, ["inspect --no-probe m", f"{generate} --model m", f"{generate} --vae m/vae"]),
        "adapters": Target(
            dict(tensors(*lora)),
            [f"{generate} --lora x.safetensors", f"{generate} --lora y.safetensors:0.5", "inspect x.safetensors"],
        ),
        "embeddings": Target(
            dict(tensors("emb_params", shape=(2, 128))),
            [
                f"{generate} --embedding x.safetensors",
                f"{generate} --embedding w=y.safetensors",
                "inspect x.safetensors",
            ],
        ),
        "metadata": Target(
            {"x.png": Seed(texts["ldm"].encode(), partial(encode_text, "ldm"))},
            ["verify x.png", "verify . --json"],
        ),
        "settings of other tools": Target(
            {
                f"{key}{k}.png": Seed(text.encode(), partial(encode_text, key))
                for k, (key, text) in enumerate(OTHER_TOOLS)
            },
            [
                f"{command} {key}{k}.png"
                for k, (key, _) in enumerate(OTHER_TOOLS)
                for command in (f"{generate} --from", "info")
            ],
        ),
        "images": Target(
            {name: Seed(encode_image(form)) for form, name in forms.items() if form in Image.SAVE},
            [f"{generate} --image {name} --strength 0.5" for name in forms.values()]
            + [f"{generate} --image x.png --mask {name}" for name in forms.values()]
            + ["verify ."],
        ),
        "recipes": Target({**caption, "r.yaml": Seed(plain)}, ["train r.yaml --lenient", "train r.yaml --strict"]),
        "prompts": Target(
            {name: Seed(content) for name, content in prompts.items()},
            [f"batch {name} --steps 2 --out o{more}" for name in prompts for more in ("", " --lenient")],
        ),
        "wildcards": Target(
            {
                "p.txt": b"a __colour__ __animals/*__ __b/x__\n",
                **{n: Seed(content) for n, content in wildcards.items()},
            },
            ["batch p.txt --out o", "batch p.txt --out o --expand all"],
        ),
        "data": Target(
            {
                "r.yaml": plain,
                **caption,
                "data/metadata.jsonl": Seed(b'{"file_name": "a.png", "text": "a cat"}\n'),
                "data/meta_cap.json": Seed(b'{"b": {"caption": "a dog", "tags": "x, y"}}'),
                "data/c.png": Seed(png),
                "data/c.txt": Seed(b"two stars"),
            },
            ["train r.yaml", "train r.yaml --lenient"],
        ),
        "tars": Target(
            {"r.yaml": plain, "data/0.tar": Seed(make_tar({"a.png": png, "a.txt": b"a cat", "a.json": b'{"x": 1}'}))},
            ["train r.yaml", "train r.yaml --lenient"],
        ),
        "shards": Target(
            {
                "r.yaml": plain,
                "data/0.parquet": Seed(make_parquet(image=[{"bytes": png, "path": "a.png"}], text=["a"])),
            },
            ["train r.yaml", "train r.yaml --lenient"],
        ),
        "jobs": Target(
            {
                "p.txt": b"a red apple\n",
                "j/manifest.jsonl": Seed(manifest * 2),
                "j/manifest-w.jsonl": Seed(manifest),
                "j/job.json": Seed(json.dumps(job).encode()),
                "j/images/ab/ab12.png": png,
            },
            ["export j --out o", "export j --out o --to parquet", "batch p.txt --out j", "verify j", "GALLERY"],
        ),
        "pickles": Target(
            {"x.ckpt": Seed(payload, wrap), "y.ckpt": Seed(wrap(payload)), "z.ckpt": Seed(pickle.dumps({"a": [1]}, 2))},
            ["UNPICKLE x.ckpt", "UNPICKLE y.ckpt", "UNPICKLE z.ckpt", "inspect x.ckpt"],
        ),
    }


def batch_identity(pipe: Pipeline) -> dict[str, Any]:
    return {"weights": dict(pipe.model.weight_hashes), "adapters": [], "embeddings": {}}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change values of JSON, or lines of it, or bytes."""
    if rng.random() < 0.7:
        lines = data.split(b"\n") if data.count(b"\n{") else [data]
        k = rng.randrange(len(lines))
        try:
            value = json.loads(lines[k])
        except ValueError:
            pass
        else:
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                value = mutate_value(value, rng)
            lines[k] = json.dumps(value).encode()
            return b"\n".join(lines)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        a = rng.randrange(len(data) + 1)
        b = min(len(data), a + rng.choice([0, 1, 1, 4, 30, 1000]))
        middle = rng.choice([b"", rng.choice(TOKENS), rng.randbytes(b - a), data[a:b] * 2, bytes([rng.randrange(256)])])
        data = data[:a] + middle + data[b:]
    return data


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one inner value replaced, removed, renamed or added."""
    if rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    value = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[str(rng.choice(VALUES))] = value.pop(key)
        case _:
            value[key] = mutate_value(value[key], rng)
    return value


def replace(owner: Any, name: str, value: Any) -> None:
    mock.patch.object(owner, name, value).start()


def run_child(command: str, folder: Path) -> None:
    """A command in this process, its output in files of the folder."""
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_LIMIT
    for kind, limit in ((resource.RLIMIT_CPU, CPU_LIMIT), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    for k, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), k)
    os.chdir(folder / "case")
    sys.stdout, sys.stderr = (open(k, "w", encoding="utf-8", buffering=1) for k in (1, 2))  # noqa: SIM115
    sys.argv = ["ldm", *command.split()]
    if command == "GALLERY":
        replace(cli, "app", lambda **_: write_gallery(Path("j")) and None)
    elif command.startswith("UNPICKLE"):
        sys.argv = [*command.split(), "o.safetensors"]
        replace(cli, "app", lambda **_: unpickle.child_main())
    try:
        cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 3)


def run_case(target: Target, rng: random.Random, folder: Path) -> str | None:
    """Run a case in `folder`, and say what is wrong with how it ended."""
    name = rng.choice([name for name, content in target.files.items() if isinstance(content, Seed)])
    readers = [command for command in target.commands if Path(name).name in command.split()] or target.commands
    command = rng.choice(readers)
    for other, content in target.files.items():
        path = folder / "case" / other
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif isinstance(content, Seed):
            path.write_bytes(content.wrap(mutate(content.payload, rng) if other == name else content.payload))
        else:
            path.write_bytes(content)
    (folder / "command").write_text(f"{command}  # {name}\n")
    if (child := os.fork()) == 0:
        try:
            run_child(command, folder)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(3)
    _, status, usage = os.wait4(child, 0)
    fault = judge(status, (folder / "stdout").read_bytes(), (folder / "stderr").read_bytes())
    return fault and f"{fault}, {usage.ru_utime + usage.ru_stime:.0f} s: ldm {command}: {name}"


def judge(status: int, out: bytes, err: bytes) -> str | None:
    """What is wrong with how a command ended; None if nothing is."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    code, last = os.WEXITSTATUS(status), (err.strip().splitlines() or [b""])[-1].decode(errors="replace")[:300]
    faults = {
        f"traceback ({last})": b"Traceback" in err,
        f"status {code} ({last})": code not in (0, 1, 2),
        "memory": b"error: out of memory" in err,
        "two errors": err.count(b"error: ") > 1 and err.count(b"\nerror: ") + err.startswith(b"error: ") > 1,
        f"other lines on stderr ({last})": any(not re.match(rb"(error|warning|note): ", n) for n in err.splitlines()),
        "control characters": UNPRINTABLE.search(out + err) is not None,
    }
    return next((fault for fault, is_so in faults.items() if is_so), None)


def prepare() -> Pipeline:
    """Load picto, and the libraries that commands import late, once for all children, which do not sample or train."""
    ours = [module.name for module in pkgutil.walk_packages(ldm.__path__, "ldm.") if module.name != "ldm.__main__"]
    for name in (*ours, "accelerate", "peft", "transformers.models.clip.modeling_clip", "typer._adapters"):
        importlib.import_module(name)
    pipe, load = Pipeline.from_pretrained(device="cpu"), vars(Pipeline)["from_pretrained"].__func__

    def from_pretrained(cls: type[Pipeline], path: Any = PICTO_PATH, **options: Any) -> Pipeline:
        usual = path == PICTO_PATH and not any(options.get(name) for name in ("vae", "prediction", "zero_snr"))
        return pipe if usual else load(cls, path, **options)

    def stop(*_: Any, **__: Any) -> Any:
        raise SystemExit(0)

    real_run_job = batch.run_job

    def run_job(job: Any, pipe: Pipeline, source: str, start: Any, *rest: Any, **options: Any) -> int:
        return real_run_job(job, pipe, source, stop, *rest, **options) if job.folder.name == "j" else stop()

    def sample(scheduler: BatchScheduler, requests: Any, *_: Any) -> Any:
        for _ in requests:
            pass
        stop()

    replace(Pipeline, "from_pretrained", classmethod(from_pretrained))
    replace(BatchScheduler, "run", sample)
    replace(batch, "run_job", run_job)
    replace(train, "create_task", stop)
    return pipe


def fuzz(cases: int, seed: int, keep: Path, only: str | None = None) -> list[str]:
    """Run cases; the faults, each with the folder of its files."""
    targets, faults = make_targets(prepare()), []
    for k in range(cases):
        rng = random.Random(f"{seed} {k}")
        name = only or list(targets)[k % len(targets)]
        folder = keep / f"{seed}-{k}"
        folder.mkdir(parents=True)
        fault = run_case(targets[name], rng, folder)
        if fault is None:
            shutil.rmtree(folder)
        else:
            faults.append(f"{folder}: {name}: {fault}")
            print(faults[-1], flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target")
    parser.add_argument("--keep", type=Path, help="folder for the files of faults; default: a temporary one")
    options = parser.parse_args()
    keep = options.keep or Path(tempfile.mkdtemp(prefix="ldm-fuzz-"))
    faults = fuzz(options.cases, options.seed, keep, options.target)
    print(f"{options.cases} cases, {len(faults)} faults" + (f" in {keep}" if faults else ""))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
