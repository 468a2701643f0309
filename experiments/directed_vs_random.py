"""Random noise moves a score by epsilon |w|_2, the directed step by epsilon |w|_1.

    python -m experiments.directed_vs_random --out runs/directed_vs_random
    python -m experiments.directed_vs_random --dataset fashion_mnist --data-dir DIR

First a linear score w.x with random weights in up to 8,192 dimensions: five kinds of
noise, whose mean change is zero and whose spread is a known constant times |w|_2,
against the one step along the gradient. The ratio grows like sqrt(d). Then nets that
were trained on one set of images in several sizes, and one net behind a k x k mean,
whose gradient is the same in each block of k x k pixels.

    exponent of the ratio in d        measured   expected
    linear, Linf corner and ball      0.498      0.5 (+- 0.05)
    linear, L2 sphere, L2 ball        0.501, 0.486
    MLP behind a mean, CNN            0.499, 0.503
    MLP and CNN trained at each size  0.489, 0.443   positive

The CNN's gradients concentrate a little as the images grow, so its ratio grows more
slowly than sqrt(d). 87 CPU seconds on one of two shared AMD EPYC cores.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import data, models, plots
from robustjax.losses import difference
from robustjax.methods.standard import standard
from robustjax.problems import ranked_class

EXACT = jax.lax.Precision.HIGHEST
FACTORS = (1, 2, 3)  # of the image side, for one net behind a mean


@dataclass(frozen=True)
class Config:
    out: str = "runs/directed_vs_random"
    """Where the results, the picture and the nets go."""
    seed: int = 0
    """Decides weights, noise and the order of the images."""
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    """Images; all but the embedded digits need --data-dir."""
    data_dir: str | None = None
    """Where other sets lie."""
    dims: tuple[int, ...] = (8, 32, 128, 512, 2048, 8192)
    """Dimensions of the linear score."""
    num_weights: int = 5
    """Random linear scores for each dimension."""
    num_noise: int = 4000
    """Noise samples for each linear score."""
    epsilon: float = 0.1
    """Budget of the linear score; it cancels in the ratio."""
    nets: tuple[Literal["MLP", "CNN"], ...] = ("MLP", "CNN")
    """One hidden layer; two convolutions (`small_cnn`)."""
    sizes: tuple[int, ...] = ()
    """Image sides; empty: 4, 8, 16, 24 (digits) or 7, 14, 28 (Fashion-MNIST)."""
    net_epsilon: float = 0.01
    """Linf budget for nets: small, so that they are nearly linear within it."""
    net_noise: int = 200
    """Noise samples for each image."""
    num_train: int = 10_000
    """How many of the training images, at most."""
    num_test: int = 360
    """How many of the test images."""
    num_epochs: int = 20
    """Passes over the training images, for each net."""


def sphere(key, epsilon, shape):
    """Uniform on the Euclidean sphere of radius epsilon."""
    direction = jax.random.normal(key, shape)
    return epsilon * direction / jnp.linalg.norm(direction)


def signs(key, epsilon, shape):
    """A random corner of the Linf ball."""
    return epsilon * jax.random.rademacher(key, shape, jnp.float32)


# name -> norm, sampler, and spread / (epsilon |w|_2) in dimension d.
NOISES = {
    "Linf corner": (rj.Linf(), signs, lambda d: 1.0),
    "Linf ball": (rj.Linf(), rj.Linf().sample, lambda d: 3**-0.5),
    "L2 sphere": (rj.L2(), sphere, lambda d: d**-0.5),
    "L2 ball": (rj.L2(), rj.L2().sample, lambda d: (d + 2) ** -0.5),
    "L1 ball": (rj.L1(), rj.L1().sample, lambda d: (2 / ((d + 1) * (d + 2))) ** 0.5),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def linear_changes(noise: str, key, w, num_noise: int, epsilon):
    """The score's change under each noise sample `[S]`, and under the directed step."""
    norm, sample, _ = NOISES[noise]
    x_key, key = jax.random.split(key)
    x = jax.random.uniform(x_key, w.shape)

    def score(x):
        return jnp.dot(x, w, precision=EXACT)

    def change(delta):
        return score(x + delta) - score(x)

    step = epsilon * norm.steepest(jax.grad(score)(x))
    keys = jax.random.split(key, num_noise)
    draw = jax.lax.map(
        lambda k: change(sample(k, epsilon, w.shape)), keys, batch_size=50
    )
    return draw, change(step)


