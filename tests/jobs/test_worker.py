"""A worker: images that depend on their requests alone, each generated once; failed items are recorded."""

import itertools
import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from job_folders import ITEMS, REQUESTS, go, job_in, outcome
from PIL import Image

from ldm.jobs import manifest, worker
from ldm.jobs.engines import InlineEngine
from ldm.jobs.source import PromptEntry
from ldm.jobs.worker import canonical_json, compute_item_id, fingerprint_model, fit_batch_size
from ldm.pipeline.request import REQUEST_FIELDS, Request
from ldm.pipeline.scheduler import BatchScheduler, MicroBatcher

BATCHES = range(1, 9) if os.environ.get("LDM_STRESS_KILLS") else (1, 3, 8)  # scripts/stress_batch.py does all


def pixels(pipe, requests, **options):
    """The images of requests in their order, by a scheduler of their own."""
    return pixels_of(BatchScheduler(pipe.model, pipe.prompt_encoder, **options), pipe, requests)


def pixels_of(scheduler, pipe, requests):
    found = dict(scheduler.run(map(pipe.resolve, requests), lambda share: None))
    return [np.asarray(found[k], int) for k in range(len(requests))]


@pytest.fixture(scope="module")
def alone(pipe):
    return {fixed: [pixels(pipe, [r], batch_size=1, pad_to=fixed)[0] for r in REQUESTS] for fixed in (None, 16)}


@pytest.mark.parametrize("batch_size", BATCHES)
def test_images_are_the_same_in_any_batch_and_order_and_strict_ones_bit_for_bit(pipe, alone, batch_size):
    for order, (fixed, near) in itertools.product(([*range(7)], [5, 2, 6, 0, 3, 1, 4]), ((None, 1), (16, 0))):
        found = pixels(pipe, [REQUESTS[k] for k in order], batch_size=batch_size, pad_to=fixed)
        assert max(np.abs(a - alone[fixed][k]).max() for k, a in zip(order, found, strict=True)) <= near


def test_strict_calls_are_of_one_size(pipe, monkeypatch):
    seen = set()
    scheduler = BatchScheduler(pipe.model, pipe.prompt_encoder, 8, pad_to=16)
    ask, decode = scheduler.batched_unet.function, scheduler.batched_decode.function
    monkeypatch.setattr(
        scheduler.batched_unet, "function", lambda x, *rest: seen.add(("call", len(x))) or ask(x, *rest)
    )
    monkeypatch.setattr(scheduler.batched_decode, "function", lambda x: seen.add(("decode", len(x))) or decode(x))
    list(scheduler.run(map(pipe.resolve, REQUESTS), lambda share: None))
    assert seen == {("call", 16), ("decode", 1)}


