"""Suites of ours on nets of others, example by example against official AutoAttack."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import robustjax as rj
from robustjax import data, models
from robustjax.models.importers.layers import from_layers

SHARED = Path(__file__).resolve().parents[2] / "shared"
CASES: dict[str, tuple[str, str, str]] = {
    "fast_mnist_pgd_Linf_0.3": ("mnist", "Linf", "0.3"),
    "fast_mnist_pgd_L2_1.5": ("mnist", "L2", "1.5"),
    "kw_fashion_eps01_Linf_0.1": ("fashion_mnist", "Linf", "0.1"),
    "sdp_mnist_cnn_a_adv_Linf_0.3": ("mnist", "Linf", "0.3"),
    "vnncomp_cifar_resnet2b_Linf_2over255": ("cifar10", "Linf", "2/255"),
    "eran_cifar_convsmall_pgd_Linf_2over255": ("cifar10", "Linf", "2/255"),
    "eran_cifar_convsmall_pgd_L2_0.25": ("cifar10", "L2", "0.25"),
    "eran_cifar_convsmall_pgd_L1_5": ("cifar10", "L1", "5"),
}


def times(scale: Any, f: Any, x: Any, key: Any = None) -> Any:
    return scale * f(x, key)


def load(case: str) -> tuple[Any, np.ndarray, dict[str, np.ndarray], Any, dict]:
    """The net, its images, the official verdicts, the threat, the official costs."""
    dataset, norm, epsilon = CASES[case]
    folder = SHARED / "models" / case.split("_L")[0]
    spec = json.loads((folder / "net.json").read_text())
    with np.load(folder / "weights.npz") as weights:
        model = from_layers(spec["layers"], dict(weights))
    with np.load(SHARED / "reference" / f"{case}.npz") as arrays:
        known = {name: arrays[name] for name in arrays.files}
    images = data.load(dataset, SHARED / "data").x_test[known["index"]]
    f = models.logits_fn(model, *model.init(jax.random.key(0), None))
    costs = json.loads((SHARED / "reference" / f"{case}.json").read_text())
    return f, images.astype(np.float32) / 255, known, rj.threat(norm, epsilon), costs


def in_float64(report: rj.Report, case: str, epsilon: float) -> bool:
    """Whether every broken point lies in ball and box, computed in float64."""
    (found,) = report.threats.values()
    assert report.x is not None
    broken = report.correct & ~report.robust
    delta = found.x_adv[broken].astype(np.float64) - report.x[broken]
    flat = delta.reshape(len(delta), -1)
    order = {"Linf": np.inf, "L2": 2, "L1": 1}[CASES[case][1]]
    size = np.linalg.norm(flat, order, axis=1)
    inside = (found.x_adv[broken] >= 0) & (found.x_adv[broken] <= 1)
    return bool((size <= epsilon + 2e-6 * max(1, epsilon)).all() and inside.all())


def one(case: str, suite: str, seed: int, options: argparse.Namespace) -> dict:
    f, x, known, threat, costs = load(case)
    if options.scale != 1:
        f = jax.tree_util.Partial(times, np.float32(options.scale), f)
    wall, cpu = time.monotonic(), time.process_time()
    report = rj.evaluate(
        f,
        *(x, known["label"], threat),
        suite=suite,
        key=jax.random.key(seed),
        batch_size=options.batch_size,
        index=known["index"],
        checks=options.checks,
        progress=False,
    )
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    (found,) = report.threats.values()
    official = sum(s["fwd"] + s["bwd"] for s in costs["stages"].values())
    counted = sum(s.forward + s.backward for s in found.stages)
    executed = sum(s.executed_forward + s.executed_backward for s in found.stages)
    extra = known["robust"] & ~report.robust
    row = {
        "case": case,
        "suite": suite,
        "seed": seed,
        "official": float(known["robust"].mean()),
        "ours": report.robust_accuracy,
        "missed": int((report.robust & ~known["robust"]).sum()),
        "extra": known["index"][extra].tolist(),
        "extra_by": found.broken_by_name[extra].tolist(),
        "agreement": float((report.robust == known["robust"]).mean()),
        "passes": counted / official,
        "executed": executed / counted,
        "seconds": wall,
        "cpu_seconds": cpu,
        "official_seconds": costs["seconds_1_thread"],
        "flipped": list(found.flipped),
        "feasible_in_float64": in_float64(report, case, float(threat.epsilon)),
        "flags": [flag.name for flag in report.flags],
        "stages": {s.name: [s.points, s.broken, s.forward, s.backward, s.seconds]
                   for s in found.stages},
        # Where FAB and Square found what they broke, in the ranking by margin.
        "ranks": {name: np.round(np.sort(found.rank[found.broken_by[name]]), 3).tolist()
                  for name in ("fab-t", "square") if name in found.broken_by},
        "robust": report.robust.tolist(),
    }  # fmt: skip
    print(
        f"{case:38} {suite:8} {seed}  official {row['official']:.3f}  ours "
        f"{row['ours']:.3f}  missed {row['missed']:2}  extra {len(row['extra']):2}  "
        f"agree {row['agreement']:.3f}  passes {row['passes']:6.2%}  executed "
        f"{row['executed']:.2f}  {wall:.0f} s (CPU {cpu:.0f}, official "
        f"{row['official_seconds']:.0f})  float64 {row['feasible_in_float64']}"
        f"{'  FLIPPED ' + str(row['flipped']) if row['flipped'] else ''}"
        f"{'  ' + str(row['flags']) if row['flags'] else ''}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/prove_evaluation", description=__doc__
    )
    add = parser.add_argument
    add("--suites", nargs="+", default=["standard", "fast", "strong"])
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--scale", type=float, default=1.0, help="multiply the logits")
    add("--batch-size", type=int, default=250)
    add("--checks", default="none", choices=["none", "default", "full"])
    add("--out", type=Path, default=Path("runs/prove_evaluation.jsonl"))
    options = parser.parse_args()
    if not (SHARED / "reference").is_dir():
        raise SystemExit(
            f"{SHARED / 'reference'} is missing: this proof needs ../shared."
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for suite in options.suites:
        for case in options.cases:
            for seed in options.seeds:
                row = one(case, suite, seed, options)
                with open(options.out, "a") as file:
                    file.write(json.dumps({**row, "scale": options.scale}) + "\n")


if __name__ == "__main__":
    main()
