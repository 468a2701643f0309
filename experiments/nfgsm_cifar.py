"""N-FGSM on CIFAR-10, a step from noise (de Jorge et al. 2022, arXiv:2202.01181).

    python -m experiments.nfgsm_cifar --data-dir DIR
    python -m experiments.nfgsm_cifar --data-dir DIR --preset paper
    python -m experiments.nfgsm_cifar --data-dir DIR --epsilon 16/255 --out runs/n_16

`small`: PreActResNet-18 of width 16, ten epochs, 39,000 of the first 40,000 training
images; as many gradients as `fast_cifar`, and no collapse is expected at a large
epsilon either; at 8/255 one of three trainings of three epochs collapsed in this mode
of BatchNorm, with `--bn-mode eval` none of three (`compare_methods`, docs/results.md).
Runs of three to four epochs were measured (docs/reproduce.md), `small` as a whole was
NOT run here.

`paper` has NOT been run here: it wants an accelerator. 30 epochs, rate 0 to 0.2 and
back in two equal parts, momentum 0.9 to 0.8 and back (CyclicLR's default), weight decay
5e-4, noise of 2 epsilon, a step of epsilon, as in the authors' train.py. The paper's
figures are not quoted: they were not read.
Differs from the authors' code: see `methods/nfgsm.py`; 1,000 training images are held
out and choose the checkpoint, theirs is the last; the net is this library's
PreActResNet-18 (docs/models.md).
"""

from dataclasses import dataclass
from typing import Any, Literal

from experiments import common
from experiments.recipe import Recipe, run
from experiments.watching import Collapse
from robustjax.methods.base import BnMode
from robustjax.methods.nfgsm import nfgsm


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper"] = "small"
    """Which defaults the other flags start from."""
    noise: float = 2.0
    """How far the uniform noise reaches, in units of epsilon."""
    step_size: float = 1.0
    """Of the one step, as a fraction of epsilon."""
    bn_mode: BnMode = "batch"
    """BatchNorm inside the attack: running statistics, or those of the batch."""
    on_collapse: Collapse = "warn"
    """When FGSM's and PGD's accuracy on training images part by more than 0.2: warn,
    stop with an error, or end the run with the best checkpoint so far."""
    recipe: Recipe = Recipe("runs/nfgsm_cifar", warmup=0.5)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        recipe=Recipe(
            "runs/nfgsm_cifar_paper",
            width=64,
            num_epochs=30,
            warmup=0.5,
            momentum=(0.9, 0.8),
            nesterov=False,
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    def build(model, threat):
        return nfgsm(
            model,
            threat,
            noise=config.noise,
            step_size=config.step_size,
            bn_mode=config.bn_mode,
        )

    return run(config, build, on_collapse=config.on_collapse)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
