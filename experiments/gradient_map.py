"""What the gradient of a standard and of a robust net points at, and what lies there.

    python -m experiments.gradient_map --out runs/gradient_map
    python -m experiments.gradient_map --dataset fashion_mnist --data-dir DIR

Input gradients of the margin and PGD's perturbations of both nets, side by side. Then
the loss around a point along PGD's direction and a random one, and its mean along both
over all test images. Digits, 360 test images, 27 CPU seconds on one of two shared AMD
EPYC cores; expected: the robust net's gradient is more like the image and wastes less
on pixels that never change (Tsipras et al., arXiv:1805.12152), its loss is straighter.

                                        standard   robust
    |cos(gradient, image)|              0.162      0.244
    share of the gradient, quiet pixels 0.097      0.053
    |loss - its tangent| at PGD's point 4.16       0.34
    adversarial / random change         5.8        4.7    at least 3.19

Relative to its slope the robust net's score is not straighter (0.170 against 0.147).
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import data, models, plots
from robustjax.losses import cross_entropy, difference
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.problems import ranked_class

T95 = 1.96  # of a mean over hundreds of images
NEAR = 0.1  # of epsilon: here the nets are nearly linear


@dataclass(frozen=True)
class Config:
    out: str = "runs/gradient_map"
    """Where the results, the pictures and the nets go."""
    seed: int = 0
    """Decides weights, noise and the order of the images."""
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    """Images; all but the embedded digits need --data-dir."""
    data_dir: str | None = None
    """Where other sets lie."""
    net: Literal["CNN", "MLP"] = "CNN"
    """`small_cnn`, or one hidden layer."""
    epsilon: float = 0.15
    """Linf budget of the perturbations (Fashion-MNIST: 0.1 is usual)."""
    train_epsilon: float = 0.2
    """Linf budget that the robust net learns with (Fashion-MNIST: 0.1)."""
    num_train: int = 10_000
    """How many of the training images, at most."""
    num_test: int = 360
    """How many of the test images."""
    num_epochs: int = 40
    """Passes over the training images, for each net."""
    num_noise: int = 100
    """Random directions for each image."""
    num_shown: int = 6
    """Images in the picture."""


@functools.partial(jax.jit, static_argnums=0)
def perturb(attack_fn: rj.AttackFn, f, x, y, threat: rj.ThreatModel):
    """The attack's perturbation, `[B, ...]`."""
    problem = rj.untargeted(f, x, y, threat)
    return attack_fn(jax.random.key(1), problem).x_adv - x


@functools.partial(jax.jit, static_argnames="num_noise")
def along(f, key, x, y, epsilon, *, num_noise):
    """Gradients, and how the score moves along their signs and along random signs.

    The score is the runner-up's logit minus the true one's, without a box. Returns the
    gradient, the change under `epsilon sign(g)` and the spread under random signs.
    """
    target = ranked_class(f(x), y, 1)

    def score(x):
        return difference(f(x), y, target)

    g = jax.grad(lambda x: score(x).sum())(x)
    start = score(x)
    directed = score(x + epsilon * jnp.sign(g)) - start

    def one(total, key):
        delta = epsilon * jax.random.rademacher(key, x.shape, x.dtype)
        change = score(x + delta) - start
        return (total[0] + change, total[1] + change**2), None

    zeros = (jnp.zeros_like(start), jnp.zeros_like(start))
    (first, second), _ = jax.lax.scan(one, zeros, jax.random.split(key, num_noise))
    variance = (second - first**2 / num_noise) / (num_noise - 1)
    return g, directed, jnp.sqrt(variance)


@jax.jit
def losses(f, x, y, first, second, a, b):
    """The losses at `x + a first + b second`, `[b, a, B]`."""

    def at(a, b):
        return cross_entropy(f(x + a * first + b * second), y)

    return jax.lax.map(lambda b: jax.lax.map(lambda a: at(a, b), a), b)


