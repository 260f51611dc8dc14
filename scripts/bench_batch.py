"""Batch jobs of the shipped model: what continuous batching gains, what batch invariance costs, and idle times.

    python scripts/bench_batch.py [--images 32] [--job 500] [--batch 8] [--steps 6 12 36] [--size 128] [--rounds 3]

Contestants generate the same requests, whose numbers of steps are mixed: continuously; in groups, each finished before
the next begins; and continuously with calls of one size. The gain depends on the cost of an evaluation of few rows. For
large images on a CPU that is in proportion to the rows, and nothing is gained; for small ones, and on a GPU, it is
nearly as much as for many rows. So the numbers of evaluations are printed too.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _bench import alternate, clock, report

from ldm import Pipeline, Request
from ldm.jobs import worker
from ldm.jobs.source import PromptEntry
from ldm.jobs.worker import INVARIANT_ROWS, Job
from ldm.pipeline.scheduler import BatchScheduler
from ldm.rng import derive_seed


def generate(scheduler: BatchScheduler, requests: list[Request]) -> None:
    """All requests, with continuous batching."""
    list(scheduler.run(requests, lambda progress_delta: None))


def generate_grouped(scheduler: BatchScheduler, requests: list[Request], size: int) -> None:
    """One group of requests after another."""
    for start in range(0, len(requests), size):
        generate(scheduler, requests[start : start + size])


def count_evaluations(scheduler: BatchScheduler, run: Callable[[], None]) -> int:
    """The number of network evaluations of a run."""
    evaluate, count = scheduler.batched_unet.function, 0

    def counted(*rows):
        nonlocal count
        count += 1
        return evaluate(*rows)

    scheduler.batched_unet.function = counted
    run()
    scheduler.batched_unet.function = evaluate
    return count


def idle_share(pipe: Pipeline, requests: list[Request], size: int) -> float:
    """The share of a job's time, from its first evaluation on, in which neither the network nor the decoder runs."""
    spans: list[tuple[float, float]] = []
    build = worker.build_worker_scheduler

    def timed(function):
        def call(*rows):
            start = time.perf_counter()
            try:
                return function(*rows)
            finally:
                spans.append((start, time.perf_counter()))

        return call

    def build_timed(job: Job, pipe: Pipeline) -> BatchScheduler:
        scheduler = build(job, pipe)
        for part in (scheduler.batched_unet, scheduler.batched_decode):
            part.function = timed(part.function)
        return scheduler

    with TemporaryDirectory() as folder:
        entries = [PromptEntry(k + 1, request) for k, request in enumerate(requests)]
        worker.build_worker_scheduler = build_timed
        worker.run_worker(Job(Path(folder), entries, lambda device: pipe, batch_size=size), threading.Event())
        end = time.perf_counter()
        worker.build_worker_scheduler = build
    busy, reached = 0.0, min(start for start, _ in spans)
    first = reached
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return 1 - busy / (end - first)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--job", type=int, default=500, help="images of the job whose idle time is measured")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 12, 36])
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_requests(pipe: Pipeline, count: int, steps: Sequence[int], size: int) -> list[Request]:
    """Requests of one size with random numbers of steps."""
    request = Request("a red apple", height=size, width=size)
    numbers = [steps[derive_seed(k) % len(steps)] for k in range(count)]
    return [pipe.resolve(replace(request, seed=k, num_inference_steps=n)) for k, n in enumerate(numbers)]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(device=args.device)
    requests = make_requests(pipe, args.images, args.steps, args.size)
    scheduler = BatchScheduler(pipe.model, pipe.prompt_encoder, args.batch)
    invariant = BatchScheduler(pipe.model, pipe.prompt_encoder, args.batch, INVARIANT_ROWS)
    contestants = {
        "continuous": partial(generate, scheduler, requests),
        "grouped": partial(generate_grouped, scheduler, requests, args.batch),
        "continuous, batch-invariant": partial(generate, invariant, requests),
    }
    counts = [count_evaluations(scheduler, contestants[name]) for name in ("continuous", "grouped")]
    ratio = counts[1] / counts[0]
    print(f"network evaluations: continuous {counts[0]}, grouped {counts[1]}, {ratio:.2f} times as many")
    share = idle_share(pipe, make_requests(pipe, args.job, args.steps, args.size), args.batch)
    print(f"device idle in a job of {args.job} images: {share:.1%}", flush=True)
    about = {name: getattr(args, name) for name in ("images", "batch", "steps", "size", "clock", "job")}
    about |= {"calls": counts, "idle": share}
    report("continuous", alternate(contestants, args.rounds, clock(args.clock)), about, args.out)


if __name__ == "__main__":
    main()
