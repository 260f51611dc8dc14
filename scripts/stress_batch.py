"""Kill batch jobs at random, 200 times under each engine: drivers, workers, nodes of a Ray cluster, and inside writes.

    python scripts/stress_batch.py [--kills 200] [--engine inline|local|ray|all]

Each job is run again until it ends, and then compared with an undisturbed one: manifest and files, bit for bit. A line
for each engine counts the kills. `all` also compares images that were generated in batches of 1 to 8, and by 1 to 4
workers. The test suite does 20 kills, 4 on Ray where it is installed, and batches of 1, 3, 8.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "jobs"
PURE = "same_by_any_number_of_workers or same_in_any_batch"
ENGINES = {  # names of tests
    "inline": "one_process",
    "local": "local_processes",
    "ray": "two_nodes",
    "all": f"ends_as_one_that_was_not or {PURE}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--engine", choices=ENGINES, default="all")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-W", "ignore", "-k", ENGINES[args.engine]]
    command += [str(TESTS / name) for name in ("test_engines.py", "test_worker.py")]
    sys.exit(subprocess.call(command, env={**os.environ, "LDM_STRESS_KILLS": str(args.kills)}, cwd=TESTS.parents[1]))


if __name__ == "__main__":
    main()
