#!/usr/bin/env python3
"""Set up `.venv`, then launch `ldm` or the tests; needs Python 3.11 with venv and nothing else.

    python3 scripts/run.py generate "a red apple"     every word goes to `ldm`
    python3 scripts/run.py test [pytest arguments]    ruff, mypy and pytest, in the repository root
    python3 scripts/run.py docs                       the documentation as `site/`
    python3 scripts/run.py wheel                      wheels of the package and of the shipped model in `dist/`

`.venv/installed` tells what `.venv` holds: a digest of all that decides it, and which extra.
`.venv/installing` tells the same of a set-up under way, whose last act renames one to the other: who gets the
lock and finds that file finds a set-up that was killed, and starts from an empty folder. Set-up speaks on
stderr: stdout is for what it launches.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = getattr(sys, "_base_executable", sys.executable)  # a venv's own link would go with the venv
OLDEST = (3, 11)

WORKERS = 8  # processes of the whole suite at most: each imports torch
EXTRAS = {"base": ".", "dev": ".[dev,docs]"}
INDEXES = {"cuda": None, "cpu": "https://download.pytorch.org/whl/cpu"}  # beside the indexes that pip knows
DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/nvidia-smi")
OFFLINE = re.compile(r"connection broken by|Max retries exceeded|Failed to establish|name resolution")
KEPT = {"installing", "install.lock", "install.log"}


class SetupError(Exception):
    """A set-up that cannot go on, in the user's words."""


def say(words: str) -> None:
    print(f"ldm: {words}", file=sys.stderr, flush=True)


def check_python(version: tuple[int, int]) -> None:
    if version < OLDEST:
        need, have = (".".join(map(str, v)) for v in (OLDEST, version))
        raise SetupError(f"Python {need} or newer is needed, this is {have}: try python{need} scripts/run.py")


def check_venv() -> None:
    if not (find_spec("venv") and find_spec("ensurepip")):  # Debian ships them apart from python3
        raise SetupError("Python's venv module is missing: sudo apt install python3-venv")


def torch_build(drivers: Sequence[str] = DRIVERS) -> str:
    """`cuda` where an NVIDIA driver left a file, else `cpu`; asking nvidia-smi would slow every start."""
    return "cuda" if any(map(os.path.exists, drivers)) else "cpu"


def digest(root: Path, version: tuple[int, int], build: str) -> str:
    """Everything that decides what `.venv` holds; the root too, for scripts and editable installs name it."""
    parts = [version, build, str(root)]
    files = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(repr((parts, files)).encode()).hexdigest()


def ready(venv: Path, wanted: str, extra: str) -> bool:
    """Whether a finished set-up left what is wanted, or that and more."""
    try:
        held = (venv / "installed").read_text().split()
    except FileNotFoundError:
        return False
    finished = not (venv / "installing").exists() and (venv / "bin/ldm").exists()
    return finished and held in ([wanted, extra], [wanted, "dev"])


def usable(venv: Path) -> bool:
    """Whether `.venv` is whole: no set-up was killed in it, its Python is this one, and its pip works."""
    if (venv / "installing").exists():
        return False
    code = "import sys, pip._internal.cli.main; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([venv / "bin/python", "-I", "-c", code], capture_output=True, text=True)
    except OSError:
        return False
    return done.stdout.split() == [str(n) for n in sys.version_info[:2]]


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def reachable(url: str, seconds: float = 2) -> bool:
    """Whether an index answers: pip would retry an unreachable one for minutes before it does without."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, method="HEAD"), timeout=seconds):
            return True
    except (OSError, HTTPException):
        return False


def pip_words(extra: str, index: str | None) -> list[str]:
    """pip's arguments; indexes, caches and certificates stay as the user's PIP_* and pip.conf say."""
    beside = ["--extra-index-url", index] if index else []
    quiet = ["--no-input", "--progress-bar", "off"]
    return ["install", *quiet, "--editable", EXTRAS[extra], "--constraint", "constraints.txt", *beside]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """An exclusive lock; yields the descriptor that holds it, until the last process with a copy ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is under way: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def logged(command: Sequence[str | Path], log: Path, root: Path, lock: int) -> None:
    """Run a command into the log; it inherits the lock, and holds it on where this process is killed."""
    with log.open("ab") as file:
        status = subprocess.run(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
        ).returncode
    if status:
        text = log.read_text(errors="replace")
        print(*text.splitlines()[-10:], sep="\n", file=sys.stderr)
        cause = "no network: pip reached no package index" if OFFLINE.search(text) else "set-up failed"
        raise SetupError(f"{cause} (all of it is in {log})")


