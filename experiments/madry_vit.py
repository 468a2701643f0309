"""Adversarial training of a vision transformer on an image folder (PGD-3, Linf 4/255).

    python -m experiments.madry_vit --images DIR
    python -m experiments.madry_vit --images DIR --preset base

DIR is an image folder, DIR/{train,val}/CLASS/*.JPEG (or png, jpg, bmp), read as
`experiments/imagenet_fast.py` reads it. `small` shows that it works on any small
folder: patches of 4 on 32 pixels, width 64, 4 blocks. `base`: ViT-B/16 at 224 pixels in
bfloat16, three steps of 2/3 epsilon from a random start, 300 epochs of batches of
2,048, AdamW 1e-3 after 5 epochs of rise, cosine to 0, weight decay 0.05, gradient
clipped at 1.

Nothing was measured here: there is no ImageNet on the machine. What the TPU compiler
says of `base` stands in docs/plan.md (`scripts/plan_pod madry_vit -- --preset base`).
The settings follow the custom of training ViTs from scratch; no published row is meant.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax

import robustjax as rj
from experiments import common, machine, watching
from experiments.imagenet_fast import batches, cut, opened, some_images
from experiments.machine import Machine
from robustjax import data, models
from robustjax.methods.madry import madry
from robustjax.training import monitors, optimizers
from robustjax.training.loop import fit


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "base"] = "small"
    """Which defaults the other flags start from."""
    out: str = "runs/madry_vit"
    """The run's folder. The same command on the same folder goes on with the run."""
    images: str | None = None
    """The image folder, with train/CLASS and val/CLASS."""
    seed: int = 0
    """Decides weights, order, crops and noise."""
    crop: int = 32
    """Edge of the images."""
    patch_size: int = 4
    """Edge of a patch."""
    width: int = 64
    """Of the stream."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 4
    """Of each block's attention."""
    epsilon: str = "4/255"
    """Linf budget, in training and testing."""
    attack_steps: int = 3
    """Gradient steps of the attack in training, from a random start."""
    attack_step_size: float = 2 / 3
    """Of each, as a fraction of epsilon."""
    num_epochs: int = 20
    """Passes over the training images."""
    rise: int = 1
    """Epochs until the highest learning rate."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 1e-3
    """The highest one."""
    weight_decay: float = 0.05
    """Decoupled, of kernels only."""
    num_validation: int = 200
    """How many validation images choose the checkpoint, by PGD-10."""
    num_monitored: int = 200
    """How many training and validation images the monitors look at."""
    num_test: int = 1000
    """How many validation images are tested on."""
    machine: Machine = Machine()


PRESETS = {
    "small": Config(),
    "base": Config(
        "base",
        out="runs/madry_vit_base",
        crop=224,
        patch_size=16,
        width=768,
        depth=12,
        num_heads=12,
        num_epochs=300,
        rise=5,
        batch_size=2048,
        machine=Machine(dtype="bfloat16"),
    ),
}
IMAGENET = 1_281_167  # training images


def workload(
    config: Config, num_train: int = IMAGENET, num_classes: int = 1000
) -> common.Workload:
    """What is trained, for `num_train` images."""
    sizes = (config.patch_size, config.width, config.depth, config.num_heads)
    options = machine.net_options(config.machine, has_blocks=True)
    net = models.vit(*sizes, num_classes, **options)
    model, threat = machine.net(config.machine, net), rj.linf(config.epsilon)
    attack_fn = rj.pgd(config.attack_steps, config.attack_step_size, keep=rj.last)
    per_epoch = data.steps_per_epoch(num_train, config.batch_size)
    num_steps = config.num_epochs * per_epoch
    rate = optimizers.cosine(
        config.learning_rate, num_steps, warmup_steps=config.rise * per_epoch
    )
    return common.Workload(
        model,
        madry(model, threat, attack_fn),
        optimizers.adamw(rate, weight_decay=config.weight_decay, clip_norm=1.0),
        threat,
        attack_fn,
        config.attack_steps,
        rj.pgd(20),
        20,
        (config.crop, config.crop, 3),
        config.batch_size,
        num_steps,
    )


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    source, root = opened(config.images), str(config.images)
    on = config.machine
    made = workload(config, len(source), len(source.classes))
    options = machine.fit_options(on, config.batch_size)
    held_out = some_images(root, "val", config.crop, config.num_validation)
    trained = fit(
        jax.random.key(config.seed),
        made.model,
        monitors.with_norms(machine.method(on, made.method)),
        made.tx,
        batches(root, config.crop, config.batch_size, config.seed),
        mix=cut(config.crop),
        batch_size=config.batch_size,
        num_steps=made.num_steps,
        checkpoint_every=made.num_steps // config.num_epochs,
        validate=watching.watch(
            *(made.model, made.threat, held_out),
            some_images(root, "train", config.crop, config.num_monitored),
            num_attacked=config.num_validation,
            num_monitored=config.num_monitored,
            mesh=options["mesh"],
        ),
        out=config.out,
        config=common.training_part(config),
        compiler_options=models.tpu_options(),
        **options,
    )
    watching.keep_curves(config.out, trained)
    report = rj.evaluate(
        models.logits_fn(made.model, trained.params, trained.extra),
        *some_images(root, "val", config.crop, config.num_test),
        made.threat,
        suite=None,
        attacks={"FGSM": rj.fgsm(), "PGD-20": made.evaluation},
        individual=True,
        batch_size=50,
        mesh=options["mesh"],
    )
    print(report)
    used = f"{len(source):,} training images of {len(source.classes)} classes"
    return common.save_results(
        config.out, {**report.summary(), "config": config, "data": used}, began
    )


if __name__ == "__main__":
    common.launch(main, PRESETS, __doc__)
