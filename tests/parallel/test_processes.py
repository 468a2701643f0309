"""Real processes on this machine; scripts/prove_pod says what it found."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prove_pod.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", ["numbers", "kill", "sigterm", "fewer"])
def test_several_processes(part):
    """1, 2 and 4 processes, a loss, a preemption, and fewer devices."""
    command = [sys.executable, str(SCRIPT), "--parts", part]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=3500,
        cwd=SCRIPT.parents[1],
        env={"PYTHONPATH": str(SCRIPT.parents[1]), "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