def install(root: Path, python: str, wanted: str, extra: str, build: str, lock: int) -> None:
    """Make `.venv` where it is not usable, install the project in it, and publish what it holds."""
    venv, log = root / ".venv", root / ".venv/install.log"
    log.write_bytes(b"")
    fresh = not usable(venv)
    (venv / "installing").write_text(f"{wanted} {extra}\n")
    if fresh:
        say(f"making .venv with {python}")
        clear(venv)
        logged([python, "-I", "-m", "venv", venv], log, root, lock)
    say(f"installing torch ({build} build) and the rest: minutes the first time (log: .venv/install.log)")
    index = INDEXES[build]
    words = pip_words(extra, index if index and reachable(index) else None)
    try:
        logged([venv / "bin/python", "-I", "-m", "pip", *words], log, root, lock)
    except SetupError:
        if b"Installing collected packages" not in log.read_bytes():  # pip failed before it touched a thing
            (venv / "installing").unlink()
        raise
    (venv / "installing").replace(venv / "installed")


def set_up(root: Path, python: str, extra: str) -> None:
    """See that `.venv` holds the project with an extra: nothing to do, or one `install` at a time."""
    venv, build = root / ".venv", torch_build()
    wanted = digest(root, sys.version_info[:2], build)
    if ready(venv, wanted, extra):
        return
    check_venv()
    venv.mkdir(exist_ok=True)
    with locked(venv / "install.lock") as lock:
        if not ready(venv, wanted, extra):  # else another set-up did it while this one waited
            start = time.monotonic()
            install(root, python, wanted, extra, build, lock)
            say(f"set up in {time.monotonic() - start:.0f} s")


def check_commands(words: Sequence[str]) -> list[list[str]]:
    """Linter, formatter, type checker and tests; the whole suite in as many processes as there are cores."""
    workers = ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadfile"]
    return [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], ["pytest", *(words or workers)]]


def docs_commands(words: Sequence[str]) -> list[list[str]]:
    """The documentation as HTML."""
    return [["mkdocs", "build", "--strict", *words]]


def wheel_commands(words: Sequence[str]) -> list[list[str]]:
    """The source distribution and the wheel of the package, and the wheel of the shipped model."""
    build = ["build", "--outdir", "dist", *words]
    return [[*build, "--sdist", "."], [*build, "--wheel", "."], [*build, "--wheel", "weights"]]


TASKS: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {  # arguments -> Python modules to run, in order
    "test": check_commands,
    "docs": docs_commands,
    "wheel": wheel_commands,
}


def run_modules(commands: Sequence[Sequence[str]], root: Path) -> int:
    """Run Python modules up to the first that fails; its exit status, a signal's as a shell gives it."""
    for command in commands:
        say(" ".join(command))
        status = subprocess.run([root / ".venv/bin/python", "-m", *command], cwd=root).returncode
        if status:
            return status if status > 0 else 128 - status
    return 0


def main(words: list[str], root: Path = ROOT, python: str = PYTHON) -> int:
    """Set up, then run one of `TASKS` or become `ldm`; status 2 if set-up cannot go on, 130 if interrupted."""
    task = TASKS.get(words[0]) if words else None
    try:
        check_python(sys.version_info[:2])
        set_up(root, python, "dev" if task else "base")
        if task:
            return run_modules(task(words[1:]), root)
        os.execv(root / ".venv/bin/ldm", ["ldm", *words])
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
