"""Pickled weights (.ckpt, .pt, .bin) as safetensors, read in a child process without running their code.

A pickle is a program that may import any function and call it. Three measures prevent that:
1. The child lists all globals that the pickle imports, without running it, and refuses those that no weights need.
2. torch.load(weights_only=True) reads it with an interpreter of its own, which calls only a short list of functions
   that rebuild tensors. What trainers left beside the weights (NumPy scalars, PyTorch Lightning callbacks) becomes a
   `Placeholder`: those libraries are not even imported.
3. The child runs without the caller's environment (no tokens), with a limit on its memory, and writes one file of at
   most twice the source's size.
They do not protect from a fault in torch's native code that reads the archive. The child is no sandbox and has the
user's rights: do not convert a file whose source you do not trust.
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

from ldm.errors import list_some

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REPO_ROOT = Path(__file__).resolve().parents[2]
CHILD_SOURCE = "import sys; sys.path.append(sys.argv.pop(1)); from ldm.convert.unpickle import child_main; child_main()"
INHERITED_ENV = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")  # what it takes to start Python
BASE_MEMORY, MEMORY_PER_BYTE = 2**30, 4  # the child may take 1 GiB and 4 times the file beside its libraries
MAX_NAME_LENGTH = 2000  # characters of a tensor's name
BASE_TIMEOUT, MIN_BYTES_PER_SECOND = 60, 4e6  # the child has 60 s and 1 s per 4 MB
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"  # the first bytes of torch.save's files, since and before torch 1.6
TENSOR_GLOBALS = re.compile(  # what torch.save writes for tensors and Python's containers; torch checks them again
    r"collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(storage\.)?\w*Storage"
    r"|torch\.(Size|device|bool|bfloat16|half|double|(float|u?int)\d*\w*)"
)
PLACEHOLDER_GLOBALS = re.compile(  # what trainers left beside the weights
    r"numpy(\.core|\._core)?(\.multiarray|\.dtypes)?\.(scalar|dtype|_reconstruct|ndarray|\w+DType)"
    r"|(pytorch_lightning|lightning|lightning_fabric|omegaconf|torchmetrics)\..+"
    r"|torch\.nn\.modules\.container\.ParameterDict|argparse\.Namespace|pathlib\.\w+|typing\.\w+"
)
STATE_DICT_KEYS = "state_dict", "module", "string_to_param"  # of Lightning, of DeepSpeed, of embeddings
TRAINING_KEY_PATTERN = re.compile(r"optimizer\w*|lr_scheduler\w*|callbacks|loops|hyper_parameters|(global_)?step|epoch")
EMBEDDING_KEY_MAP = {"*": "emb_params"}  # the key of an embedding in a pickle: in safetensors


class Placeholder:
    """Replaces an object that no weights need: accepts any arguments, keeps its state and does nothing."""

    state: Any = None

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch.save, whatever its name; the header of safetensors has a "{" at byte 8."""
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) and start[8:] != b"{"


