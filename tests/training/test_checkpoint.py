import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.training import checkpoint
from robustjax.training.state import Ema, TrainState


def state_of(width: int = 3, seed: int = 0) -> TrainState:
    params = {"kernel": jnp.arange(2.0 * width).reshape(2, width), "none": jnp.ones(0)}
    return TrainState(
        step=jnp.int32(7),
        params=params,
        extra={"half": jnp.ones(2, jnp.bfloat16)},
        opt_state=optax.adam(0.1).init(params),
        carry=(jax.random.key(1, impl="rbg"), jnp.array([True, False])),
        ema=Ema(params, {}),
        key=jax.random.key(seed),
    )


def same(first, second) -> bool:
    def numbers(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    pairs = zip(*(jax.tree.leaves(tree) for tree in (first, second)), strict=True)
    return all(
        a.dtype == b.dtype and np.array_equal(numbers(a), numbers(b)) for a, b in pairs
    )


def test_every_kind_of_leaf_comes_back(tmp_path):
    state = state_of()
    checkpoint.save(tmp_path, 7, state, {"best": {"step": 3}})
    found = checkpoint.restore(tmp_path, 7, jax.eval_shape(lambda: state))
    assert same(state, found)
    assert jax.tree.structure(state) == jax.tree.structure(found)
    expected = jax.random.normal(jax.random.fold_in(state.carry[0], 1))
    assert expected == jax.random.normal(jax.random.fold_in(found.carry[0], 1))
    assert checkpoint.read_meta(tmp_path, 7)["remembered"] == {"best": {"step": 3}}


def test_a_part_is_read_without_the_rest(tmp_path):
    state = state_of()
    checkpoint.save(tmp_path, 7, state, {})
    found = checkpoint.restore(tmp_path, 7, state.params, within=".ema.params")
    assert same(found, state.params)


def test_restored_onto_a_mesh(tmp_path):
    from robustjax.parallel import data_mesh, replicated

    checkpoint.save(tmp_path, 7, state_of(), {})
    sharding = replicated(data_mesh())
    found = checkpoint.restore(tmp_path, 7, state_of(), sharding)
    assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    for step in (3, 7):
        checkpoint.save(tmp_path, step, state_of(), {})
    arrays = checkpoint.path_of(tmp_path, 7) / "arrays"
    victim = max(
        (p for p in arrays.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[: int(keep * victim.stat().st_size)])
    message = "step_00000007 is incomplete.*truncated.*Delete that folder.*step 3"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, 7, state_of())
    assert same(checkpoint.restore(tmp_path, 3, state_of()), state_of())


def test_a_flipped_bit_and_a_missing_file_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, 7, state_of(), {})
    files = [
        p for p in (path / "arrays").rglob("*") if p.stat().st_size and p.is_file()
    ]
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(ValueError, match="incomplete.*Delete the run's folder"):
        checkpoint.restore(tmp_path, 7, state_of())
    files[0].unlink()
    with pytest.raises(ValueError, match="is missing"):
        checkpoint.restore(tmp_path, 7, state_of())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no robustjax checkpoint: its meta.json is missing"),
        ('{"format": "robus', "no robustjax checkpoint.*JSONDecodeError"),
        ('{"format": "another tool 2"}', "foreign: its format is 'another tool 2'"),
        ("[1]", "foreign"),
    ],
)
def test_foreign_folders_are_refused(tmp_path, content, message):
    path = checkpoint.path_of(tmp_path, 7)
    path.mkdir()
    if content is not None:
        (path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, 7, state_of())


def test_another_model_or_optimizer_is_named(tmp_path):
    checkpoint.save(tmp_path, 7, state_of(), {})
    with pytest.raises(ValueError, match=r"\['kernel'\] is float32\[2, 3\].*\[2, 5\]"):
        checkpoint.restore(tmp_path, 7, state_of(width=5))
    other = {"kernel": jnp.ones((2, 3)), "none": jnp.ones(0), "scale": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"has no leaf \['scale'\]"):
        checkpoint.restore(tmp_path, 7, other, within=".params")
    with pytest.raises(ValueError, match=r"also has the leaf \['none'\]"):
        checkpoint.restore(tmp_path, 7, {"kernel": jnp.ones((2, 3))}, within=".params")


def test_missing_step_says_what_is_there(tmp_path):
    checkpoint.save(tmp_path, 7, state_of(), {})
    with pytest.raises(FileNotFoundError, match=r"step_00000008.*\[7\]"):
        checkpoint.restore(tmp_path, 8, state_of())


def test_full_disc_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 3, state_of(), {})

    def full(path, arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save", full)
    message = "step 7 could not be saved.*disc is full.*step 3 is intact.*same command"
    with pytest.raises(OSError, match=message) as caught:
        checkpoint.save(tmp_path, 7, state_of(), {})
    assert caught.value.errno == errno.ENOSPC
    assert checkpoint.steps(tmp_path) == [3]
    assert not list(tmp_path.glob(".*"))
    assert same(checkpoint.restore(tmp_path, 3, state_of()), state_of())


def test_what_a_crash_left_is_no_checkpoint_and_is_pruned(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state_of(), {})
    shutil.copytree(checkpoint.path_of(tmp_path, 3), tmp_path / ".saving_00000004")
    (tmp_path / "step_notes").mkdir()
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    checkpoint.prune(tmp_path, {1, 3})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000001", "step_00000003", "step_notes"]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, state_of(seed=0), {})
    checkpoint.save(tmp_path, 1, state_of(seed=5), {"n": 2})
    found = checkpoint.restore(tmp_path, 1, state_of())
    assert same(found, state_of(seed=5))
    meta = json.loads((checkpoint.path_of(tmp_path, 1) / "meta.json").read_text())
    assert meta["remembered"] == {"n": 2}
