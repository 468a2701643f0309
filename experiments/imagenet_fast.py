"""RS-FGSM on ImageNet in three resolutions (Wong et al. 2020, arXiv:2001.03994).

    python -m experiments.imagenet_fast --images DIR
    python -m experiments.imagenet_fast --images DIR --preset paper
    python -m experiments.imagenet_fast --images DIR --preset large

DIR is an image folder, DIR/{train,val}/CLASS/*.JPEG (or png, jpg, bmp). Its images are
read and scaled by Grain's threads while the device computes; a batch follows from the
seed and the step, so every phase goes on where it stopped, and several processes read
their own rows of it. `paper` (epsilon 2/255) and
`large` (4/255): ResNet-50, 6 epochs of batches of 512 at 128 pixels, 6 of 224 at 224, 3
of 128 at 288; the rate 0 to 0.4 in an epoch, 0.04 at epoch 6, 0.004 at 12, 0.0004 at
15; weight decay 1e-4. `small` shows that it works on any small folder: width 8, crops
of 32, 48 and 64 pixels.

Nothing was measured here: there is no ImageNet on the machine. Published, not measured
here: at 2/255 clean 60.90, PGD-50 with 10 restarts 43.46 in 12 hours (the authors'
README); this file ends with FGSM and one PGD-20, which is weaker. The settings of the
phases were read in the copy of the authors' configurations in the N-FGSM repository.
Differs from the authors' code: images are scaled to 5/4 of the crop and cut square,
then cropped at random, where theirs take a part of random size and shape; the momentum
begins anew with each phase; no weight decay on the last layer's bias, as on BatchNorm,
which theirs spares too; `methods/fast.py` says more.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, machine, watching
from experiments.machine import Machine
from robustjax import data, models, parallel
from robustjax.data.folder import ImageFolder
from robustjax.methods.fast import fast
from robustjax.training import monitors, optimizers
from robustjax.training.arguments import check_counts
from robustjax.training.loop import FitResult, fit
from robustjax.types import Batch, PyTree

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "paper", "large"] = "small"
    """Which defaults the other flags start from."""
    out: str = "runs/imagenet_fast_small"
    """The run's folder. The same command on the same folder goes on with the run."""
    images: str | None = None
    """The image folder, with train/CLASS and val/CLASS."""
    seed: int = 0
    """Decides weights, order, crops and noise."""
    width: int = 8
    """Inner channels of ResNet-50's first stage."""
    epsilon: str = "2/255"
    """Linf budget, in training and testing."""
    step_size: float = 1.25
    """Of the one step, as a fraction of epsilon."""
    crops: tuple[int, ...] = (32, 48, 64)
    """Edge of the images in each phase."""
    batch_sizes: tuple[int, ...] = (32, 16, 16)
    """Images per step in each phase."""
    ends: tuple[int, ...] = (6, 12, 15)
    """The epoch that ends each phase."""
    rise: float = 1.0
    """Epochs until the highest learning rate; it then falls linearly to a tenth at the
    end of each phase."""
    learning_rate: float = 0.05
    """The highest one."""
    weight_decay: float = 1e-4
    """L2 penalty."""
    on_collapse: Literal["warn", "stop", "restore"] = "warn"
    """When FGSM's and PGD's accuracy on training images part by more than 0.2: warn,
    stop with an error, or end the phase with its best checkpoint so far."""
    num_watched: int = 200
    """How many training images are attacked for that after every epoch, and how many
    validation images are watched; these choose nothing."""
    num_test: int = 1000
    """How many validation images are tested on, at the last resolution."""
    test_batch_size: int = 50
    """Of them, how many at once."""
    machine: Machine = Machine()


PAPER = Config(
    "paper",
    out="runs/imagenet_fast",
    width=64,
    crops=(128, 224, 288),
    batch_sizes=(512, 224, 128),
    learning_rate=0.4,
    num_test=50_000,
)
PRESETS = {
    "small": Config(),
    "paper": PAPER,
    "large": replace(
        PAPER, preset="large", out="runs/imagenet_fast_large", epsilon="4/255"
    ),
}


def cut(crop: int) -> Callable[[jax.Array, Batch], Batch]:
    """Crop every image at a place of its own, mirror half of them; uint8 to [0, 1].

    `fit`'s `mix`: inside the compiled step, by key and by the example's index.
    """

    def mix(key: jax.Array, batch: Batch) -> Batch:
        place_key, flip_key = jax.random.split(key)
        free = batch.x.shape[1] - crop + 1

        def one(index: jax.Array, x: jax.Array) -> jax.Array:
            place = jax.random.fold_in(place_key, index)
            top, left = jax.random.randint(place, (2,), 0, free)
            return jax.lax.dynamic_slice(x, (top, left, 0), (crop, crop, x.shape[-1]))

        assert batch.index is not None  # a stream's has one
        x = jax.vmap(one)(batch.index, batch.x)
        x = data.random_flip(flip_key, x, batch.index)
        return batch._replace(x=data.to_float(x, 255))

    return mix


def opened(root: str | None) -> ImageFolder:
    """The training images of a folder.

    Raises:
      FileNotFoundError: there is no folder, or a split is missing.
      ValueError: its splits have different classes.
    """
    if root is None:
        raise FileNotFoundError(
            "--images is absent: give a folder with train/CLASS/*.JPEG and val/CLASS/"
            "*.JPEG, such as ImageNet's."
        )
    train, test = (data.image_folder(root, split) for split in ("train", "val"))
    if train.classes != test.classes:
        raise ValueError(f"{root}/train and {root}/val have different classes.")
    return train


