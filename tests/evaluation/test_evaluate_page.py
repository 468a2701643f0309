"""The page "Evaluate your defense": its three kinds of models run as it says."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

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


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dense = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(x.reshape(len(x), -1)))


def test_an_nnx_module_that_one_holds():
    net = NnxNet(nnx.Rngs(0))
    net.eval()
    _, params, rest = nnx.split(net, nnx.Param, ...)
    model = models.from_nnx(lambda rngs: NnxNet(rngs=rngs))
    f = models.logits_fn(model, params, rest)
    np.testing.assert_allclose(f(X), net(X), rtol=1e-5)
    evaluate(f)
    with pytest.raises(TypeError, match="Flax module NnxNet"):
        evaluate(net)


def test_an_adaptive_attack():
    """A rounding defense hides its gradient; the attack goes around it."""

    def quantize(x):
        return jnp.round(x * 4) / 4

    w = jax.random.normal(jax.random.key(0), (16, 3))

    def classifier(x):
        return x.reshape(len(x), -1) @ w

    def f(x):
        return classifier(quantize(x))

    def surrogate(x):
        return classifier(rj.bpda(quantize)(x))

    def my_attack(key, problem):
        softened = rj.untargeted(surrogate, problem.x, problem.y, problem.threat)
        return rj.pgd(20)(key, softened)

    y = np.asarray(jnp.argmax(f(X), -1))
    both = {"plain": rj.pgd(20), "mine": my_attack}
    report = rj.evaluate(
        *(f, X, y, rj.linf(0.2)),
        suite=None,
        attacks=both,
        individual=True,
        batch_size=6,
        checks="none",
        progress=False,
    )
    mine = report.accuracy("threat", "mine")
    assert mine < report.accuracy("threat", "plain")


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
