"""The page "Evaluate your defense": its three kinds of models run as it says."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import robustjax as rj
from robustjax import models

X = np.random.default_rng(0).uniform(size=(6, 4, 4, 1)).astype(np.float32)
QUIET = {"suite": ("apgd-ce",), "batch_size": 6, "progress": False}


def evaluate(f):
    y = np.asarray(jnp.argmax(f(X), -1))
    report = rj.evaluate(f, X, y, rj.linf("64/255"), checks="none", **QUIET)
    assert report.clean_accuracy == 1.0
    assert report.robust_accuracy < 1.0
    return report


def test_a_plain_function(tmp_path):
    def logits_fn(params, x):
        return jax.nn.relu(x.reshape(len(x), -1) @ params["w1"]) @ params["w2"]

    keys = jax.random.split(jax.random.key(0))
    params = {"w1": jax.random.normal(keys[0], (16, 8))}
    params["w2"] = jax.random.normal(keys[1], (8, 3))
    report = evaluate(jax.tree_util.Partial(logits_fn, params))
    report.save(tmp_path / "aa")
    names = {path.name for path in (tmp_path / "aa").iterdir()}
    assert names == {"report.json", "examples.npz", "report.html"}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.relu(x).reshape(x.shape[0], -1))


def test_flax():
    variables = Net().init(jax.random.key(0), X[:1])
    model = models.from_linen(Net())
    statistics = {"batch_stats": variables["batch_stats"]}
    evaluate(models.logits_fn(model, variables["params"], statistics))


def test_equinox():
    keys = jax.random.split(jax.random.key(0))
    network = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 4, 3, key=keys[0]),
            eqx.nn.Lambda(lambda x: jax.nn.relu(x).ravel()),
            eqx.nn.Dropout(0.5),
            eqx.nn.Linear(16, 3, key=keys[1]),
        ]
    )
    network = eqx.nn.inference_mode(network)
    params, static = eqx.partition(network, eqx.is_array)

    def apply(params, x, key=None):
        return jax.vmap(eqx.combine(params, static))(jnp.transpose(x, (0, 3, 1, 2)))

    evaluate(jax.tree_util.Partial(apply, params))
