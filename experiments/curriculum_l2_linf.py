"""L2 before Linf: does a curriculum over norms help, at equal cost?

    python -m experiments.curriculum_l2_linf --out runs/curriculum
    python -m experiments.curriculum_l2_linf --dataset fashion_mnist --data-dir DIR

Adversarial training against Linf alone, against L2 in the first half and Linf in the
second, and, as a control, against Linf with an epsilon that grows over the first half:
the same number of updates, of attack steps, and so of gradients. At the usual budget,
and at one where Linf alone is unstable. Three seeds each.

Measured (digits, three seeds, about four minutes on one AMD EPYC core): robust accuracy
at 0.15 0.693 alone, 0.672 with L2 first, 0.665 with a growing epsilon; at 0.35 0.024,
0.025, 0.029. Neither helps here, and the claim of a collapse to a constant fails.
MNIST (--num-epochs 5 --epsilons 0.2 0.3 --num-test 500; 22 CPU minutes): at 0.3 all
nets trained on Linf alone or with L2 first are constant (0.134), those with a growing
epsilon reach 0.820; at 0.2 0.592 alone (one of three constant), 0.365, 0.864.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import data, plots
from robustjax.methods.base import Method
from robustjax.methods.curriculum import curriculum, in_turn, ramp
from robustjax.methods.madry import madry

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, of a mean over n seeds
CONSTANT = 0.9  # of all predictions are one class: the net has collapsed


@dataclass(frozen=True)
class Config:
    out: str = "runs/curriculum"
    """Where the results, the picture and the nets go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides weights, order of the images and all noise of its nets; 2 to 5."""
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The embedded digits, or a set that needs --data-dir."""
    data_dir: str | None = None
    """Where other sets lie."""
    num_train: int = 10_000
    """How many of the training images, at most."""
    num_test: int = 360
    """How many of the test images."""
    ways: tuple[Literal["Linf", "L2 first", "ramp"], ...] = ("Linf", "L2 first", "ramp")
    """Linf alone, L2 before it, or a growing epsilon."""
    epsilons: tuple[float, ...] = (0.15, 0.35)
    """Linf budgets: the usual one, and one where Linf alone is unstable."""
    l2_factor: float = 0.5
    """The L2 budget is this times epsilon sqrt(d), the Linf ball's half diagonal."""
    share: float = 0.5
    """The part of the training that the curriculum takes."""
    num_epochs: int = 20
    """Passes over the training images, for each net."""
    peak: float = 5e-3
    """Largest learning rate of Adam's one cycle."""
    attack_steps: int = 7
    """PGD steps in training, under either norm."""
    test_steps: int = 50
    """PGD steps in the measurement, from three starts."""


def schedule(
    way: str, epsilon: float, switch: int, dimensions: int, factor: float
) -> Callable[[jax.Array], rj.ThreatModel]:
    """The threat model of each step."""
    final = rj.linf(epsilon)
    if way == "L2 first":
        return in_turn([rj.l2(factor * epsilon * dimensions**0.5), final], [switch])
    if way == "ramp":
        return ramp(final, switch)
    return lambda step: final


@functools.partial(jax.jit, static_argnums=0)
def measure(attack_fn: rj.AttackFn, f, x, y, epsilon):
    """Who is right, who resists, and what is predicted, `[B]` each."""
    answers = rj.predictions(f(x))
    problem = rj.untargeted(f, x, y, rj.linf(epsilon))
    found = attack_fn(jax.random.key(1), problem)
    return answers == y, (answers == y) & ~found.success, answers


def check(config: Config) -> None:
    """Raise ValueError for what the summary could not be made of."""
    seeds, ways = config.seeds, config.ways
    if len(set(seeds)) != len(seeds) or len(seeds) not in T95:
        raise ValueError(
            f"seeds={seeds}; give {min(T95)} to {max(T95)} different ones."
        )
    if "Linf" not in ways or len(set(ways)) != len(ways):
        raise ValueError(f"ways={ways}; give Linf, which the others are compared with.")
    if not config.epsilons:
        raise ValueError("epsilons is empty; give one or more.")


def main(config: Config) -> dict[str, Any]:
    check(config)
    began = common.start()
    splits = common.load_splits(config.dataset, config.data_dir, 0, 0, config.num_test)
    train_set = splits.train._replace(
        x=splits.train.x[: config.num_train], y=splits.train.y[: config.num_train]
    )
    model = common.build_model("small_cnn", config.dataset)
    per_epoch = data.steps_per_epoch(train_set.x.shape[0], 64)
    switch = round(config.share * config.num_epochs * per_epoch)
    inner = rj.pgd(config.attack_steps, keep=rj.last)
    attack_fn = rj.pgd(config.test_steps, num_restarts=3)
    dimensions = train_set.x[0].size

    def method(way: str, epsilon: float) -> Method:
        at = schedule(way, epsilon, switch, dimensions, config.l2_factor)
        return curriculum(lambda step: madry(model, at(step), inner))

    runs = []
    for epsilon in config.epsilons:
        for way in config.ways:
            for seed in config.seeds:
                f, fitted = ideas.train(
                    config.out,
                    f"{way.replace(' ', '_')}_{epsilon:g}_{seed}",
                    *(model, method(way, epsilon), train_set),
                    {
                        name: getattr(config, name)
                        for name in ("l2_factor", "share", "attack_steps", "num_train")
                    },
                    num_epochs=config.num_epochs,
                    peak=config.peak,
                    seed=seed,
                )
                x, y = map(jnp.asarray, splits.test)
                right, resists, answers = measure(attack_fn, f, x, y, epsilon)
                rows = [row for row in fitted.history if row["kind"] == "train"]
                run = {
                    "epsilon": epsilon,
                    "way": way,
                    "seed": seed,
                    "updates": int(fitted.state.step),
                    "gradients": int(fitted.state.step) * (config.attack_steps + 1),
                    "clean_accuracy": float(right.mean()),
                    "robust_accuracy": float(resists.mean()),
                    "largest_class": float(np.bincount(answers).max() / len(answers)),
                    "step": [row["step"] for row in rows],
                    "loss": [row["loss"] for row in rows],
                }
                runs.append(run)
    print(table(runs))
    plots.save(draw(runs, switch, config), Path(config.out) / "curriculum_l2_linf.png")
    summary = summarize(runs, config)
    return ideas.save(
        config.out,
        config,
        claims_of(runs, summary, config),
        {"runs": runs, "summary": summary, "switch": switch, "data": splits.used},
        ["curriculum_l2_linf.png"],
        began,
    )


