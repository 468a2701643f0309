"""MART on CIFAR-10, Linf (Wang et al., ICLR 2020).

    python -m experiments.mart_cifar --data-dir DIR
    python -m experiments.mart_cifar --data-dir DIR --preset paper
    python -m experiments.mart_cifar --data-dir DIR --preset wide

`small`: PreActResNet-18 of width 16, beta 5, two steps of 0.75 epsilon, five epochs
(four gradients per update, as many in all as `madry_cifar`) with a highest rate of 0.1,
39,000 of the first 40,000 training images. `small` was NOT run here; the method's row
of `compare_methods` was (docs/results.md).

`paper` (ResNet-18, beta 5, SGD 0.01, weight decay 3.5e-3, 120 epochs) and `wide`
(WideResNet-34-10, beta 6, SGD 0.1, 7e-4, 90 epochs), a tenth from epochs 75, 90 and 100
on, counted from 1, have NOT been run here: they want an accelerator. Published, not
measured here: ResNet-18 AutoAttack 47.51, WideResNet-34-10 51.89 (MAIR's README, its
own runs of the method); the authors' 87.50 and 56.29 are with 500,000 more images.
Differs from the authors' code: see `methods/mart.py`; 1,000 training images are held
out and choose the checkpoint; inputs are normalized by the data set's mean, theirs not.
"""

from dataclasses import dataclass
from typing import Any, Literal

import robustjax as rj
from experiments import common
from experiments.recipe import Recipe, run
from robustjax.methods.base import BnMode
from robustjax.methods.mart import mart


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper", "wide"] = "small"
    """Which defaults the other flags start from."""
    beta: float = 5.0
    """Weight of the divergence."""
    attack_steps: int = 2
    """Gradient steps of the attack in training."""
    attack_step_size: float = 0.75
    """Of each, as a fraction of epsilon."""
    bn_mode: BnMode = "eval"
    """BatchNorm inside the attack: running statistics, or those of the batch."""
    recipe: Recipe = Recipe("runs/mart_cifar", num_epochs=5, learning_rate=0.1)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        attack_steps=10,
        attack_step_size=0.007 / 0.031,
        recipe=Recipe(
            "runs/mart_cifar_paper",
            model="resnet18",
            width=64,
            epsilon="0.031",
            num_epochs=120,
            schedule="piecewise",
            boundaries=(74, 89, 99),
            learning_rate=0.01,
            weight_decay=3.5e-3,
            nesterov=False,
            num_test=10_000,
        ),
    ),
    "wide": Config(
        "wide",
        beta=6.0,
        attack_steps=10,
        attack_step_size=0.007 / 0.031,
        recipe=Recipe(
            "runs/mart_cifar_wide",
            model="wide_resnet",
            width=10,
            epsilon="0.031",
            num_epochs=90,
            schedule="piecewise",
            boundaries=(74, 89, 99),
            learning_rate=0.1,
            weight_decay=7e-4,
            nesterov=False,
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    attack_fn = rj.pgd(
        config.attack_steps, config.attack_step_size, random_start=False, keep=rj.last
    )

    def build(model, threat):
        return mart(model, threat, attack_fn, beta=config.beta, bn_mode=config.bn_mode)

    return run(config, build)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
