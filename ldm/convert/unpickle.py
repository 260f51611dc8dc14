"""Pickled weights (.ckpt, .pt, .bin) as safetensors: read in a process of their own, where nothing of theirs runs.

A pickle is a program: it may ask for any function of any library and call it. Three walls stand before that.
1. The child reads the list of all that the pickle asks for, without running it, and refuses what no weights need.
2. torch.load(weights_only=True) follows the rest with an interpreter of its own, which calls nothing but a short list
   of functions that rebuild tensors. What trainers left beside the weights (numbers of numpy, callbacks of PyTorch
   Lightning) becomes a `Placeholder`: those libraries are not even imported.
3. All of it happens in a child without the caller's environment (no tokens), which writes one draft, of at most twice
   the file's size.
What they do not protect from: a fault in the native code of torch that reads the archive. The child is no sandbox, and
has the user's rights. Who does not trust the source of a file should not convert it.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


REPO_ROOT = Path(__file__).resolve().parents[2]
CHILD_SOURCE = "import sys; sys.path.append(sys.argv.pop(1)); from ldm.convert.unpickle import child_main; child_main()"
INHERITED_ENV = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")  # of the environment: what it takes to start Python
BASE_TIMEOUT, MIN_BYTES_PER_SECOND = 60, 4e6  # seconds for any file, and bytes a second of it

ZIP_MAGIC, PICKLE_MAGIC = (
    b"PK\x03\x04",
    b"\x80",
)  # what files of torch.save begin with: today's, and those before torch 1.6
TENSOR_GLOBALS = (
    re.compile(  # what torch.save writes for tensors, and containers of Python's own; torch has the last word
        r"collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set"
        r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(storage\.)?\w*Storage"
        r"|torch\.(Size|device|bool|bfloat16|half|double|(float|u?int)\d*\w*)"
    )
)
PLACEHOLDER_GLOBALS = re.compile(  # what trainers left beside the weights
    r"numpy(\.core|\._core)?(\.multiarray|\.dtypes)?\.(scalar|dtype|_reconstruct|ndarray|\w+DType)"
    r"|(pytorch_lightning|lightning|lightning_fabric|omegaconf|torchmetrics)\..+"
    r"|torch\.nn\.modules\.container\.ParameterDict|argparse\.Namespace|pathlib\.\w+|typing\.\w+"
)
STATE_DICT_KEYS = (
    "state_dict",
    "module",
    "string_to_param",
)  # where trainers keep the weights: Lightning, DeepSpeed, embeddings
TRAINING_KEY_PATTERN = re.compile(r"optimizer\w*|lr_scheduler\w*|callbacks|loops|hyper_parameters|(global_)?step|epoch")
EMBEDDING_KEY_MAP = {"*": "emb_params"}  # an embedding's one name in a pickle: in safetensors


class Placeholder:
    """Stands for an object that no weights need: it takes what it is given, keeps its state and does nothing."""

    state: Any = None

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch.save, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(9)
    return (
        start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) and start[8:] != b"{"
    )  # which is where a header of safetensors begins


def unpickle_weights(src: Path, draft: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the tensors of a pickle as safetensors to `draft`, which is not there yet, and report.

    Real numbers are written in `dtype`, or in each tensor's own. The report has the number of `get_tensor_fields` and what was
    `should_drop_caption`: what is no tensor, or belongs to a training. ValueError in one line for contents that ask for code, which
    is named; for what is no file of torch.save, or not whole; and for a child that was killed or did not end.
    """
    limit = BASE_TIMEOUT + src.stat().st_size / MIN_BYTES_PER_SECOND
    environment = {name: os.environ[name] for name in INHERITED_ENV if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-I", "-c", CHILD_SOURCE, str(REPO_ROOT), str(src.absolute()), str(draft.absolute())]
    words += [str(dtype).removeprefix("torch.")] if dtype else []
    try:
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{src}: not read after {limit:.0f} seconds, given up") from None
    if done.returncode:
        killed = f"killed by signal {-done.returncode}, perhaps for want of memory" if done.returncode < 0 else "failed"
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{src}: the process that read it {': '.join([killed, *last])}")
    report = json.loads(done.stdout)
    if "error" in report:
        raise ValueError(f"{src}: {report['error']}")
    return report


def child_main() -> None:
    """What runs in the process of its own, `SRC DRAFT [DTYPE]`: prints the report."""
    src, draft, *dtype = sys.argv[1:]
    try:
        report = unpickle_in_process(Path(src), Path(draft), *dtype)
    except ValueError as error:
        report = {"error": " ".join(str(error).split())}
    print(json.dumps(report))


def unpickle_in_process(src: Path, draft: Path, dtype: str | None = None) -> dict[str, Any]:
    """`unpickle_weights`, by the process that calls it."""
    asked = read_pickle_globals(src)
    if strange := sorted(
        name for name in asked if not (TENSOR_GLOBALS.fullmatch(name) or PLACEHOLDER_GLOBALS.fullmatch(name))
    ):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(f"asks for code that no weights need ({strange[0]}{more}); it was not run")
    import torch

    from ldm.checkpoints.tensors import SafetensorsWriter

    try:
        with torch.serialization.safe_globals(
            [(Placeholder, name) for name in asked if PLACEHOLDER_GLOBALS.fullmatch(name)]
        ):
            content = torch.load(src, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(src))
    except Exception as error:  # of any kind, from the depths of torch
        raise ValueError(f"not a whole file of torch.save ({_summarize_error(error)})") from None
    tensors, dropped, word = extract_tensors(content)
    size, limit = sum(a.numel() * a.itemsize for a in tensors.values()), 2 * src.stat().st_size
    if size > limit:  # shapes are only said; names may share memory, and share it no more
        raise ValueError(f"{size} bytes of tensors in a file of {limit // 2}")
    with SafetensorsWriter(
        draft, tensors, {"format": "pt", **word}, getattr(torch, dtype) if dtype else None
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return {"tensors": len(tensors), "dropped": dropped}


def read_pickle_globals(path: Path) -> set[str]:
    """What a file of torch.save asks for, as module.name, without running any of it; ValueError for other files."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == ZIP_MAGIC:
                return _zip_globals(path)
            if start.startswith(PICKLE_MAGIC) and not tarfile.is_tarfile(path):
                return _stream_globals(file, 5)  # magic number, protocol, machine, content, names of storages
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(f"not a whole file of torch.save ({_summarize_error(error)})") from None
    raise ValueError("not a file of torch.save")


def _zip_globals(path: Path) -> set[str]:
    """`read_pickle_globals` a zip archive, which torch.save does not compress: its members are no larger than the file."""
    asked = set()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise ValueError("a TorchScript program, not weights")
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("a compressed archive, which torch.save does not write")
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member) as file:
                    asked |= _stream_globals(file, 1)
    return asked


def _stream_globals(file: IO[bytes], count: int) -> set[str]:
    """What the next pickles ask for; the two strings before STACK_GLOBAL are taken for its words."""
    found, words = set(), ["", ""]
    try:
        for _ in range(count):
            for op, value, _place in pickletools.genops(file):
                if op.name in ("GLOBAL", "INST"):
                    found.add(str(value).replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    found.add(".".join(words[-2:]))
                elif isinstance(value, str):
                    words.append(value)
    except ValueError:
        pass  # no further pickle: torch says what is wrong, if anything is
    return found


def extract_tensors(content: Any) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """The tensors of a file by dotted name, what beside them is dropped, and an embedding's word as its `name_from_repo_id`.

    ValueError where there are none.
    """
    from torch import Tensor

    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not weights by name")
    part = next(
        (name for name in STATE_DICT_KEYS if isinstance(_unwrap_parameter_dict(content.get(name)), Mapping)), None
    )
    rest = {name for name in content if name != part and (part or TRAINING_KEY_PATTERN.fullmatch(str(name)))}
    dropped = [*map(str, rest)]
    found: dict[str, Tensor] = {}
    for name, value in _flatten(content[part] if part else {n: a for n, a in content.items() if n not in rest}):
        if not isinstance(value, Tensor):
            dropped.append(name)
        elif name in found:
            raise ValueError(f"{name} is given twice")
        else:
            found[name] = value
    if not found:
        raise ValueError("holds no tensors")
    if part != "string_to_param":
        return found, sorted(dropped), {}
    word = content.get("name")
    named = {"name": word} if isinstance(word, str) else {}
    return {EMBEDDING_KEY_MAP.get(name, name): a for name, a in found.items()}, sorted(dropped), named


def _unwrap_parameter_dict(value: Any) -> Any:
    """A ParameterDict's parameters; anything else as it is."""
    return value.state.get("_parameters") if isinstance(value, Placeholder) and isinstance(value.state, dict) else value


def _flatten(value: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """What mappings within mappings hold, by dotted name; ValueError for one held twice: their number has no bound."""
    value, seen = _unwrap_parameter_dict(value), set() if seen is None else seen
    if not isinstance(value, Mapping):
        yield name, value
        return
    if id(value) in seen:
        raise ValueError(f"{name[:40]}: a mapping that is held twice, or within itself")
    seen.add(id(value))
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else str(key), seen)


def _summarize_error(error: BaseException) -> str:
    """The line of an error of torch that says what is wrong; the others are advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = (line for line in lines if line.startswith(("Unsupported", "Trying to", "Only ", "Can only", "Expected")))
    return next(told, lines[0])[:200]
