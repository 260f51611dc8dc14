"""The driver: whatever befalls a folder or its workers, a job resumes or fails with one line, and nothing is lost."""

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from job_folders import ITEMS, fork, go, job_in, outcome
from PIL import Image

from ldm import files as publishing
from ldm.jobs import driver, leases, manifest
from ldm.jobs.driver import JobProgress, Monitor, StalledError
from ldm.jobs.engines import InlineEngine
from ldm.pipeline.scheduler import BatchScheduler


def pictures(folder):
    return sorted(folder.glob("images/*/*.png"))


def lines(folder):
    return (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)


def rewrite(folder, found):
    (folder / "manifest.jsonl").write_bytes(b"".join(found))


def split(folder, count, tail=b""):
    """The last lines as a dead worker's own file."""
    found = lines(folder)
    rewrite(folder, found[:-count])
    (folder / "manifest-dead.jsonl").write_bytes(b"".join(found[-count:]) + tail)


def undone(folder, number=0):
    """Forget an image and its line; its id."""
    found = lines(folder)
    record = json.loads(found.pop(number))
    rewrite(folder, found)
    (folder / record["file"]).unlink()
    return record["id"]


def lease(folder, content, when=None):
    """A lease of an undone item; what owns it is in the content."""
    path = folder / "leases" / f"{undone(folder)}.0"
    path.mkdir() if content is None else path.write_bytes(content)
    if when is not None:
        os.utime(path, (when, when))


def beat(folder, content, when=None):
    """A worker whose beat this is holds an undone item."""
    lease(folder, b"other\n")
    path = folder / "leases" / "other.beat"
    path.write_bytes(content)
    if when is not None:
        os.utime(path, (when, when))


def failed(folder, number=0):
    record = json.loads(lines(folder)[number])
    undone(folder, number)
    wrong = {k: v for k, v in record.items() if k not in ("file", "sha256", "pixels")}
    wrong |= {"status": "failed", "reason": "once"}
    (folder / "manifest-dead.jsonl").write_text(json.dumps(wrong) + "\n")


def draft(folder, folder_too=False):
    path = pictures(folder)[0].parent / f".{undone(folder)}.png.1.part"
    path.mkdir(parents=True) if folder_too else (path.parent.mkdir(exist_ok=True), path.write_bytes(b"half"))


def later(record):
    return json.dumps(record).encode() + b"\n"


