"""Set-up: done once, seen at once, whole again after a kill; a fake Python stands for venv and pip."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/run.py"
spec = importlib.util.spec_from_file_location("run", SCRIPT)
assert spec and spec.loader
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

# A Python that makes a venv by copying itself into it, and writes what it is asked into `calls`. The step in
# `print_error` says `words` and fails, the one in `hang` stops half-way; only pip gives an `ldm`, at its end.
FAKE = r"""#!/bin/sh
root={root} version="{version}"
case "$2" in -c) step=probe ;; -m) step=$3 ;; *) step=$2 ;; esac
halt() {{ [ "$step" = "$(cat $root/$1 2>/dev/null)" ]; }}
echo $step >> $root/calls
if halt fail; then cat $root/words; exit 1; fi
if [ $step = venv ]; then mkdir -p $4/bin; cp $0 $4/bin/python; fi
if halt hang; then echo $$ > $root/pid; exec sleep 60; fi
case $step in
    probe) test ! -e "${{0%/*}}/pip" || echo $version ;;
    venv) touch $4/bin/pip ;;
    pip) cd $root/.venv/bin; echo '#!/bin/sh' > ldm; echo 'printf "<%s>" "$@"' >> ldm; chmod +x ldm ;;
esac
"""
DRIVER = """
import pathlib, run, sys
run.torch_build = lambda: "cuda"  # asks for no index
sys.exit(run.main(sys.argv[3:], pathlib.Path(sys.argv[1]), sys.argv[2]))
"""


class Project:
    """A repository and the fake Python; `start` and `run` are `scripts/run.py` in a process of its own."""

    def __init__(self, root: Path):
        self.root, self.venv = root, root / ".venv"
        (root / "pyproject.toml").write_text("[project]\n")
        (root / "constraints.txt").write_text("torch==1\n")
        self.fake(root / "python")

    def fake(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(root=self.root, version=" ".join(map(str, sys.version_info[:2]))))
        path.chmod(0o755)

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(self.root), str(self.root / "python"), *words]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd="/", env=environment)

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def steps(self) -> list[str]:
        """What Python was asked since the last look."""
        calls = self.root / "calls"
        steps = calls.read_text().split() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return steps

    def kill_at(self, step: str) -> int:
        """Kill a set-up, and not the step in which it hangs: the pid of that."""
        (self.root / "hang").write_text(step)
        process = self.start("info")
        pid = int(wait_for(self.root / "pid"))
        process.kill()
        process.communicate()
        (self.root / "hang").unlink()
        self.steps()
        return pid


def wait_for(path: Path) -> str:
    for _ in range(1000):
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text
        time.sleep(0.01)
    raise TimeoutError(path)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_words_reach_ldm_untouched_and_stdout_is_ldms_alone(project):
    words = ["generate", "a  red 'apple' *", "--", "", "-x=1"]
    code, out, err = project.run(*words)
    assert (code, out) == (0, "".join(f"<{w}>" for w in words))
    assert "installing torch" in err


def test_second_run_asks_python_nothing(project):
    project.run("info")
    assert project.steps() == ["venv", "pip"]
    assert (project.run("info"), project.steps()) == ((0, "<info>", ""), [])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again_in_the_same_venv(project, name):
    project.run("info")
    project.steps()
    (project.root / name).write_text("changed")
    project.run("info")
    assert project.steps() == ["probe", "pip"]


def test_digest_tells_apart_all_that_decides_a_venv(project, tmp_path_factory):
    other = Project(tmp_path_factory.mktemp("other"))
    cases = [(project.root, (3, 11), "cpu"), (project.root, (3, 12), "cpu"), (project.root, (3, 11), "cuda")]
    cases += [(other.root, (3, 11), "cpu")]
    assert len({run.digest(*case) for case in cases}) == len(cases)
    assert run.digest(*cases[0]) == run.digest(*cases[0])


def test_dev_satisfies_base_but_not_the_reverse(project):
    project.run("info")
    project.steps()
    assert project.run("test", "-k", "x")[0] == 0
    assert project.steps() == ["probe", "pip", "ruff", "ruff", "mypy", "pytest"]
    project.run("info")
    assert project.steps() == []


def test_checks_stop_at_the_first_failure_and_give_its_status(project):
    project.run("test")
    project.steps()
    (project.root / "fail").write_text("mypy")
    (project.root / "words").write_text("wrong\n")
    code, out, _ = project.run("test", "-k", "x")
    assert (code, out, project.steps()) == (1, "wrong\n", ["ruff", "ruff", "mypy"])


@pytest.mark.parametrize("step", ["venv", "pip"])
def test_killed_half_way_starts_from_an_empty_folder(project, step):
    os.kill(project.kill_at(step), signal.SIGKILL)
    torn = project.venv / "lib/torn"
    torn.mkdir(parents=True)
    assert project.run("info")[:2] == (0, "<info>")
    assert project.steps() == ["venv", "pip"]
    assert not torn.exists()


def test_a_step_that_outlives_its_set_up_keeps_the_lock(project):
    pid = project.kill_at("pip")
    second = project.start("info")
    assert second.stderr and "waiting" in second.stderr.readline()
    assert project.steps() == []
    os.kill(pid, signal.SIGKILL)
    assert second.communicate(timeout=30)[0] == "<info>"


def test_two_at_once_install_once(project):
    both = [project.start("info") for _ in range(2)]
    assert [process.communicate(timeout=30)[0] for process in both] == ["<info>"] * 2
    steps = project.steps()
    assert steps.count("venv") == steps.count("pip") == 1


def test_a_venv_without_pip_is_made_again_and_a_whole_one_adopted(project):
    project.fake(project.venv / "bin/python")
    project.run("info")
    assert project.steps() == ["probe", "venv", "pip"]
    (project.venv / "installed").unlink()
    project.run("info")
    assert project.steps() == ["probe", "pip"]


@pytest.mark.parametrize(
    ("words", "cause", "kept"),
    [
        ("Retrying after connection broken by 'NewConnectionError'", "error: no network", True),
        ("No matching distribution found for torch==1", "error: set-up failed", True),
        ("Installing collected packages: torch\nNo space left on device", "error: set-up failed", False),
    ],
)
def test_pips_failure_is_told_and_a_venv_that_it_did_not_touch_is_kept(project, words, cause, kept):
    project.run("info")
    before = (project.root / "constraints.txt").read_text()
    (project.root / "constraints.txt").write_text("torch==2\n")
    (project.root / "fail").write_text("pip")
    (project.root / "words").write_text(words + "\n")
    code, out, err = project.run("info")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(cause) and words.splitlines()[-1] in err
    (project.root / "constraints.txt").write_text(before)
    assert project.run("info")[0] == (0 if kept else 2)


def test_old_python_and_missing_venv_are_one_line(monkeypatch):
    with pytest.raises(run.SetupError, match=r"Python 3\.11 or newer is needed, this is 3\.9"):
        run.check_python((3, 9))
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(run.SetupError, match="apt install python3-venv"):
        run.check_venv()


def test_an_old_python_can_read_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


def test_the_driver_chooses_the_build_and_only_a_reachable_index_is_named(tmp_path):
    driver = tmp_path / "version"
    assert run.torch_build([str(driver)]) == "cpu"
    driver.touch()
    assert run.torch_build([str(driver)]) == "cuda"
    assert not run.reachable("http://127.0.0.1:9/")  # the discard port: nothing listens
    assert "--extra-index-url" not in run.pip_words("base", None)
    assert run.pip_words("dev", "URL")[-2:] == ["--extra-index-url", "URL"]
