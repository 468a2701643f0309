"""TRADES with generated or self-labeled images (Wang et al. 2023, arXiv:2302.04638).

    python -m experiments.generated_data_cifar --data-dir DIR --generated self
    python -m experiments.generated_data_cifar --data-dir DIR --generated FILE.npz \
        --out runs/generated_file
    python -m experiments.generated_data_cifar --generated FILE.npz --preset paper

`--generated self` is self-training in small (Carmon et al. 2019, arXiv:1905.13736):
`--num-held-back` training images lose their labels, a net trained without attacks on
the rest (in OUT/teacher) predicts them, and each batch takes `--fraction` of its images
from these. `small`: PreActResNet-18 of width 16, 20,000 images held back, two steps of
0.75 epsilon, 1,480 steps of 128 images, half of them labeled: five passes over 19,000
(four gradients per update, as many in all as `madry_cifar`). `small` was NOT run here;
the row `madry_pseudo` of `compare_methods` is self-training too (docs/results.md).

`paper` has NOT been run here: it wants an accelerator and the million images of an EDM.
Published, not measured here: WideResNet-28-10 clean 92.44, AutoAttack 67.31 (the
authors' README; its longest runs had 20 million images). 400 epochs of 50,000 images,
batches of 512, 0.7 of each generated, beta 5, 10 steps of 2/255, labels smoothed by
0.1, rate 0.2 (cosines, 0.025 of the training up), momentum 0.95 to 0.85 and back
(OneCycleLR's default), averaged weights (0.995), BatchNorm's statistics with 0.99.
Differs from the authors' code: see `methods/generated.py`; the rate follows its curve
from step to step, theirs from epoch to epoch; the averaging has no warm-up and takes
BatchNorm's statistics in, which theirs copies; the first step does not set these
statistics anew; 1,024 training images choose the checkpoint by PGD-10.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import robustjax as rj
from experiments import common, machine, recipe
from experiments.recipe import Prepared, Recipe
from robustjax import data
from robustjax.methods.base import smoothed
from robustjax.methods.generated import split_batch, with_stream
from robustjax.methods.trades import trades


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper"] = "small"
    """Which defaults the other flags start from."""
    generated: str | None = None
    """An .npz with `image` (uint8) and `label`, or "self"."""
    fraction: float = 0.5
    """Of each batch, how much is generated. Devices share both parts: 0.7 of 512 are
    154 + 358 rows, for two devices at most; 0.6875 are 160 + 352, for up to 32."""
    smoothing: float = 0.0
    """Of all labels."""
    num_held_back: int = 20_000
    """With "self": training images that lose their labels."""
    teacher_epochs: int = 5
    """With "self": of the net that labels them."""
    beta: float = 6.0
    """Weight of the divergence."""
    attack_steps: int = 2
    """Gradient steps of the attack in training."""
    attack_step_size: float = 0.75
    """Of each, as a fraction of epsilon."""
    recipe: Recipe = Recipe("runs/generated_data_cifar", num_epochs=10)


PRESETS = {
    "small": Config(),
    "paper": Config(
        "paper",
        fraction=0.7,
        smoothing=0.1,
        beta=5.0,
        attack_steps=10,
        attack_step_size=2 / 8,
        recipe=Recipe(
            "runs/generated_data_cifar_paper",
            model="wide_resnet",
            width=10,
            depth=28,
            activation="silu",
            num_epochs=400,
            batch_size=512,
            schedule="cosine_cycle",
            warmup=0.025,
            momentum=(0.95, 0.85),
            bn_momentum=0.99,
            decay="kernels",
            ema_decay=0.995,
            num_validation=1024,
            num_attacked=1024,
            num_test=10_000,
        ),
    ),
}


def read(path: str) -> data.Resident:
    """The generated images and labels of a file, on the device.

    Raises:
      FileNotFoundError: there is none; says where such files come from.
      ValueError: the file holds something else.
    """
    if not path or not Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f"--generated is {path or 'absent'}: give an .npz with the arrays image "
            "[N, 32, 32, 3] uint8 and label [N]. DDPM images are published with "
            "arXiv:2103.01946 (deepmind-research, adversarial_robustness), EDM images "
            "with arXiv:2302.04638 (DM-Improves-AT). Without a file: --generated self "
            "labels a part of the training images by a net trained on the rest."
        )
    with np.load(Path(path).expanduser()) as arrays:
        if not {"image", "label"} <= set(arrays.files):
            names = ", ".join(arrays.files)
            raise ValueError(f"{path} holds {names}; it must hold image and label.")
        x, y = arrays["image"], arrays["label"]
    if x.dtype != np.uint8 or x.shape[1:] != common.SHAPES["cifar10"]:
        raise ValueError(f"{path}: image is {x.dtype} {x.shape}, not uint8 32x32x3.")
    if y.size and y.max() > 9:
        raise ValueError(f"{path}: label goes to {y.max()}; CIFAR-10 has 0 to 9.")
    return data.resident(x, y, 255)


def label(config: Config, ready: Prepared) -> tuple[Prepared, data.Resident, float]:
    """Hold images back and let a net label them.

    Returns:
      What remains to train on, the images with predicted labels, and which fraction of
      these labels is right.
    """
    found = ready.splits.train
    (x, y), (x_held, y_held) = data.split_validation(
        config.recipe.seed + 1,
        np.asarray(found.x),
        np.asarray(found.y),
        config.num_held_back,
    )
    scale = int(found.scale)
    splits = ready.splits._replace(train=data.resident(x, y, scale))
    ready = ready._replace(splits=splits)
    teacher = recipe.standard_net(
        config.recipe, ready, "teacher", config.teacher_epochs
    )
    held = common.labeled(teacher, data.resident(x_held, y_held, scale))
    right = float((np.asarray(held.y) == y_held).mean())
    print(f"{len(y_held):,} images labeled by the teacher, {right:.3f} of them rightly")
    return ready, held, right


def main(config: Config) -> dict[str, Any]:
    own, rows = split_batch(config.recipe.batch_size, config.fraction)
    images = None if config.generated == "self" else read(config.generated or "")
    ready, right = recipe.prepare(config.recipe), None
    # What cannot be is refused before a teacher is trained.
    shared = machine.fit_options(config.recipe.machine, own, rows)
    steps, size = config.attack_steps, config.attack_step_size
    method = trades(
        ready.model,
        ready.threat,
        rj.pgd(steps, size, keep=rj.last),
        beta=config.beta,
        bn_mode="batch",
        moved_by=("natural", "adversarial"),
        start_noise=None,
        outer=smoothed(config.smoothing),
    )
    if images is None:
        ready, images, right = label(config, ready)
    streams = {"generated": (images, rows)}
    trained = recipe.train(
        config, ready, with_stream(method), batch_size=own, streams=streams, **shared
    )
    return recipe.finish(config, ready, trained, labels_right=right)


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
