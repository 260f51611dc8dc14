"""Pickles give their tensors and run nothing, neither here nor in the process that reads them."""

import json
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.adapters.textual_inversion import load_embeddings
from ldm.convert import unpickle as module
from ldm.convert.convert import convert_checkpoint
from ldm.convert.unpickle import is_pickle, unpickle_in_process, unpickle_weights

LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2], dtype=torch.int64)}


class Code:
    """Runs a command when it is unpickled in the usual way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def as_zip(content, path):
    """A zip archive of another kind, with a pickle inside."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/evil.pkl", pickle.dumps(content, 2))


CODED = {
    "model.ckpt": save,
    "model.pt": lambda content, path: save(content, path, zipped=False),
    "model.bin": lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
    "model.safetensors": save,
    "model.pth": lambda content, path: path.write_bytes(pickle.dumps(content, 4)),
    "model.zip": as_zip,
}


def test_the_code_of_these_tests_would_run(tmp_path):
    save({"a": Code(f"touch {tmp_path / 'marker'}")}, tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("trust", [True, False])
def test_pickled_code_is_refused_and_does_not_run(name, trust, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    CODED[name]({"a": torch.ones(1), "b": Code(f"touch {tmp_path / 'marker'}")}, folder / name)
    refusal = "imports code that no weights need .posix.system( and 1 more)?.; it was not run"
    match = refusal if trust else "ldm convert --trust"
    with pytest.raises(ValueError, match=rf"\A{folder / name}: .*{match}") as error:
        convert_checkpoint(folder / name, tmp_path / "out.safetensors", trust=trust)
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [folder] and [*folder.iterdir()] == [folder / name]


@LEGACY
def test_a_checkpoint_of_lightning_is_read_without_it(zipped, tmp_path, monkeypatch):
    """A file of 2022: numbers of numpy, a callback's class and state beside the weights."""
    lightning = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    lightning.ModelCheckpoint = callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, lightning.__name__, lightning)
    state = callback()
    state.best = np.float64(0.25)
    content = {
        "state_dict": {"model.a": torch.ones(2), "model.step": np.int64(3), "none": None},
        "global_step": np.int64(470000),
        "callbacks": {callback: {"best": np.float32(0.5), "list": [state, np.arange(3)]}},
    }
    path = save(content, tmp_path / "model.ckpt", zipped)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):  # so torch alone does not read it
        torch.load(path, weights_only=True)
    monkeypatch.delitem(sys.modules, lightning.__name__)
    report = unpickle_in_process(path, tmp_path / "model.safetensors")
    assert report == {"tensors": 1, "dropped": ["callbacks", "global_step", "model.step", "none"]}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.a"], torch.ones(2))


