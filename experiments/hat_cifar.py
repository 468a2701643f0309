"""HAT on CIFAR-10: help against excessive margins (Rade, Moosavi-Dezfooli, ICLR 2022).

    python -m experiments.hat_cifar --data-dir DIR
    python -m experiments.hat_cifar --data-dir DIR --preset paper

First trains the helper, the same net without attacks, in OUT/helper, then the net; the
same command goes on with either. `small`: PreActResNet-18 of width 16, five epochs for
the helper, then four with two steps of 0.75 epsilon (five gradients per update),
39,000 of the first 40,000 training images. `small` was NOT run here; the method's row
of `compare_methods` was (docs/results.md).

`paper` has NOT been run here: it wants an accelerator. Published, not measured here:
ResNet-18 clean 84.90, AutoAttack 49.08 (the authors' README). 50 epochs for each net,
10 steps of 2/255, rate up to 0.21 at a quarter of the training and down along cosines,
Nesterov momentum, which OneCycleLR takes from 0.95 to 0.85 and back, weight decay 5e-4;
h 2, beta 2.5, gamma 0.5.
Differs from the authors' code: see `methods/hat.py`; 1,000 training images are held out
and choose the checkpoints; inputs are normalized by the data set's mean, theirs not.
"""

from dataclasses import dataclass
from typing import Any, Literal

import robustjax as rj
from experiments import common, recipe
from experiments.recipe import Recipe
from robustjax.methods.hat import hat


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper"] = "small"
    """Which defaults the other flags start from."""
    helper_epochs: int = 5
    """Of the helper's training; the rest of it is the recipe's."""
    beta: float = 2.5
    """Weight of the divergence."""
    gamma: float = 0.5
    """Weight of the helper's answer."""
    reach: float = 2.0
    """How far beyond the adversarial example it is asked, the authors' h."""
    attack_steps: int = 2
    """Gradient steps of the attack in training."""
    attack_step_size: float = 0.75
    """Of each, as a fraction of epsilon."""
    recipe: Recipe = Recipe("runs/hat_cifar", num_epochs=4)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        helper_epochs=50,
        attack_steps=10,
        attack_step_size=2 / 8,
        recipe=Recipe(
            "runs/hat_cifar_paper",
            model="resnet18",
            width=64,
            num_epochs=50,
            schedule="cosine_cycle",
            warmup=0.25,
            learning_rate=0.21,
            momentum=(0.95, 0.85),
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    ready = recipe.prepare(config.recipe)
    attack_fn = rj.pgd(
        config.attack_steps, config.attack_step_size, random_start=False, keep=rj.last
    )
    helper = recipe.standard_net(config.recipe, ready, "helper", config.helper_epochs)
    method = hat(
        ready.model,
        ready.threat,
        helper,
        attack_fn,
        beta=config.beta,
        gamma=config.gamma,
        reach=config.reach,
    )
    return recipe.finish(config, ready, recipe.train(config, ready, method))


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
