"""Fast adversarial training on CIFAR-10, RS-FGSM (Wong et al. 2020, arXiv:2001.03994).

    python -m experiments.fast_cifar --data-dir DIR
    python -m experiments.fast_cifar --data-dir DIR --preset collapse
    python -m experiments.fast_cifar --data-dir DIR --preset paper

`small`: PreActResNet-18 of width 16, one random-start step of 1.25 epsilon, ten epochs,
39,000 of the first 40,000 training images. `collapse`: the same at epsilon 16/255,
where the method is known to overfit catastrophically (arXiv:2007.02617): training
points then resist FGSM and not PGD. After every epoch the monitor compares the two and
warns; `--on-collapse stop` raises, `restore` ends the run. results.json says when
(`collapsed_after`), and what the last epoch was like (`last`), since the measured
checkpoint is the best one, from before. There is none where the net collapses within
the first epoch, as that of `collapse` did here. `collapse` and a shorter `small` were
measured (docs/reproduce.md), `small` as a whole was NOT run here.

`paper` has NOT been run here: it wants an accelerator. Published, not measured here:
clean 86.06, PGD-50 with 10 restarts 46.06 in 12 minutes (the authors' README; their
issue 8 has re-runs by users of 79.30 and 45.31); AutoAttack 43.21 (RobustBench).
15 epochs, rate 0 to 0.2 and back in two equal parts, momentum 0.9 to 0.8 and back
(CyclicLR's default, which their code takes), weight decay 5e-4.
Differs from the authors' code: see `methods/fast.py`; 1,000 training images are held
out and choose the checkpoint (theirs stops when PGD-5 on a training batch falls by more
than 0.2); activated shortcuts and a last BatchNorm in the net; float32, not half.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments import common
from experiments.recipe import Recipe, run
from experiments.watching import Collapse
from robustjax.methods.base import BnMode
from robustjax.methods.fast import fast


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "collapse", "paper"] = "small"
    """Which defaults the other flags start from."""
    step_size: float = 1.25
    """Of the one step, as a fraction of epsilon."""
    bn_mode: BnMode = "batch"
    """BatchNorm inside the attack: running statistics, or those of the batch."""
    on_collapse: Collapse = "warn"
    """When FGSM's and PGD's accuracy on training images part by more than 0.2: warn,
    stop with an error, or end the run with the best checkpoint so far."""
    recipe: Recipe = Recipe("runs/fast_cifar", warmup=0.5)


PRESETS = {
    "small": Config(),
    "collapse": Config(
        "collapse",
        recipe=replace(Config.recipe, out="runs/fast_cifar_collapse", epsilon="16/255"),
    ),
    "paper": Config(
        "paper",
        recipe=Recipe(
            "runs/fast_cifar_paper",
            width=64,
            num_epochs=15,
            warmup=0.5,
            momentum=(0.9, 0.8),
            nesterov=False,
            num_test=10_000,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    def build(model, threat):
        step_size, bn_mode = config.step_size, config.bn_mode
        return fast(model, threat, step_size=step_size, bn_mode=bn_mode)

    return run(config, build, on_collapse=config.on_collapse)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
