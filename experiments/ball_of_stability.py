"""The ball of stability: how far an answer is proven to hold, and where it breaks.

    python -m experiments.ball_of_stability --out runs/ball_of_stability

An image with margin m keeps its answer within `m / L` (L2), L a Lipschitz constant of
the difference of two logits: the global one, a product over layers, or the local one in
a small ball. An attack breaks it at some distance; between the two nobody knows. Three
nets learn the digits: a standard one, an adversarially trained one, and one that is
1-Lipschitz by construction, trained to a margin.

100 test images, L2; certified by the global constant, attacked by PGD and FAB:

    net           clean   certified at 0.25   attacked at 0.25   median global L
    standard      0.98    0.00                0.91               708
    robust        0.97    0.00                0.95               553
    1-Lipschitz   0.95    0.86                0.88               1.39

Expected: nothing crosses, the third net's constant is at most 1 (its pairs' sqrt(2)),
and it is certified where the standard net is not. 128 CPU seconds on an AMD EPYC core,
training included.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import models, plots
from robustjax.certify.bracket import Bracket, bracket
from robustjax.certify.evaluate import logits
from robustjax.certify.lipschitz import steepest_gradient
from robustjax.certify.local import local_constants, local_radius
from robustjax.certify.radius import all_constants
from robustjax.certify.trace import trace
from robustjax.losses import margin
from robustjax.methods.lipschitz_margin import lipschitz_margin
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.models.lipschitz import lipschitz_net

TRAINING = ("seed", "dataset", "net", "train_l2", "radius", "num_epochs")
LITERATURE = 36 / 255  # the radius at which 1-Lipschitz nets are compared on CIFAR-10


@dataclass(frozen=True)
class Config:
    out: str = "runs/ball_of_stability"
    """Where the results, the pictures and the nets go."""
    seed: int = 0
    """Decides weights, order of the images and all noise."""
    dataset: Literal["digits"] = "digits"
    """The embedded one: 1,437 training and 360 test images of 8x8 pixels."""
    net: Literal["cnn", "mlp"] = "cnn"
    """Convolutions, or dense layers of 32 alone (quick)."""
    train_l2: float = 0.6
    """The budget that the robust net learns with (L2)."""
    radius: float = 0.5
    """The certified radius that the 1-Lipschitz net is trained to (L2)."""
    proven_at: float = 0.25
    """Where certified accuracies are compared (L2)."""
    local_ball: float = 0.01
    """Radius of the ball of the local constants (L2)."""
    num_epochs: int = 40
    """Passes over the training images, for each net."""
    num_test: int = 100
    """Test images that are certified and attacked."""
    num_bisections: int = 8
    """PGD runs for each image, over budgets."""
    fab_steps: int = 50
    """Steps of FAB, for each image and each other class; 0: no FAB."""


def measure(f: rj.LogitsFn, x: np.ndarray, y: np.ndarray, config: Config):
    """One net: its bracket, and lists for each image."""
    graph = trace(f, x)
    constants = all_constants(graph)
    found = bracket(
        *(f, x, y, rj.l2(4.0)),
        num_bisections=config.num_bisections,
        fab_steps=config.fab_steps,
        key=jax.random.key(config.seed),
        batch_size=min(100, len(y)),
    )
    z = logits(graph, x)
    rows = np.arange(len(y))
    own, other = z[rows, y], np.where(np.eye(z.shape[1], dtype=bool)[y], -np.inf, z)
    rival = other.argmax(1)
    gap = own - other.max(1)
    local = local_constants(graph, x, y, "L2", config.local_ball, constants)
    near = local_radius(graph, x, y, "L2", constants)
    grad = jax.grad(lambda x: margin(f(x), jnp.asarray(y)).sum())(jnp.asarray(x))
    slope = np.linalg.norm(np.asarray(grad, np.float64).reshape(len(x), -1), axis=1)
    length = np.linalg.norm(x.reshape(len(x), -1), axis=1)
    steep = steepest_gradient(f, x, y, "L2", radius=config.local_ball, num_steps=30)
    lists = {
        "margin": gap,
        "global_constant": constants["L2"].pairs[y, rival],
        "largest_global": constants["L2"].pairs[y].max(1),
        "local_constant": local[rows, rival],
        "largest_local": local.max(1),
        "steepest_gradient": steep,
        "certified": found.certified,
        "certified_locally": np.where(found.correct, near, 0.0),
        "found": found.found,
        # Relative change of the margin for a relative change of the image.
        "condition": length * slope / np.maximum(np.abs(gap), 1e-12),
        "length": length,
    }
    return found, lists, constants["L2"].vector


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    splits = common.load_splits("digits", None, config.seed, 0, config.num_test)
    x, y = splits.test
    plain, aol = models.small_cnn(10), lipschitz_net(10)
    if config.net == "mlp":
        plain, aol = models.mlp((32,)), lipschitz_net(channels=(), hidden=(32,))
    inner = rj.pgd(7, keep=rj.last)
    recipes = {
        "standard": (plain, standard(plain)),
        "robust": (plain, madry(plain, rj.l2(config.train_l2), inner)),
        "1-Lipschitz": (aol, lipschitz_margin(aol, config.radius)),
    }
    brackets, lists, vectors = {}, {}, {}
    for name, (model, method) in recipes.items():
        f, _ = ideas.train(
            *(config.out, name, model, method, splits.train),
            {name: getattr(config, name) for name in TRAINING},
            num_epochs=config.num_epochs,
            seed=config.seed,
        )
        brackets[name], lists[name], vectors[name] = measure(f, x, y, config)
        print(brackets[name].table([0.0, LITERATURE, 0.25, 0.5, 1.0, 1.5]))

    claims, measured = judge(config, brackets, lists, vectors)
    for name, figure in {
        "ball_of_stability": draw(brackets, lists),
        "condition": draw_condition(brackets, lists),
    }.items():
        plots.save(figure, Path(config.out) / f"{name}.png")
    figures = ["ball_of_stability.png", "condition.png"]
    return ideas.save(config.out, config, claims, measured, figures, began)


def judge(config, brackets, lists, vectors):
    """Claims, and what else is worth a number."""
    claims, measured = {}, {}
    for name, found in brackets.items():
        these = lists[name]
        at = [0.0, LITERATURE, config.proven_at, config.radius]
        proven, standing = found.accuracies(at)
        right, here = found.correct, these["certified_locally"]
        broken = np.isfinite(found.found) & right
        ratio = these["condition"] * found.found / these["length"]
        measured[name] = {
            "epsilon": at,
            "certified_accuracy": proven.tolist(),
            "attacked_accuracy": standing.tolist(),
            "vector_constant": vectors[name],
            "median_margin": float(np.median(these["margin"])),
            "median_global_constant": float(np.median(these["global_constant"])),
            "median_local_constant": float(np.median(these["local_constant"])),
            "median_steepest_gradient": float(np.median(these["steepest_gradient"])),
            "median_certified": float(np.median(found.certified)),
            "median_certified_locally": float(np.median(here)),
            "median_found": float(np.median(found.found)),
            "median_condition": float(np.median(these["condition"])),
            "median_condition_times_distance": float(np.median(ratio[broken])),
            "lists": {key: np.asarray(v).tolist() for key, v in these.items()},
        }
        tight = (here[right] / found.found[right]).max(initial=0)
        says = f"{name}: locally certified / distance found, at most 1"
        claims[f"{name}_bracket"] = ideas.Claim(says, float(tight), high=1 + 1e-5)
        above = (these["steepest_gradient"] / these["largest_local"]).max()
        says = f"{name}: steepest gradient in the ball / local constant, at most 1"
        claims[f"{name}_local"] = ideas.Claim(says, float(above), high=1 + 1e-5)
        above = (these["largest_local"] / these["largest_global"]).max()
        says = f"{name}: local / global constant, at most 1"
        claims[f"{name}_global"] = ideas.Claim(says, float(above), high=1 + 1e-9)
    says = "1-Lipschitz: the constant of its logit vector is at most 1"
    claims["one"] = ideas.Claim(says, vectors["1-Lipschitz"], high=1 + 1e-6)
    place = measured["standard"]["epsilon"].index(config.proven_at)
    accuracy = {n: m["certified_accuracy"][place] for n, m in measured.items()}
    says = f"1-Lipschitz: certified accuracy at L2 {config.proven_at:g} is above 0.5"
    claims["certified"] = ideas.Claim(says, accuracy["1-Lipschitz"], low=0.5)
    says = f"standard: certified accuracy at L2 {config.proven_at:g} is 0 (0.01)"
    claims["plain"] = ideas.Claim(says, accuracy["standard"], high=0.01)
    return claims, measured


def draw(brackets: dict[str, Bracket], lists: dict[str, dict[str, np.ndarray]]):
    """Above: margins against distances, with constants as lines; below: accuracies."""
    figure = plots.new_figure(9, 6)
    panels = figure.subplots(2, 3)
    grid = np.linspace(0, 1.5, 1500)
    for column, (name, found) in enumerate(brackets.items()):
        these, axes = lists[name], panels[0, column]
        shown = found.correct & np.isfinite(found.found)
        color = plots.COLORS[column]
        axes.loglog(
            *(found.found[shown], these["margin"][shown], "o"),
            color=color,
            markersize=3,
            alpha=0.6,
            label="attacked: distance, margin",
        )
        ends = np.array([3e-3, 3.0])
        for key, style, label in (
            ("global_constant", "-", "global L"),
            ("local_constant", "--", "local L"),
            ("steepest_gradient", ":", "steepest gradient"),
        ):
            constant = np.median(these[key])
            label = f"{label}: {constant:.3g}"
            axes.plot(ends, constant * ends, style, color=plots.INK, label=label)
        axes.set(title=name, xlabel="L2 distance", xlim=ends, ylim=(5e-3, 300))
        axes.legend(frameon=False, fontsize=7)
        below = panels[1, column]
        low, high = found.accuracies(grid)
        below.fill_between(grid, low, high, color="#D5D5D5", label="unknown")
        below.plot(grid, high, color=color, linewidth=2, label="attacked")
        below.plot(grid, low, color=plots.INK, linewidth=2, label="certified, global L")
        middle = found._replace(certified=these["certified_locally"]).accuracies(grid)[
            0
        ]
        below.plot(grid, middle, "--", color=plots.INK, label="certified, local L")
        below.set(xlim=(0, grid[-1]), ylim=(0, 1), xlabel="L2 budget epsilon")
        radii = [np.median(these[k]) for k in ("certified", "certified_locally")]
        text = (
            "medians: certified {:.2g} (global L),\n{:.2g} (local L); attacked {:.2g}"
        )
        text = text.format(*radii, np.median(found.found))
        below.set_title(text, fontsize=8)
        for each in (axes, below):
            each.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("margin m")
    panels[1, 0].set_ylabel("accuracy")
    panels[1, 0].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def draw_condition(brackets, lists):
    """The local condition number against the distance to the ill-posed set."""
    figure = plots.new_figure(4.5, 3.4)
    axes = figure.subplots()
    for color, (name, found) in zip(plots.COLORS, brackets.items(), strict=False):
        these = lists[name]
        shown = found.correct & np.isfinite(found.found)
        relative = found.found[shown] / these["length"][shown]
        axes.loglog(
            *(relative, these["condition"][shown], "o"),
            color=color,
            markersize=3,
            alpha=0.6,
            label=name,
        )
    ends = np.array([1e-3, 1.0])
    axes.plot(ends, 1 / ends, color=plots.INK, linewidth=0.8, label="1 / distance")
    axes.set(
        xlabel="distance to the boundary / length of the image",
        ylabel="condition number of the margin",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
