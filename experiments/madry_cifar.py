"""Adversarial training on CIFAR-10 (Madry et al. 2018, arXiv:1706.06083).

    python -m experiments.madry_cifar --data-dir DIR            # preset `small`
    python -m experiments.madry_cifar --preset paper --data-dir DIR

The paper's row (Linf, 8/255): clean 87.3, FGSM 56.1, PGD-7 50.0, PGD-20 45.8.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import jax

import robustjax as rj
from experiments import common
from robustjax import data, models
from robustjax.methods.madry import madry
from robustjax.training import optimizers
from robustjax.training.loop import fit

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper", "code"] = "small"
    """Which defaults the other flags start from."""
    out: str = "runs/madry_cifar"
    """The run's folder. The same command on the same folder goes on with the run."""
    data_dir: str | None = None
    """Where cifar10.npz or another form of the set lies (docs/data.md)."""
    seed: int = 0
    """Decides weights, order, augmentation, noise and the held-out images."""

    model: Literal["preact_resnet18", "wide_resnet"] = "preact_resnet18"
    """The net."""
    width: int = 16
    """Channels of PreActResNet-18's first stage, or WideResNet's factor."""
    depth: int = 34
    """Of the WideResNet."""

    epsilon: str = "8/255"
    """Linf budget, in training and testing."""
    attack_steps: int = 1
    """Gradient steps of the attack in training, from a random start."""
    attack_step_size: float = 1.25
    """Of each, as a fraction of epsilon."""
    bn_mode: Literal["eval", "batch"] = "batch"
    """BatchNorm inside the attack: running statistics, or those of the batch."""

    num_epochs: int = 10
    """Passes over the training images."""
    num_steps: int | None = None
    """Batches to learn from, instead of `num_epochs`."""
    batch_size: int = 128
    """Images per step."""
    schedule: Literal["one_cycle", "piecewise"] = "one_cycle"
    """One linear rise and fall, or a tenth at 1/2 and at 3/4 of the training."""
    learning_rate: float = 0.2
    """The highest one."""
    weight_decay: float = 5e-4
    """L2 penalty."""
    decay: Literal["all", "kernels"] = "all"
    """What is decayed: every weight, or no norm scales and biases."""
    ema_decay: float | None = None
    """Average the weights with this decay and use the averages."""

    num_validation: int = 1000
    """Training images held out."""
    num_attacked: int = 500
    """Of these, how many PGD-10 attacks after every epoch; the best epoch is kept."""
    num_test: int = 1000
    """How many test images, from the first."""


PRESETS = {
    "small": Config(),
    "paper": Config(
        preset="paper",
        out="runs/madry_cifar_paper",
        model="wide_resnet",
        width=10,
        attack_steps=7,
        attack_step_size=2 / 8,
        num_steps=80_000,
        schedule="piecewise",
        learning_rate=0.1,
        weight_decay=2e-4,
        decay="kernels",
    ),
}


def build(config: Config, num_classes: int = 10) -> models.Model:
    """The config's net; it normalizes its inputs itself."""
    if config.model == "preact_resnet18":
        return models.preact_resnet18(
            num_classes, width=config.width, mean=MEAN, std=STD
        )
    return models.wide_resnet(
        config.depth, config.width, num_classes, mean=MEAN, std=STD
    )


def main(config: Config) -> dict[str, Any]:
    began = time.monotonic()
    splits = common.load_splits(
        "cifar10",
        config.data_dir,
        config.seed,
        config.num_validation,
        config.num_test,
    )
    print(splits.used)
    threat = rj.linf(config.epsilon)
    model = build(config, splits.num_classes)
    attack_fn = rj.pgd(config.attack_steps, config.attack_step_size, keep=rj.last)
    per_epoch = data.steps_per_epoch(splits.train.x.shape[0], config.batch_size)
    num_steps = config.num_steps or config.num_epochs * per_epoch
    if config.schedule == "one_cycle":
        rate = optimizers.one_cycle(config.learning_rate, num_steps)
    else:
        boundaries = [num_steps // 2, num_steps * 3 // 4]
        rate = optimizers.piecewise(config.learning_rate, boundaries)
    x, y = splits.validation
    trained = fit(
        jax.random.key(config.seed),
        model,
        madry(model, threat, attack_fn, bn_mode=config.bn_mode),
        optimizers.sgd(rate, weight_decay=config.weight_decay, decay=config.decay),
        splits.train,
        batch_size=config.batch_size,
        num_steps=num_steps,
        checkpoint_every=min(per_epoch, num_steps),
        augment=data.compose(data.random_crop, data.random_flip),
        validate=common.validator(
            model,
            (x[: config.num_attacked], y[: config.num_attacked]),
            threat,
            rj.pgd(10),
        ),
        out=config.out,
        config=common.training_part(config),
        ema_decay=config.ema_decay,
    )
    f = models.logits_fn(model, trained.params, trained.extra)
    clean, robust = common.accuracies(f, *splits.test, threat, rj.pgd(20))
    print(clean, robust)
    results = {"clean_accuracy": clean, "pgd20": robust, "best": trained.metrics}
    common.save_results(config.out, results, began)
    return results


if __name__ == "__main__":
    main(common.parse(PRESETS, __doc__))
