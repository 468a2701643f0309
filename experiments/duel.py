"""The duel: training as a game, and what the inner player's strength does to it.

    python -m experiments.duel --out runs/duel

Adversarial training is a game: the attacker moves each image within its ball to raise
the loss, the net moves its weights to lower it. Here the attacker's strength varies:
steps, step size, starts. Along training two losses are watched, on the same training
images: the one that the net is shown (by the attacker it trains against) and the one
that a strong attacker finds; what lies between them the inner player has left.

Measured (digits, Linf 0.2, one seed, 178 CPU seconds on one AMD EPYC core): accuracy
under PGD-50 with five starts: no attack 0.003, FGSM 0.267, one step 0.322, 2 steps
0.417, 5 steps 0.489, 10 steps 0.514, 20 steps 0.508; 10 short steps 0.256.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import models, plots
from robustjax.losses import cross_entropy
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard


@dataclass(frozen=True)
class Config:
    out: str = "runs/duel"
    """Where the results, the picture and the nets go."""
    seed: int = 0
    """Decides weights, order of the images and all noise."""
    epsilon: float = 0.2
    """Linf budget of all players."""
    num_epochs: int = 30
    """Passes over the training images, for each net."""
    epochs_per_look: int = 2
    """How often the losses are measured."""
    num_watched: int = 256
    """Training images on which they are."""
    watch_steps: int = 20
    """PGD steps of the strong attacker along training, from two starts."""
    num_test: int = 360
    """How many of the test images."""
    test_steps: int = 50
    """PGD steps in the final measurement, from five starts."""


def players() -> dict[str, tuple[int, rj.AttackFn | None]]:
    """The inner players: gradients per image, and the attack (None: none)."""

    def pgd(steps: int, size: float | None = None, **options: Any) -> rj.AttackFn:
        return rj.pgd(steps, size, **{"keep": rj.last, **options})

    return {
        "none": (0, None),
        "FGSM": (1, pgd(1, 1.0, random_start=False)),
        "1 step, random start": (1, pgd(1, 1.25)),
        "2 steps": (2, pgd(2)),
        "5 steps": (5, pgd(5)),
        "10 steps": (10, pgd(10)),
        "10 short steps": (10, pgd(10, 0.5 / 10)),
        "10 steps, no start": (10, pgd(10, random_start=False)),
        "20 steps": (20, pgd(20)),
        "10 steps, 3 starts": (30, pgd(10, num_restarts=3, keep=rj.worst)),
    }


# Of the config, what a net's folder is about: its training, and what is seen of it.
DECIDES = ("epsilon", "seed", "num_watched", "watch_steps")
WATCHED = ("FGSM", "1 step, random start", "10 steps")
REFERENCE = "10 steps"


@functools.partial(jax.jit, static_argnums=0)
def attacked(attack_fn: rj.AttackFn, f, x, y, epsilon):
    """The loss after the attack, and who resists it, `[B]` each."""
    problem = rj.untargeted(f, x, y, rj.linf(epsilon))
    found = attack_fn(jax.random.key(1), problem)
    right = (rj.predictions(f(x)) == y) & ~found.success
    return found.score, right


@jax.jit
def clean_loss(f, x, y):
    """Mean loss without an attack."""
    return cross_entropy(f(x), y).mean()


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    splits = common.load_splits("digits", None, config.seed, 0, config.num_test)
    model = common.build_model("small_cnn", "digits")
    train_set, count = splits.train, config.num_watched
    x = train_set.x[:count].astype(jnp.float32) / train_set.scale
    y = train_set.y[:count]
    strong = rj.pgd(config.watch_steps, num_restarts=2)
    threat, epsilon = rj.linf(config.epsilon), jnp.float32(config.epsilon)

    def watch(attack_fn: rj.AttackFn | None):
        """Both players' losses on the watched images, after every few epochs."""

        def validate(params: Any, extra: Any) -> dict[str, float]:
            f = models.logits_fn(model, params, extra)
            score, right = attacked(strong, f, x, y, epsilon)
            found = {"clean": clean_loss(f, x, y), "strong": score.mean()}
            if attack_fn is not None:
                found["shown"] = attacked(attack_fn, f, x, y, epsilon)[0].mean()
            else:
                found["shown"] = found["clean"]
            return {**found, "robust_accuracy": right.mean()}

        return validate

    test = tuple(map(jnp.asarray, splits.test))
    final = rj.pgd(config.test_steps, num_restarts=5)
    nets, resists = {}, {}
    for name, (gradients, attack_fn) in players().items():
        if attack_fn is None:
            method = standard(model)
        else:
            method = madry(model, threat, attack_fn)
        f, fitted = ideas.train(
            *(config.out, name.replace(", ", "_").replace(" ", "_"), model, method),
            *(train_set, {name: getattr(config, name) for name in DECIDES}),
            num_epochs=config.num_epochs,
            seed=config.seed,
            validate=watch(attack_fn),
            epochs_per_checkpoint=config.epochs_per_look,
        )
        rows = [row for row in fitted.history if row["kind"] == "validate"]
        resists[name] = np.asarray(attacked(final, f, *test, epsilon)[1])
        nets[name] = {
            "gradients": gradients + 1,
            "clean_accuracy": float((rj.predictions(f(test[0])) == test[1]).mean()),
            "robust_accuracy": float(resists[name].mean()),
            "interval": interval(resists[name]),
            "seconds_per_step": ideas.step_seconds(model, method, train_set),
            "step": [row["step"] for row in rows],
            **{key: [row[key] for row in rows] for key in ("clean", "shown", "strong")},
        }
    print(table(nets))
    plots.save(draw(nets, config), Path(config.out) / "duel.png")
    claims = claims_of(nets, resists)
    measured = {"nets": nets}
    return ideas.save(config.out, config, claims, measured, ["duel.png"], began)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over images."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def claims_of(nets, resists) -> dict[str, ideas.Claim]:
    """What strength does: differences over test images, and what is left unfound."""

    def better(first: str, second: str) -> ideas.Claim:
        low, _ = interval(resists[first].astype(float) - resists[second])
        says = f"robust accuracy, {first} minus {second}, lower end of 95 %, above 0"
        return ideas.Claim(says, low, 0.0)

    def left(name: str) -> float:
        return nets[name]["strong"][-1] - nets[name]["shown"][-1]

    return {
        "attack": better("FGSM", "none"),
        "steps": better(REFERENCE, "FGSM"),
        "step_size": better(REFERENCE, "10 short steps"),
        "left_by_fgsm": ideas.Claim(
            "loss that FGSM leaves to a strong attacker, minus what 10 steps leave, "
            "above 0",
            *(left("FGSM") - left(REFERENCE), 0.0),
        ),
    }