def batches(root: str, crop: int, batch_size: int, seed: int) -> Callable[[int], Batch]:
    """What `fit` trains on: this process's rows, scaled to 5/4 of the crop, uint8."""
    ours = parallel.process_rows(batch_size)
    count = ours.stop - ours.start
    return data.by_step(
        data.image_folder(root, "train", crop * 5 // 4),
        count,
        seed,
        max_value=None,
        shard_index=ours.start // count,
        shard_count=batch_size // count,
    )


def some_images(
    root: str, split: str, crop: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, evenly spread over the classes, in [0, 1]; and their labels."""
    source = data.image_folder(root, split, crop)
    rows = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    x = np.stack([source[row]["image"] for row in rows])
    y = np.array([source.labels[row] for row in rows], np.int32)
    return np.asarray(data.to_float(jnp.asarray(x), 255)), y


def rate(config: Config, phase: int, per_epoch: int) -> optimizers.Schedule:
    """The learning rate in the steps of one phase."""
    num_steps = num_epochs(config, phase) * per_epoch
    first = config.learning_rate * 0.1**phase
    if phase > 0:
        return optimizers.linear([first, first / 10], [0, num_steps])
    rise = round(config.rise * per_epoch)
    return optimizers.linear([0, first, first / 10], [0, rise, num_steps])


def check_phases(config: Config) -> None:
    """Raise ValueError before the first phase for what would end a later one."""
    crops, sizes, ends = config.crops, config.batch_sizes, config.ends
    if not crops or not len(crops) == len(sizes) == len(ends):
        raise ValueError(
            f"crops={crops}, batch_sizes={sizes}, ends={ends}: give as many of each, "
            "one per phase."
        )
    if any(num_epochs(config, phase) < 1 for phase in range(len(ends))):
        raise ValueError(f"ends={ends}; give epochs that rise from 1 on.")
    if not 0 <= config.rise < ends[0]:
        raise ValueError(f"rise={config.rise}; give an epoch before {ends[0]}.")
    check_counts(num_watched=config.num_watched, num_test=config.num_test)
    for batch_size in sizes:
        machine.mesh(config.machine, batch_size)


def num_epochs(config: Config, phase: int) -> int:
    """How many epochs a phase has.

    >>> [num_epochs(Config(), phase) for phase in (0, 1, 2)]
    [6, 6, 3]
    """
    return config.ends[phase] - (0, *config.ends)[phase]


def carried_on(trained: FitResult) -> tuple[PyTree, PyTree]:
    """What the next phase begins with: the last weights, but where a collapse ended the
    phase, be it in its last epoch, those of the best checkpoint."""
    if any(row.get("stop") for row in trained.history):
        return trained.params, trained.extra
    return trained.state.params, trained.state.extra


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    check_phases(config)
    train, root = opened(config.images), str(config.images)
    for batch_size in config.batch_sizes:
        data.steps_per_epoch(len(train), batch_size)  # refuses too small a folder
    on = config.machine
    options = {"mean": MEAN, "std": STD, **machine.net_options(on, has_blocks=False)}
    net = models.resnet50(
        len(train.classes), width=config.width, stem="imagenet", **options
    )
    model, threat = machine.net(on, net), rj.linf(config.epsilon)
    method = monitors.with_norms(
        machine.method(on, fast(model, threat, step_size=config.step_size))
    )
    settings, weights, trained = common.training_part(config), None, None
    for phase, (crop, batch_size) in enumerate(
        zip(config.crops, config.batch_sizes, strict=True)
    ):
        per_epoch = data.steps_per_epoch(len(train), batch_size)
        num_steps = num_epochs(config, phase) * per_epoch
        print(f"phase {phase + 1}: {num_steps} steps at {crop} pixels")
        seen, held_out = (
            some_images(root, split, crop, config.num_watched)
            for split in ("train", "val")
        )
        trained = fit(
            jax.random.key(config.seed + phase),
            model,
            method,
            optimizers.sgd(
                rate(config, phase, per_epoch),
                nesterov=False,
                weight_decay=config.weight_decay,
                decay="kernels",
            ),
            batches(root, crop, batch_size, config.seed + phase),
            mix=cut(crop),
            batch_size=batch_size,
            num_steps=num_steps,
            checkpoint_every=per_epoch,
            validate=watching.watch(
                *(model, threat, held_out, seen),
                num_attacked=config.num_watched,
                num_monitored=config.num_watched,
                on_collapse=config.on_collapse,
                mesh=machine.mesh(on, batch_size),
            ),
            best_metric="train_pgd_accuracy",
            out=Path(config.out) / f"phase_{phase + 1}",
            config={**settings, "phase": phase + 1},
            start=weights,
            **machine.fit_options(on, batch_size),
            compiler_options=models.convolution_options(),
        )
        watching.keep_curves(Path(config.out) / f"phase_{phase + 1}", trained)
        weights = carried_on(trained)
    assert weights is not None
    report = rj.evaluate(
        models.logits_fn(model, *weights),
        *some_images(root, "val", config.crops[-1], config.num_test),
        threat,
        suite=None,
        attacks={"FGSM": rj.fgsm(), "PGD-20": rj.pgd(20)},
        individual=True,
        batch_size=config.test_batch_size,
        mesh=machine.mesh(on, config.batch_sizes[-1]),
    )
    print(report)
    used = f"{len(train):,} training images of {len(train.classes)} classes"
    return common.save_results(
        config.out, {**report.summary(), "config": config, "data": used}, began
    )


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
