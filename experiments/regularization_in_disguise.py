"""Regularization in disguise: adversarial training penalizes the gradient.

    python -m experiments.regularization_in_disguise --out runs/disguise

First the disguise itself: the adversarial loss minus (loss + epsilon * dual norm of the
gradient), against epsilon, in float64, for Linf, L2 and L1. Then nets trained either
way: on PGD's examples, and with the penalty, exact and by differences.

Measured (digits, seed 0, 186 CPU seconds on two shared AMD EPYC cores): exponent 2.03,
2.04, 2.12 for Linf, L2, L1 (expected 2). Accuracy under PGD-50 at Linf 0.15: standard
0.189; trained at 0.03 by PGD 0.303, by the penalty 0.306; at 0.15 0.714 and 0.311 (by
differences of 0.1 and 1 epsilon 0.383 and 0.631): beyond the first order's reach a
small gradient is not enough. Not run: Fashion-MNIST.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import models, plots
from robustjax.losses import cross_entropy
from robustjax.methods.gradient_penalty import dual_norm, gradient_penalty
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.norms import L1, L2, Linf

POWER = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}  # d^power: balls of about equal effect
NORMS = {"Linf": Linf(), "L2": L2(), "L1": L1()}


@dataclasses.dataclass(frozen=True)
class Config:
    out: str = "runs/disguise"
    """Where the results, the picture and the nets go."""
    seed: int = 0
    """Decides weights, order of the images and all noise."""
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    """The embedded digits, or Fashion-MNIST, which needs --data-dir."""
    data_dir: str | None = None
    """Where other sets lie."""
    num_train: int = 10_000
    """How many of the training images, at most."""
    num_test: int = 360
    """How many of the test images."""
    num_epochs: int = 30
    """Passes over the training images, for each net."""
    smallest: float = 1e-4
    """The gap's smallest epsilon: Linf; L2 times sqrt(d), L1 times d."""
    largest: float = 1e-2
    """Its largest one, likewise."""
    num_points: int = 9
    """How many epsilons between them."""
    gap_steps: int = 100
    """PGD steps of the inner maximization there."""
    train_epsilons: tuple[float, ...] = (0.03, 0.15)
    """Linf budgets that nets are trained with, either way."""
    train_steps: int = 7
    """PGD steps in adversarial training."""
    differences: tuple[float, ...] = (0.1, 1.0)
    """Of the penalty by differences, fractions of epsilon; 1 is FGSM without a box."""
    test_steps: int = 50
    """PGD steps in the measurement, with three restarts."""


def forward(params: Any, x: jax.Array, activation: str) -> jax.Array:
    """The zoo's MLP, which computes in float32, in the precision of its arguments."""
    h = x.reshape(x.shape[0], -1)
    for i in range(1, len(params)):
        layer = params[f"dense{i}"]
        h = getattr(jax.nn, activation)(h @ layer["kernel"] + layer["bias"][None])
    return h @ params["head"]["kernel"] + params["head"]["bias"][None]


@functools.partial(jax.jit, static_argnames=("activation", "num_steps"))
def gaps(params, x, y, norm, epsilons, *, activation, num_steps):
    """`max loss(x + d) - loss(x) - epsilon ||grad||_dual` `[E, B]`, without a box, and
    `<d, H d>` `[B]` for the steepest d of the unit ball, H the loss's Hessian."""

    def loss(x):
        return cross_entropy(forward(params, x, activation), y)

    gradient = jax.grad(lambda x: loss(x).sum())
    attack_fn = rj.pgd(num_steps, random_start=False)
    threat = rj.ThreatModel(norm, 1.0, -jnp.inf, jnp.inf)
    here, slope = loss(x), gradient(x)
    steepest = jax.vmap(norm.steepest)(slope)
    bent = jax.jvp(gradient, (x,), (steepest,))[1]
    curvature = (bent * steepest).reshape(len(x), -1).sum(1)

    def at(epsilon):
        ball = dataclasses.replace(threat, epsilon=epsilon)
        problem = rj.untargeted(lambda x: forward(params, x, activation), x, y, ball)
        problem = problem._replace(success=rj.never)  # the loss alone counts
        found = attack_fn(jax.random.key(0), problem).x_adv
        return loss(found) - here - epsilon * dual_norm(threat, slope)

    return jax.lax.map(at, epsilons), curvature


def exponent(epsilons: np.ndarray, values: np.ndarray) -> float:
    """The p of `values ~ epsilon^p`, by least squares in log-log."""
    return float(np.polyfit(np.log(epsilons), np.log(values), 1)[0])


