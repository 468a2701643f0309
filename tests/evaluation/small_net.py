"""A small net, points around its boundary, and `evaluate` on them."""

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from robustjax.evaluation import runner

QUIET = {"progress": False, "checks": "none"}
COUNT = 24


def net(weights, x, key=None):
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ weights[0])
    return hidden @ weights[1]


def make_net(seed=0, scale=4.0):
    rng = np.random.default_rng(seed)
    shapes = ((36, 16), (16, 4))
    weights = [jnp.asarray(rng.normal(size=s, scale=0.4), jnp.float32) for s in shapes]
    weights[1] = weights[1] * scale
    return jax.tree_util.Partial(net, weights)


NET = make_net()
X = np.random.default_rng(1).uniform(size=(COUNT, 6, 6, 1)).astype(np.float32)
Y = np.asarray(jnp.argmax(NET(X), -1), np.int32)
# Smallest perturbations of PGD lie around 0.02: some points fall, some do not.
THREAT = rj.linf(0.03)


def evaluate(f=NET, x=X, y=Y, threat=THREAT, **changes):
    return rj.evaluate(f, x, y, threat, **({"batch_size": 16} | QUIET | changes))


def with_suite(suite, f, x, y, threat, batch_size=16):
    runner.SUITES["own"] = suite
    try:
        return rj.evaluate(f, x, y, threat, suite="own", batch_size=batch_size, **QUIET)
    finally:
        del runner.SUITES["own"]