def unpickle_weights(src: Path, draft: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the tensors of a pickle as safetensors to the new file `draft`, and report.

    Floating-point tensors are written in `dtype`, None for each its own. The report has the number of `tensors` and
    what was `dropped`: what is no tensor, or belongs to a training run. ValueError in one line for a pickle that
    imports code, which is named; for what is not a whole file of torch.save; for a child that was killed or timed out.
    """
    limit = BASE_TIMEOUT + src.stat().st_size / MIN_BYTES_PER_SECOND
    environment = {name: os.environ[name] for name in INHERITED_ENV if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", CHILD_SOURCE, str(REPO_ROOT), str(src.absolute()), str(draft.absolute())]
    command += [str(dtype).removeprefix("torch.")] if dtype else []
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{src}: not read within {limit:.0f} seconds") from None
    if done.returncode:
        killed = f"killed by signal {-done.returncode}, perhaps out of memory" if done.returncode < 0 else "failed"
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{src}: the process that read it {': '.join([killed, *last])}")
    report = json.loads(done.stdout)
    if "error" in report:
        raise ValueError(f"{src}: {report['error']}")
    return report


def child_main() -> None:
    """The child process, `SRC DRAFT [DTYPE]`: prints the report as JSON."""
    src, draft, *dtype = sys.argv[1:]
    try:
        limit_memory(BASE_MEMORY + MEMORY_PER_BYTE * os.stat(src).st_size)
        report = unpickle_in_process(Path(src), Path(draft), *dtype)
    except MemoryError:
        report = {"error": "needs far more memory than its size allows"}
    except RecursionError:
        report = {"error": "nested too deeply"}
    except ValueError as error:
        report = {"error": " ".join(str(error).split())}
    print(json.dumps(report))


def limit_memory(size: int) -> None:
    """Limit this process to `size` bytes of address space beside what its libraries have, where the system can."""
    import torch  # noqa: F401  (its libraries are mapped before they are counted)

    from ldm.checkpoints import tensors  # noqa: F401

    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [mapped + size, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))


def unpickle_in_process(src: Path, draft: Path, dtype: str | None = None) -> dict[str, Any]:
    """`unpickle_weights` in the calling process."""
    names = read_pickle_globals(src)
    placeholders = {name for name in names if PLACEHOLDER_GLOBALS.fullmatch(name)}
    if unknown := sorted(name for name in names - placeholders if not TENSOR_GLOBALS.fullmatch(name)):
        raise ValueError(f"imports code that no weights need ({list_some(unknown, 1)}); it was not run")
    import torch

    from ldm.checkpoints.tensors import SafetensorsWriter

    try:
        with torch.serialization.safe_globals([(Placeholder, name) for name in placeholders]):
            content = torch.load(src, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(src))
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"not a whole file of torch.save ({_summarize_error(error)})") from None
    tensors, dropped, metadata = extract_tensors(content)
    size, limit = sum(a.numel() * a.itemsize for a in tensors.values()), 2 * src.stat().st_size
    if size > limit:  # a view may claim any shape; tensors that share memory in the pickle are written apart
        raise ValueError(f"{size} bytes of tensors in a file of {limit // 2}")
    target_dtype = getattr(torch, dtype) if dtype else None
    with SafetensorsWriter(draft, tensors, {"format": "pt", **metadata}, target_dtype) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return {"tensors": len(tensors), "dropped": dropped}


def read_pickle_globals(path: Path) -> set[str]:
    """The globals, module.name, that a file of torch.save imports, without running it; ValueError for other files."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == ZIP_MAGIC:
                return _zip_globals(path)
            if start.startswith(PICKLE_MAGIC) and not tarfile.is_tarfile(path):
                return _stream_globals(file, 5)  # magic number, protocol, system, content, storage keys
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(f"not a whole file of torch.save ({_summarize_error(error)})") from None
    raise ValueError("not a file of torch.save")


def _zip_globals(path: Path) -> set[str]:
    """The globals of a zip archive; torch.save does not compress it, so its members are no larger than the file."""
    names = set()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise ValueError("a TorchScript program, not weights")
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if compressed or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("a compressed archive, which torch.save does not write")
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member) as file:
                    names |= _stream_globals(file, 1)
    return names


def _stream_globals(file: IO[bytes], count: int) -> set[str]:
    """The globals of the next pickles; the arguments of STACK_GLOBAL are taken to be the two strings before it."""
    names, strings = set(), ["", ""]
    try:
        for _ in range(count):
            for op, value, _position in pickletools.genops(file):
                if op.name in ("GLOBAL", "INST"):
                    names.add(str(value).replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    except ValueError:
        pass  # no further pickle: torch reports what is wrong, if anything is
    return names


def extract_tensors(content: Any) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """The tensors of a file by dotted name, the names of all else, and an embedding's token as metadata.

    ValueError if there are no tensors.
    """
    from torch import Tensor

    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not weights by name")
    keys = (key for key in STATE_DICT_KEYS if isinstance(_unwrap_parameter_dict(content.get(key)), Mapping))
    state_dict_key = next(keys, None)
    if state_dict_key:
        state_dict, others = content[state_dict_key], [key for key in content if key != state_dict_key]
    else:
        others = [key for key in content if TRAINING_KEY_PATTERN.fullmatch(str(key))]
        state_dict = {key: value for key, value in content.items() if key not in others}
    dropped = [*map(str, others)]
    tensors: dict[str, Tensor] = {}
    for name, value in _flatten(state_dict):
        if not isinstance(value, Tensor):
            dropped.append(name)
        elif name in tensors:
            raise ValueError(f"{name} is given twice")
        else:
            tensors[name] = value
    if not tensors:
        raise ValueError("holds no tensors")
    if state_dict_key != "string_to_param":
        return tensors, sorted(dropped), {}
    token = content.get("name")
    metadata = {"name": token} if isinstance(token, str) else {}
    return {EMBEDDING_KEY_MAP.get(name, name): a for name, a in tensors.items()}, sorted(dropped), metadata


def _unwrap_parameter_dict(value: Any) -> Any:
    """The parameters of a ParameterDict; any other value itself."""
    return value.state.get("_parameters") if isinstance(value, Placeholder) and isinstance(value.state, dict) else value


def _flatten(value: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted name; ValueError for a mapping met twice: leaves could be endless."""
    value, seen = _unwrap_parameter_dict(value), set() if seen is None else seen
    if not isinstance(value, Mapping):
        yield name, value
        return
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{name[:40]}...: a name of more than {MAX_NAME_LENGTH} characters")
    if id(value) in seen:
        raise ValueError(f"{name[:40]}: a mapping that occurs twice, or within itself")
    seen.add(id(value))
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else str(key), seen)


def _summarize_error(error: BaseException) -> str:
    """The line of an error of torch that names the cause; the others are advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    causes = (line for line in lines if line.startswith(("Unsupported", "Trying to", "Only ", "Can only", "Expected")))
    return next(causes, lines[0])[:200]
