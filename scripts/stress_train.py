"""Kill trainings at 20 random points, inside checkpoints' writes too, and compare how they end with an undisturbed one.

    python scripts/stress_train.py [--kills 20]

The test suite does two.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TEST = Path(__file__).resolve().parents[1] / "tests" / "train" / "test_state.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-k", "killed_anywhere", str(TEST)]
    sys.exit(subprocess.call(command, env={**os.environ, "LDM_STRESS_KILLS": str(kills)}, cwd=TEST.parents[2]))


if __name__ == "__main__":
    main()
