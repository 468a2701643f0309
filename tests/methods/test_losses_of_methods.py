"""Each method against a transcription of its published formula, in float64.

The transcriptions follow the papers and what the authors' code does step by step: sums
and reductions, what is a constant, which passes run BatchNorm in train mode, and which
move the running statistics. They share with the library the net, nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import threats
from robustjax.attacks.base import Result, last
from robustjax.attacks.pgd import pgd
from robustjax.methods import awp as awp_file
from robustjax.methods import fast, free, mart, nfgsm, trades
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.models.base import Model
from robustjax.problems import maximize, never
from robustjax.threats import l2, linf
from robustjax.types import Batch

ROWS, SIZE, HIDDEN, CLASSES = 8, 6, 12, 4
STEP = 0.05


def net(params, stats, x, train):
    """Dense, BatchNorm, ReLU, dense; returns logits and running statistics."""
    h = x.reshape(x.shape[0], -1) @ params["first"]
    mean, var = stats["mean"], stats["var"]
    if train:
        mean, var = h.mean(0), h.var(0)
        stats = {
            "mean": 0.9 * stats["mean"] + 0.1 * mean,
            "var": 0.9 * stats["var"] + 0.1 * var,
        }
    h = (h - mean[None]) / jnp.sqrt(var[None] + 1e-5) * params["scale"][None]
    return jax.nn.relu(h + params["bias"][None]) @ params["second"], stats


def apply(params, extra, x, *, train=False, key=None):
    return net(params, extra, x, train)


MODEL = Model(lambda key, x: (weights(), statistics()), apply)


def weights():
    rng = np.random.default_rng(0)
    return {
        "first": jnp.asarray(rng.normal(size=(SIZE, HIDDEN))),
        "bias": jnp.asarray(rng.normal(size=HIDDEN)),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, HIDDEN)),
        "second": jnp.asarray(rng.normal(size=(HIDDEN, CLASSES))),
    }


def statistics():
    """Far from those of the batch: a wrong mode shows."""
    return {"mean": jnp.linspace(-1, 2, HIDDEN), "var": jnp.linspace(0.3, 4, HIDDEN)}


def inputs():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(0.2, 0.8, (ROWS, SIZE)))
    return Batch(x, jnp.asarray(rng.integers(0, CLASSES, ROWS)), jnp.arange(10, 18))


def shift():
    return 0.02 * jnp.sin(jnp.arange(ROWS * SIZE * 1.0)).reshape(ROWS, SIZE)


def one_step(key, problem):
    """An attack without randomness: from x + shift, one signed step up the score."""
    start = problem.x + shift()
    grad = jax.grad(lambda x: problem.score(x, None)[0].sum())(start)
    x_adv = jnp.clip(start + STEP * jnp.sign(grad), 0, 1)
    zero = jnp.zeros(ROWS)
    return Result(x_adv, zero > 0, zero, problem.score(x_adv, None)[0])


def stepped(x, objective):
    """The same step, written again: `objective(x) -> scalar` is raised."""
    start = x + shift()
    return jnp.clip(start + STEP * jnp.sign(jax.grad(objective)(start)), 0, 1)


def log_softmax(z):
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def nll(z, y):
    """What torch's cross_entropy(z, y) gives: the batch's mean."""
    return -(log_softmax(z) * jnp.eye(CLASSES)[y]).sum() / z.shape[0]


def kl_sum(log_q, p):
    """torch's KLDivLoss(reduction="sum")(log_q, p)."""
    return (p * (jnp.log(p) - log_q)).sum()


def check(method, expected, carry=None):
    """Loss, gradient and statistics; `expected(params) -> (loss, statistics)`."""
    params, stats, batch = weights(), statistics(), inputs()
    carry = method.init(params, batch) if carry is None else carry

    @jax.jit
    def found(params):
        step, key = jnp.int32(3), jax.random.key(4)
        return method.grads(params, stats, carry, batch, step, key)

    grads, aux = found(params)
    by_hand = jax.jit(jax.value_and_grad(expected, has_aux=True))
    (loss, moved), slopes = by_hand(params)
    close(aux.metrics["loss"].total / ROWS, loss)
    close(grads, slopes)
    close(aux.extra, moved)
    return grads, aux


