"""Engines: the same job under each, whoever dies."""

import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from folders import Opens, fork, go, job_in, outcome
from kills import until

from ldm.jobs import driver, engines
from ldm.jobs.driver import JobProgress, Monitor, StalledError
from ldm.jobs.engines import InlineEngine, LocalEngine, assign_devices
from ldm.pipeline.scheduler import BatchScheduler


def test_what_a_process_fails_by_is_the_job_s_reason_and_it_is_not_begun_again(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda kind, begin=multiprocessing.get_context: begin("fork"))
    local = LocalEngine(replace(job_in(tmp_path / "job", pipe), load_pipeline=Opens(tmp_path / "nothing")), [None])
    until(lambda: not local.poll())
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


class Idle:
    """An engine whose workers do nothing."""

    def __init__(self, reasons=()):
        self.errors, self.stop_requested = list(reasons), []

    def poll(self):
        return "stop" not in self.stop_requested

    def stop(self):
        self.stop_requested.append("stop")

    def kill(self):
        self.stop_requested.append("kill")


@pytest.mark.parametrize("left", [{"a"}, set()])
def test_a_job_without_progress_ends_with_the_reason(pipe, tmp_path, left):
    """Unless nothing is left: then those who have not begun are not waited for."""
    job, now, told = job_in(tmp_path, pipe), iter(range(0, 10_000, 7)), []
    with job.open_leases() as leases:
        engine, watch = Idle(), Monitor(job, leases, left, 100.0, lambda: next(now))
        if left:
            with pytest.raises(StalledError, match=r"no step was finished in 1\d\d seconds"):
                driver.supervise_workers(engine, watch, told.append)
        else:
            driver.supervise_workers(engine, watch, told.append)
        assert engine.stop_requested == ["kill"] and told[0].remaining == len(left)


def test_progress_of_anybody_keeps_a_job_alive(pipe, tmp_path):
    job, now = job_in(tmp_path, pipe), iter(range(0, 10_000, 7))
    with job.open_leases() as leases, job.open_leases() as other:
        watch = Monitor(job, leases, {"a"}, 100.0, lambda: next(now))
        for step in range(50):
            other.status = {"steps": step, "batch_size": 3}
            other._write_heartbeat(other._heartbeat_fd)
            assert watch.progress().batch_size == 3 and watch.seconds_idle() < 100


def test_a_worker_of_a_killed_driver_is_waited_for_and_its_lines_are_joined(
    pipe, finished, undisturbed, tmp_path, monkeypatch
):
    """It finished the last item, and leaves only when it has been waited for."""
    folder, ask, asked = Path(shutil.copytree(finished, tmp_path / "job")), Monitor.has_other_workers, []
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    orphan = job_in(folder, pipe).open_leases()
    (folder / "manifest.jsonl").write_bytes(b"".join(lines[:-2]))
    (folder / f"manifest-{orphan.worker}.jsonl").write_bytes(b"".join(lines[-2:]))

    def others(watch):
        asked.append(ask(watch))
        if len(asked) == 3:
            orphan.__exit__()
        return asked[-1]

    monkeypatch.setattr(Monitor, "has_other_workers", others)
    assert go(job_in(folder, pipe), pipe) == 0
    assert asked == [True, True, True, False] and outcome(folder) == undisturbed


def test_a_worker_at_other_items_is_not_waited_for_nor_one_that_hangs_for_ever(pipe, finished, tmp_path):
    folder, clock = Path(shutil.copytree(finished, tmp_path / "job")), iter(range(0, 10_000, 7))
    with job_in(folder, pipe).open_leases() as leases, job_in(folder, pipe).open_leases() as other:
        shutil.copy(folder / "manifest.jsonl", folder / f"manifest-{other.worker}.jsonl")
        job = job_in(folder, pipe)
        name = next(job.iter_items(pipe)).id
        watch = Monitor(job, leases, {name}, 100.0, lambda: next(clock))
        assert watch.has_other_workers() and not Monitor(job, leases, {"a"}, 100.0).has_other_workers()
        driver.wait_for_workers(watch, 50.0)
        assert 50 < next(clock) < 200


def test_when_one_worker_fails_the_others_are_asked_to_stop(pipe, tmp_path):
    job, engine = job_in(tmp_path, pipe), Idle(["disk full"])
    with job.open_leases() as leases, pytest.raises(RuntimeError, match="disk full"):
        driver.supervise_workers(engine, Monitor(job, leases, {"a"}, 100.0), lambda state: None)
    assert engine.stop_requested == ["stop"]


def test_a_hanging_worker_ends_the_process_and_the_job_can_go_on(pipe, tmp_path, undisturbed, monkeypatch):
    folder = tmp_path / "job"

    def live():
        BatchScheduler._step = lambda self, asked: time.sleep(1000)
        driver.Monitor.__init__.__defaults__ = (lambda: time.monotonic() * 100,)
        return go(job_in(folder, pipe), pipe, start=lambda job: InlineEngine(job, [None]))

    assert os.waitstatus_to_exitcode(fork(live)) == 1
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


def test_time_left_is_what_is_left_over_the_rate():
    assert JobProgress(4, 0, 6, 2.0, 1, 8).seconds_left == 3.0 and JobProgress(0, 0, 6, 0.0, 1, 8).seconds_left is None
