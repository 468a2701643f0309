"""One small net on the embedded digits, and models made of it that are broken.

Each says by which name the doctor must flag it, and which attack still finds the true
accuracy: the net's own, since most of them answer as it does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import robustjax as rj
from robustjax import data


def digits():
    """`x_train, y_train, x_test, y_test`, images in [0, 1]."""
    d = data.load("digits")
    x_train, x_test = (np.float32(x) / 16 for x in (d.x_train, d.x_test))
    return x_train, np.int32(d.y_train), x_test, np.int32(d.y_test)


def net(params, x, activation=jax.nn.relu):
    """A multi-layer perceptron's logits."""
    h = x.reshape(x.shape[0], -1)
    for weights, bias in params[:-1]:
        h = activation(h @ weights + bias[None])
    return h @ params[-1][0] + params[-1][1][None]


def train(seed, widths=(64, 32), epsilon=0.0, activation=jax.nn.relu, steps=500):
    """A net trained by Adam, adversarially under Linf where `epsilon` is above 0."""
    x, y, _, _ = map(jnp.asarray, digits())
    keys = jax.random.split(jax.random.key(seed), len(widths) + 2)
    sizes = (64, *widths, 10)
    params = [
        (jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
        for k, m, n in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
    ]
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    inner = rj.pgd(5, keep=rj.last)

    @jax.jit
    def run(params, key):
        def step(carry, t):
            params, state = carry
            k = jax.random.fold_in(key, t)
            rows = jax.random.randint(k, (128,), 0, len(x))
            xs, ys = x[rows], y[rows]
            if epsilon:
                f = functools.partial(net, params, activation=activation)
                xs = inner(k, rj.untargeted(f, xs, ys, rj.linf(epsilon))).x_adv

            def loss(params):
                logits = net(params, xs, activation)
                return jnp.mean(rj.losses.cross_entropy(logits, ys))

            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]

    return run(params, keys[0])


class Broken(NamedTuple):
    """A model `f(params, x, key)`, the flag it must get, who finds its accuracy.

    remedy: what finds it ("margin": PGD on the margin; "bpda": the same on `mended`;
            "eot"), or None where none of ours does, or the accuracy is another.
    """

    f: object
    flag: str
    remedy: str | None = None
    mended: object = None


def _batch_norm(params, x, key):
    # Each batch is brought to mean and deviation of the digits, by its own statistics.
    mean, std = jnp.mean(x, 0)[None], jnp.std(x)
    return net(params, (x - mean) / (std + 1e-3) * 0.38 + mean)


def _dropout(params, x, key):
    def activation(h):
        return jnp.where(jax.random.bernoulli(key, 0.8, h.shape), jax.nn.relu(h), 0)

    return net(params, x, activation)


def winners(h, k=6):
    """k-winners-take-all: the k largest of a layer, the others 0."""
    least = jax.lax.top_k(h, k)[0][:, -1:]
    return jnp.where(h >= least, h, 0)


@jax.custom_vjp
def _backwards(x):
    return x


_backwards.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def _host_noise(z):
    noise = np.random.default_rng().normal(size=z.shape)
    return np.asarray(z + noise, np.float32)


def _impure(params, x, key):
    z = net(params, x)
    shape = jax.ShapeDtypeStruct(z.shape, z.dtype)
    return z + jax.lax.stop_gradient(
        jax.pure_callback(_host_noise, shape, jax.lax.stop_gradient(z)) - z
    )


def _undefined(params, x, key):
    bright = jnp.sum(x, (1, 2, 3)) > 20
    return jnp.where(bright[:, None], jnp.nan, net(params, x))


def _round(x):
    return jnp.round(8 * x) / 8


def _ripples(x):
    return x + 0.02 * jnp.sin(400 * x)


def _before(step, flag):
    """The net behind a step that spoils its gradient, which bpda mends."""
    mended = rj.bpda(step)
    return Broken(
        lambda p, x, key: net(p, step(x)),
        flag,
        "bpda",
        lambda p, x, key: net(p, mended(x)),
    )