@pytest.mark.parametrize("where", ["batched_unet", "batched_decode"])
def test_where_memory_runs_out_the_same_images_are_generated_by_fewer_at_a_time(pipe, alone, where):
    """No step that was finished is done again: the network answers as often as it would have, in more parts."""
    requests = [replace(REQUESTS[0], seed=k, num_inference_steps=1 + k // 4) for k in range(8)]
    plain, poor = (BatchScheduler(pipe.model, pipe.prompt_encoder, 8) for _ in range(2))
    wanted, rows, whole = pixels_of(plain, pipe, requests), [], []
    ask, inner = getattr(poor, where).function, getattr(plain, where).function

    def refuse(*parts):
        if len(parts[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows.append(len(parts[0]))
        return ask(*parts)

    getattr(poor, where).function = refuse
    getattr(plain, where).function = lambda *parts: whole.append(len(parts[0])) or inner(*parts)
    pixels_of(plain, pipe, requests)
    found = pixels_of(poor, pipe, requests)
    assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) <= 1
    assert max(rows) <= 3 < max(whole) and sum(rows) == sum(whole) and getattr(poor, where).max_rows <= 3


def test_memory_for_less_than_one_row_is_an_error_and_a_fixed_size_stays():
    def poor(x):
        raise torch.OutOfMemoryError("out")

    for calls in (MicroBatcher(poor, 8), MicroBatcher(poor, 8, pad_to=8)):
        with pytest.raises(torch.OutOfMemoryError):
            calls(torch.zeros(8))
    assert calls.max_rows == 8


def test_requests_are_asked_for_when_there_is_room_and_none_means_not_yet(pipe):
    scheduler, ahead, finished = BatchScheduler(pipe.model, pipe.prompt_encoder, 2), [], 0

    def requests():
        for k in range(40):
            if k % 3 == 2 and k > finished:
                yield None
            ahead.append(k + 1 - finished)
            yield pipe.resolve(replace(REQUESTS[0], seed=k, num_inference_steps=1 + k % 3))

    indexes = []
    for index, _ in scheduler.run(requests(), lambda share: None):
        finished += 1
        indexes.append(index)
    assert sorted(indexes) == list(range(40)) and max(ahead) <= 2 + 2 * 4


def test_the_batch_fits_in_the_free_memory():
    assert [fit_batch_size(free, 3, 5) for free in (0, 10, 20, 10**9)] == [
        1,
        4,
        8,
        worker.MAX_BATCH_SIZE,
    ] and fit_batch_size(100, 5, 5) == 64


class Several:
    """An engine of the tests: workers in threads."""

    def __init__(self, job, count):
        self.workers = [InlineEngine(job, [None]) for _ in range(count)]

    @property
    def errors(self):
        return [error for worker in self.workers for error in worker.errors]

    def poll(self):
        return sum(one.poll() for one in self.workers)

    def stop(self):
        for one in self.workers:
            one.stop()


@pytest.mark.parametrize("count, batch_size", [(1, 1), (2, 1), (4, 2), (2, 8)])
def test_any_number_of_workers_generates_each_item_once(pipe, tmp_path, undisturbed, monkeypatch, count, batch_size):
    drawn, run = [], BatchScheduler.run

    def counted(self, requests, said):
        for index, picture in run(self, requests, said):
            drawn.append(index)
            yield index, picture

    monkeypatch.setattr(BatchScheduler, "run", counted)
    job = job_in(tmp_path / "job", pipe, batch_size=batch_size)
    assert go(job, pipe, start=lambda job: Several(job, count)) == 0
    assert outcome(tmp_path / "job") == undisturbed and len(drawn) == ITEMS


def test_what_another_finished_since_one_looked_is_not_taken(pipe, tmp_path):
    job = job_in(tmp_path, pipe)
    first, second, *_ = job.iter_items(pipe)
    with job.open_leases() as leases:
        feed = worker.Prefetcher(job, pipe, leases, threading.Event(), max_ready=1)
        line = {"id": first.id, "status": "done", "line": 1, "file": "images/0a/0a.png", "sha256": "0"}
        manifest.append_manifest_record(tmp_path, "other", line)
        assert not feed._try_lease(first) and leases.is_free(first.id)
        assert feed._try_lease(second) and leases.holds(second.id)


def test_a_worker_that_slept_and_was_taken_for_dead_writes_nothing(pipe, tmp_path):
    job = job_in(tmp_path, pipe)
    item = next(job.iter_items(pipe))
    with job.open_leases() as leases:
        for mine in (False, True):
            assert not mine or leases.acquire(item.id)
            with worker.ImageWriter(job, pipe, leases) as writer:
                writer.put(item, Image.new("RGB", (32, 32)), 1.0)
            assert [path.is_file() for path in (tmp_path / item.image_path("png"), *tmp_path.glob("manifest*"))] == [
                mine
            ] * (1 + mine)


def test_an_item_that_is_asked_for_twice_is_generated_once_and_listed_twice(finished):
    rows = [json.loads(line) for line in (finished / "items.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(REQUESTS) + 1))
    assert rows[0]["id"] == rows[3]["id"] and len({row["id"] for row in rows}) == ITEMS
    lines = [json.loads(line) for line in (finished / "manifest.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 5, 6, 7]
    assert {row["file"] for row in rows} == {line["file"] for line in lines}


def test_shards_are_the_whole(pipe, tmp_path, undisturbed):
    for k in (1, 0, 2):
        job = job_in(tmp_path / "job", pipe, shard=(k, 3))
        assert go(job, pipe) == 0
    found = outcome(tmp_path / "job")
    assert found["manifest"] == undisturbed["manifest"]
    assert {k: v for k, v in found["files"].items() if not k.startswith("items")}.items() <= undisturbed[
        "files"
    ].items()


def test_a_job_stops_between_batches_and_goes_on(pipe, tmp_path, undisturbed):
    """By a request to stop, after each image."""
    folder = tmp_path / "job"
    lives = 0
    while not lives or len(list(folder.rglob("*.png"))) < ITEMS:

        def start(job):
            engine = InlineEngine(job, [None])
            before = len(list(folder.rglob("*.png")))

            def watch():
                while engine.poll() and len(list(folder.rglob("*.png"))) == before:
                    time.sleep(0.005)
                engine.stop()

            threading.Thread(target=watch).start()
            return engine

        go(job_in(folder, pipe, batch_size=1), pipe, start=start)
        lives += 1
    assert lives > 1 and go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


def failing(pipe, monkeypatch, fails):
    """Let generating fail where `fails(request)`."""
    start = BatchScheduler._start

    def poor(self, members):
        for drawing in members:
            if fails(drawing.request):
                raise RuntimeError("broken\nkernel")
        return start(self, members)

    monkeypatch.setattr(BatchScheduler, "_start", poor)


def test_an_item_that_fails_is_recorded_alone_and_generated_by_the_next_run(pipe, tmp_path, monkeypatch, undisturbed):
    folder = tmp_path / "job"
    failing(pipe, monkeypatch, lambda request: request.seed in (2, 5))
    assert go(job_in(folder, pipe), pipe) == 1
    lines = outcome(folder)["manifest"]
    failed = [line for line in lines if line["status"] == "failed"]
    assert [line["line"] for line in failed] == [2, 6] and len(lines) == ITEMS
    assert all(line["reason"] == "broken kernel" and "file" not in line for line in failed)
    monkeypatch.undo()
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


def test_a_worker_by_whom_everything_fails_gives_up(pipe, tmp_path, monkeypatch, capsys):
    requests = [Request("a cat", seed=k, num_inference_steps=1) for k in range(40)]
    failing(pipe, monkeypatch, lambda request: True)
    assert go(job_in(tmp_path / "job", pipe, requests=requests), pipe) == 1
    assert capsys.readouterr().err.endswith("error: broken kernel\n")
    assert len(outcome(tmp_path / "job")["manifest"]) == worker.MAX_CONSECUTIVE_FAILURES


def test_a_million_entries_stream(pipe, tmp_path, monkeypatch):
    """Entries are asked for no further ahead than what waits to be generated."""
    asked = 0
    drawn = threading.Event()

    class Endless:
        def __iter__(self):
            nonlocal asked
            for asked in itertools.count():
                yield PromptEntry(asked + 1, replace(REQUESTS[0], seed=asked))

    job = replace(job_in(tmp_path, pipe, batch_size=2), entries=Endless())
    stop = threading.Event()
    monkeypatch.setattr(worker.ImageWriter, "put", lambda self, item, picture, seconds: (drawn.set(), stop.set()))
    worker.run_worker(job, stop)
    assert drawn.is_set() and asked < 40


def test_texts_are_encoded_once_for_each_distinct_prompt(pipe, tmp_path):
    pipe.prompt_encoder.clear()
    requests = [Request(f"a cat {k % 3}", seed=k, num_inference_steps=1) for k in range(12)]
    assert go(job_in(tmp_path / "job", pipe, requests=requests, batch_size=1), pipe) == 0
    cache = pipe.prompt_encoder._encode_chunk.cache_info()
    assert cache.currsize == 4 and cache.misses <= 5  # the empty one too; two threads may meet at the first


@pytest.mark.parametrize("output, suffix", [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_every_kind_of_file_keeps_its_texts(pipe, tmp_path, output, suffix):
    from ldm.metadata import read_image_and_metadata

    requests = [Request("a cat, é 雪", seed=1, num_inference_steps=1)]
    assert go(job_in(tmp_path / "job", pipe, requests=requests, image_format=output), pipe) == 0
    (path,) = (tmp_path / "job").rglob(f"*.{suffix}")
    picture, texts = read_image_and_metadata(path)
    (drawn,) = pixels(pipe, requests, batch_size=1)
    wanted = pipe.metadata(pipe.resolve(requests[0]), "tiny")
    assert texts == wanted
    assert np.abs(np.asarray(picture, int) - drawn).max() <= (1 if output != "jpeg" else 60)
    with Image.open(path) as opened:
        assert opened.format.lower() == output


MODEL = {"weights": {"unet": "0" * 64}, "adapters": [], "embeddings": {}}
PLAIN = Request("a cat", height=32, width=32, num_inference_steps=6, guidance_scale=3.0)
CHANGES = {
    "prompt": "a dog",
    "negative_prompt": "",
    "seed": 1,
    "height": 48,
    "width": 48,
    "num_inference_steps": 7,
    "guidance_scale": 3.0000000000000004,
    "sampler": "ddim",
    "spacing": "karras",
    "eta": 0.5,
    "s_churn": 1.0,
    "s_tmin": 0.1,
    "s_tmax": 5.0,
    "s_noise": 1.1,
    "guidance_rescale": 0.5,
    "guidance_interval": (0.5, None),
    "clip_skip": 1,
    "image": Image.new("RGB", (32, 32)),
    "mask": Image.new("L", (32, 32)),
    "strength": 0.5,
    "upscale": 2.0,
    "upscale_strength": 0.6,
    "original_size": (32, 32),
    "crops_coords_top_left": (1, 0),
    "target_size": (32, 32),
}


def test_every_field_of_a_request_and_of_the_model_is_in_its_name():
    assert CHANGES.keys() == REQUEST_FIELDS.keys()
    names = [compute_item_id(replace(PLAIN, **{name: value}), MODEL) for name, value in CHANGES.items()]
    others = [
        {**MODEL, "weights": {"unet": "1"}},
        {**MODEL, "adapters": [["2", 0.5]]},
        {**MODEL, "embeddings": {"a": "3"}},
    ]
    names += [compute_item_id(PLAIN, model) for model in [MODEL, *others]]
    assert len(set(names)) == len(names) and all(len(name) == 24 and int(name, 16) >= 0 for name in names)


def test_a_number_is_the_same_however_it_is_written_and_wherever_the_name_is_made():
    whole = replace(PLAIN, guidance_scale=3, eta=0, guidance_interval=(1, 2))
    real = replace(PLAIN, guidance_scale=3.0, eta=0.0, guidance_interval=[1.0, 2.0])
    assert compute_item_id(whole, MODEL) == compute_item_id(real, MODEL)
    assert compute_item_id(PLAIN, MODEL) == compute_item_id(Request(**json.loads(json.dumps(PLAIN.to_record()))), MODEL)
    assert compute_item_id(PLAIN, MODEL) == "17c3e9709eb8950351b1fe82"


def test_canonical_json_is_one_text_for_equal_values():
    assert canonical_json({"b": 0.1, "a": [1, None, "é"]}) == '{"a":[1,null,"\\u00e9"],"b":0.1}'
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def test_a_model_is_its_hashes_and_an_adapter_without_weight_is_none(pipe, monkeypatch):
    monkeypatch.setattr(pipe.adapters, "loaded", {"x": (type("A", (), {"sha256": "9"}), 0.0)})
    assert fingerprint_model(pipe) == {"weights": pipe.model.weight_hashes, "adapters": [], "embeddings": {}}
    monkeypatch.setattr(
        pipe.adapters, "loaded", {k: (type("A", (), {"sha256": k}), w) for k, w in (("9", 0.5), ("1", 2))}
    )
    assert fingerprint_model(pipe)["adapters"] == [["1", 2], ["9", 0.5]]


def test_images_that_are_generated_at_once_share_the_seconds(pipe, tmp_path):
    start = time.monotonic()
    assert go(job_in(tmp_path / "job", pipe, batch_size=4), pipe) == 0
    lines = [json.loads(line) for line in (tmp_path / "job" / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) > 4 and 0 < sum(line["seconds"] for line in lines) <= time.monotonic() - start + 0.001 * len(
        lines
    )


def test_a_shared_clock_goes_on_by_each_share(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    clock, readings = worker.SharedClock(), []
    for seconds, running in ((1, 0), (2, 1), (4, 2), (8, 4)):
        now[0] += seconds
        readings.append(clock.advance(running))
    assert readings == [1, 3, 5, 7]