def table(nets) -> str:
    """A row for each inner player."""
    heads = (
        "inner player",
        "gradients",
        "ms/step",
        "shown",
        "strong",
        "clean",
        "robust",
    )
    rows: list[tuple[str, ...]] = [heads]
    for name, net in nets.items():
        low, high = net["interval"]
        rows.append(
            (
                name,
                str(net["gradients"]),
                f"{1e3 * net['seconds_per_step']:.1f}",
                *(f"{net[key][-1]:.3f}" for key in ("shown", "strong")),
                f"{net['clean_accuracy']:.3f}",
                f"{net['robust_accuracy']:.3f} ({low:.3f}, {high:.3f})",
            )
        )
    return "\n".join(
        f"{r[0]:22}" + "".join(f"{c:>10}" for c in r[1:-1]) + f"{r[-1]:>24}"
        for r in rows
    )


def draw(nets, config: Config):
    """Losses along training for three players; outcome against cost for all."""
    figure = plots.new_figure(11, 5.8)
    top, bottom = np.ravel(figure.subfigures(2, 1))
    shown = [name for name in WATCHED if name in nets]
    ceiling = 1.05 * max(max(nets[name]["strong"]) for name in shown)
    for part, name in zip(np.ravel(top.subfigures(1, len(shown))), shown, strict=True):
        net = nets[name]
        lines = {
            "a strong attacker finds": plots.Line(net["step"], net["strong"]),
            "the net is shown": plots.Line(net["step"], net["shown"]),
            "clean": plots.Line(net["step"], net["clean"]),
        }
        plots.draw_lines(lines, part, x="training step", y="loss", title=name)
        part.axes[0].set_ylim(0, ceiling)
    names, place = list(nets), np.arange(len(nets))[::-1]
    outcome, losses = bottom.subplots(1, 2, sharey=True)
    robust = np.array([nets[name]["robust_accuracy"] for name in names])
    ends = np.array([nets[name]["interval"] for name in names])
    clean = [nets[name]["clean_accuracy"] for name in names]
    outcome.errorbar(
        *(robust, place),
        xerr=np.abs(ends.T - robust),
        fmt="o",
        color=plots.COLORS[0],
        label=f"PGD-{config.test_steps}, 95 %",
    )
    outcome.plot(clean, place, "s", color=plots.COLORS[1], label="clean")
    labels = [f"{name} ({nets[name]['gradients']})" for name in names]
    outcome.set_yticks(place, labels)
    outcome.set(xlabel="test accuracy", ylabel="trained against (gradients per update)")
    for style, (key, label) in enumerate(
        {"strong": "a strong attacker finds", "shown": "the net is shown"}.items()
    ):
        values = [nets[name][key][-1] for name in names]
        losses.plot(
            *(values, place, "os"[style]), color=plots.COLORS[style], label=label
        )
    losses.set(xlabel="loss at the end, training images", xscale="log")
    for axes in (outcome, losses):
        plots.tidy(axes)
        axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