def close(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype == np.float64
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
        # Far below what is asked: only the float32 epsilon of the threat remains.
        assert np.abs(a - b).max() <= 1e-7 * scale


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnames="train")
def attacked_by_cross_entropy(params, train=False):
    batch = inputs()
    return stepped(
        batch.x, lambda x: nll(net(params, statistics(), x, train)[0], batch.y)
    )


@functools.partial(jax.jit, static_argnames="train")
def attacked_by_divergence(params, train=False):
    batch, stats = inputs(), statistics()
    p = jax.nn.softmax(net(params, stats, batch.x, train)[0])
    return stepped(
        batch.x, lambda x: kl_sum(log_softmax(net(params, stats, x, train)[0]), p)
    )


def trades_by_hand(params, x_adv, beta=6.0):
    """Clean pass, adversarial pass, clean pass again: all in train mode."""
    batch, stats = inputs(), statistics()
    clean, stats = net(params, stats, batch.x, True)
    adversarial, stats = net(params, stats, x_adv, True)
    again, stats = net(params, stats, batch.x, True)
    robust = kl_sum(log_softmax(adversarial), jax.nn.softmax(again)) / ROWS
    return nll(clean, batch.y) + beta * robust, stats


def test_trades():
    x_adv = attacked_by_divergence(weights())
    method = trades.trades(MODEL, linf(0.1), one_step)
    _, aux = check(method, lambda params: trades_by_hand(params, x_adv))
    batch = inputs()
    for name, x in (("accuracy", x_adv), ("clean_accuracy", batch.x)):
        right = net(weights(), statistics(), x, True)[0].argmax(-1) == batch.y
        assert float(aux.metrics[name].total) == int(right.sum())


def test_trades_as_deepmind_has_it():
    """The attack sees the batch's statistics; the adversarial pass alone moves them."""
    batch, x_adv = inputs(), attacked_by_divergence(weights(), train=True)

    def expected(params):
        clean, _ = net(params, statistics(), batch.x, True)
        adversarial, stats = net(params, statistics(), x_adv, True)
        robust = kl_sum(log_softmax(adversarial), jax.nn.softmax(clean)) / ROWS
        return nll(clean, batch.y) + 2.5 * robust, stats

    options = {"beta": 2.5, "bn_mode": "batch", "moved_by": ("adversarial",)}
    check(trades.trades(MODEL, linf(0.1), one_step, **options), expected)


def test_trades_begins_near_x():
    seen = {}

    def attack_fn(key, problem):
        seen["start"] = problem.start - problem.x
        return one_step(key, problem)

    method = trades.trades(MODEL, linf(0.1), attack_fn, start_noise=1e-3)
    batch = inputs()
    params, rest = weights(), ((), batch, 0, jax.random.key(0))
    method.stages.attack(params, statistics(), *rest)
    noise = np.asarray(seen["start"])
    assert 0.6e-3 < noise.std() < 1.4e-3 and np.abs(noise).max() < 5e-3
    order = jnp.arange(ROWS)[::-1]
    turned = Batch(batch.x[order], batch.y[order], batch.index[order])
    method.stages.attack(params, statistics(), (), turned, 0, jax.random.key(0))
    np.testing.assert_array_equal(seen["start"][::-1], noise)
    with pytest.raises(ValueError, match="moved_by names 'clean'"):
        trades.trades(MODEL, linf(0.1), moved_by=("clean",))


def test_mart():
    batch, x_adv = inputs(), attacked_by_cross_entropy(weights())

    def expected(params):
        clean, stats = net(params, statistics(), batch.x, True)
        adversarial, stats = net(params, stats, x_adv, True)
        p, q = jax.nn.softmax(clean), jax.nn.softmax(adversarial)
        order = jnp.argsort(q, axis=1)
        wrong = jnp.where(order[:, -1] == batch.y, order[:, -2], order[:, -1])
        picked = (jnp.log(1.0001 - q + 1e-12) * jnp.eye(CLASSES)[wrong]).sum(1)
        bce = nll(adversarial, batch.y) - picked.mean()
        true = (p * jnp.eye(CLASSES)[batch.y]).sum(1)
        each = (p * (jnp.log(p) - jnp.log(q + 1e-12))).sum(1)
        robust = (each * (1.0000001 - true)).sum() / ROWS
        return bce + 5.0 * robust, stats

    check(mart.mart(MODEL, linf(0.1), one_step, beta=5.0), expected)


