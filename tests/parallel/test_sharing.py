"""Devices share rows and weights, and nothing that comes out depends on it."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import parallel
from robustjax.data.resident import batch_indices, resident
from robustjax.data.sources import load
from robustjax.methods.standard import standard
from robustjax.models.base import Model
from robustjax.problems import example_keys
from robustjax.training.loop import Preempted, fit
from robustjax.training.optimizers import sgd


def init(key, x):
    first, second = jax.random.split(key)
    hidden = 0.1 * jax.random.normal(first, (x[0].size, 64))
    return {"hidden": hidden, "out": 0.1 * jax.random.normal(second, (64, 10))}, {}


def apply(params, extra, x, *, train=False, key=None):
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params["hidden"])
    return hidden @ params["out"], extra


MODEL = Model(init, apply)


def train(out=None, **changes):
    digits = load("digits")
    settings = {
        "batch_size": 16,
        "num_steps": 8,
        "checkpoint_every": 4,
        "log_every": 3,
        "ema_decay": 0.9,
        "log": False,
        "validate": lambda params, extra: {
            "robust_accuracy": float(jnp.abs(params["out"]).sum())
        },
        "out": out,
        **changes,
    }
    data = resident(digits.x_train[:64], digits.y_train[:64], digits.max_value)
    return fit(jax.random.key(0), MODEL, standard(MODEL), sgd(0.5), data, **settings)


def mesh(devices):
    return parallel.data_mesh(jax.devices()[:devices])


def close(first, second):
    """Of two states: everything but the key."""
    trees = ((s.params, s.opt_state, s.ema, s.step) for s in (first, second))
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(parallel.fetch(a), parallel.fetch(b), atol=1e-6)


def test_the_largest_axis_that_divides_is_shared():
    shapes = {
        "kernel": (3, 3, 32, 64),
        "wide": (96, 64),
        "of equals the first": (64, 64),
        "odd": (4099, 2),
        "prime": (67, 71),
        "small": (64,),
        "key": (),
    }
    tree = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in shapes.items()}
    tree["key"] = jax.random.key(0)
    found = {n: tuple(s.spec) for n, s in parallel.spread(tree, mesh(4)).items()}
    assert found == {
        "kernel": (None, None, None, "data"),
        "wide": ("data",),
        "of equals the first": ("data",),
        "odd": (),
        "prime": (),
        "small": (),
        "key": (),
    }
    few = parallel.spread({"odd": tree["odd"]}, mesh(2), smallest=1)
    assert tuple(few["odd"].spec) == (None, "data")


@pytest.mark.polished  # the states part by rounding
def test_shared_weights_train_as_whole_ones_and_go_on_on_other_devices(tmp_path):
    whole = train()
    shared = train(tmp_path, mesh=mesh(4), shard_params=True)
    state = shared.state
    parts = state.params["hidden"], state.ema.params["hidden"]
    parts += tuple(
        leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (64, 64)
    )
    assert len(parts) == 3  # SGD's momentum
    for leaf in parts:
        assert {s.data.shape for s in leaf.addressable_shards} == {(16, 64)}
    # What is used afterwards is whole on every device.
    assert shared.params["hidden"].sharding.is_fully_replicated
    close(whole.state, state)
    for here in (mesh(2), None):
        # As if it had stopped after 4 steps.
        shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
        again = train(tmp_path, mesh=here)
        assert [row["step"] for row in again.history] == [3, 4, 4, 6, 8, 8]
        close(whole.state, again.state)
    with pytest.raises(ValueError, match="shard_params needs a mesh"):
        train(shard_params=True)


def test_devices_draw_the_same_numbers():
    """Weights, order of the examples and noise per example: 1, 2 and 4 devices."""
    key = jax.random.key(5)

    def draw(index):
        keys = example_keys(key, index)
        noise = jax.vmap(lambda k: jax.random.uniform(k, (5,)))(keys)
        rows = batch_indices(key, 0, 3, n=64, batch_size=16)
        return noise, init(key, jnp.zeros((1, 64)))[0], rows

    found = []
    for devices in (1, 2, 4):
        here = mesh(devices)
        rows, all_of_them = parallel.split_rows(here), parallel.replicated(here)
        shapes = jax.eval_shape(draw, jnp.arange(16))
        spread = parallel.spread(shapes[1], here)
        index = parallel.put_global(np.arange(16), rows)
        places = (rows, spread, all_of_them)
        found.append(parallel.fetch(jax.jit(draw, out_shardings=places)(index)))
    for other in found[1:]:
        for a, b in zip(*map(jax.tree.leaves, (found[0], other)), strict=True):
            np.testing.assert_array_equal(a, b)


def rows_of(out):
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def test_sigterm_saves_that_step_and_the_run_goes_on_exactly(tmp_path):
    """Between two checkpoints and two training rows."""

    def augment(key, x, index):
        jax.debug.callback(signal_at_five, index)
        return x

    def signal_at_five(index):
        calls.append(index)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    calls: list = []
    before = signal.getsignal(signal.SIGTERM)
    whole = train(tmp_path / "whole")
    config = {"augment": "none that changes anything"}  # else the two are told apart
    with pytest.raises(Preempted) as stopped:
        train(tmp_path / "cut", augment=augment, config=config)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    steps = sorted(os.listdir(tmp_path / "cut" / "checkpoints"))
    assert len(steps) == 2 and steps[0] == "step_00000004"
    assert 5 <= int(steps[1][5:]) < 8  # the host may be two calls ahead
    again = train(tmp_path / "cut", config=config)
    for a, b in zip(*map(jax.tree.leaves, (whole.params, again.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_sigterm_does_not_save_what_is_not_finite(tmp_path):
    def augment(key, x, index):
        jax.debug.callback(lambda _: os.kill(os.getpid(), signal.SIGTERM), index)
        return x * jnp.nan

    with pytest.raises(FloatingPointError, match="in step 0"):
        train(tmp_path / "cut", augment=augment)
    assert not os.path.exists(tmp_path / "cut" / "checkpoints")


def test_where_the_processes_are_is_said_completely():
    with pytest.raises(ValueError, match="give all three"):
        parallel.initialize("host:1")
    with pytest.raises(ValueError, match="process_id is 2 of num_processes 2.*0 to 1"):
        parallel.initialize("host:1", 2, 2)
    with pytest.raises(ValueError, match="'host'; give host:port"):
        parallel.initialize("host", 2, 0)


def test_an_error_alone_is_an_ordinary_error(monkeypatch):
    monkeypatch.setattr(parallel, "initialize", lambda *where: None)
    with pytest.raises(ZeroDivisionError), parallel.joined():
        _ = 1 / 0
