"""A stranger's job folder: a link or a pipe under a name of ours is refused by whatever writes or reads there."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from job_folders import SETTLED, write_job

from ldm.jobs import gallery
from ldm.jobs.exports import export_job
from ldm.jobs.leases import Leases
from ldm.jobs.manifest import MANIFEST_FILE, check_job_folder, scan_image_files


def link(path, outside):
    path.symlink_to(outside)


def pipe_(path, outside):
    os.mkfifo(path)


def socket_(path, outside):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)


def folder_(path, outside):
    path.mkdir()


def file_(path, outside):
    path.write_text("")


IMAGE = "images/00/000000000000000000000000.png"
ENTRIES = {  # the place of an entry in a job's folder, what is there, and the words about it
    "images": (link, "a symbolic link, not a folder"),
    "images/00": (link, "a symbolic link, not a folder"),
    "images/ab": (link, "a symbolic link, not a folder"),
    IMAGE: (pipe_, "a pipe, socket or device, not a file"),
    "images/00/ab.webp": (link, "a symbolic link, not a file"),
    "images/00/ac.png": (folder_, "a folder, not a file"),
    "images/cd": (file_, "a file, not a folder"),
    "leases": (link, "a symbolic link, not a folder"),
    "leases/dead.beat": (pipe_, "a pipe, socket or device, not a file"),
    "leases/folder.0": (link, "a symbolic link, not a file"),
    "thumbs": (link, "a symbolic link, not a folder"),
    "thumbs/00": (link, "a symbolic link, not a folder"),
    "index.data": (link, "a symbolic link, not a folder"),
    "index.data/x.js": (pipe_, "a pipe, socket or device, not a file"),
    "index.html": (folder_, "a folder, not a file"),
    "grids": (link, "a symbolic link, not a folder"),
    "grids/seed": (link, "a symbolic link, not a folder"),
    "job.json": (pipe_, "a pipe, socket or device, not a file"),
    "items.jsonl": (socket_, "a pipe, socket or device, not a file"),
    MANIFEST_FILE: (pipe_, "a pipe, socket or device, not a file"),
    "manifest-dead.jsonl": (link, "a symbolic link, not a file"),
}
DOORS = {
    "gallery": gallery.write_gallery,
    "export": lambda folder: export_job(folder, folder.parent / "exported", "webdataset", 9, lambda *_: None),
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job's folder, and beside it a folder with a draft and a lease, which nothing may remove."""
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path / "job", [SETTLED])
    (tmp_path / "outside").mkdir()
    for name in (".x.png.1-2.part", "dead.beat", "000000000000000000000000.0"):
        (tmp_path / "outside" / name).write_text("kept")
    return tmp_path / "job"


def put(job, name):
    entry = job / name
    entry.parent.mkdir(parents=True, exist_ok=True)
    if entry.is_dir():
        shutil.rmtree(entry)
    entry.unlink(missing_ok=True)
    ENTRIES[name][0](entry, job.parent / "outside")
    return f"{entry}: {ENTRIES[name][1]}"


def listing(folder):
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_leads_elsewhere_is_named_and_nothing_is_written(job, name, door):
    said = put(job, name)
    before = listing(job.parent)
    with pytest.raises(ValueError) as error:
        DOORS[door](job)
    assert str(error.value) == said
    assert listing(job.parent) == before


@pytest.mark.parametrize("name", ["images/ab", "leases", "thumbs", "grids", MANIFEST_FILE])
@pytest.mark.parametrize("command", ["batch", "verify", "export"])
def test_commands_refuse_it_in_one_line(refused, job, tiny, name, command):
    said = put(job, name)
    (job.parent / "prompts.txt").write_text("a cat")
    before = listing(job.parent)
    words = {
        "batch": ("prompts.txt", "--out", job, "--model", tiny, "--grid", "seed"),
        "verify": (job, "--model", tiny),
        "export": (job, "--out", "exported"),
    }
    refused(command, *words[command], said=said)
    assert listing(job.parent) == before


def test_what_people_have_in_a_job_folder_is_left_alone(job):
    outside = job.parent / "outside"
    for name in (".DS_Store", "images/.DS_Store", "images/00/.DS_Store", "images/Thumbs.db", "notes.txt"):
        (job / name).write_text("")
    (job / "dataset").symlink_to(outside)
    (job.parent / "latest").symlink_to(job)
    copy = job / "images/00/1.png"
    os.link(job / IMAGE, copy)  # as of `cp -al`
    check_job_folder(job.parent / "latest")
    check_job_folder(job.parent / "not there")
    with Leases(job / "leases") as leases:
        assert scan_image_files(job, leases) == {Path(IMAGE).name, copy.name}
