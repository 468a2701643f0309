"""Momentum and transfer: which attacks on one net also fool another.

    python -m experiments.momentum_transfer --out runs/momentum_transfer
    python -m experiments.momentum_transfer --preset fashion_mnist --data-dir DIR

An attacker without the net makes examples on one of his own. Five nets of different
make are each attacked and shown what fooled the others: by I-FGSM, with momentum (MI),
and with the gradient taken through random resizings (DI) and smoothed (TI). Then
Madry's black-box table: a robust net attacked by its own gradient, by a second robust
net's, by a natural net's.

Linf, 10 steps, last iterate; % fooled of what a target has right, mean over 20 pairs
of different nets, with 95 % intervals over images; seed 0:

    data, epsilon              I-FGSM             MI                 MI+DI+TI
    Fashion-MNIST 0.1, 1,000   18.3 (17.1, 19.5)  24.2 (22.8, 25.5)  25.7 (24.3, 27.1)
    digits 0.15, 360           21.7 (19.3, 24.1)  23.4 (20.9, 26.0)  19.6 (17.2, 22.1)

Expected: each column above the one before. So it is on Fashion-MNIST, also with seeds 1
and 2. On the digits MI is above I-FGSM, but MI+DI+TI BELOW MI, with all three seeds:
8x8 pixels leave little to resize and to smooth. Madry's orderings hold on Fashion-MNIST
but for PGD against FGSM by a copy, which one of three seeds does not settle; on the
digits only white box against copy is settled.
Digits 140 CPU seconds, Fashion-MNIST 240, on one of two shared AMD EPYC cores.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import jax
import numpy as np

import robustjax as rj
from experiments import common, ideas
from robustjax import models, plots
from robustjax.attacks.input_transforms import input_diversity, translation_invariant
from robustjax.evaluation.transfer import (
    Difference,
    TransferMatrix,
    transfer_matrix,
)
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard

TRAINING = ("seed", "dataset", "num_train", "train_steps", "epsilon", "width")
ROBUST, COPY, NATURAL = "robust", "robust copy", "Madry"


@dataclass(frozen=True)
class Config:
    preset: Literal["digits", "fashion_mnist"] = "digits"
    """Which defaults the other flags start from."""
    out: str = "runs/momentum_transfer"
    """Where the results, the picture and the nets go; the same command goes on."""
    seed: int = 0
    """Decides weights, order of the images and all noise."""
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The embedded digits (8x8 pixels), or images of 28x28."""
    data_dir: str | None = None
    """Where the data set lies (docs/data.md); absent: $ROBUSTJAX_DATA_DIR."""
    others: tuple[Literal["MLP", "PreActResNet", "WideResNet"], ...] = (
        "MLP",
        "PreActResNet",
        "WideResNet",
    )
    """Nets in the matrix beside Madry's, natural and robust."""
    num_train: int = 1437
    """The first so many training images."""
    num_test: int = 360
    """The first so many test images."""
    num_epochs: int = 20
    """Passes over the training images, for each of the six nets."""
    width: int = 4
    """Channels of the first stage of PreActResNet-18; the other nets are in scale."""
    train_steps: int = 5
    """PGD steps in the training of the two robust nets."""
    epsilon: float = 0.15
    """Linf budget, in training and testing."""
    attack_steps: int = 10
    """Steps of I-FGSM, MI and MI+DI+TI, each of epsilon / steps."""
    smallest: float = 0.8
    """DI: the smallest copy of an image, as a share of it."""
    kernel: int = 3
    """TI: pixels of the kernel's side."""
    sigma: float = 0.5
    """TI: the Gaussian's, in pixels."""


PRESETS = {
    "digits": Config(),
    "fashion_mnist": Config(
        preset="fashion_mnist",
        out="runs/momentum_transfer_fashion_mnist",
        dataset="fashion_mnist",
        num_train=6000,
        num_test=1000,
        num_epochs=5,
        epsilon=0.1,
    ),
}


def attacks(config: Config) -> dict[str, rj.AttackFn]:
    """I-FGSM, MI-FGSM and MI with both transformations; the last iterate, as papers."""
    steps, size = config.attack_steps, 1 / config.attack_steps
    mi = rj.momentum(steps, keep=rj.last)

    def transformed(key, problem):
        inner = input_diversity(problem, smallest=config.smallest)
        outer = translation_invariant(inner, size=config.kernel, sigma=config.sigma)
        return mi(key, outer)

    return {
        "I-FGSM": rj.pgd(steps, size, random_start=False, keep=rj.last),
        "MI": mi,
        "MI+DI+TI": transformed,
    }