@LEGACY
@pytest.mark.parametrize("key", [None, "state_dict", "module"])
def test_tensors_arrive_as_they_are(zipped, key, tmp_path):
    shared = torch.randn(4, 6)
    tensors = {
        **WEIGHTS,
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "whole": shared,
        "alias": shared,
        "part": shared[1:3],
        "transposed": shared.T,
        "last": shared.contiguous(memory_format=torch.contiguous_format)[:, ::2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = save({key: tensors, "epoch": 3} if key else {**tensors, "epoch": 3}, tmp_path / "model.pt", zipped)
    assert is_pickle(path)
    assert unpickle_in_process(path, tmp_path / "out.safetensors") == {"tensors": len(tensors), "dropped": ["epoch"]}
    found = load_file(tmp_path / "out.safetensors")
    assert not is_pickle(tmp_path / "out.safetensors") and found.keys() == tensors.keys()
    assert all(a.dtype == tensors[n].dtype and torch.equal(a, tensors[n]) for n, a in found.items())
    unpickle_in_process(path, tmp_path / "half.safetensors", "float16")
    halves = {n: a.half() if a.is_floating_point() else a for n, a in tensors.items()}
    assert all(torch.equal(a, halves[n]) for n, a in load_file(tmp_path / "half.safetensors").items())


def test_mappings_within_mappings_are_named_with_dots(tmp_path):
    save({"ema": {"a": {"b": torch.ones(1)}}, "optimizer": {"m": torch.ones(2)}, "step": 1}, tmp_path / "m.pt")
    report = unpickle_in_process(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == {"ema.a.b"} and report["dropped"] == ["optimizer", "step"]


@pytest.mark.parametrize("kind", [dict, torch.nn.ParameterDict], ids=["web UI", "textual_inversion"])
def test_an_embedding_keeps_its_token(kind, tmp_path):
    """AUTOMATIC1111's file, and that of the method's inventors, which pickles a module."""
    vectors = torch.randn(2, 8)
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": kind({"*": vectors}), "name": "cat"}
    path = save(content | {"step": 500, "sd_checkpoint": None}, tmp_path / "cat.pt")
    report = convert_checkpoint(path, tmp_path / "cat.safetensors", trust=True)
    assert report["dropped"] == {"cat.pt": ["name", "sd_checkpoint", "step", "string_to_token"]}
    with safe_open(tmp_path / "cat.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "name": "cat"} and [*file.keys()] == ["emb_params"]
    assert torch.equal(load_embeddings(tmp_path / "cat.safetensors")["text_encoder"], vectors)


def repacked(path, compression):
    save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def torn(path, size):
    data = save(WEIGHTS, path).read_bytes()
    path.write_bytes(data[:size])


def cycle():
    value = {"a": torch.ones(1)}
    value["b"] = value
    return value


def laughs():
    """Thirty mappings, each of which holds the next one twice: a billion leaves."""
    value = {"a": torch.ones(1)}
    for _ in range(30):
        value = {"a": value, "b": value}
    return value


FAULTS = {
    "a list": (lambda p: save([torch.ones(1)], p), "holds a list, not weights by name"),
    "a pickled list": (lambda p: p.write_bytes(pickle.dumps([1, 2], 2)), "not a whole file of torch.save"),
    "a module": (lambda p: save({"m": torch.nn.Linear(1, 1)}, p), r"\(torch.nn.modules.linear.Linear\)"),
    "a function": (lambda p: save({"f": json.loads}, p), r"\(json.loads\)"),
    "two functions": (lambda p: save({"f": json.loads, "g": json.dumps}, p), r"\(json.dumps and 1 more\)"),
    "a builtin": (lambda p: p.write_bytes(pickle.dumps(eval, 2)), r"\(__builtin__.eval\)"),
    "a tensor's method": (lambda p: p.write_bytes(b"\x80\x02ctorch\nload\n."), r"\(torch.load\)"),
    "a storage's way out": (
        lambda p: p.write_bytes(b"\x80\x02ctorch.storage\n_load_from_bytes\n."),
        r"\(torch.storage._load_from_bytes\)",
    ),
    "no tensors": (lambda p: save({"state_dict": {"a": 1}}, p), "holds no tensors"),
    "nothing": (lambda p: save({}, p), "holds no tensors"),
    "a bad dtype": (lambda p: save({"a": torch.ones(1, dtype=torch.complex64)}, p), "a has dtype torch.complex64"),
    "one name twice": (lambda p: save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, p), "a.b is given twice"),
    "no end": (lambda p: save(cycle(), p), "b: a mapping that occurs twice, or within itself"),
    "a bomb of mappings": (lambda p: save(laughs(), p), "a mapping that occurs twice"),
    "a bomb of shapes": (lambda p: save({"a": torch.ones(1).expand(10**6)}, p), "4000000 bytes of tensors in a file"),
    "a compressed archive": (lambda p: repacked(p, zipfile.ZIP_DEFLATED), "a compressed archive"),
    "TorchScript": (lambda p: torch.jit.script(torch.nn.Linear(1, 1)).save(p), "a TorchScript program"),
    "half": (lambda p: torn(p, 700), "not a whole file of torch.save"),
    "a beginning": (lambda p: torn(p, 40), "not a whole file of torch.save"),
    "almost all": (lambda p: torn(p, -1), "not a whole file of torch.save"),
    "half a legacy file": (
        lambda p: p.write_bytes(save(WEIGHTS, p, False).read_bytes()[:300]),
        "not a whole file of torch.save",
    ),
    "a legacy file without its end": (
        lambda p: p.write_bytes(save(WEIGHTS, p, False).read_bytes()[:-20]),
        "not a whole file of torch.save",
    ),
    "text": (lambda p: p.write_text("hello"), "not a file of torch.save"),
    "0 bytes": (lambda p: p.write_bytes(b""), "not a file of torch.save"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(fault, tmp_path):
    spoil, match = FAULTS[fault]
    spoil(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=match):
        unpickle_in_process(tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "child, match",
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9, perhaps out of memory"),
        ("raise MemoryError('no more')", "failed: MemoryError: no more"),
        ("import time; time.sleep(60)", "not read within 1 seconds"),
    ],
)
def test_a_child_that_dies_or_hangs_is_one_error(child, match, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHILD_SOURCE", child)
    monkeypatch.setattr(module, "BASE_TIMEOUT", 1)
    save(WEIGHTS, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'model.pt'}: .*{match}"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "out.safetensors", trust=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_the_child_has_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(module, "CHILD_SOURCE", "import json, os; print(json.dumps({'names': list(os.environ)}))")
    save(WEIGHTS, tmp_path / "model.pt")
    assert set(unpickle_weights(tmp_path / "model.pt", tmp_path / "out")["names"]) <= {
        *module.INHERITED_ENV,
        "OMP_NUM_THREADS",
        "LC_CTYPE",
    }


def test_a_header_of_safetensors_is_no_pickle(tmp_path):
    """Of 640 bytes, whose number begins as a pickle of protocol 2 does."""
    (tmp_path / "model.safetensors").write_bytes((640).to_bytes(8, "little") + b'{"a":0}')
    assert (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert not is_pickle(tmp_path / "model.safetensors")


def test_a_small_pickle_that_takes_gigabytes_is_refused(tmp_path):
    """Dicts in each other under one long key, which the pickle holds once: names of the leaves of gigabytes."""
    content, key = torch.zeros(1), "k" * 20000
    for _ in range(300):
        content = {key: content}
    save({"state_dict": content}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 30000
    with pytest.raises(ValueError, match="a name of more than 2000 characters"):
        unpickle_weights(tmp_path / "bomb.pt", tmp_path / "out")


def test_the_child_has_a_limit_of_memory(tmp_path, monkeypatch):
    """In a process of its own, whose limit is that of a file of 1 KB."""
    source = (
        "import sys, json; sys.path.append(sys.argv[1]); from ldm.convert import unpickle as u; u.limit_memory(2**28)\n"
        "try: bytearray(2**29)\nexcept MemoryError: print(json.dumps({'error': 'limited'}))"
    )
    monkeypatch.setattr(module, "CHILD_SOURCE", source)
    save(WEIGHTS, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="limited"):
        unpickle_weights(tmp_path / "model.pt", tmp_path / "out")
