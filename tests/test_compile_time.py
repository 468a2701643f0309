"""Slow: scripts/compile_time runs, and a warm cache saves XLA's time."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "compile_time"


@pytest.mark.slow
def test_a_warm_cache_saves_the_time_of_xla():
    done = subprocess.run(
        [SCRIPT, "--quick", "--norm", "L2"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = dict(
        re.findall(r"^(\w+) .*?([\d.]+) s compiling", done.stdout, re.MULTILINE)
    )
    assert list(found) == ["cold", "first", "warm"], done.stdout
    assert "(apgd-ce, apgd-t, fab-t, square)" in done.stdout
    assert float(found["warm"]) < float(found["first"]) / 2


def test_a_bad_flag_is_named():
    done = subprocess.run(
        [SCRIPT, "--norm", "L0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--norm" in done.stderr and "L0" in done.stderr