FAR = b'{"boot": "another machine"}'
DECADES = 10**9  # seconds
GOES_ON = {
    "nothing at all": lambda f: None,
    "a picture is deleted": lambda f: pictures(f)[2].unlink(),
    "all pictures are deleted": lambda f: [path.unlink() for path in pictures(f)],
    "the folder of pictures is deleted": lambda f: shutil.rmtree(f / "images"),
    "a folder in place of a picture's line": lambda f: (f / "manifest-dead.jsonl").write_bytes(b"[]\n"),
    "no manifest": lambda f: (f / "manifest.jsonl").unlink(),
    "an empty manifest": lambda f: rewrite(f, []),
    "a line is missing": lambda f: rewrite(f, lines(f)[1:]),
    "the last newline is missing": lambda f: rewrite(f, [b"".join(lines(f))[:-1]]),
    "the last line is half": lambda f: rewrite(f, [b"".join(lines(f))[:-200]]),
    "a line in the middle is half": lambda f: rewrite(f, [*lines(f)[:2], lines(f)[2][:90] + b"\n", *lines(f)[3:]]),
    "a line is garbage": lambda f: rewrite(f, [*lines(f)[:2], b"\xff\x00\n", *lines(f)[2:]]),
    "zeros at the end": lambda f: rewrite(f, [*lines(f), bytes(4096)]),
    "a line is there twice": lambda f: rewrite(f, [*lines(f), lines(f)[0]]),
    "lines in another order": lambda f: rewrite(f, [lines(f)[0], *lines(f)[:0:-1], later({"id": "x"})]),
    "a line of wrong types": lambda f: rewrite(f, [*lines(f), later({"id": "x", "status": "done", "line": "1"})]),
    "a line a million brackets deep": lambda f: rewrite(f, [*lines(f), b"[" * 10**6 + b"\n"]),
    "an item failed once": failed,
    "a dead worker's file": lambda f: split(f, 3),
    "a dead worker's file, torn": lambda f: split(f, 3, tail=b'{"id": "'),
    "a dead worker's file, empty": lambda f: (f / "manifest-dead.jsonl").touch(),
    "a dead worker's draft": draft,
    "a dead worker's draft is a folder": lambda f: draft(f, True),
    "a lease of nobody that is known": lambda f: lease(f, b"dead\n"),
    "a lease of garbage": lambda f: lease(f, b"\x00\xff"),
    "an empty lease": lambda f: lease(f, b""),
    "a lease is a folder": lambda f: lease(f, None),
    "a lease from the future": lambda f: lease(f, b"", 5 * DECADES),
    "a lease from long ago": lambda f: lease(f, b"", 0),
    "a dead worker of this machine": lambda f: beat(
        f, json.dumps({"boot": leases.BOOT_ID_PATH.read_text().strip()}).encode()
    ),
    "a dead worker of another machine": lambda f: beat(f, FAR),
    "a dead worker whose clock ran ahead": lambda f: beat(f, FAR, 5 * DECADES),
    "a dead worker whose clock stood at zero": lambda f: beat(f, FAR, 0),
    "a beat of garbage": lambda f: beat(f, b"\x00["),
    "no job.json": lambda f: (f / "job.json").unlink(),
    "no items.jsonl": lambda f: (f / "items.jsonl").unlink(),
    "the folder of leases is deleted": lambda f: shutil.rmtree(f / "leases"),
}


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "job"))


@pytest.mark.parametrize("damage", GOES_ON.values(), ids=[name.replace(" ", "_") for name in GOES_ON])
def test_a_job_goes_on_and_ends_as_if_nothing_had_been(folder, pipe, undisturbed, damage):
    damage(folder)
    assert go(job_in(folder, pipe), pipe) == 0
    assert outcome(folder) == undisturbed


CHANGED = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "one_bit": lambda path: path.write_bytes(path.read_bytes()[:-20] + b"\x01" + path.read_bytes()[-19:]),
    "another_picture": lambda path: Image.new("RGB", (32, 32)).save(path),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_changed_image_is_found_by_check_and_generated_again(folder, pipe, undisturbed, capsys, change):
    change(pictures(folder)[1])
    assert go(job_in(folder, pipe), pipe) == 0  # without it nobody looks
    with pytest.raises(AssertionError):
        outcome(folder)
    assert go(job_in(folder, pipe), pipe, check=True) == 0 and outcome(folder) == undisturbed
    assert "1 finished images are missing or changed" in capsys.readouterr().err


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_an_image_that_is_missing_or_empty_is_generated_again_by_itself(folder, pipe, undisturbed, capsys, change):
    change(pictures(folder)[1])
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed
    assert "1 finished images are missing or changed" in capsys.readouterr().err


IN_THE_WAY = {
    "a_folder_in_place_of_a_picture": lambda f: pictures(f)[0],
    "a_file_in_place_of_a_folder_of_pictures": lambda f: pictures(f)[0].parent,
    "a_file_in_place_of_images": lambda f: f / "images",
    "a_file_in_place_of_leases": lambda f: f / "leases",
    "a_folder_in_place_of_the_manifest": lambda f: f / "manifest.jsonl",
    "a_folder_in_place_of_items.jsonl": lambda f: f / "items.jsonl",
}


