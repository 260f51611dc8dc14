"""Batch jobs of the shipped model: what continuous batching gains, what strictness costs, how long the device idles.

    python scripts/bench_batch.py [--images 32] [--job 500] [--batch 8] [--steps 6 12 36] [--size 128] [--rounds 3]

Contestants draw the same requests, whose numbers of steps are mixed: continuously; in groups, each drawn to its end
before the next begins; and continuously in strict mode. The gain depends on what a call of few rows costs: of large
pictures on a CPU in proportion to the rows, and nothing is gained; of small ones, and on a GPU, nearly as much as a
full one. So the numbers of calls are told too.
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
from ldm.jobs.worker import STRICT_ROWS, Job
from ldm.pipeline.scheduler import BatchScheduler
from ldm.rng import derive_seed


def draw(scheduler: BatchScheduler, requests: list[Request]) -> None:
    """All of them, with continuous batching."""
    list(scheduler.run(requests, lambda share: None))


def draw_grouped(scheduler: BatchScheduler, requests: list[Request], size: int) -> None:
    """Group after group."""
    for start in range(0, len(requests), size):
        draw(scheduler, requests[start : start + size])


def calls(scheduler: BatchScheduler, run: Callable[[], None]) -> int:
    """How often a run asks the network."""
    ask, count = scheduler.batched_unet.function, 0

    def counted(*rows):
        nonlocal count
        count += 1
        return ask(*rows)

    scheduler.batched_unet.function = counted
    run()
    scheduler.batched_unet.function = ask
    return count


def idle(pipe: Pipeline, requests: list[Request], size: int) -> float:
    """The share of a job's time, from its first call on, in which neither the network nor the decoder was asked."""
    spans: list[tuple[float, float]] = []
    make = worker.build_worker_scheduler

    def timed(function):
        def ask(*rows):
            start = time.perf_counter()
            try:
                return function(*rows)
            finally:
                spans.append((start, time.perf_counter()))

        return ask

    def watched(job: Job, pipe: Pipeline) -> BatchScheduler:
        scheduler = make(job, pipe)
        for part in (scheduler.batched_unet, scheduler.batched_decode):
            part.function = timed(part.function)
        return scheduler

    with TemporaryDirectory() as folder:
        entries = [PromptEntry(k + 1, request) for k, request in enumerate(requests)]
        worker.build_worker_scheduler = watched
        worker.run_worker(Job(Path(folder), entries, lambda device: pipe, batch_size=size), threading.Event())
        end = time.perf_counter()
        worker.build_worker_scheduler = make
    busy, reached = 0.0, min(start for start, _ in spans)
    first = reached
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return 1 - busy / (end - first)


def arguments() -> argparse.Namespace:
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


def mixed(pipe: Pipeline, count: int, steps: Sequence[int], size: int) -> list[Request]:
    """Requests of a size whose numbers of steps are drawn from some."""
    asked = Request("a red apple", height=size, width=size)
    numbers = [steps[derive_seed(k) % len(steps)] for k in range(count)]
    return [pipe.resolve(replace(asked, seed=k, num_inference_steps=n)) for k, n in enumerate(numbers)]


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(device=args.device)
    requests = mixed(pipe, args.images, args.steps, args.size)
    scheduler = BatchScheduler(pipe.model, pipe.prompt_encoder, args.batch)
    strict = BatchScheduler(pipe.model, pipe.prompt_encoder, args.batch, STRICT_ROWS)
    contestants = {
        "continuous": partial(draw, scheduler, requests),
        "grouped": partial(draw_grouped, scheduler, requests, args.batch),
        "continuous, strict": partial(draw, strict, requests),
    }
    counts = [calls(scheduler, contestants[name]) for name in ("continuous", "grouped")]
    print(
        f"calls of the network: continuous {counts[0]}, grouped {counts[1]}, {counts[1] / counts[0]:.2f} times as many"
    )
    share = idle(pipe, mixed(pipe, args.job, args.steps, args.size), args.batch)
    print(f"device idle in a job of {args.job} images: {share:.1%}", flush=True)
    about = {
        "images": args.images,
        "batch": args.batch,
        "steps": args.steps,
        "size": args.size,
        "clock": args.clock,
        "calls": counts,
        "job": args.job,
        "idle": share,
    }
    report("continuous", alternate(contestants, args.rounds, clock(args.clock)), about, args.out)


if __name__ == "__main__":
    main()
