"""Broken and hostile files: each is one clear line and exit status 2; nothing is left behind, and none of it runs."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
INDEX = f"{UNET}.index.json"
MARKER = "code-ran"


class Code:
    """A pickle of it makes a folder of this name where it is read."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


def raw(header, data=b"", length=None):
    """The bytes of a safetensors file, its header as it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def slot(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def single(content, name="x.safetensors"):
    """A case: a file beside the model."""

    def spoil(folder):
        write(folder.parent / name, content() if callable(content) else content)
        return folder.parent / name

    return spoil


def within(name, content):
    """A case: a file of the model is other than it was."""

    def spoil(folder):
        old = (folder / name).read_bytes() if (folder / name).is_file() else b""
        write(folder / name, content(old) if callable(content) else content)

    return spoil


def tensors(name, change):
    """A case: other tensors in a file of the model."""

    def spoil(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)

    return spoil


def fields(name, **changes):
    """A case: other values in a configuration of the model."""
    return within(name, lambda old: json.dumps({**json.loads(old), **changes}))


def swap(found):
    one, other = "conv_in.weight", "conv_out.weight"
    found[one], found[other] = found[other], found[one]


def zipped(*names):
    """A zip archive with pickled code in it, as torch.save writes one."""
    path = Path("archive.zip")
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, pickle.dumps(Code()))
    return path.read_bytes()


def sharded(change=lambda index: index, keep=True):
    """A case: the U-Net in two shards, and what the index says of them."""

    def spoil(folder):
        found = load_file(folder / UNET)
        names = sorted(found)
        parts = {f"diffusion_pytorch_model-{k + 1:05}-of-00002.safetensors": names[k::2] for k in range(2)}
        for file, own in parts.items():
            save_file({name: found[name] for name in own}, folder / "unet" / file)
        (folder / UNET).unlink()
        index = change({name: file for file, own in parts.items() for name in own})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return spoil


def without_a_shard(folder):
    sharded()(folder)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def without_an_index(folder):
    sharded()(folder)
    (folder / INDEX).unlink()


def outside(folder):
    sharded(lambda m: dict.fromkeys(m, "../../stolen.safetensors"))(folder)
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors", folder.parent / "stolen.safetensors"
    )


def only_pickles(folder):
    write(folder / "unet" / "diffusion_pytorch_model.bin", pickle.dumps(Code()))
    (folder / UNET).unlink()


def circular(folder):
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("diffusion_pytorch_model.safetensors")


def circular_folder(folder):
    (folder.parent / "loop").symlink_to("loop")
    return folder.parent / "loop"


def a_folder_named_so(folder):
    (folder.parent / "x.safetensors").mkdir()
    return folder.parent / "x.safetensors"


def a_folder_in_its_place(folder):
    (folder / UNET).unlink()
    (folder / UNET).mkdir()


def a_file_in_its_place(folder):
    shutil.rmtree(folder / "unet")
    (folder / "unet").touch()


def a_pipe(folder):
    os.mkfifo(folder.parent / "x.safetensors")
    return folder.parent / "x.safetensors"


def gone(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def named(source):
    """A case: that word for a model."""
    return lambda folder: source


TORN = "not a whole safetensors file"
PICKLED = "`ldm convert --trust"
REMOTE = ["modelling_evil", "EvilModel"]
CASES = {  # what is wrong: how it comes about, what is said
    # a file by its bytes
    "0 bytes": (single(b""), "0 bytes"),
    "7 bytes": (single(b"1234567"), TORN),
    "a header without its end": (single(raw({"a": slot()}, bytes(4))[:20]), TORN),
    "data without its end": (single(raw({"a": slot()}, bytes(3))), "3 bytes of data, expected 4"),
    "data beyond its end": (single(raw({"a": slot()}, bytes(5))), "5 bytes of data, expected 4"),
    "a header that is longer than the file": (single(raw({"a": slot()}, bytes(4), length=10**6)), TORN),
    "a header of terabytes": (single(raw({"a": slot()}, bytes(4), length=2**60)), TORN),
    "a header that is shorter than it is": (single(raw({"a": slot()}, bytes(4), length=9)), TORN),
    "an empty header": (single(raw(b"")), TORN),
    "a header that is a list": (single(raw(b"[1, 2]")), TORN),
    "a header that is not JSON": (single(raw(b'{"a": }')), TORN),
    "a header that is not text": (single(raw(b'{"\xff\xfe": 1}')), TORN),
    "a header without a bottom": (single(raw(b'{"a":' * 30_000)), TORN),
    "overlapping tensors": (single(raw({"a": slot(), "b": slot(2, 6)}, bytes(6))), "begins at byte 2"),
    "a hole": (single(raw({"a": slot(), "b": slot(8, 12)}, bytes(12))), "begins at byte 8"),
    "an end before its start": (single(raw({"a": slot(4, 0)}, bytes(4))), TORN),
    "a negative offset": (single(raw({"a": slot(-4, 0)}, bytes(4))), TORN),
    "a fraction of a byte": (single(raw({"a": slot(0, 4.0)}, bytes(4))), TORN),
    "a shape that its bytes do not hold": (single(raw({"a": slot(shape=(2,))}, bytes(4))), "4 bytes, expected 8"),
    "a shape beyond all memory": (single(raw({"a": slot(shape=(2**40, 2**40))}, bytes(4))), TORN),
    "integers of 10**5 digits": (
        single(raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**5 + b'],"data_offsets":[0,4]}}', bytes(4))),
        "a has an invalid shape",
    ),
    "a shape of 10**5 sides": (single(raw({"a": slot(0, 4, (1,) * 10**5)}, bytes(4))), "100000 dimensions, of 64"),
    "a shape of huge sides": (single(raw({"a": slot(0, 4, (10**38,) * 10**4)}, bytes(4))), "10000 dimensions, of 64"),
    "a million keys": (single(lambda: raw(b"{" + b'"":0,' * (10**6 + 1) + b"}")), "strings, 500000 at most"),
    "nothing of endless length": (single(raw({"a": slot(0, 0, (0, 2**70))})), "too large"),
    "nothing of endless size": (single(raw({"a": slot(0, 0, (0, 2**62, 2**40))})), "too large"),
    "a dtype of its own": (single(raw({"a": slot(dtype="F33")}, bytes(4))), "dtype F33"),
    "one name twice": (single(raw(b'{"a": %b, "a": %b}' % (2 * (json.dumps(slot()).encode(),)), bytes(4))), "twice"),
    "metadata of numbers": (single(raw({"__metadata__": {"a": 1}})), "metadata"),
    "no tensors": (single(raw({})), "not a model of Stable Diffusion"),
    "text": (single("hello, I am a model " * 9), TORN),
    "a pointer of Git LFS": (single("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"), "Git LFS"),
    "an HTML page": (single("<!DOCTYPE html><html>Sign in</html>"), "an HTML page"),
    "a GGUF file": (single(b"GGUF\x03" + bytes(40)), "GGUF"),
    # pickled code
    "code in a .ckpt": (single(lambda: pickle.dumps(Code()), "x.ckpt"), PICKLED),
    "code in a .pt": (single(lambda: pickle.dumps(Code()), "x.pt"), PICKLED),
    "code in a .bin": (single(lambda: pickle.dumps(Code()), "x.bin"), PICKLED),
    "code in a .safetensors": (single(lambda: pickle.dumps(Code())), PICKLED),
    "code in a file without a suffix": (single(lambda: pickle.dumps(Code()), "x"), PICKLED),
    "code in a zip": (single(lambda: zipped("archive/data.pkl"), "x.ckpt"), PICKLED),
    "code in a zip named .safetensors": (single(lambda: zipped("archive/data.pkl", "archive/data/0")), PICKLED),
    "code in a folder's .safetensors": (within(UNET, lambda old: pickle.dumps(Code())), PICKLED),
    "code in a folder's .bin": (only_pickles, "unet/diffusion_pytorch_model.bin: a pickle"),
    "code as a VAE": (single(lambda: pickle.dumps(Code()), "vae.pt"), PICKLED),
    # a folder
    "no index": (gone("model_index.json"), "no model_index.json"),
    "an index of a list": (within("model_index.json", "[]"), "not a JSON object"),
    "an index that is torn": (within("model_index.json", lambda old: old[:40]), "model_index.json: not JSON"),
    "a class of its own": (fields("model_index.json", unet=REMOTE), "unet is modelling_evil.EvilModel"),
    "a pipeline of its own": (fields("model_index.json", _class_name="EvilPipeline"), "_class_name 'EvilPipeline'"),
    "a pipeline of a list": (fields("model_index.json", _class_name=REMOTE), "model_index.json"),
    "a ControlNet": (fields("model_index.json", controlnet=["diffusers", "T2IAdapter"]), "controlnet is"),
    "a safety checker of its own": (fields("model_index.json", safety_checker=REMOTE), "safety_checker is"),
    "no U-Net in the index": (fields("model_index.json", unet=[None, None]), "no unet"),
    "no U-Net's folder": (gone("unet"), "unet/config.json"),
    "no weights": (gone(UNET), f"{UNET}: no such file"),
    "NaN in a configuration": (within("vae/config.json", '{"scaling_factor": NaN}'), "NaN"),
    "a field twice": (within("vae/config.json", '{"latent_channels": 4, "latent_channels": 4}'), "twice"),
    "a field of the future": (fields("vae/config.json", shift_factor=0.1), "shift_factor = 0.1"),
    "a width in words": (fields("unet/config.json", block_out_channels="wide"), "unet/config.json"),
    "a width of zero": (fields("unet/config.json", block_out_channels=[0, 0]), "block_out_channels 0"),
    "layers without end": (fields("unet/config.json", layers_per_block=10**9), "layers_per_block 1000000000"),
    "text without end": (fields("text_encoder/config.json", num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "a width beyond all memory": (fields("unet/config.json", block_out_channels=[2**40] * 2), "unet/"),
    "an activation of its own": (fields("text_encoder/config.json", hidden_act="relu"), "hidden_act = 'relu'"),
    "code of a text encoder": (fields("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}), "auto_map"),
    "code of a tokenizer": (fields("tokenizer/tokenizer_config.json", auto_map={"A": ["evil.E", None]}), "auto_map"),
    "a vocabulary of a list": (within("tokenizer/vocab.json", "[]"), "tokenizer/vocab.json"),
    "a vocabulary of words": (within("tokenizer/vocab.json", '{"a": "b"}'), "tokenizer"),
    "too many words": (fields("text_encoder/config.json", vocab_size=549), "eos_token_id 549: vocab_size is 549"),
    "a schedule of words": (
        fields("scheduler/scheduler_config.json", num_train_timesteps="many"),
        "num_train_timesteps",
    ),
    "a recommendation of its own": (fields("generation_config.json", do_sample=True), "do_sample"),
    "latents of another width": (fields("unet/config.json", cross_attention_dim=64), "has shape"),
    "a missing tensor": (tensors(UNET, lambda t: t.pop("conv_in.bias")), "missing conv_in.bias"),
    "an extra tensor": (tensors(UNET, lambda t: t.update(extra=torch.ones(2))), "unknown extra"),
    "two tensors that changed places": (tensors(UNET, swap), "conv_in.weight has shape"),
    "whole numbers for weights": (
        tensors(UNET, lambda t: t.update({"conv_in.bias": torch.ones(32).int()})),
        "torch.int32",
    ),
    "truths for weights": (
        tensors(TEXT, lambda t: t.update({"final_layer_norm.bias": torch.ones(32).bool()})),
        "torch.bool",
    ),
    "a name under both transformers": (
        tensors(TEXT, lambda t: t.update({"text_model.final_layer_norm.bias": torch.ones(32)})),
        "given twice",
    ),
    "a missing shard": (without_a_shard, "00002-of-00002.safetensors: No such file"),
    "shards without an index": (without_an_index, "a shard without"),
    "a shard outside": (outside, "no file of this folder"),
    "a shard of the whole disk": (sharded(lambda m: dict.fromkeys(m, "/etc/passwd")), "no file of this folder"),
    "a shard that is a number": (sharded(lambda m: dict.fromkeys(m, 7)), "no file of this folder"),
    "a map of the wrong shards": (sharded(lambda m: dict.fromkeys(m, next(iter(m.values())))), "lacks"),
    "a map that lacks a tensor": (sharded(lambda m: dict(list(m.items())[1:])), "which the index does not list"),
    "a map of nothing": (sharded(lambda m: {}), "no weight_map"),
    "a map of a list": (sharded(lambda m: [*m]), "no weight_map"),
    # what lies there is no file
    "a folder named as a file": (a_folder_named_so, "no model_index.json"),
    "a folder in a file's place": (a_folder_in_its_place, f"{UNET}: Is a directory"),
    "a file in a folder's place": (a_file_in_its_place, "unet"),
    "a link to itself": (circular, "Too many levels of symbolic links"),
    "a model that is a link to itself": (circular_folder, "Too many levels of symbolic links"),
    "a pipe": (a_pipe, "neither a folder nor a file"),
    # names
    "no such folder": (named("./nowhere"), "./nowhere: No such file"),
    "no such file": (named("nowhere.safetensors"), "nowhere.safetensors: No such file"),
    "no such path": (named("/nowhere/at/all"), "/nowhere/at/all: No such file"),
    "a model of the hub, without the hub": (named("owner/name"), "owner/name: not in the local cache"),
    "a file of the hub, without the hub": (named("owner/name:a.safetensors"), "owner/name:a.safetensors: not in the"),
    "an impossible model of the hub": (named("owner/na..me"), "owner/na..me: not the name of a model"),
    "an impossible name": (named("a\0b"), "null byte"),
    "an endless name": (named("a" * 5000), "File name too long"),
}


def state(folder):
    """Every path below a folder, with what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else os.lstat(p).st_mode
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line_and_nothing_is_left_behind(tiny, tmp_path, monkeypatch, refused, case):
    spoil, said = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()  # its client remembers whether it is offline
    folder = shutil.copytree(tiny, tmp_path / "model")
    model = spoil(folder) or folder
    if isinstance(model, Path) and model.name == "vae.pt":
        words = ["--model", folder, "--vae", model]
    else:
        words = ["--model", model]
    before = state(tmp_path)
    refused("generate", "x", *words, "--out", tmp_path / "out", said=said)
    assert state(tmp_path) == before and MARKER not in before
    close_session()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tiny, tmp_path, refused):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / UNET).chmod(0)
    refused("generate", "x", "--model", folder, "--out", tmp_path / "out", said=f"{UNET}: Permission denied")
    assert not (tmp_path / "out").exists()


def test_the_code_would_run():
    """The pickles above are what they claim to be."""
    assert pickle.loads(pickle.dumps(Code())) is None and Path(MARKER).is_dir()
    Path(MARKER).rmdir()
