"""scripts/fast_at_torch: what it refuses, how it sums times up; slow: our side runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "scripts/fast_at_torch.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, FILE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


def test_what_it_refuses():
    done = run("--torch-python", "/no/such/python")
    assert done.returncode == 1
    assert "no PyTorch in /no/such/python" in done.stderr
    assert "--torch-python PATH" in done.stderr
    done = run("--target", "30")
    assert done.returncode == 2
    assert "--target is 30.0; give an accuracy from 0 to 1" in done.stderr
    done = run("--core", "0", "9999")
    assert done.returncode == 1
    assert "--core is [0, 9999]; there are" in done.stderr


def test_time_until_the_target():
    spec = importlib.util.spec_from_file_location("fast_at_torch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [
        {"epoch": n, "seconds": 10.0 * n, "cpu_seconds": n, "held_out": {"PGD-10": a}}
        for n, a in ((1, 0.2), (2, 0.31), (3, 0.29))
    ]
    found = module.summary(rows, 0.3)
    assert (found["seconds"], found["cpu_seconds"]) == (60.0, 6.0)
    assert found["reached"] == {"epoch": 2, "seconds": 30.0, "cpu_seconds": 3.0}
    assert module.summary(rows, 0.32)["reached"] is None


@pytest.mark.slow
def test_our_side_runs_and_goes_on_where_it_was(tmp_path):
    random = np.random.RandomState(0)
    arrays = {
        f"{part}_{split}": random.randint(0, top, shape).astype(kind)
        for split, count in (("train", 160), ("test", 40))
        for part, top, shape, kind in (
            ("x", 256, (count, 32, 32, 3), np.uint8),
            ("y", 10, count, np.int32),
        )
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    given = ("--quick", "--data-dir", tmp_path, "--out", tmp_path / "out")
    given += ("--torch-python", "/no/such/python")
    done = run(*given)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["sides"]) == ["robustjax"]
    rows = report["rows"]["robustjax"]
    assert [rows[n]["epoch"] for n in ("1", "2")] == [1, 2]
    assert all(row["cpu_seconds"] > 0 for row in rows.values())
    assert set(report["sides"]["robustjax"]["test"]) == {"clean", "PGD-10", "PGD-20"}
    # All epochs are there: only the test images are judged again.
    assert run(*given).returncode == 0
    again = json.loads((tmp_path / "out/report.json").read_text())
    assert again["sides"] == report["sides"]
    refused = run(*given, "--seed", 1)
    assert refused.returncode == 1
    assert "was begun with" in refused.stderr