def disguise(params: Any, activation: str, x, y, config: Config) -> dict[str, Any]:
    """Part one, for one net: for each norm epsilons, mean gaps and their exponent."""
    found = {}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        x, y = jnp.asarray(x, jnp.float64), jnp.asarray(y)
        grid = np.geomspace(config.smallest, config.largest, config.num_points)
        options = {"activation": activation, "num_steps": config.gap_steps}
        for name, norm in NORMS.items():
            epsilons = grid * (x[0].size ** POWER[name])
            inputs = (params, x, y, norm, jnp.asarray(epsilons))
            each, curvature = map(np.asarray, gaps(*inputs, **options))
            second = epsilons**2 / 2 * curvature.mean()
            found[name] = {
                "epsilon": epsilons,
                "gap": each.mean(1),
                "absolute_gap": np.abs(each).mean(1),
                "second_order": second,
                "slope": exponent(epsilons, np.abs(each.mean(1))),
                "to_second_order": float(each[0].mean() / second[0]),
            }
    return found


@functools.partial(jax.jit, static_argnums=0)
def attacked(attack_fn: rj.AttackFn, f, x, y, epsilons):
    """Who resists under Linf, and the loss where the attack ended, `[E, B]` each."""

    def at(epsilon):
        problem = rj.untargeted(f, x, y, rj.linf(epsilon))
        found = attack_fn(jax.random.key(1), problem)
        right = (rj.predictions(f(x)) == y) & ~found.success
        return right, found.score

    return jax.lax.map(at, epsilons)


@jax.jit
def shape_of(f, x, y, steps):
    """Loss `[B]`, its gradient's L1 norm `[B]`, and for each step h the curvature
    `2 (loss(x + h d) - loss(x) - h |grad|_1) / h^2` `[H, B]`, `d = sign(grad)`."""

    def loss(x):
        return cross_entropy(f(x), y)

    here, slope = loss(x), jax.grad(lambda x: loss(x).sum())(x)
    size = dual_norm(rj.linf(1.0), slope)

    def at(h):
        return 2 * (loss(x + h * jnp.sign(slope)) - here - h * size) / h**2

    return here, size, jax.lax.map(at, steps)


def measure(f: rj.LogitsFn, x, y, epsilons: np.ndarray, config: Config):
    """Part two, for one net: accuracies, losses, gradient and curvature."""
    attack_fn = rj.pgd(config.test_steps, num_restarts=3)
    right, scores = attacked(attack_fn, f, x, y, jnp.asarray(epsilons, jnp.float32))
    steps = jnp.asarray([0.01, *config.train_epsilons], jnp.float32)
    here, size, curvature = shape_of(f, x, y, steps)
    clean = (rj.predictions(f(x)) == y)[None]
    right = np.concatenate([clean, right])
    curvature = curvature.mean(1).tolist()
    return right, {
        "accuracy": right.mean(1),
        "loss": np.concatenate([here[None], scores]).mean(1),
        "gradient_norm": float(size.mean()),
        "curvature": dict(zip(map("{:g}".format, steps), curvature, strict=True)),
        # Where the second order is as large as the first.
        "reach": 2 * float(size.mean()) / curvature[0],
    }


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    splits = common.load_splits(
        *(config.dataset, config.data_dir, config.seed, 0, config.num_test)
    )
    train_set = splits.train._replace(
        x=splits.train.x[: config.num_train], y=splits.train.y[: config.num_train]
    )
    training = ("seed", "dataset", "num_train", "train_steps")
    decides = {name: getattr(config, name) for name in training}

    def train(name, model, method):
        return ideas.train(
            *(config.out, name, model, method, train_set, decides),
            num_epochs=config.num_epochs,
            seed=config.seed,
        )

    found = {}
    for activation in ("silu", "relu"):
        mlp = models.mlp((64, 64), activation=activation)
        _, fitted = train(f"mlp {activation}", mlp, standard(mlp))
        found[activation] = disguise(fitted.params, activation, *splits.test, config)

    cnn = common.build_model("small_cnn", config.dataset)
    inner = rj.pgd(config.train_steps, keep=rj.last)
    methods = {"standard": standard(cnn)}
    for epsilon in config.train_epsilons:
        threat = rj.linf(epsilon)
        methods |= {
            f"PGD {epsilon:g}": madry(cnn, threat, inner),
            f"penalty {epsilon:g}": gradient_penalty(cnn, threat),
            **{
                f"difference {h:g} {epsilon:g}": gradient_penalty(
                    cnn, threat, difference=h
                )
                for h in config.differences
            },
        }
    nets = {name: train(name, cnn, method)[0] for name, method in methods.items()}
    x, y = map(jnp.asarray, splits.test)
    reach = 1.5 * max(config.train_epsilons)
    grid = sorted({*np.linspace(reach / 8, reach, 8), *config.train_epsilons})
    measured, right, seconds = {}, {}, {}
    for name, f in nets.items():
        right[name], measured[name] = measure(f, x, y, np.array(grid), config)
        seconds[name] = ideas.step_seconds(cnn, methods[name], train_set)
    grid = [0.0, *grid]
    print(table(measured, seconds, grid, config))
    figure = draw(found, measured, grid, config)
    plots.save(figure, Path(config.out) / "regularization_in_disguise.png")
    return ideas.save(
        config.out,
        config,
        claims_of(found, measured, right, grid, config),
        {"gap": found, "epsilon": grid, "nets": measured, "seconds": seconds},
        ["regularization_in_disguise.png"],
        began,
    )


