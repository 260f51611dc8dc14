"""What the benchmarks share: timing contestants in turn, ratios with an interval, one JSON and one table."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 2


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list]:
    """Seconds of every contestant in each round, in turn A B C A B C ..., after warm-ups that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for k in range(WARM_UPS + rounds):
        for name, run in contestants.items():
            start = clock()
            run()
            if k >= WARM_UPS:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float], draws: int = 2000) -> dict[str, float]:
    """The median of the rounds' ratios slow / fast, and its 90 % bootstrap interval."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    low, high = medians[draws // 20], medians[-draws // 20]
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def clock(name: str) -> Callable[[], float]:
    """`cpu`: the process's own CPU time, robust on a shared machine with one thread; `wall`: what a user waits."""
    return {"cpu": time.process_time, "wall": time.perf_counter}[name]


def report(ours: str, seconds: Mapping[str, list[float]], about: Mapping[str, Any], out: Path | None) -> None:
    """Print a Markdown table of medians and of every contestant's ratio to ours; write all of it as JSON."""
    rows = {
        name: {"median_s": statistics.median(s), "min_s": min(s), **ratio(s, seconds[ours])}
        for name, s in seconds.items()
    }
    print("| contestant | median s | min s | time / ours | 90 % interval |\n|---|---|---|---|---|")
    for name, r in rows.items():
        interval = f"{r['low']:.2f} to {r['high']:.2f}"
        print(f"| {name} | {r['median_s']:.3f} | {r['min_s']:.3f} | {r['ratio']:.2f} | {interval} |")
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    if out is not None:
        out.write_text(json.dumps({**about, **machine, "results": rows}, indent=2) + "\n")
