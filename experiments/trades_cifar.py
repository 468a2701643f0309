"""TRADES on CIFAR-10, Linf (Zhang et al. 2019, arXiv:1901.08573).

    python -m experiments.trades_cifar --data-dir DIR
    python -m experiments.trades_cifar --data-dir DIR --preset paper
    python -m experiments.trades_cifar --data-dir DIR --beta 1 --out runs/trades_beta_1

`small`: PreActResNet-18 of width 16, beta 6, two steps of 0.75 epsilon, five epochs
(four gradients per update: as many in all as `madry_cifar`), 39,000 of the first 40,000
training images. `small` was NOT run here; the method's row of `compare_methods` was
(docs/results.md).

`paper` has NOT been run here: it wants an accelerator. Published, not measured here, at
epsilon 0.031: clean 84.92, PGD-20 with steps of 0.003 56.61, AutoAttack 53.08 (the
authors' README). WideResNet-34-10, 10 steps of 0.007, SGD 0.1, a tenth from epochs 75,
90 and 100 on, counted from 1, of 76 (their code; the text of older versions has 100 or
120 epochs), so after 74 whole ones; weight decay 2e-4.
Differs from the authors' code: see `methods/trades.py`; 1,000 training images are held
out and choose the checkpoint, theirs is the last; inputs are normalized by the data
set's mean, theirs not.
"""

from dataclasses import dataclass
from typing import Any, Literal

import robustjax as rj
from experiments import common
from experiments.recipe import Recipe, run
from robustjax.methods.base import BnMode
from robustjax.methods.trades import trades


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper"] = "small"
    """Which defaults the other flags start from."""
    beta: float = 6.0
    """Weight of the divergence."""
    attack_steps: int = 2
    """Gradient steps of the attack in training."""
    attack_step_size: float = 0.75
    """Of each, as a fraction of epsilon."""
    bn_mode: BnMode = "eval"
    """BatchNorm inside the attack: running statistics, or those of the batch."""
    recipe: Recipe = Recipe("runs/trades_cifar", num_epochs=5)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        attack_steps=10,
        attack_step_size=0.007 / 0.031,
        recipe=Recipe(
            "runs/trades_cifar_paper",
            model="wide_resnet",
            width=10,
            epsilon="0.031",
            num_epochs=76,
            schedule="piecewise",
            boundaries=(74, 89, 99),
            learning_rate=0.1,
            weight_decay=2e-4,
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
        return trades(
            model, threat, attack_fn, beta=config.beta, bn_mode=config.bn_mode
        )

    return run(config, build)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