def claims_of(found, measured, right, grid, config: Config) -> dict[str, ideas.Claim]:
    """Part one: Taylor's exponent and constant. Part two: that both ways regularize."""
    claims = {}
    for norm in NORMS:
        smooth, kinked = found["silu"][norm], found["relu"][norm]
        claims[f"slope_{norm}"] = ideas.Claim(
            f"{norm}: exponent of the gap, 2 (+- 0.2)", smooth["slope"], 1.8, 2.2
        )
        claims[f"slope_relu_{norm}"] = ideas.Claim(
            f"{norm}: the same of a ReLU net, 2 (+- 0.2)", kinked["slope"], 1.8, 2.2
        )
        claims[f"constant_{norm}"] = ideas.Claim(
            f"{norm}: smallest gap / (epsilon^2 <d, H d> / 2), 1 (+- 0.05)",
            *(smooth["to_second_order"], 0.95, 1.05),
        )
    largest = max(config.train_epsilons)

    def gain(first: str, second: str) -> ideas.Claim:
        at = grid.index(largest)
        pairs = right[first][at].astype(float) - right[second][at]
        low = pairs.mean() - 1.96 * pairs.std(ddof=1) / len(pairs) ** 0.5
        says = f"accuracy at {largest:g}, {first} minus {second}, lower end of 95 %"
        return ideas.Claim(f"{says}, above 0", float(low), 0.0)

    plain = measured["standard"]["gradient_norm"]
    for name, net in measured.items():
        if name == "standard":
            continue
        claims[f"gain {name}"] = gain(name, "standard")
        says = f"{name}: gradient norm / the standard net's, below 1"
        claims[f"flatter {name}"] = ideas.Claim(
            says, net["gradient_norm"] / plain, 0, 1
        )
    way, other = f"PGD {largest:g}", f"penalty {largest:g}"
    claims["beyond first order"] = gain(way, other)
    return claims


def table(measured: Mapping[str, Any], seconds, grid, config: Config) -> str:
    """A row for each net."""
    heads = [f"PGD {e:g}" for e in config.train_epsilons]
    curved = [f"bend {h}" for h in measured["standard"]["curvature"]]
    rows = [["trained by", "clean", *heads, "|grad|_1", *curved, "reach", "ms/step"]]
    for name, net in measured.items():
        robust = [net["accuracy"][grid.index(e)] for e in config.train_epsilons]
        numbers = [net["accuracy"][0], *robust, net["gradient_norm"]]
        numbers += [*net["curvature"].values(), net["reach"], 1e3 * seconds[name]]
        rows.append([name, *(f"{value:.3f}" for value in numbers)])
    return "\n".join(f"{r[0]:20}" + "".join(f"{c:>11}" for c in r[1:]) for r in rows)


def draw(found, measured, grid, config: Config):
    """The gap against epsilon; accuracies of the nets, a panel for each budget."""
    panels = 1 + len(config.train_epsilons)
    figure = plots.new_figure(3.6 * panels, 3.4)
    parts = np.ravel(figure.subfigures(1, panels))
    lines = {}
    for norm, power in POWER.items():
        row = found["silu"][norm]
        unit = {0.0: "", 0.5: " / sqrt(d)", 1.0: " / d"}[power]
        scaled = np.geomspace(config.smallest, config.largest, config.num_points)
        lines[f"{norm}, epsilon{unit}"] = plots.Line(scaled, np.abs(row["gap"]))
        lines[f"_{norm}"] = plots.Line(scaled, np.abs(row["second_order"]), theory=True)
    plots.draw_lines(
        *(lines, parts[0]),
        x="epsilon",
        y="adversarial - penalized loss",
        title="slope 2: the disguise",
        log_x=True,
        log_y=True,
    )
    for part, epsilon in zip(parts[1:], config.train_epsilons, strict=True):
        names = ["standard", *(n for n in measured if n.endswith(f" {epsilon:g}"))]
        lines = {
            name.removesuffix(f" {epsilon:g}"): plots.Line(
                grid, measured[name]["accuracy"]
            )
            for name in names
        }
        plots.draw_lines(
            *(lines, part),
            x="Linf budget epsilon",
            y=f"accuracy under PGD-{config.test_steps}",
            title=f"trained for epsilon {epsilon:g}",
        )
        part.axes[0].axvline(epsilon, color="#999999", linestyle=":", linewidth=1)
    return figure


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
