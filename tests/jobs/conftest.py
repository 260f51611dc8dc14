"""How the small job ends when nothing disturbs it."""

import pytest
from job_folders import go, job_in, outcome

from ldm.jobs import driver, worker


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Look often, for these jobs are short."""
    monkeypatch.setattr(driver, "MONITOR_INTERVAL", 0.02)
    monkeypatch.setattr(worker, "QUEUE_POLL_INTERVAL", 0.02)


@pytest.fixture(scope="session")
def finished(pipe, tmp_path_factory):
    """The folder of a job that nothing disturbed: copy it."""
    folder = tmp_path_factory.mktemp("jobs") / "finished"
    assert go(job_in(folder, pipe), pipe) == 0
    return folder


@pytest.fixture(scope="session")
def undisturbed(finished):
    return outcome(finished)
