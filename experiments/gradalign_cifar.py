"""GradAlign on CIFAR-10 (Andriushchenko and Flammarion 2020, arXiv:2007.02617).

    python -m experiments.gradalign_cifar --data-dir DIR
    python -m experiments.gradalign_cifar --data-dir DIR --epsilon 16/255 --strength 2 \
        --out runs/gradalign_16
    python -m experiments.gradalign_cifar --data-dir DIR --preset paper

`small`: PreActResNet-18 of width 16, strength 0.2, three epochs of 39,000 of the first
40,000 training images; BatchNorm in mode eval, since in the authors' mode this net
learned to read the label off the step (docs/results.md). The penalty is differentiated
twice, which costs more than the four gradients that are counted: 72 images per second
were measured on one core. `small` as a whole was NOT run here; the method's row of
`compare_methods` was (docs/results.md).

`paper` has NOT been run here: it wants an accelerator. 30 epochs, rate up to 0.3 at 2/5
of the training and back, weight decay 5e-4; strength by epsilon of 255: 8 0.2, 10
0.356, 12 0.632, 16 2 (`methods/gradalign.py`). Published, not measured here: AutoAttack
43.93 (RobustBench); the paper's own figures were not read.
Differs from the authors' code: see `methods/gradalign.py`; 1,000 training images are
held out and choose the checkpoint; the net is this library's PreActResNet-18
(docs/models.md); float32, not half.
"""

from dataclasses import dataclass
from typing import Any, Literal

from experiments import common
from experiments.recipe import Recipe, run
from experiments.watching import Collapse
from robustjax.methods.base import BnMode
from robustjax.methods.gradalign import gradalign


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper"] = "small"
    """Which defaults the other flags start from."""
    strength: float = 0.2
    """Weight of the misalignment, the authors' lambda; more for a larger epsilon."""
    step_size: float = 1.25
    """Of the one step from the image itself, as a fraction of epsilon."""
    through_clean: bool = False
    """Differentiate the gradient at the image itself too, as the paper's formula."""
    bn_mode: BnMode = "eval"
    """BatchNorm in the passes that give input gradients: running statistics, or the
    batch's, as the authors and the preset `paper`."""
    on_collapse: Collapse = "warn"
    """When FGSM's and PGD's accuracy on training images part by more than 0.2: warn,
    stop with an error, or end the run with the best checkpoint so far."""
    recipe: Recipe = Recipe("runs/gradalign_cifar", num_epochs=3)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        bn_mode="batch",
        recipe=Recipe(
            "runs/gradalign_cifar_paper",
            width=64,
            num_epochs=30,
            learning_rate=0.3,
            nesterov=False,
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    def build(model, threat):
        return gradalign(
            model,
            threat,
            strength=config.strength,
            step_size=config.step_size,
            through_clean=config.through_clean,
            bn_mode=config.bn_mode,
        )

    return run(config, build, on_collapse=config.on_collapse)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
