"""Kill batch jobs at 200 random points: workers, drivers and inside writes; on this machine and on a Ray cluster.

    python scripts/stress_batch.py [--kills 200]

How each ends is compared with an undisturbed job: manifest and files, bit for bit. The test suite does 15 and no Ray.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "jobs"
FILES = ("test_kill.py", "test_faults.py", "test_worker.py", "test_engines.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    kills = parser.parse_args().kills
    words = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *(str(TESTS / file) for file in FILES)]
    sys.exit(subprocess.call(words, env={**os.environ, "LDM_STRESS_KILLS": str(kills)}, cwd=TESTS.parents[1]))


if __name__ == "__main__":
    main()
