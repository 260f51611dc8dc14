"""The command's one handler of errors: a line that names the file, printable, and an exit status; never a traceback."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from ldm import cli
from ldm.errors import MAX_LINE_LENGTH, one_line, printable
from ldm.files import atomic_write

ERRORS = {  # what a command raises: status and line
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "a.png"), 1, "a.png: No space left on device"),
    "a file of another": (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "a: Permission denied"),
    "no memory": (MemoryError(), 1, "out of memory"),
    "torch's": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "out of memory: DefaultCPU"),
    "depth": (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
    "nobody's home": (RuntimeError("Could not determine home directory."), 2, "no such user"),
    "an escape": (ValueError("a\x1b[2Jb\r\nerror: c"), 2, "error: a\\x1b[2Jb error: c\n"),
    "a bell in a name": (OSError(errno.ENOENT, "No such file", "a\x07"), 2, "a\\x07: No such file"),
    "a long line": (ValueError("x" * 3_000_000), 2, "(2996000 characters)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_the_system_is_one_printable_line(ldm_, monkeypatch, case):
    error, wanted, said = ERRORS[case]

    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    status, out, err = ldm_("info")
    assert (status, out) == (wanted, "") and err.startswith("error: ") and said in err
    assert err.count("\n") == 1 and err[:-1].isprintable() and len(err) < MAX_LINE_LENGTH + 100


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_text_of_others_is_printable():
    assert printable("a\x1b[2J\n\x9b\u202e\ud800 é雪👩\u200d🎨") == "a\\x1b[2J\\n\\x9b\\u202e\\ud800 é雪👩\u200d🎨"
    assert one_line("a\n b\tc\x07") == "a b c\\x07"


PATHS = ["~nosuchuser/x", "x" * 300, "a\0b", "x/" * 3000]


@pytest.mark.parametrize("path", PATHS, ids=["user", "name", "null", "path"])
@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a cat", "--model", "PATH"),
        ("generate", "a cat", "--model", "TINY", "--steps", 1, "--out", "PATH"),
        ("generate", "a cat", "--model", "TINY", "--image", "PATH"),
        ("generate", "a cat", "--model", "TINY", "--lora", "PATH"),
        ("generate", "a cat", "--model", "TINY", "--embedding", "PATH"),
        ("generate", "a cat", "--model", "TINY", "--vae", "PATH"),
        ("verify", "PATH", "--model", "TINY"),
        ("batch", "PATH", "--model", "TINY"),
        ("export", "PATH", "--out", "o"),
        ("inspect", "PATH"),
        ("convert", "PATH", "o.safetensors"),
        ("convert", "TINY", "PATH"),
        ("check", "PATH"),
        ("train", "PATH"),
    ],
    ids=lambda words: "-".join(str(word) for word in words if str(word).islower() or str(word).startswith("-")),
)
def test_a_path_that_cannot_be_is_one_line(ldm_, tiny, tmp_path, monkeypatch, words, path):
    monkeypatch.chdir(tmp_path)
    status, out, err = ldm_(*(path if word == "PATH" else tiny if word == "TINY" else word for word in words))
    made = "--out" in words and path.startswith("~")  # a folder of that name can be made
    assert made or ((status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1)


@pytest.mark.parametrize("change", ["os.rmdir(os.getcwd())", "os.close(0); sys.stdin = None", "os.close(0)"])
def test_a_deleted_working_directory_and_a_closed_stdin(tmp_path, change):
    (tmp_path / "gone").mkdir()
    script = f"import os, sys; {change}; sys.argv = ['ldm', 'batch', '-', '--out', 'o']; import ldm.cli as c"
    done = subprocess.run([sys.executable, "-c", f"{script}; c.main()"], cwd=tmp_path / "gone", capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, done.stderr


def test_a_hang_up_removes_drafts(tmp_path):
    script = (
        "import ldm.cli as c, ldm.files as f, pathlib, time\n"
        "def app(**_):\n"
        "    with f.atomic_write(pathlib.Path('a')) as draft:\n"
        "        draft.write_text('x'); print('begun', flush=True); time.sleep(60)\n"
        "c.app = app; c.main()"
    )
    command = [sys.executable, "-c", script]
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # though the tests run under nohup
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env={**os.environ}, **heed) as child:
        assert child.stdout.readline() == b"begun\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGHUP)
        assert child.wait(30) == 130
    assert os.listdir(tmp_path) == []


def test_a_name_that_the_output_cannot_encode_is_printed(tmp_path):
    script = "import ldm.cli as c; c.app = lambda **_: print('é雪'); c.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9\\u96ea\n", b"")


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_the_umask_is_heeded(tmp_path, umask, mode):
    script = "import ldm.files as f, pathlib\nwith f.atomic_write(pathlib.Path('a')) as d: d.touch()"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, umask=umask, check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_drafts_of_two_processes_with_one_number_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_a_name_as_long_as_names_may_be_is_published(tmp_path):
    with atomic_write(tmp_path / ("é" * 127)) as draft:
        draft.touch()
    assert os.listdir(tmp_path) == ["é" * 127]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "a.png") as draft:
        draft.symlink_to("/dev/full")
        with draft.open("wb") as file:
            file.write(b"x")
    assert caught.value.filename == str(tmp_path / "a.png") and os.listdir(tmp_path) == []


def test_python_m_ldm_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ldm", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "generate" in done.stdout