def proxy_of(params, ascent_loss, gamma, rate=0.01):
    """The authors' way: an SGD step of a proxy on minus the loss, then rescaled."""
    slopes = jax.grad(ascent_loss)(params)
    found = {}
    for name, w in params.items():
        moved = (w + rate * slopes[name]) - w
        if w.ndim <= 1:
            found[name] = w
            continue
        size = jnp.sqrt((w**2).sum()) / (jnp.sqrt((moved**2).sum()) + 1e-20)
        found[name] = w + gamma * size * moved
    return found


@pytest.mark.parametrize("base", ["madry", "trades", "standard"])
def test_awp(base):
    batch = inputs()
    if base == "trades":
        method = trades.trades(MODEL, linf(0.1), one_step)
        x_adv = attacked_by_divergence(weights())
        plain = lambda params: trades_by_hand(params, x_adv)  # noqa: E731
    else:
        method, x = standard(MODEL), batch.x
        if base == "madry":
            method, x = madry(MODEL, linf(0.1), one_step), None
            x = attacked_by_cross_entropy(weights())

        def plain(params):
            logits, stats = net(params, statistics(), x, True)
            return nll(logits, batch.y), stats

    start = weights()
    worst = proxy_of(start, lambda params: plain(params)[0], gamma=0.02)
    offsets = jax.tree.map(jnp.subtract, worst, start)
    # The proxy is a constant: the gradient at w + v is taken as that at w.
    moved = lambda p: plain(jax.tree.map(jnp.add, p, offsets))  # noqa: E731
    found, _ = check(awp_file.awp(method, gamma=0.02), moved)
    assert np.abs(offsets["first"]).max() > 0.001
    later = awp_file.awp(method, gamma=0.02, warmup=4)  # the step is 3: not yet
    without, _ = check(later, plain)
    assert np.abs(found["first"] - without["first"]).max() > 1e-4


def test_awp_attacks_once():
    calls = []

    def counted(key, problem):
        calls.append(1)
        return one_step(key, problem)

    args = (weights(), statistics(), (), inputs(), jnp.int32(0), jax.random.key(0))
    awp_file.awp(madry(MODEL, linf(0.1), counted)).grads(*args)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="gamma is -1"):
        awp_file.awp(standard(MODEL), gamma=-1)


def test_fast():
    """One step of 1.25 epsilon from the ball, batch statistics, projected."""
    batch, key = inputs(), jax.random.key(4)
    stats, threat = statistics(), linf(0.06)
    method = fast.fast(MODEL, threat)

    @jax.jit
    def start_of(key):  # the same attack with no step to speak of
        frozen = lambda x: jnp.zeros((ROWS, CLASSES))  # noqa: E731
        problem = maximize(
            frozen, batch.x, threat, lambda z: z.sum(-1), never, index=batch.index
        )
        return pgd(1, 1.0, keep=last)(key, problem).x_adv

    start = start_of(jax.random.split(key)[0])
    delta = start - batch.x
    assert 0.05 < np.abs(delta).max() <= 0.06 + 1e-9
    loss = lambda x: nll(net(weights(), stats, x, True)[0], batch.y)  # noqa: E731
    delta = delta + 1.25 * 0.06 * jnp.sign(jax.grad(loss)(start))
    x_adv = jnp.clip(batch.x + jnp.clip(delta, -0.06, 0.06), 0, 1)

    def expected(params):
        logits, moved = net(params, stats, x_adv, True)
        return nll(logits, batch.y), moved

    check(method, expected)