CORPUS = {
    "wants 0..255": Broken(lambda p, x, key: net(p, x / 255), "input scale"),
    "wants -1..1": Broken(
        lambda p, x, key: net(p, (x + 1) / 2), "normalization outside"
    ),
    "softmax": Broken(
        lambda p, x, key: jax.nn.softmax(net(p, x)), "probabilities", "margin"
    ),
    "sharp softmax": Broken(
        lambda p, x, key: jax.nn.softmax(100 * net(p, x)), "probabilities"
    ),
    "argmax head": Broken(
        lambda p, x, key: jax.nn.one_hot(net(p, x).argmax(-1), 10),
        "vanishing gradient",
        None,
    ),
    "rounded input": _before(_round, "vanishing gradient"),
    "saturated": Broken(lambda p, x, key: 1e4 * net(p, x), "saturated loss", "margin"),
    "batch statistics": Broken(_batch_norm, "depends on the batch"),
    "rows mixed": Broken(
        lambda p, x, key: net(p, x) + 0.2 * jnp.roll(net(p, x), 1, 0),
        "depends on the batch",
    ),
    "input noise": Broken(
        lambda p, x, key: net(p, x + 0.1 * jax.random.normal(key, x.shape)),
        "random",
        "eot",
    ),
    "dropout": Broken(_dropout, "random", "eot"),
    "noise from the host": Broken(_impure, "random"),
    "k winners": Broken(lambda p, x, key: net(p, x, winners), "gradient masked"),
    "gradient stopped": _before(jax.lax.stop_gradient, "vanishing gradient"),
    "gradient backwards": _before(_backwards, "gradient masked"),
    "ripples": _before(_ripples, "gradient masked"),
    "sharp activation": Broken(
        lambda p, x, key: net(p, x, lambda h: 2 * jax.nn.sigmoid(300 * (h - 0.5))),
        "vanishing gradient",
    ),
    "steps": Broken(
        lambda p, x, key: net(p, x, lambda h: jnp.sign(h) + 1), "vanishing gradient"
    ),
    "float16 logits": Broken(
        lambda p, x, key: net(p, x).astype(jnp.float16), "low precision", "margin"
    ),
    "bfloat16 logits": Broken(
        lambda p, x, key: net(p, x).astype(jnp.bfloat16).astype(jnp.float32),
        "low precision",
        "margin",
    ),
    "rounded logits": Broken(
        lambda p, x, key: jnp.round(2 * net(p, x)) / 2, "low precision", None
    ),
    "undefined": Broken(_undefined, "non-finite logits"),
    "classes exchanged": Broken(
        lambda p, x, key: jnp.roll(net(p, x), 1, -1), "clean accuracy at chance"
    ),
}

SOUND = {
    "sound": lambda p, x, key: net(p, x),
    "log-softmax": lambda p, x, key: jax.nn.log_softmax(net(p, x)),
}
MENDED = {f"{n}, mended": b.mended for n, b in CORPUS.items() if b.mended}
NAMES = [*SOUND, *CORPUS, *MENDED]


def any_model(params, which, x, key):
    """The model of that number in `NAMES`: data, so that all share their programs."""

    fs = SOUND | {name: broken.f for name, broken in CORPUS.items()} | MENDED

    def branch(name):
        own = params.get(name, params["net"])
        return lambda: fs[name](own, x, key).astype(jnp.float32)

    return jax.lax.switch(which, [branch(name) for name in NAMES])


def train_all(seed):
    """What `model` needs: the net, and one trained with k-winners-take-all."""
    return {
        "net": train(seed, (48, 32)),
        "k winners": train(seed, (96, 96), 0.1, winners),
    }


def model(params, name):
    """A model by name, as the doctor wants it."""
    return jax.tree_util.Partial(any_model, params, jnp.int32(NAMES.index(name)))
