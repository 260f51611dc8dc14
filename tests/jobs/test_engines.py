"""Engines: the same job under each, whoever dies."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from folders import REQUESTS, Opens, fork, go, job_in, outcome

from ldm.jobs import driver, engines
from ldm.jobs.driver import State, Stuck, Watch
from ldm.jobs.engines import Inline, Local, Ray, places
from ldm.scheduler import Scheduler

KILLS = int(os.environ.get("LDM_STRESS_KILLS", "0"))  # scripts/stress_batch.py asks for some
MANY = [replace(REQUESTS[0], seed=k, num_inference_steps=10) for k in range(60)]  # so that there is time to kill
ALIKE = {"requests": MANY, "batch_size": 1, "strict": False}  # calls of one size are bit for bit the same anyway


def pids(folder):
    """Of the workers that live, by their names; the driver has the lowest."""
    return sorted(int(path.stem.split("-")[-2]) for path in folder.glob("leases/*.beat"))


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def pictures(folder):
    return len(list(folder.glob("images/*/[!.]*.png")))


@pytest.fixture(scope="module")
def slow(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow") / "job"
    assert go(job_in(folder, pipe, **ALIKE), pipe) == 0
    return outcome(folder)


@pytest.fixture
def patient(pipe, tiny, tmp_path):
    """A job that can be sent to another process."""
    return job_in(tmp_path / "job", pipe, expiry=2.0, **ALIKE)


@pytest.mark.parametrize("story", range(1 + KILLS // 20))
def test_a_killed_process_is_begun_again_and_those_of_a_killed_driver_end(pipe, tiny, patient, slow, story):
    folder = patient.folder

    def live():
        def start(job):
            local = Local(replace(job, open=Opens(tiny)), [None, None])
            first, _ = (process.pid for process, *_ in local._workers)
            until(lambda: first in pids(folder))
            os.kill(first, signal.SIGKILL)
            return local

        return go(patient, pipe, start=start)

    child = os.fork()
    if not child:
        os._exit(live())
    until(lambda: pictures(folder) > 0 and len(pids(folder)) > 2)
    os.kill(child, signal.SIGSTOP)
    orphans = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not any(map(alive, orphans)))
    assert len(orphans) >= 2 and pictures(folder) < len(MANY)
    assert go(job_in(folder, pipe, **ALIKE), pipe) == 0
    assert outcome(folder) == slow


def alive(pid):
    """Does a process live? One that nobody has buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_process_fails_by_is_the_job_s_reason_and_it_is_not_begun_again(patient, tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda kind, begin=multiprocessing.get_context: begin("fork"))
    local = Local(replace(patient, open=Opens(tmp_path / "nothing")), [None])
    until(lambda: not local.poll())
    assert len(local.reasons) == 1 and "nothing" in local.reasons[0]


@pytest.mark.skipif(not KILLS, reason="takes 20 seconds: scripts/stress_batch.py does it")
def test_ray_goes_on_when_a_node_of_two_is_killed(tiny, patient, pipe, slow, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(driver, "GRACE", 1.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]))
    cluster = Cluster()
    try:
        for _ in range(2):
            node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False)

        def start(job):
            engine = Ray(replace(job, open=Opens(tiny)), [None, None])
            until(lambda: len(pids(job.folder)) == 3 and pictures(job.folder) > 0, 120)
            cluster.remove_node(node, allow_graceful=False)
            assert pictures(job.folder) < len(MANY)
            return engine

        assert go(patient, pipe, start=start) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert outcome(patient.folder) == slow


def test_ray_that_is_not_there_is_said_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'ldm\[ray\]'"):
        engines.imported()


def test_workers_have_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places("local", None, "auto") == ["cuda:0", "cuda:1"] and places("local", 3, "cuda")[2] == "cuda:0"
    assert places("local", 2, "cpu") == [None, None] and places("inline", None, "auto") == [None]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert places("ray", None, "auto") == [None] and places("local", 4, "auto") == [None] * 4
    with pytest.raises(ValueError, match="--workers 2: the engine inline has one"):
        places("inline", 2, "auto")


class Idle:
    """An engine whose workers do nothing."""

    def __init__(self, reasons=()):
        self.reasons, self.asked = list(reasons), []

    def poll(self):
        return "stop" not in self.asked

    def stop(self):
        self.asked.append("stop")

    def kill(self):
        self.asked.append("kill")


@pytest.mark.parametrize("left", [{"a"}, set()])
def test_a_job_without_progress_ends_with_the_reason(pipe, tmp_path, left):
    """Unless nothing is left: then those who have not begun are not waited for."""
    job, now, told = job_in(tmp_path, pipe), iter(range(0, 10_000, 7)), []
    with job.leases() as leases:
        engine, watch = Idle(), Watch(job, leases, left, 100.0, lambda: next(now))
        if left:
            with pytest.raises(Stuck, match=r"no step was finished in 1\d\d seconds"):
                driver.drive(engine, watch, told.append)
        else:
            driver.drive(engine, watch, told.append)
        assert engine.asked == ["kill"] and told[0].left == len(left)


def test_progress_of_anybody_keeps_a_job_alive(pipe, tmp_path):
    job, now = job_in(tmp_path, pipe), iter(range(0, 10_000, 7))
    with job.leases() as leases, job.leases() as other:
        watch = Watch(job, leases, {"a"}, 100.0, lambda: next(now))
        for step in range(50):
            other.status = {"steps": step, "batch_size": 3}
            other._tell(other._beat)
            assert watch.state().batch_size == 3 and watch.idle() < 100


def test_when_one_worker_fails_the_others_are_asked_to_stop(pipe, tmp_path):
    job, engine = job_in(tmp_path, pipe), Idle(["disk full"])
    with job.leases() as leases, pytest.raises(RuntimeError, match="disk full"):
        driver.drive(engine, Watch(job, leases, {"a"}, 100.0), lambda state: None)
    assert engine.asked == ["stop"]


def test_a_hanging_worker_ends_the_process_and_the_job_can_go_on(pipe, tmp_path, undisturbed, monkeypatch):
    folder = tmp_path / "job"

    def live():
        Scheduler._step = lambda self, asked: time.sleep(1000)
        driver.Watch.__init__.__defaults__ = (lambda: time.monotonic() * 100,)
        return go(job_in(folder, pipe), pipe, start=lambda job: Inline(job, [None]))

    assert os.waitstatus_to_exitcode(fork(live)) == 1
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


def test_time_left_is_what_is_left_over_the_rate():
    assert State(4, 0, 6, 2.0, 1, 8).seconds_left == 3.0 and State(0, 0, 6, 0.0, 1, 8).seconds_left is None