def measure(f, x, y, delta, quiet: np.ndarray, config: Config) -> dict[str, np.ndarray]:
    """For each image: what its gradient looks like, and where it leads."""
    key, options = jax.random.key(config.seed), {"num_noise": config.num_noise}
    g, directed, spread = along(f, key, x, y, NEAR * config.epsilon, **options)
    _, far, far_spread = along(f, key, x, y, config.epsilon, **options)
    flat = np.asarray(g, float).reshape(len(x), -1)
    l1, l2 = np.abs(flat).sum(1), np.linalg.norm(flat, axis=1)
    image = x.reshape(len(x), -1)
    slope = jax.grad(lambda x: cross_entropy(f(x), y).sum())(x)
    start, end = (cross_entropy(f(jnp.asarray(v)), y) for v in (x, x + delta))
    linear = np.asarray(slope * delta).reshape(len(x), -1).sum(1)
    return {
        "gradient": np.asarray(g),
        "alignment": np.abs((flat * image).sum(1))
        / (l2 * np.linalg.norm(image, axis=1)),
        "gradient_l1": l1,
        "effective_dimension": (l1 / l2) ** 2,
        "quiet_share": np.abs(flat)[:, quiet.ravel()].sum(1) / l1,
        "ratio": np.asarray(directed / spread),
        "ratio_at_epsilon": np.asarray(far / far_spread),
        "margin_bend": np.abs(np.asarray(far) / (config.epsilon * l1) - 1),
        "loss_bend": np.abs(np.asarray(end - start) - linear),
    }


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    splits = common.load_splits(
        config.dataset, config.data_dir, config.seed, 0, config.num_test
    )
    n = min(config.num_train, splits.train.x.shape[0])
    train = splits.train._replace(x=splits.train.x[:n], y=splits.train.y[:n])
    x, y = splits.test
    # Pixels that hardly ever change cannot tell classes apart.
    quiet = np.asarray(data.to_float(train.x, train.scale)).std(0) < 0.05
    model = models.small_cnn() if config.net == "CNN" else models.mlp((128,))
    threat = rj.linf(config.epsilon)
    inner = rj.pgd(7, keep=rj.last)
    methods = {
        "standard": standard(model),
        "robust": madry(model, rj.linf(config.train_epsilon), inner),
    }
    nets, found, deltas = {}, {}, {}
    for name, method in methods.items():
        nets[name], _ = ideas.train(
            *(config.out, name, model, method, train),
            {
                "dataset": config.dataset,
                "net": config.net,
                "num_train": n,
                "train_epsilon": config.train_epsilon,
            },
            num_epochs=config.num_epochs,
            seed=config.seed,
        )
        f = nets[name]
        deltas[name] = np.asarray(perturb(rj.pgd(20), f, x, y, threat))
        found[name] = measure(f, x, y, deltas[name], quiet, config)
        for kind, images in {"clean": x, "attacked": x + deltas[name]}.items():
            right = np.asarray(rj.predictions(f(jnp.asarray(images)))) == y
            found[name][f"{kind}_right"] = right.astype(float)
    claims, measured = judge(found, int(quiet.sum()), x[0].size)
    measured["data"] = splits.used
    plots.save(
        draw(nets, found, deltas, x, y, config), Path(config.out) / "gradient_map.png"
    )
    return ideas.save(config.out, config, claims, measured, ["gradient_map.png"], began)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval over the images."""
    mean, half = values.mean(), T95 * values.std(ddof=1) / len(values) ** 0.5
    return float(mean), float(mean - half), float(mean + half)


def judge(found: dict, num_quiet: int, d: int) -> tuple[dict, dict]:
    """Claims, and the numbers that they come from."""
    measured: dict[str, Any] = {"quiet_pixels": num_quiet, "pixels": d}
    for name, these in found.items():
        measured[name] = {
            key: dict(zip(("mean", "low", "high"), interval(v), strict=True))
            | {"median": float(np.median(v))}
            for key, v in these.items()
            if v.ndim == 1
        }
    robust, plain = found["robust"], found["standard"]
    claims = {}
    for key, says in {
        "alignment": "robust - standard: |cos(gradient, image)|",
        "quiet_share": "standard - robust: share of the gradient on quiet pixels",
        "loss_bend": "standard - robust: |loss(x + d) - loss(x) - <d, gradient>|",
    }.items():
        difference = robust[key] - plain[key]
        _, low, _ = interval(difference if key == "alignment" else -difference)
        says += ", mean, lower end of 95 %, above 0"
        claims[key] = ideas.Claim(says, low, low=0.0)
    bound = (2 * d / np.pi) ** 0.5 / 2
    for name, these in found.items():
        ratio = np.median(these["ratio"])
        says = f"{name}: adversarial / random slope, at least {bound:.2f}"
        claims[f"ratio_{name}"] = ideas.Claim(says, float(ratio), bound, d**0.5)
    return claims, measured


def draw(nets, found, deltas, x, y, config: Config):
    """Above: images, gradients, perturbations; below: the loss around one point."""
    figure = plots.new_figure(10, 8.8)
    top, bottom = np.ravel(figure.subfigures(2, 1, height_ratios=(7, 3)))
    shown = [int(np.flatnonzero(y == label)[0]) for label in range(config.num_shown)]
    rows, captions = {"image": [x[i] for i in shown]}, {}
    for name, f in nets.items():
        rows[f"{name}:\ngradient"] = [found[name]["gradient"][i] for i in shown]
        rows[f"{name}:\nperturbation"] = [deltas[name][i] for i in shown]
        attacked = x + deltas[name]
        rows[f"{name}:\nattacked, sees"] = [attacked[i] for i in shown]
        answers = np.asarray(rj.predictions(f(jnp.asarray(attacked))))
        captions[f"{name}:\nattacked, sees"] = [str(answers[i]) for i in shown]
    signed = [row for row in rows if "gradient" in row or "perturbation" in row]
    plots.draw_images(rows, (), top, signed=signed, captions=captions)

    noise = jax.random.rademacher(jax.random.key(3), x.shape, jnp.float32)
    noise = config.epsilon * noise
    a, zero = np.linspace(-2, 2, 33, dtype=np.float32), np.zeros(1, np.float32)
    parts = np.ravel(bottom.subfigures(1, 3))
    fooled = found["standard"]["attacked_right"] < found["standard"]["clean_right"]
    i = next((i for i in shown if fooled[i]), shown[0])
    one, lines, surfaces = slice(i, i + 1), {}, {}
    for name, f in nets.items():
        delta = deltas[name]
        around = losses(f, x[one], y[one], delta[one], noise[one], a, a)
        surfaces[name] = np.asarray(around)[..., 0]
        ahead = a[a >= 0][::4]
        for kind, direction in {"PGD's": delta, "random": noise}.items():
            values = losses(f, x, y, direction, direction, ahead, zero)
            values = np.asarray(values)[0].mean(-1)
            lines[f"{name}, {kind}"] = plots.Line(ahead, values)
    for part, (name, values) in zip(parts, surfaces.items(), strict=False):
        plots.draw_surface(
            *(a, a, values, part),
            x="along PGD's perturbation",
            y="along random signs / epsilon",
            title=f"{name}: loss around a {y[i]}",
        )
    title = "mean loss over the test images"
    plots.draw_lines(lines, parts[2], x="along the perturbation", title=title)
    return figure


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
