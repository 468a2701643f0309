import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.digests import program_digest


def fingerprint_of(f, *arguments):
    return program_digest(jax.make_jaxpr(f)(*arguments))


def normed(x, scale):
    return jnp.where(x > 0, x, 0.5) @ (x.T @ x) * scale


def twice(x):
    return normed(normed(x, 2.0), 2.0)


NUMBERS = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x @ NUMBERS.T, lambda x: x @ (NUMBERS.T + 1)),  # a constant
        (jax.jit(lambda x: x * NUMBERS), jax.jit(lambda x: x * -NUMBERS)),  # inside
        (jax.jit(lambda x: jnp.sin(x)), jax.jit(lambda x: jnp.cos(x))),  # inside a call
        (lambda x: jnp.where(x > 0, x, 1), lambda x: jnp.where(x > 0, x, 2)),  # literal
        (lambda x: x.sum(0), lambda x: x.sum(1)),  # a parameter
        (lambda x: x - x[:1], lambda x: x[:1] - x),  # the order of arguments
        (
            lambda x: jax.lax.fori_loop(0, 3, lambda i, a: a * x, x),
            lambda x: jax.lax.fori_loop(0, 4, lambda i, a: a * x, x),
        ),
        (
            lambda x: x + jax.random.normal(jax.random.key(0), (2, 3)),
            lambda x: x + jax.random.normal(jax.random.key(1), (2, 3)),
        ),
    ],
)
def test_what_differs_is_told_apart(one, other):
    x = np.ones((2, 3))
    first = fingerprint_of(one, x)
    assert first == fingerprint_of(lambda y: one(y), x)
    assert first != fingerprint_of(other, x)


def test_shapes_count_and_inner_traces_do_not():
    """A function that JAX traced before, for another caller, is read as a new one."""
    x = jnp.ones((2, 3))
    fresh = fingerprint_of(lambda x: normed(normed(x, 2.0), 2.0), x)
    jax.clear_caches()
    normed(x, 2.0)
    assert fresh == fingerprint_of(lambda x: normed(normed(x, 2.0), 2.0), x)
    assert fresh != fingerprint_of(
        lambda x: normed(normed(x, 2.0), 2.0), jnp.ones((3, 3))
    )


STEP = """
import jax, jax.numpy as jnp, robustjax as rj
from robustjax import models
from robustjax.methods.awp import awp
from robustjax.methods.trades import trades
from robustjax.training.optimizers import sgd, one_cycle
from robustjax.digests import program_digest
from robustjax.training.state import create_state
from robustjax.training.step import make_train_step
from robustjax.types import Batch

model = models.preact_resnet18(10, width=4)
method = awp(trades(model, rj.linf("8/255")), gamma=0.005)
tx = sgd(one_cycle(0.1, 10), weight_decay=5e-4, clip_norm=3.0)
x = jnp.zeros((8, 32, 32, 3))
batch = Batch(x, jnp.zeros(8, jnp.int32), jnp.arange(8), None)
step = make_train_step(method, tx, 0.9)

def program(batch):
    key = jax.random.key(0)
    return step(create_state(key, model, method, tx, batch, ema=True), batch)

print(program_digest(jax.make_jaxpr(program)(batch)))
"""


@pytest.mark.slow  # two processes that compile nothing, but import and trace
@pytest.mark.quick
def test_two_processes_agree():
    """Hash seeds, addresses and the number of devices are not the run's."""
    found = set()
    for seed, devices in (("1", "1"), ("2", "4")):
        changes = {"PYTHONHASHSEED": seed, "JAX_NUM_CPU_DEVICES": devices}
        done = subprocess.run(
            [sys.executable, "-c", STEP],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **changes},
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1 and len(found.pop()) == 16