def train(config: Config, splits: common.Splits) -> dict[str, rj.LogitsFn]:
    """Five nets of different make, and a second robust one with other weights."""
    width = config.width
    net = models.madry_mnist(channels=(4 * width, 8 * width), hidden=64 * width)
    residual = models.preact_resnet18(width=width)
    wide = models.wide_resnet(10, 1, base_width=2 * width)
    perceptron = models.mlp((64 * width, 64 * width))
    inner = rj.pgd(config.train_steps, keep=rj.last)
    robust = madry(net, rj.linf(config.epsilon), inner)
    recipes = {
        "MLP": (perceptron, standard(perceptron), 0),
        NATURAL: (net, standard(net), 0),
        "PreActResNet": (residual, standard(residual), 0),
        "WideResNet": (wide, standard(wide), 0),
        ROBUST: (net, robust, 0),
        COPY: (net, robust, 1),
    }
    chosen = (NATURAL, ROBUST, COPY, *config.others)
    return {
        name: ideas.train(
            *(config.out, name, model, method, splits.train),
            {field: getattr(config, field) for field in TRAINING},
            num_epochs=config.num_epochs,
            seed=config.seed + other,
        )[0]
        for name, (model, method, other) in recipes.items()
        if name in chosen
    }


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    splits = common.load_splits(
        config.dataset, config.data_dir, config.seed, 0, config.num_test
    )
    few = splits.train._replace(
        x=splits.train.x[: config.num_train], y=splits.train.y[: config.num_train]
    )
    nets = train(config, splits._replace(train=few))
    copy = nets.pop(COPY)
    shared = (*splits.test, rj.linf(config.epsilon))
    key = jax.random.key(config.seed)
    found = transfer_matrix(
        nets, None, attacks(config), *shared, key=key, batch_size=250
    )
    print(found)
    black = transfer_matrix(  # Madry's table: one robust net, attacked from three
        {ROBUST: nets[ROBUST], COPY: copy, NATURAL: nets[NATURAL]},
        {ROBUST: nets[ROBUST]},
        {"FGSM": rj.fgsm(), "PGD-20": rj.pgd(20, keep=rj.last)},
        *shared,
        key=key,
        batch_size=250,
    )
    print(black)
    claims, measured = judge(found, black)
    measured["data"] = f"{splits.used}; the nets saw the first {len(few.x):,}"
    plots.save(draw(found, black), Path(config.out) / "momentum_transfer.png")
    figures = ["momentum_transfer.png"]
    return ideas.save(config.out, config, claims, measured, figures, began)


def ordered(black: TransferMatrix, one: tuple[int, int], two: tuple[int, int]):
    """How much more (attack, source) `one` fools the robust net than `two`, paired."""
    right = black.correct[0]
    d = black.wrong[one][0, right].astype(float) - black.wrong[two][0, right]
    half = NormalDist().inv_cdf(0.975) * d.std(ddof=1) / np.sqrt(len(d))
    return Difference(float(d.mean()), float(d.mean() - half), float(d.mean() + half))


def judge(found: TransferMatrix, black: TransferMatrix):
    """Claims hold where the whole 95 % interval is above zero."""
    compared = {
        "mi_over_ifgsm": (
            "MI fools more than I-FGSM, mean over the pairs of nets",
            found.difference("MI", "I-FGSM"),
        ),
        "di_ti_over_mi": (
            "MI+DI+TI fools more than MI, mean over the pairs of nets",
            found.difference("MI+DI+TI", "MI"),
        ),
        # (attack, source): FGSM, PGD by itself, the copy, the natural net.
        "white_over_copy": (
            "Madry: PGD by the robust net's own gradient fools more than by a copy's",
            ordered(black, (1, 0), (1, 1)),
        ),
        "pgd_over_fgsm": (
            "Madry: PGD by the copy fools more than FGSM by the copy",
            ordered(black, (1, 1), (0, 1)),
        ),
        "copy_over_natural": (
            "Madry, CIFAR-10: PGD by the copy fools more than by the natural net",
            ordered(black, (1, 1), (1, 2)),
        ),
    }
    claims = {
        name: ideas.Claim(f"{says}; lower end of the difference > 0", d.low, 0.0)
        for name, (says, d) in compared.items()
    }
    measured = {
        "differences": {name: d._asdict() for name, (_, d) in compared.items()},
        "mean_rate": {a: found.mean_rate(a)._asdict() for a in found.attacks},
        "transfer": table(found),
        "black_box": table(black),
    }
    return claims, measured


def table(matrix: TransferMatrix) -> dict[str, Any]:
    """A matrix as plain numbers: everything that a page quotes."""
    return {
        **{name: list(getattr(matrix, name)) for name in ("sources", "targets")},
        "clean_error": matrix.clean_error,
        "rate": dict(zip(matrix.attacks, matrix.rate, strict=True)),
        "interval": dict(zip(matrix.attacks, matrix.intervals(), strict=True)),
        "error": dict(zip(matrix.attacks, matrix.error, strict=True)),
    }


def draw(found: TransferMatrix, black: TransferMatrix):
    """The matrices above; below the means over pairs, and Madry's black-box table."""
    figure = plots.new_figure(11, 6.2)
    top, bottom = np.ravel(figure.subfigures(2, 1, height_ratios=(3.4, 2.6)))
    plots.draw_matrix(
        dict(zip(found.attacks, 100 * found.rate, strict=True)),
        *(found.sources, found.targets, top),
        x="judged on",
        y="made on",
        label="% fooled",
        limits=(0, 100),
        form=".0f",
    )
    left, right = bottom.subplots(1, 2, width_ratios=(2, 3))
    for place, name in enumerate(found.attacks):
        mean = found.mean_rate(name)
        bar(left, place, 0.6, mean.value, mean.low, mean.high, plots.COLORS[place])
    left.set_xticks(range(len(found.attacks)), found.attacks)
    left.set_title("mean over pairs of different nets", fontsize=11, color=plots.INK)
    for a, name in enumerate(black.attacks):
        for s in range(len(black.sources)):
            low, high = black.intervals()[a, s, 0]
            color, label = plots.COLORS[3 + a], name if s == 0 else None
            place, rate = s + 0.36 * (a - 0.5), black.rate[a, s, 0]
            bar(right, place, 0.34, rate, low, high, color, label)
    names = ["its own gradient", "a robust copy's", "a natural net's"]
    right.set_xticks(range(len(names)), names)
    right.set_title("Madry's robust net, attacked by", fontsize=11, color=plots.INK)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_ylabel("% fooled")
        plots.tidy(axes)
    return figure


def bar(axes, place, width, value, low, high, color, label=None):
    """A rate with its interval, both in percent."""
    ends = [[100 * (value - low)], [100 * (high - value)]]
    style = {"color": color, "ecolor": plots.INK, "capsize": 3, "label": label}
    axes.bar(place, 100 * value, width, yerr=ends, **style)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
