"""scripts/bench: its arithmetic, and one tiny run from end to end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "bench_lib"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "bench_compare", FOLDER / "compare.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeWorker:
    """Answers as a worker does, from a list of times for each program."""

    def __init__(self, times):
        self.times = {name: iter(values) for name, values in times.items()}
        self.asked = []

    def ask(self, request, name):
        self.asked.append((request, name))
        if request != "time":
            return {}
        cpu = next(self.times[name])
        return {"cpu_ms": cpu, "wall_ms": 10 * cpu}


def test_a_ratio_is_the_median_of_the_rounds_ratios(bench):
    # The second round ran on a machine twice as slow: both programs met it.
    worker = FakeWorker({"ours": [3.0, 6.0, 3.3], "bare": [2.0, 4.0, 3.0]})
    comparison = bench.Comparison("ours / bare", "jax:ours", "jax:bare", 1.05)
    measured, (row,) = bench.measure([comparison], {"jax": worker}, 3)
    assert row["cpu_ratio"] == row["wall_ratio"] == 1.5
    assert measured["jax:ours"]["cpu_ms"] == 3.3
    assert measured["jax:bare"]["wall_ms"] == 30.0
    timed = [name for request, name in worker.asked if request == "time"]
    assert timed == ["bare", "ours", "ours", "bare", "bare", "ours"]


def test_each_side_is_judged_by_its_better_form(bench):
    ratios = {("jax", "nchw"): 0.9, ("jax", "channels_last"): 1.3}
    ratios |= {("onednn", "nchw"): 0.8, ("onednn", "channels_last"): 1.2}
    rows = [
        {"subject": f"{w}:a", "baseline": f"torch:{b}", "cpu_ratio": r, "limit": 1.1}
        for (w, b), r in ratios.items()
    ]
    assert [row["limit"] for row in bench.best_layout(rows)] == [None] * 3 + [1.1]


def test_a_dead_worker_ends_the_bench(bench):
    with pytest.raises(SystemExit, match="code 3"):
        bench.Worker([sys.executable, "-c", "raise SystemExit(3)"], {})


def test_quick_run(tmp_path):
    out = tmp_path / "bench.json"
    done = subprocess.run(
        [
            *(sys.executable, FOLDER / "main.py"),
            *("--quick", "--sections", "step", "--out", out),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    names = [f"jax:mlp/step/{name}" for name in ("bare", "linf", "l2", "l1")]
    assert list(report["programs"]) == names
    for sections in report["programs"].values():
        assert sections["step"]["cpu_ms"] > 0 and sections["step"]["wall_ms"] > 0
        assert len(sections["step"]["cpu_ms_all"]) == report["options"]["repeats"]
        assert sections["step"]["compile_s"] > 0
    assert {row["limit"] for row in report["comparisons"]} == {1.05, None}
    for row in report["comparisons"]:
        assert row["what"] in done.stdout
