"""What `fit` is given by mistake, and what it answers."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from robustjax.data.sources import load
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.models.madry_mnist import small_cnn

X, Y = np.full((20, 64), 255, np.uint8), np.arange(20) % 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": 7}, r"key is 7, .* give jax.random.key\(7\)"),
        ({"key": np.int64(7)}, r"give jax.random.key\(7\)"),
        ({"key": None}, r"key is a NoneType, .* jax.random.key\(0\)"),
        ({"key": jax.random.split(jax.random.key(0))}, r"of shape \(2,\), not one"),
        ({"model": nn.Dense(10)}, r"Linen module, Dense: pass from_linen\(module\)"),
        ({"model": nnx.Linear(4, 3, rngs=nnx.Rngs(0))}, r"pass from_nnx\(lambda rngs"),
        ({"model": small_cnn}, "model is small_cnn, .* call it if it makes one"),
        ({"model": ({}, {})}, r"model is of type tuple: .*Model\(init, apply\)"),
        ({"method": standard}, r"method is the function standard, .* standard\(model"),
        ({"method": madry}, r"method is the function madry, .* madry\(model, linf"),
        ({"method": "madry"}, "method is a str, no Method"),
        ({"tx": 0.1}, r"tx is a float, .*sgd\(0.1\)"),
        ({"tx": optax.sgd}, "tx is the function sgd, no optax transformation"),
        ({"data": (X, Y)}, r"data is a tuple: .* resident\(x, y, max_value\)"),
        ({"data": X}, r"data is a ndarray: .* resident\(x, y, max_value\)"),
        ({"data": [(X, Y)]}, "data is a list: .* a function step -> Batch"),
        ({"data": load("digits")}, r"resident\(d.x_train, d.y_train, d.max_value\)"),
        ({"batch_size": 16.0}, "batch_size is 16.0; give an integer"),
        ({"num_steps": 1e3}, "num_steps is 1000.0; give an integer"),
        ({"log_every": 0.5}, "log_every is 0.5; give an integer"),
    ],
)
def test_another_kind_is_named_with_what_to_give(train, changes, message):
    with pytest.raises(TypeError, match=message):
        train(**changes)


def test_keys_of_the_older_kind_serve(train):
    new, old = (
        train(key=make(3), num_steps=1, checkpoint_every=1).params["kernel"]
        for make in (jax.random.key, jax.random.PRNGKey)
    )
    np.testing.assert_array_equal(new, old)


def test_a_label_without_a_logit_is_named(train, data):
    with pytest.raises(
        ValueError, match=r"data has the label 11, .* 10 classes \(0 to"
    ):
        train(data=data._replace(y=data.y.at[3].set(11)))