@pytest.mark.parametrize("place", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_in_the_way_is_named_in_one_line_and_nothing_is_lost(folder, pipe, undisturbed, capsys, place):
    path = place(folder)
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
        (path / "inside").write_text("")
    before = {file for file in folder.rglob("*") if file.is_file()}
    assert go(job_in(folder, pipe), pipe) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {path}") and ("irectory" in last or "File exists" in last)
    assert before <= set(folder.rglob("*"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


def full(number, at):
    """A function that fails with an errno from its call number `at` on."""
    calls = iter(range(1000))

    def wrap(function):
        def poor(*args, **kwargs):
            if next(calls) >= at:
                raise OSError(number, os.strerror(number), str(args[0]))
            return function(*args, **kwargs)

        return poor

    return wrap


DISK = {
    "full, at the first picture": (errno.ENOSPC, 0, Image.Image, "save"),
    "full, at the third picture": (errno.ENOSPC, 2, Image.Image, "save"),
    "failing, at a flush of a picture": (errno.EIO, 6, publishing, "fsync_path"),
    "full, at the second line": (errno.ENOSPC, 1, manifest, "append_manifest_record"),
    "read-only, from the beginning": (errno.EROFS, 0, publishing.Path, "mkdir"),
    "no more open files, at a line": (errno.EMFILE, 3, manifest, "append_manifest_record"),
}


@pytest.mark.parametrize("number, at, owner, name", DISK.values(), ids=[name.replace(" ", "_") for name in DISK])
def test_a_disk_that_is_full_or_fails_is_one_line_and_what_was_finished_stays(
    pipe, tmp_path, undisturbed, monkeypatch, capsys, number, at, owner, name
):
    folder = tmp_path / "job"
    with monkeypatch.context() as poor:
        poor.setattr(owner, name, full(number, at)(getattr(owner, name)))
        if owner is manifest:
            poor.setattr("ldm.jobs.worker.append_manifest_record", manifest.append_manifest_record)
        assert go(job_in(folder, pipe, batch_size=1), pipe) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: ") and err[0].endswith(os.strerror(number))
    kept = outcome(folder)["manifest"] if (folder / "manifest.jsonl").exists() else []
    assert all(line["status"] == "done" for line in kept) and len(kept) < ITEMS
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_cannot_be_written_is_named(folder, pipe, capsys):
    undone(folder)
    below = [path for path in (folder / "images").rglob("*") if path.is_dir()]
    for path in below:
        path.chmod(0o500)
    status, said = go(job_in(folder, pipe), pipe), capsys.readouterr().err
    for path in below:
        path.chmod(0o755)
    assert status == 1 and "Permission denied" in said
    assert go(job_in(folder, pipe), pipe) == 0


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: "{", "job.json: not JSON"),
        (lambda text: "{}", "job.json: has no weights"),
        (
            lambda text: text.replace('"unet": "', '"unet": "0'),
            "belongs to another job: weights differ; give another --out",
        ),
        (lambda text: text.replace('"output": "png"', '"output": "webp"'), "another job: output differs"),
        (lambda text: text.replace("float32", "bfloat16"), "another job: dtype differs"),
    ],
)
def test_another_job_s_folder_is_refused_and_left_as_it_is(folder, pipe, change, said):
    (folder / "job.json").write_text(change((folder / "job.json").read_text()))
    undone(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=said):
        go(job_in(folder, pipe), pipe)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_source_may_grow(folder, pipe):
    before = outcome(folder)["manifest"]
    requests = [entry.request for entry in job_in(folder, pipe).entries]
    more = [*requests, job_in(folder, pipe).entries[0].request.__class__("new", seed=9, num_inference_steps=1)]
    assert go(job_in(folder, pipe, requests=more), pipe) == 0
    after = outcome(folder)["manifest"]
    assert after[:-1] == before and after[-1]["request"]["prompt"] == "new"


def test_two_drivers_on_one_job_share_it(pipe, tmp_path, undisturbed):
    statuses = []
    drivers = [
        threading.Thread(target=lambda: statuses.append(go(job_in(tmp_path / "job", pipe, batch_size=1), pipe)))
        for _ in range(2)
    ]
    for thread in drivers:
        thread.start()
    for thread in drivers:
        thread.join()
    assert statuses == [0, 0] and go(job_in(tmp_path / "job", pipe), pipe) == 0
    assert outcome(tmp_path / "job") == undisturbed


def test_the_cases_are_thirty_at_least():
    assert len(GOES_ON) + len(CHANGED) + len(IN_THE_WAY) + len(DISK) >= 30


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
