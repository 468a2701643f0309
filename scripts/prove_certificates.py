"""Random and adversarial points inside certified balls: none may change the answer.

A point counts only if its distance, in float64, is at most the certified radius; what
answers is the float32 net. The linear nets are where certificates are tight: there an
adversarial point stands at the boundary itself.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from robustjax import data, models
from robustjax.certify.evaluate import logits
from robustjax.certify.radius import all_constants, certified_radius
from robustjax.certify.trace import trace
from robustjax.losses import difference, margin
from robustjax.models.importers.layers import from_layers
from robustjax.models.lipschitz import lipschitz_net

SHARED = Path(__file__).resolve().parents[2] / "shared"
OTHERS = {
    "eran_mnist_mlp_6_100": "mnist",
    "fast_mnist_pgd": "mnist",
    "kw_mnist_eps01": "mnist",
    "kw_fashion_eps01": "fashion_mnist",
    "sdp_mnist_cnn_a_adv": "mnist",
    "eran_cifar_convsmall_pgd": "cifar10",
    "vnncomp_cifar_resnet2b": "cifar10",
}
OWN = {
    "linear": models.mlp((), 10),
    "mlp": models.mlp((64, 64), 10),
    "aol": lipschitz_net(10),
    "wide_resnet": models.wide_resnet(10, 1, 10, base_width=4),
}
ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1}
PGD = rj.pgd(20)


def load(name: str, count: int) -> tuple[Any, np.ndarray]:
    """A net and test images."""
    if name in OWN:
        x = data.load("digits", None).x_test[:count].astype(np.float32) / 16
        params, extra = OWN[name].init(jax.random.key(7), x[:1])
        extra = jax.tree.map(lambda a: a + jnp.linspace(0, 0.3, a.size), extra)
        return models.logits_fn(OWN[name], params, extra), x
    folder = SHARED / "models" / name
    spec = json.loads((folder / "net.json").read_text())
    with np.load(folder / "weights.npz") as weights:
        model = from_layers(spec["layers"], dict(weights))
    x = data.load(OTHERS[name], SHARED / "data").x_test[:count]
    f = models.logits_fn(model, *model.init(jax.random.key(0), None))
    return f, x.astype(np.float32) / 255


def directions(rng, norm: str, shape: tuple[int, ...], count: int) -> Iterator:
    """Random perturbations of size 1: dense, sparse, and corners."""
    rows, width = shape[0], int(np.prod(shape[1:]))
    for number in range(count):
        delta = rng.normal(size=(rows, width))
        if number % 3 == 1:
            delta = np.sign(delta)
        if number % 3 == 2:
            kept = max(1, width // int(rng.integers(2, width)))
            delta *= rng.random(delta.shape).argsort(1) < kept
        delta /= np.linalg.norm(delta, ORDERS[norm], axis=1, keepdims=True)
        yield delta.reshape(shape)


@jax.jit
def attacked(f, x, y, target, threat, key):
    problem = rj.maximize(f, x, threat, lambda z: difference(z, y, target))
    return PGD(key, problem).x_adv


@jax.jit
def answers(f, x, y):
    z = f(x)
    return rj.predictions(z), margin(z, y)


def inside(x: np.ndarray, delta: np.ndarray, radius: np.ndarray, norm: str):
    """Float32 points near the edge of the balls, and which of them are inside."""
    rows = (-1,) + (1,) * (x.ndim - 1)
    x_adv = (x + delta * radius.reshape(rows)).astype(np.float32)
    moved = (x_adv.astype(np.float64) - x).reshape(len(x), -1)
    return x_adv, np.linalg.norm(moved, ORDERS[norm], axis=1) <= radius


def one(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One net, a row for each norm."""
    began = time.monotonic()
    f, x = load(name, options.images)
    graph = trace(f, x)
    constants = all_constants(graph)
    gap = np.abs(logits(graph, x) - np.asarray(f(x))).max()
    y = np.asarray(f(x)).argmax(1)
    for norm in ORDERS:
        radius = certified_radius(graph, x, y, norm, constants).astype(np.float64)
        yield {
            "net": name,
            "norm": norm,
            "images": len(x),
            "certified": float((radius > 0).mean()),
            "median_radius": float(np.median(radius)),
            "constant": constants[norm].vector,
            **attack(f, x, y, norm, radius, options),
            "float32_gap": float(gap),
            "seconds": time.monotonic() - began,
        }


def attack(
    f: Any, x: np.ndarray, y: np.ndarray, norm: str, radius: np.ndarray, options: Any
) -> dict[str, Any]:
    """Points of every kind in the balls of one net and norm."""
    labels = jnp.asarray(y)
    clean = np.asarray(answers(f, x, labels)[1])
    least = np.full(len(x), np.inf)
    counts = {"points": 0, "adversarial": 0, "violations": 0}

    def judge(delta: np.ndarray, kind: str) -> None:
        x_adv, mine = inside(x, delta, radius, norm)
        mine &= radius > 0
        answer, left = (np.asarray(a) for a in answers(f, x_adv, labels))
        least[mine] = np.minimum(least[mine], left[mine] / clean[mine])
        counts["points"] += int(mine.sum())
        counts["adversarial"] += int(mine.sum()) if kind == "adversarial" else 0
        counts["violations"] += int((mine & (answer != y)).sum())

    rng = np.random.default_rng(options.seed)
    for unit in directions(rng, norm, x.shape, options.random):
        # At the edge, and now and then further inside.
        judge(unit * rng.choice([1 - 1e-6, 0.7]), "random")
    threat = rj.threat(norm, jnp.asarray(radius * (1 - 1e-6)), -1e6, 1e6)
    for k in range(10):
        target = jnp.where(labels == k, (k + 1) % 10, k)
        key = jax.random.key(options.seed + k)
        delta = np.asarray(attacked(f, x, labels, target, threat, key), np.float64) - x
        size = np.linalg.norm(delta.reshape(len(x), -1), ORDERS[norm], axis=1)
        delta /= np.maximum(size, 1e-30).reshape((-1,) + (1,) * (x.ndim - 1))
        for shrink in (1 - 1e-6, 1 - 1e-4, 1 - 1e-2):
            judge(shrink * delta, "adversarial")
    return {**counts, "least_margin_left": float(least.min())}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/prove_certificates", description=__doc__
    )
    add = parser.add_argument
    names = [*OWN, *OTHERS]
    add("--nets", nargs="+", default=names, choices=names, metavar="NET")
    add("--images", type=int, default=50, help="balls for each net and norm")
    add("--random", type=int, default=60, help="random points in each ball")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/prove_certificates.jsonl"))
    options = parser.parse_args()
    if not SHARED.is_dir() and set(options.nets) & set(OTHERS):
        raise SystemExit(f"{SHARED} is missing: give --nets {' '.join(OWN)}.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    points = violations = 0
    for name in options.nets:
        for row in one(name, options):
            points, violations = points + row["points"], violations + row["violations"]
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name:26} {row['norm']:4}  certified {row['certified']:.2f}  median "
                f"radius {row['median_radius']:.3g}  points {row['points']:6} "
                f"({row['adversarial']} adversarial)  violations {row['violations']}  "
                f"least margin left {row['least_margin_left']:.2g}  "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
    print(f"{points:,} points inside certified balls, {violations} violations")
    if violations:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