def test_nfgsm():
    """From noise of 2 epsilon one step of epsilon; box, but no ball."""
    batch, key = inputs(), jax.random.key(4)
    stats, epsilon = statistics(), 0.2
    flat = maximize(
        lambda x: jnp.zeros((ROWS, CLASSES)),
        batch.x,
        linf(epsilon),
        lambda z: z.sum(-1),
        index=batch.index,
    )
    noisy = nfgsm.noisy_step(2.0)(jax.random.split(key)[0], flat).x_adv
    assert (noisy >= 0).all() and (noisy <= 1).all()
    assert 1.5 * epsilon < np.abs(noisy - batch.x).max() <= 2 * epsilon + 1e-7
    loss = lambda x: nll(net(weights(), stats, x, True)[0], batch.y)  # noqa: E731
    x_adv = jnp.clip(
        noisy + np.float32(epsilon) * jnp.sign(jax.grad(loss)(noisy)), 0, 1
    )
    assert np.abs(x_adv - batch.x).max() > 2 * epsilon

    def expected(params):
        logits, moved = net(params, stats, x_adv, True)
        return nll(logits, batch.y), moved

    check(nfgsm.nfgsm(MODEL, linf(epsilon)), expected)


def test_nfgsm_claims_no_success_outside_the_ball():
    batch = inputs()
    problem = maximize(
        lambda x: jnp.zeros((ROWS, CLASSES)),
        batch.x,
        l2(0.1),
        lambda z: z.sum(-1),
        lambda z: jnp.ones(ROWS, bool),
    )
    found = nfgsm.noisy_step(4.0)(jax.random.key(0), problem)
    assert (np.asarray(found.size) > 0.1).any()
    outside = np.asarray(threats.size(problem.threat, found.x_adv - batch.x)) > 0.11
    assert not np.asarray(found.success)[outside].any()


@pytest.mark.parametrize("threat", [linf(0.06), l2(0.2)], ids=["Linf", "L2"])
def test_free(threat):
    """Three replays by hand, the perturbation handed on, and on to another batch."""
    batch, stats, params = inputs(), statistics(), weights()
    batch = batch._replace(x=jnp.clip(3 * batch.x - 1, 0, 1))  # faces of the box
    method = free.free(MODEL, threat, repeats=3)
    assert method.repeats == 3
    carry = method.init(params, batch)
    assert carry.shape == batch.x.shape and not carry.any()
    epsilon = float(threat.epsilon)
    noise = jnp.zeros_like(batch.x)
    grads = jax.jit(method.grads)
    for replay in range(4):
        if replay == 3:
            batch = batch._replace(x=batch.x[::-1], y=batch.y[::-1])

        def loss(params, noise, batch=batch, stats=stats):
            logits, moved = net(params, stats, jnp.clip(batch.x + noise, 0, 1), True)
            return nll(logits, batch.y), moved

        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (total, moved), (slopes, pull) = both(params, noise)
        if threat == linf(0.06):
            noise = jnp.clip(noise + epsilon * jnp.sign(pull), -epsilon, epsilon)
        else:
            length = lambda d: jnp.sqrt((d**2).sum(-1, keepdims=True))  # noqa: E731
            noise = noise + epsilon * pull / length(pull)
            noise = noise * jnp.minimum(1, epsilon / length(noise))
        found, aux = grads(
            params, stats, carry, batch, jnp.int32(0), jax.random.key(replay)
        )
        close(found, slopes)
        close((aux.metrics["loss"].total / ROWS, aux.extra), (total, moved))
        np.testing.assert_allclose(aux.carry, noise, atol=1e-7)
        carry, stats = aux.carry, moved
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, slopes)


def test_presets_are_methods():
    for build in (
        trades.cifar10,
        trades.mnist,
        trades.deepmind,
        mart.resnet18,
        mart.wide_resnet,
        fast.cifar10,
        fast.mnist,
        fast.imagenet,
        nfgsm.cifar10,
        nfgsm.svhn,
        free.cifar10,
        free.imagenet,
    ):
        args = (weights(), statistics())
        method, batch = build(MODEL), inputs()
        carry = method.init(weights(), batch)
        out = jax.eval_shape(
            method.grads, *args, carry, batch, jnp.int32(0), jax.random.key(0)
        )
        assert jax.tree.structure(out[0]) == jax.tree.structure(weights())
