"""RS-FGSM on ImageNet in three resolutions (Wong et al. 2020, arXiv:2001.03994).

    python -m experiments.imagenet_fast --images DIR
    python -m experiments.imagenet_fast --images DIR --preset paper
    python -m experiments.imagenet_fast --images DIR --preset large

DIR is an image folder, DIR/{train,val}/CLASS/*.JPEG (or png, jpg, bmp). Its images are
read and scaled by Grain's threads while the device computes; a batch follows from the
seed and the step, so every phase goes on where it stopped. `paper` (epsilon 2/255) and
`large` (4/255): ResNet-50, 6 epochs of batches of 512 at 128 pixels, 6 of 224 at 224, 3
of 128 at 288; the rate 0 to 0.4 in an epoch, 0.04 at epoch 6, 0.004 at 12, 0.0004 at
15; weight decay 1e-4. `small` shows that it works on any small folder: width 8, crops
of 32, 48 and 64 pixels.

Nothing was measured here: there is no ImageNet on the machine. Published, not measured
here: at 2/255 clean 60.90, PGD-50 with 10 restarts 43.46 in 12 hours (the authors'
README). The settings of the phases were read in the copy of the authors' configurations
in the N-FGSM repository.
Differs from the authors' code: images are scaled to 5/4 of the crop and cut square,
then cropped at random, where theirs take a part of random size and shape; the momentum
begins anew with each phase; `methods/fast.py` says more.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import robustjax as rj
from experiments import common, machine
from experiments.machine import Machine
from robustjax import data, models
from robustjax.methods.fast import fast
from robustjax.training import monitors, optimizers
from robustjax.training.loop import fit
from robustjax.types import Batch

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp")
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
    """What to do when FGSM's and PGD's accuracy on training images part."""
    num_watched: int = 200
    """How many training images are attacked for that after every epoch."""
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
)
PRESETS = {
    "small": Config(),
    "paper": PAPER,
    "large": replace(
        PAPER, preset="large", out="runs/imagenet_fast_large", epsilon="4/255"
    ),
}


def list_images(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """The images of a folder with labels, by class and name; and the classes' names."""
    inside = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in inside if path.is_dir())
    found = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no images: --images DIR is a folder with train/CLASS/*."
            "JPEG and val/CLASS/*.JPEG."
        )
    return found, names


def decode(size: int) -> Callable[[tuple[Path, int]], tuple[np.ndarray, int]]:
    """Read an image, scale its shorter edge to `size`, cut the middle square."""
    from PIL import Image, ImageOps

    def read(example: tuple[Path, int]) -> tuple[np.ndarray, int]:
        path, label = example
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size))
        return np.asarray(square), label

    return read


def batches(
    images: list[tuple[Path, int]], crop: int, batch_size: int, seed: int
) -> Callable[[int], Batch]:
    """`step -> Batch` of random crops, half of them mirrored; steps may start anywhere.

    Read ahead in the order of the steps; another step begins a new stream.
    """
    edge, ahead = crop * 5 // 4, {}
    read = decode(edge)

    def batch(step: int) -> Batch:
        if ahead.get("step") != step:
            if "stream" in ahead:
                ahead["stream"].close()
            ahead["stream"] = data.stream(
                *(images, batch_size, seed),
                start_step=step,
                max_value=None,
                transform=read,
            )
        found = next(ahead["stream"])
        ahead["step"] = step + 1
        rng = np.random.default_rng((seed, step))
        corners = rng.integers(0, edge - crop + 1, (batch_size, 2))
        mirrored = rng.integers(0, 2, batch_size)
        x = np.stack(
            [
                image[i : i + crop, j : j + crop][:, :: 1 - 2 * mirror]
                for image, (i, j), mirror in zip(
                    np.asarray(found.x), corners, mirrored, strict=True
                )
            ]
        )
        return found._replace(x=_to_float(x))

    return batch


def some_images(
    images: list[tuple[Path, int]], crop: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, evenly spread, scaled and cut in the middle, in [0, 1]."""
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    read = decode(crop)
    x, y = zip(*(read(images[row]) for row in rows), strict=True)
    return _to_float(np.stack(x)), np.array(y, np.int32)


def _to_float(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) * (np.float32(1) / np.float32(255))


def rate(config: Config, phase: int, per_epoch: int) -> optimizers.Schedule:
    """The learning rate in the steps of one phase."""
    num_steps = num_epochs(config, phase) * per_epoch
    first = config.learning_rate * 0.1**phase
    if phase > 0:
        return optimizers.linear([first, first / 10], [0, num_steps])
    rise = round(config.rise * per_epoch)
    return optimizers.linear([0, first, first / 10], [0, rise, num_steps])


def num_epochs(config: Config, phase: int) -> int:
    """How many epochs a phase has.

    >>> [num_epochs(Config(), phase) for phase in (0, 1, 2)]
    [6, 6, 3]
    """
    return config.ends[phase] - (0, *config.ends)[phase]


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    root = Path(config.images or "").expanduser()
    if config.images is None:
        raise FileNotFoundError(
            "--images is absent: give a folder with train/CLASS/*.JPEG and val/CLASS/"
            "*.JPEG, such as ImageNet's."
        )
    train, names = list_images(root / "train")
    test, test_names = list_images(root / "val")
    if names != test_names:
        raise ValueError(f"{root}/train and {root}/val have different classes.")
    on = config.machine
    options = {"mean": MEAN, "std": STD, **machine.net_options(on, has_blocks=False)}
    net = models.resnet50(len(names), width=config.width, stem="imagenet", **options)
    model, threat = machine.net(on, net), rj.linf(config.epsilon)
    method = machine.method(on, fast(model, threat, step_size=config.step_size))
    settings, weights, trained = common.training_part(config), None, None
    for phase, (crop, batch_size) in enumerate(
        zip(config.crops, config.batch_sizes, strict=True)
    ):
        per_epoch = data.steps_per_epoch(len(train), batch_size)
        num_steps = num_epochs(config, phase) * per_epoch
        print(f"phase {phase + 1}: {num_steps} steps at {crop} pixels")
        watched = some_images(train, crop, config.num_watched)
        trained = fit(
            jax.random.key(config.seed + phase),
            model,
            method,
            optimizers.sgd(
                rate(config, phase, per_epoch),
                nesterov=False,
                weight_decay=config.weight_decay,
            ),
            batches(train, crop, batch_size, config.seed + phase),
            batch_size=batch_size,
            num_steps=num_steps,
            checkpoint_every=per_epoch,
            validate=monitors.catastrophic_overfitting(
                *(model, threat, watched, config.on_collapse)
            ),
            best_metric="train_pgd_accuracy",
            out=Path(config.out) / f"phase_{phase + 1}",
            config={**settings, "phase": phase + 1},
            start=weights,
            **machine.fit_options(on, batch_size),
            compiler_options=models.convolution_options(),
        )
        weights = trained.params, trained.extra
        if int(trained.state.step) == num_steps:  # not ended by a collapse
            weights = trained.state.params, trained.state.extra
    assert weights is not None
    report = rj.evaluate(
        models.logits_fn(model, *weights),
        *(*some_images(test, config.crops[-1], config.num_test), threat),
        suite=None,
        attacks={"FGSM": rj.fgsm(), "PGD-20": rj.pgd(20)},
        individual=True,
        batch_size=config.test_batch_size,
        mesh=machine.mesh(on, config.batch_sizes[-1]),
    )
    print(report)
    used = f"{len(train):,} training images of {len(names)} classes"
    return common.save_results(
        config.out, {**report.summary(), "config": config, "data": used}, began
    )


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
