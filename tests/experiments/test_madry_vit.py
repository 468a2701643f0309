"""madry_vit: the published sizes, and a run on a tiny image folder."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments import madry_vit
from experiments.machine import Machine
from tests.experiments.test_imagenet_fast import write_folder


def test_the_base_preset_is_vit_b_16():
    config = madry_vit.PRESETS["base"]
    made = madry_vit.workload(config)
    x = jnp.zeros((1, *made.shape))
    params, _ = jax.eval_shape(made.model.init, jax.random.key(0), x)
    # 86,567,656 as published, less the class token and its place.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 86_567_656 - 2 * 768
    assert made.num_steps == 300 * (1_281_167 // 2048)


def test_images_are_asked_for():
    with pytest.raises(FileNotFoundError, match="--images is absent"):
        madry_vit.main(madry_vit.Config())


@pytest.mark.slow
def test_a_tiny_folder_is_learned_and_measured(tmp_path):
    write_folder(tmp_path / "images")
    config = dataclasses.replace(
        madry_vit.Config(),
        images=str(tmp_path / "images"),
        out=str(tmp_path / "run"),
        **{"crop": 8, "width": 8, "depth": 1, "num_heads": 2, "num_epochs": 4},
        **{"batch_size": 8, "num_validation": 6, "num_test": 6},
        machine=Machine(num_devices=1, cache=False),
    )
    results = madry_vit.main(config)
    assert 0 <= results["robust_accuracy"] <= results["clean_accuracy"] <= 1
    assert (tmp_path / "run" / "results.json").exists()
    with pytest.raises(ValueError, match="999 with 18 examples"):
        madry_vit.main(dataclasses.replace(config, batch_size=999))
