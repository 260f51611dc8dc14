"""Engines: the same job under each, and a job that is killed anywhere and run again ends as if it had not been."""

import multiprocessing
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import kills
import pytest
from cluster import clustered
from job_folders import Opens, fork, go, job_in, outcome

from ldm.jobs import engines
from ldm.jobs.engines import LocalEngine, assign_devices


def test_what_a_process_fails_by_is_the_job_s_reason_and_it_is_not_begun_again(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda kind, begin=multiprocessing.get_context: begin("fork"))
    local = LocalEngine(replace(job_in(tmp_path / "job", pipe), load_pipeline=Opens(tmp_path / "nothing")), [None])
    kills.until(lambda: not local.poll())
    assert len(local.errors) == 1 and "nothing" in local.errors[0]


def test_ray_that_is_not_there_is_said_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs ray: .*pip install .*\[ray\]"):
        engines.import_ray()


def test_workers_have_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (
        assign_devices("local", None, "auto") == ["cuda:0", "cuda:1"]
        and assign_devices("local", 3, "cuda")[2] == "cuda:0"
    )
    assert assign_devices("local", 2, "cpu") == [None, None] and assign_devices("inline", None, "auto") == [None]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert assign_devices("ray", None, "auto") == [None] and assign_devices("local", 4, "auto") == [None] * 4
    with pytest.raises(ValueError, match="--workers 2: engine inline has one worker"):
        assign_devices("inline", 2, "auto")


KILLS = int(os.environ.get("LDM_STRESS_KILLS", "8"))  # scripts/stress_batch.py asks for hundreds
RAY_KILLS = int(os.environ.get("LDM_STRESS_KILLS", "4"))  # each takes seconds


@pytest.fixture(scope="module")
def nodes(pipe, tiny):
    """A cluster whose workers have the model already."""
    if not find_spec("ray"):
        pytest.skip("ray is not installed")
    kills.WARM[tiny] = pipe
    with clustered() as nodes:
        yield nodes


@pytest.fixture
def killed(pipe, tiny, tmp_path, monkeypatch):
    """Kills jobs on a bench, and prints what was done."""
    monkeypatch.setitem(kills.WARM, tiny, pipe)

    def run(bench, count, name):
        told = kills.kill(bench, pipe, tiny, tmp_path, count, name)
        print(told)
        return told

    return run


def test_a_job_of_one_process_that_is_killed_ends_as_one_that_was_not(killed):
    killed(kills.inline(), KILLS, "inline")


def test_a_job_of_local_processes_that_are_killed_ends_as_one_that_was_not(killed):
    killed(kills.local(), KILLS, "local")


def test_a_job_on_a_cluster_of_two_nodes_that_are_killed_ends_as_one_that_was_not(killed, nodes):
    assert "node" in killed(kills.ray(nodes, size=24 if RAY_KILLS < 100 else 60), RAY_KILLS, "ray").partition("(")[2]


@pytest.mark.parametrize("name, count", [("local", 1), ("local", 2), ("local", 3), ("local", 4), ("ray", 3)])
def test_images_are_the_same_by_any_number_of_workers_of_any_engine(
    pipe, tiny, tmp_path, undisturbed, request, name, count
):
    """Bit for bit, generated in one run and in two."""
    bench = kills.local(count) if name == "local" else kills.ray(request.getfixturevalue("nodes"), count)
    folder = tmp_path / "job"

    def drawn():
        job = job_in(folder, pipe)
        return go(job, pipe, start=lambda job: bench.start(replace(job, load_pipeline=Opens(tiny))))

    for _ in range(2):
        assert os.waitstatus_to_exitcode(fork(drawn)) == 0 and outcome(folder) == undisturbed
        for path in sorted(folder.glob("images/*/*"))[::2]:
            path.unlink()


def test_a_line_that_is_torn_where_a_worker_dies_within_it_is_repaired(pipe, tmp_path, undisturbed):
    """Of the writes alone: the driver's lease, those of the items, their lines."""
    folder, torn = tmp_path / "job", 0

    def live(fatal):
        kills.doom(folder, fatal, events=("os.write",))
        return go(job_in(folder, pipe), pipe)

    for fatal in (9, 8, 7):
        fork(lambda fatal=fatal: live(fatal))
        torn += any(data and not data.endswith(b"\n") for data in map(Path.read_bytes, folder.glob("manifest-*")))
    assert torn and go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed
