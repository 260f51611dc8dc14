"""Mutated files of every kind through the command line: `scripts/fuzz.py`, a few cases of each parser."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = 300


def test_mutated_files_end_in_a_status_and_at_most_one_error_line(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "fuzz.py", "--cases", str(CASES), "--keep", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{CASES} cases, 0 faults\n"