def measure_linear(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Noise -> `[dims, weights]` arrays of what was measured and what theory says."""
    rows, root = {name: [] for name in NOISES}, jax.random.key(config.seed)
    for d in config.dims:
        for i in range(config.num_weights):
            keys = jax.random.split(
                jax.random.fold_in(root, i * 100_000 + d), 1 + len(NOISES)
            )
            w = jax.random.normal(keys[0], (d,))
            for key, (name, (norm, _, constant)) in zip(
                keys[1:], NOISES.items(), strict=True
            ):
                draw, step = linear_changes(
                    name, key, w, config.num_noise, config.epsilon
                )
                draw = np.asarray(draw, float)
                theory = config.epsilon * np.array(
                    [constant(d) * float(jnp.linalg.norm(w)), float(norm.dual(w))]
                )
                rows[name].append([draw.mean(), draw.std(ddof=1), float(step), *theory])
    fields = ("mean", "spread", "directed", "spread_theory", "directed_theory")
    shape = (len(config.dims), config.num_weights)
    return {
        name: {
            f: np.reshape(v, shape)
            for f, v in zip(fields, np.transpose(values), strict=True)
        }
        for name, values in rows.items()
    }


def resize(x: np.ndarray, size: int) -> np.ndarray:
    """Images `[N, H, W, C]` at another size: means of blocks, or linear between."""
    n, side, _, channels = x.shape
    if size < side and side % size == 0:
        blocks = x.reshape(n, size, side // size, size, side // size, channels)
        return blocks.mean((2, 4))
    return np.asarray(jax.image.resize(x, (n, size, size, channels), "linear"))


def lift(f, factor: int):
    """The net behind a mean over blocks of `factor` x `factor` pixels."""

    def lifted(x):
        n, height, width, channels = x.shape
        shape = (n, height // factor, factor, width // factor, factor, channels)
        return f(x.reshape(shape).mean((2, 4)))

    return lifted


@functools.partial(jax.jit, static_argnames=("factor", "block", "num_noise"))
def net_changes(f, key, x, y, epsilon, *, factor=1, block=1, num_noise=200):
    """`[B]` each: directed step, mean and spread under random signs, |g|_1 and |g|_2.

    The score is the runner-up's logit minus the true one's. `factor`: see `lift`; the
    noise is one sign for each block of `block` x `block` pixels.
    """
    net = f if factor == 1 else lift(f, factor)
    target = ranked_class(net(x), y, 1)

    def score(x):
        return difference(net(x), y, target)

    start, g = score(x), jax.grad(lambda x: score(x).sum())(x)
    directed = score(x + epsilon * jnp.sign(g)) - start
    coarse = (*x.shape[:1], x.shape[1] // block, x.shape[2] // block, x.shape[3])

    def one(total, key):
        delta = signs(key, epsilon, coarse).repeat(block, 1).repeat(block, 2)
        change = score(x + delta) - start
        return (total[0] + change, total[1] + change**2), None

    zeros = (jnp.zeros_like(start), jnp.zeros_like(start))
    (first, second), _ = jax.lax.scan(one, zeros, jax.random.split(key, num_noise))
    mean = first / num_noise
    spread = jnp.sqrt((second - num_noise * mean**2) / (num_noise - 1))
    axes = (1, 2, 3)
    return directed, mean, spread, jnp.abs(g).sum(axes), jnp.sqrt((g**2).sum(axes))


def exponent(d: Sequence[float], ratio: Any) -> float:
    """The slope of log(ratio) against log(d), by least squares."""
    return float(np.polyfit(np.log(np.asarray(d, float)), np.log(ratio), 1)[0])


def row(f, x, y, config: Config, factor: int, block: int) -> dict[str, float]:
    """Quartiles of the ratio over the images, and what the gradient predicts."""
    key = jax.random.key(config.seed)
    found = {"size": x.shape[1], "d": x[0].size}
    for kind, side in {"": 1, "blocks_": block}.items():
        if side:
            changes = net_changes(
                *(f, key, x, y, config.net_epsilon),
                factor=factor,
                block=side,
                num_noise=config.net_noise,
            )
            directed, mean, spread, l1, l2 = (np.asarray(v, float) for v in changes)
            low, middle, high = np.quantile(directed / spread, [0.25, 0.5, 0.75])
            found |= {f"{kind}ratio": middle, f"{kind}low": low, f"{kind}high": high}
            found[f"{kind}mean_over_spread"] = np.median(mean / spread)
            if side == 1:
                found["predicted"] = np.median(l1 / l2)
                found["effective_dimension"] = np.median((l1 / l2) ** 2)
    return {name: float(value) for name, value in found.items()}


def measure_nets(config: Config, splits: common.Splits) -> dict[str, list[dict]]:
    """Train every net at every size; name -> one row for each size."""
    n = min(config.num_train, splits.train.x.shape[0])
    x_train = np.asarray(data.to_float(splits.train.x[:n], splits.train.scale))
    y_train, (x_test, y) = np.asarray(splits.train.y[:n]), splits.test
    native = x_test.shape[1]
    sizes = config.sizes or ((4, 8, 16, 24) if native == 8 else (7, 14, 28))
    rows = {}
    for name in config.nets:
        model = models.mlp((128,)) if name == "MLP" else models.small_cnn()
        rows[name], rows[f"{name}, lifted"] = [], []
        for size in sizes:
            pixels = np.rint(255 * resize(x_train, size)).astype(np.uint8)
            f, _ = ideas.train(
                *(config.out, f"{name}_{size}", model, standard(model)),
                data.resident(pixels, y_train, 255),
                {"dataset": config.dataset, "num_train": n, "size": size},
                num_epochs=config.num_epochs,
                seed=config.seed,
            )
            x = resize(x_test, size)
            block = 0 if size % native else size // native
            accuracy = float((rj.predictions(f(jnp.asarray(x))) == y).mean())
            found = row(f, x, y, config, 1, block) | {"accuracy": accuracy}
            rows[name].append(found)
            if size == native:
                for k in FACTORS:
                    fine = x.repeat(k, 1).repeat(k, 2)
                    rows[f"{name}, lifted"].append(row(f, fine, y, config, k, k))
    return rows


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    linear = measure_linear(config)
    splits = common.load_splits(
        config.dataset, config.data_dir, config.seed, 0, config.num_test
    )
    nets = measure_nets(config, splits)
    claims, measured = judge(config, linear, nets)
    name = "directed_vs_random.png"
    plots.save(draw(config, linear, nets), Path(config.out) / name)
    measured["data"] = splits.used
    return ideas.save(config.out, config, claims, measured, [name], began)


def judge(config: Config, linear: dict, nets: dict) -> tuple[dict, dict]:
    """Claims, and the numbers that they come from."""
    claims, exponents = {}, {}

    def claim(name: str, says: str, value: Any, low: float, high: float) -> None:
        claims[name] = ideas.Claim(says, float(value), low, high)

    errors = {"mean": [], "spread": [], "directed": []}
    for name, found in linear.items():
        errors["mean"].append(found["mean"] / found["spread"] * config.num_noise**0.5)
        errors["spread"].append(found["spread"] / found["spread_theory"] - 1)
        errors["directed"].append(found["directed"] / found["directed_theory"] - 1)
        slope = exponent(config.dims, (found["directed"] / found["spread"]).mean(1))
        exponents[name] = slope
        if name != "L1 ball":  # there |w|_inf grows too, like sqrt(log d)
            says = f"{name}: directed / random grows as d^0.5 (+- 0.05)"
            claim(f"exponent {name}", says, slope, 0.45, 0.55)
    largest = {name: np.abs(values).max() for name, values in errors.items()}
    says = "linear: largest |mean change|, in standard errors of 0"
    claim("mean", says, largest["mean"], 0, 5)
    says = "linear: |spread / (constant epsilon |w|_2) - 1| <= 0.06"
    claim("spread", says, largest["spread"], 0, 0.06)
    says = "linear: |directed / (epsilon |w|_dual) - 1| <= 1e-3"
    claim("directed", says, largest["directed"], 0, 1e-3)

    for name, rows in nets.items():
        d = [one["d"] for one in rows]
        error = max(abs(one["ratio"] / one["predicted"] - 1) for one in rows)
        says = f"{name}: |measured ratio / (|g|_1 / |g|_2) - 1| <= 0.1"
        claim(f"ratio {name}", says, error, 0, 0.1)
        exponents[name] = slope = exponent(d, [one["ratio"] for one in rows])
        if name.endswith("lifted"):
            says = f"{name}: exponent 0.5 (+- 0.05), though neighbors are equal"
            claim(f"exponent {name}", says, slope, 0.45, 0.55)
            slope = exponent(d, [one["blocks_ratio"] for one in rows])
            says = f"{name}: exponent 0 (+- 0.05) against noise in blocks"
            claim(f"blocks {name}", says, slope, -0.05, 0.05)
        else:
            growth = min(b["ratio"] / a["ratio"] for a, b in pairwise(rows))
            says = f"{name}: from size to size the ratio grows, least factor above 1"
            claim(f"growth {name}", says, growth, 1, np.inf)
    linear = {n: {k: v.tolist() for k, v in one.items()} for n, one in linear.items()}
    return claims, {"exponents": exponents, "linear": linear, "nets": nets}


def draw(config: Config, linear: dict, nets: dict):
    """The linear score; nets at several sizes; nets behind a mean."""
    figure = plots.new_figure(11, 3.7)
    parts = np.ravel(figure.subfigures(1, 3))
    lines = {}
    for name, found in linear.items():
        ratio = found["directed"] / found["spread"]
        theory = (found["directed_theory"] / found["spread_theory"]).mean(1)
        hidden = "" if name == "L1 ball" else "_"  # one entry in the legend
        lines[name] = plots.Line(config.dims, ratio.mean(1), ratio.min(1), ratio.max(1))
        lines[f"{hidden}theory {name}"] = plots.Line(config.dims, theory, theory=True)
    lines["theory"] = lines.pop("theory L1 ball")
    options: dict[str, Any] = {"log_x": True, "log_y": True, "x": "dimension d"}
    y = "directed step / spread of noise"
    plots.draw_lines(lines, parts[0], **options, y=y, title="a linear score")
    for part, title, end in ((1, "nets", ""), (2, "one net behind a mean", ", lifted")):
        lines = {}
        for name in config.nets:
            for kind, text in (("", "pixel noise"), ("blocks_", "noise in blocks")):
                rows = [r for r in nets[name + end] if f"{kind}ratio" in r]
                if len(rows) < 2:
                    continue
                lines[f"{name}, {text}"] = plots.Line(
                    [one["d"] for one in rows],
                    [one[f"{kind}ratio"] for one in rows],
                    low=[one[f"{kind}low"] for one in rows],
                    high=[one[f"{kind}high"] for one in rows],
                )
        d = [one["d"] for one in nets[config.nets[0] + end]]
        root = [value**0.5 for value in d]
        lines["sqrt(d)"] = plots.Line(d, root, theory=True)
        plots.draw_lines(lines, parts[part], **options, title=title)
        lowest = min(min(line.y) for line in lines.values())
        axes = parts[part].axes[0]
        axes.set_ylim(0.4 * lowest, None)  # room for the legend
        axes.get_legend().set_loc("lower right")
    return figure


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
