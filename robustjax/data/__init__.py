"""Data: names to arrays, whole sets on the device, augmentation, streams."""

from robustjax.data.augment import (
    AugmentFn,
    Mixed,
    compose,
    cutmix,
    cutout,
    random_crop,
    random_flip,
)
from robustjax.data.dataset import Dataset
from robustjax.data.folder import image_folder
from robustjax.data.resident import (
    Resident,
    batch_at,
    batch_indices,
    epoch_order,
    eval_batches,
    resident,
    split_validation,
    steps_per_epoch,
    take,
    to_float,
)
from robustjax.data.sources import default_data_dir, load
from robustjax.data.stream import by_step, stream

__all__ = [
    "AugmentFn",
    "Dataset",
    "Mixed",
    "Resident",
    "batch_at",
    "batch_indices",
    "by_step",
    "compose",
    "cutmix",
    "cutout",
    "default_data_dir",
    "epoch_order",
    "eval_batches",
    "image_folder",
    "load",
    "random_crop",
    "random_flip",
    "resident",
    "split_validation",
    "steps_per_epoch",
    "stream",
    "take",
    "to_float",
]