def over_seeds(values: Any) -> dict[str, float]:
    """Mean and 95 % interval (Student's t) over the seeds."""
    values = np.asarray(values, float)
    half = T95[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return {"mean": float(mean), "low": float(mean - half), "high": float(mean + half)}


def pick(runs, epsilon: float, way: str, key: str) -> list[float]:
    """One number of each seed's run."""
    return [r[key] for r in runs if (r["epsilon"], r["way"]) == (epsilon, way)]


def summarize(runs, config: Config) -> dict[str, Any]:
    """Over the seeds: accuracies, collapses, and differences to Linf alone, paired."""
    found = {}
    for epsilon in config.epsilons:
        for way in config.ways:
            keys = ("clean_accuracy", "robust_accuracy")
            values = {key: pick(runs, epsilon, way, key) for key in keys}
            row: dict[str, Any] = {key: over_seeds(v) for key, v in values.items()}
            largest = np.array(pick(runs, epsilon, way, "largest_class"))
            row["collapsed"] = int((largest >= CONSTANT).sum())
            if way != "Linf":
                alone = pick(runs, epsilon, "Linf", "robust_accuracy")
                difference = np.subtract(values["robust_accuracy"], alone)
                row["minus_linf"] = over_seeds(difference)
            found[f"{way} {epsilon:g}"] = row
    return found


def claims_of(runs, summary, config: Config) -> dict[str, ideas.Claim]:
    """Equal cost, instability of Linf alone, and what L2 first makes of it."""
    costs = {run["gradients"] for run in runs}
    usual, unstable = config.epsilons[0], config.epsilons[-1]
    claims = {
        "equal_cost": ideas.Claim(
            "largest / smallest number of gradients of a net, 1",
            *(max(costs) / min(costs), 1.0, 1.0),
        ),
        "unstable": ideas.Claim(
            f"Linf alone at {unstable:g}: nets collapsed to a constant, at least 1",
            *(summary[f"Linf {unstable:g}"]["collapsed"], 1.0),
        ),
        "stable": ideas.Claim(
            f"Linf alone at {usual:g}: nets collapsed to a constant, 0",
            *(summary[f"Linf {usual:g}"]["collapsed"], 0.0, 0.0),
        ),
    }
    return claims


def table(runs) -> str:
    """A row for each net."""
    rows: list[tuple[str, ...]] = [
        ("epsilon", "way", "seed", "clean", "robust", "largest class", "last loss")
    ]
    for r in runs:
        numbers = (r["clean_accuracy"], r["robust_accuracy"], r["largest_class"])
        rows.append(
            (
                *(f"{r['epsilon']:g}", r["way"], str(r["seed"])),
                *(f"{v:.3f}" for v in (*numbers, r["loss"][-1])),
            )
        )
    return "\n".join("".join(f"{cell:>15}" for cell in row) for row in rows)


def draw(runs, switch: int, config: Config):
    """For each budget: robust accuracies, and the loss along training."""
    figure = plots.new_figure(9, 5.6)
    grid = np.atleast_2d(figure.subplots(len(config.epsilons), 2, squeeze=False))
    for (dots, losses), epsilon in zip(grid, config.epsilons, strict=True):
        for number, way in enumerate(config.ways):
            style = plots.style(number)
            values = pick(runs, epsilon, way, "robust_accuracy")
            place = np.full(len(values), number) + np.linspace(-0.1, 0.1, len(values))
            mean = over_seeds(values)
            dots.plot(place, values, color=style["color"], marker="o", linestyle="")
            half = mean["high"] - mean["mean"]
            dots.errorbar(
                number + 0.25, mean["mean"], half, fmt="_", color=style["color"]
            )
            steps = pick(runs, epsilon, way, "step")[0]
            curve = np.mean(pick(runs, epsilon, way, "loss"), axis=0)
            options = {k: v for k, v in style.items() if k != "marker"}
            losses.plot(steps, curve, label=way, **options)
        dots.set_xticks(range(len(config.ways)), config.ways)
        dots.set(ylabel="robust accuracy", title=f"epsilon {epsilon:g}", ylim=(0, 1))
        losses.axvline(switch, color="#999999", linestyle=":", linewidth=1)
        losses.set(xlabel="training step", ylabel="loss that the net is shown")
        losses.legend(frameon=False)
        for axes in (dots, losses):
            plots.tidy(axes)
    return figure


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
