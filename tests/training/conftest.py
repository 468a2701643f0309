"""A training that takes milliseconds: a linear model on 64 images of digits."""

import jax
import jax.numpy as jnp
import pytest

from robustjax.data.resident import resident
from robustjax.data.sources import load
from robustjax.methods.standard import standard
from robustjax.models.base import Model
from robustjax.training.loop import fit
from robustjax.training.optimizers import sgd


def init(key, x):
    size = x[0].size
    weights = 0.01 * jax.random.normal(key, (size, 10))
    return {"kernel": weights, "bias": jnp.zeros(10)}, {"passes": jnp.zeros(())}


def apply(params, extra, x, *, train=False, key=None):
    logits = x.reshape(x.shape[0], -1) @ params["kernel"]
    logits = logits + params["bias"][None]
    return logits, {"passes": extra["passes"] + train}


@pytest.fixture(scope="session")
def model():
    return Model(init, apply)


@pytest.fixture(scope="session")
def data():
    digits = load("digits")
    return resident(digits.x_train[:64], digits.y_train[:64], digits.max_value)


@pytest.fixture(scope="session")
def train(model, data):
    """`fit` with small defaults; every one of them can be overridden."""
    defaults = {
        "batch_size": 16,
        "num_steps": 12,
        "checkpoint_every": 4,
        "log": False,
        "key": jax.random.key(0),
        "model": model,
        "method": standard(model),
        "tx": sgd(0.5),
        "data": data,
    }

    def call(**changes):
        settings = {**defaults, **changes}
        return fit(**settings)

    return call
