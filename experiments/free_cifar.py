"""Free adversarial training on CIFAR-10 (Shafahi et al. 2019, arXiv:1904.12843).

    python -m experiments.free_cifar --data-dir DIR
    python -m experiments.free_cifar --data-dir DIR --preset paper

`small`: PreActResNet-18 of width 16, each batch replayed four times, five epochs (so
twenty gradients per image, as many as `madry_cifar`), 39,000 of the first 40,000
training images. `small` was NOT run here; the method's row of `compare_methods` was
(docs/results.md).

`paper` has NOT been run here: it wants an accelerator. Published, not measured here:
clean 85.96, PGD-100 46.19, CW 46.60 in 785 minutes (the authors' README; PGD training
there 87.25 and 45.29 in 5,418). Eight replays of 10,000 batches of 128; rate 0.1, 0.01
from update 40,000, 0.001 from 60,000; weight decay 2e-4; the WideResNet of Madry's
challenge, 34-10 in the usual count.
Differs from the authors' code: see `methods/free.py`; ReLU where theirs is leaky (0.1);
normalization by the data set's mean where theirs is by each image's; 1x1 convolutions
as shortcuts; 1,000 training images are held out and choose the checkpoint.
"""

from dataclasses import dataclass
from typing import Any, Literal

from experiments import common
from experiments.recipe import Recipe, run
from experiments.watching import Collapse
from robustjax.methods.free import free


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper"] = "small"
    """Which defaults the other flags start from."""
    repeats: int = 4
    """Updates on each batch, the authors' m. The schedule's length counts them."""
    step_size: float = 1.0
    """Of the perturbation at each of them, as a fraction of epsilon."""
    on_collapse: Collapse = "warn"
    """When FGSM's and PGD's accuracy on training images part by more than 0.2: warn,
    stop with an error, or end the run with the best checkpoint so far."""
    recipe: Recipe = Recipe("runs/free_cifar", num_epochs=5)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        repeats=8,
        recipe=Recipe(
            "runs/free_cifar_paper",
            model="wide_resnet",
            width=10,
            num_steps=10_000,
            schedule="piecewise",
            learning_rate=0.1,
            weight_decay=2e-4,
            decay="kernels",
            nesterov=False,
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    def build(model, threat):
        repeats, step_size = config.repeats, config.step_size
        return free(model, threat, repeats=repeats, step_size=step_size)

    return run(config, build, on_collapse=config.on_collapse)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
