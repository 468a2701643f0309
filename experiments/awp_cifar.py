"""Adversarial weight perturbation on CIFAR-10 (Wu et al. 2020, arXiv:2004.05884).

    python -m experiments.awp_cifar --data-dir DIR
    python -m experiments.awp_cifar --data-dir DIR --on trades --out runs/awp_trades
    python -m experiments.awp_cifar --data-dir DIR --preset paper
    python -m experiments.awp_cifar --data-dir DIR --preset trades

`small`: PreActResNet-18 of width 16, two steps of 0.75 epsilon, five epochs (on Madry's
method four gradients per update, as many in all as `madry_cifar`), 39,000 of the first
40,000 training images. `small` was NOT run here; the method's rows of `compare_methods`
were (docs/results.md).

`paper` (Madry's method, PreActResNet-18, gamma 0.01) and `trades` (WideResNet-34-10,
gamma 0.005 after 9 epochs without) have NOT been run here: they want an accelerator.
Published, not measured here: ResNet-18 AutoAttack 50.80 on Madry's method and 51.62 on
TRADES (MAIR's README); WideResNet-34-10 clean 85.36, AutoAttack 53.97, with TRADES
56.17 (the authors' README). 200 epochs, SGD 0.1, a tenth at 1/2 and at 3/4 (on TRADES
after 99 and 149 epochs: their epochs count from 1), weight decay 5e-4, 10 steps of
2/255.
Differs from the authors' code: see `methods/awp.py`; 1,000 training images are held out
and choose the checkpoint; the net is this library's PreActResNet-18 (docs/models.md).
"""

from dataclasses import dataclass
from typing import Any, Literal

import robustjax as rj
from experiments import common, recipe
from experiments.recipe import Recipe
from robustjax.methods.awp import awp
from robustjax.methods.madry import madry
from robustjax.methods.trades import trades

GAMMA = {"madry": 0.01, "trades": 0.005}


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper", "trades"] = "small"
    """Which defaults the other flags start from."""
    on: Literal["madry", "trades"] = "madry"
    """The method that is wrapped."""
    gamma: float | None = None
    """How far the weights go, relative to each tensor's norm; absent: the authors',
    0.01 on madry and 0.005 on trades."""
    num_warmup: int = 0
    """Epochs without perturbed weights."""
    beta: float = 6.0
    """Weight of the divergence in trades."""
    attack_steps: int = 2
    """Gradient steps of the attack in training."""
    attack_step_size: float = 0.75
    """Of each, as a fraction of epsilon."""
    recipe: Recipe = Recipe("runs/awp_cifar", num_epochs=5)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        attack_steps=10,
        attack_step_size=2 / 8,
        recipe=Recipe(
            "runs/awp_cifar_paper",
            width=64,
            num_epochs=200,
            schedule="piecewise",
            learning_rate=0.1,
            nesterov=False,
            num_test=10_000,
        ),
    ),
    "trades": Config(
        "trades",
        on="trades",
        num_warmup=9,
        attack_steps=10,
        attack_step_size=2 / 8,
        recipe=Recipe(
            "runs/awp_cifar_trades",
            model="wide_resnet",
            width=10,
            num_epochs=200,
            schedule="piecewise",
            boundaries=(99, 149),
            learning_rate=0.1,
            nesterov=False,
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    ready = recipe.prepare(config.recipe)
    _, per_epoch = recipe.length(config.recipe, ready.splits.train.x.shape[0])
    steps, size = config.attack_steps, config.attack_step_size
    if config.on == "madry":
        attack_fn = rj.pgd(steps, size, keep=rj.last)
        method = madry(ready.model, ready.threat, attack_fn, bn_mode="batch")
    else:
        attack_fn = rj.pgd(steps, size, random_start=False, keep=rj.last)
        method = trades(ready.model, ready.threat, attack_fn, beta=config.beta)
    gamma = GAMMA[config.on] if config.gamma is None else config.gamma
    method = awp(method, gamma=gamma, warmup=config.num_warmup * per_epoch)
    return recipe.finish(config, ready, recipe.train(config, ready, method))


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
