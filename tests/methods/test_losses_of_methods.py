"""Each method against a transcription of its published formula, in float64.

The transcriptions follow the papers and what the authors' code does step by step: sums
and reductions, what is a constant, which passes run BatchNorm in train mode, and which
move the running statistics. They share with the library the net and the random points.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import threats
from robustjax.attacks.base import Result, last
from robustjax.attacks.pgd import pgd
from robustjax.losses import margin_loss
from robustjax.methods import awp as awp_file
from robustjax.methods import (
    eat,
    fast,
    free,
    generated,
    gradalign,
    hat,
    logit_pairing,
    mart,
    msd,
    multinorm,
    nfgsm,
    trades,
)
from robustjax.methods.base import label_loss
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.metrics import Mean
from robustjax.models.base import Model, logits_fn
from robustjax.problems import example_keys, maximize, never
from robustjax.threats import l1, l2, linf
from robustjax.types import Batch

ROWS, SIZE, HIDDEN, CLASSES = 8, 6, 12, 4
STEP = 0.05

# BatchNorm inside the attack; the passes that the weights learn from are in train mode.
MODES = pytest.mark.parametrize("bn_mode", ["eval", "batch"])


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
    """An attack without randomness: from x + shift, one squashed step up the score.

    Its result has a derivative by the weights; a method that let it through would miss
    the transcription, where the point is a constant.
    """
    start = problem.x + shift()
    grad = jax.grad(lambda x: problem.score(x, None)[0].sum())(start)
    x_adv = jnp.clip(start + STEP * jnp.tanh(5 * grad), 0, 1)
    zero = jnp.zeros(ROWS)
    return Result(x_adv, zero > 0, zero, problem.score(x_adv, None)[0])


def stepped(x, objective):
    """The same step, written again: `objective(x) -> scalar` is raised."""
    start = x + shift()
    return jnp.clip(start + STEP * jnp.tanh(5 * jax.grad(objective)(start)), 0, 1)


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
        batch.x, lambda x: nll(net(params, statistics(), x, train)[0], batch.y) * ROWS
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


@MODES
def test_mart(bn_mode):
    batch = inputs()
    x_adv = attacked_by_cross_entropy(weights(), train=bn_mode == "batch")

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

    check(mart.mart(MODEL, linf(0.1), one_step, beta=5.0, bn_mode=bn_mode), expected)


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
    # `check` takes step 3, the fourth: the first after a warm-up of three.
    found, _ = check(awp_file.awp(method, gamma=0.02, warmup=3), moved)
    assert np.abs(offsets["first"]).max() > 0.001
    without, _ = check(awp_file.awp(method, gamma=0.02, warmup=4), plain)
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


@MODES
def test_fast(bn_mode):
    """One step of 1.25 epsilon from the ball, projected."""
    batch, key, train = inputs(), jax.random.key(4), bn_mode == "batch"
    stats, threat = statistics(), linf(0.06)
    method = fast.fast(MODEL, threat, bn_mode=bn_mode)

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
    loss = lambda x: nll(net(weights(), stats, x, train)[0], batch.y)  # noqa: E731
    delta = delta + 1.25 * 0.06 * jnp.sign(jax.grad(loss)(start))
    x_adv = jnp.clip(batch.x + jnp.clip(delta, -0.06, 0.06), 0, 1)

    def expected(params):
        logits, moved = net(params, stats, x_adv, True)
        return nll(logits, batch.y), moved

    check(method, expected)


@MODES
def test_nfgsm(bn_mode):
    """From noise of 2 epsilon one step of epsilon; box, but no ball."""
    batch, key, train = inputs(), jax.random.key(4), bn_mode == "batch"
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
    loss = lambda x: nll(net(weights(), stats, x, train)[0], batch.y)  # noqa: E731
    x_adv = jnp.clip(
        noisy + np.float32(epsilon) * jnp.sign(jax.grad(loss)(noisy)), 0, 1
    )
    assert np.abs(x_adv - batch.x).max() > 2 * epsilon

    def expected(params):
        logits, moved = net(params, stats, x_adv, True)
        return nll(logits, batch.y), moved

    check(nfgsm.nfgsm(MODEL, linf(epsilon), bn_mode=bn_mode), expected)


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


def _moved(threat, x, delta, pull):
    """A step of epsilon, then onto ball and box, both by bisection or clipping."""
    epsilon = float(threat.epsilon)
    boxed = lambda d: jnp.clip(x + d, 0, 1) - x  # noqa: E731
    if threat == linf(0.06):
        return boxed(jnp.clip(delta + epsilon * jnp.sign(pull), -epsilon, epsilon))
    if threat == l2(0.2):  # shrunk until, inside the box, its length is epsilon
        length = lambda d: jnp.sqrt((d**2).sum(-1, keepdims=True))  # noqa: E731
        moved = delta + epsilon * pull / length(pull)
        near = lambda t: boxed((1 - t) * moved)  # noqa: E731
    else:  # all coordinates shrunk by one amount, inside the box, as far as needed
        length = lambda d: jnp.abs(d).sum(-1, keepdims=True)  # noqa: E731
        top = jnp.abs(pull) == jnp.abs(pull).max(-1, keepdims=True)
        moved = delta + epsilon * jnp.sign(pull) * top
        shrunk = lambda t: jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - t, 0)  # noqa: E731
        near = lambda t: boxed(shrunk(t))  # noqa: E731
    low, high = jnp.zeros_like(length(pull)), jnp.ones_like(length(pull))
    for _ in range(60):
        middle = (low + high) / 2
        long = length(near(middle)) > epsilon
        low, high = jnp.where(long, middle, low), jnp.where(long, high, middle)
    return jnp.where(length(near(0 * low)) > epsilon, near(high), near(0 * low))


@pytest.mark.parametrize(
    "threat", [linf(0.06), l2(0.2), l1(0.3)], ids=["Linf", "L2", "L1"]
)
def test_free(threat):
    """Three replays by hand, the perturbation handed on, and on to another batch."""
    batch, stats, params = inputs(), statistics(), weights()
    batch = batch._replace(x=jnp.clip(3 * batch.x - 1, 0, 1))  # faces of the box
    method = free.free(MODEL, threat, repeats=3)
    assert method.repeats == 3
    carry = method.init(params, batch)
    assert carry.shape == batch.x.shape and not carry.any()
    noise = jnp.zeros_like(batch.x)
    grads = jax.jit(method.grads)
    for replay in range(4):
        if replay == 3:
            batch = batch._replace(x=batch.x[::-1], y=batch.y[::-1])

        def loss(params, x_adv, batch=batch, stats=stats):
            logits, moved = net(params, stats, x_adv, True)
            return nll(logits, batch.y), moved

        x_adv = jnp.clip(batch.x + noise, 0, 1)
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (total, moved), (slopes, pull) = both(params, x_adv)
        stuck = (x_adv >= 1) & (pull > 0) | (x_adv <= 0) & (pull < 0)
        assert stuck.any()
        pull = jnp.where(stuck, 0, pull)
        noise = _moved(threat, batch.x, x_adv - batch.x, pull)
        found, aux = grads(
            params, stats, carry, batch, jnp.int32(0), jax.random.key(replay)
        )
        close(found, slopes)
        close((aux.metrics["loss"].total / ROWS, aux.extra), (total, moved))
        np.testing.assert_allclose(aux.carry, noise, atol=1e-7)
        carry, stats = aux.carry, moved
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, slopes)


@MODES
def test_gradalign(bn_mode):
    """The gradient at x is a constant, that near x is not; the mean skips zeros."""
    batch, stats = inputs(), statistics()
    threat, key = linf(0.05), jax.random.key(4)
    _, noise_key = jax.random.split(jax.random.split(key)[1], 3)[1:]
    keys = example_keys(noise_key, batch.index)
    near = batch.x + threats.sample(threat, keys, batch.x)
    assert 0.04 < np.abs(near - batch.x).max() <= 0.05 + 1e-7

    def slope(params, x):
        logits = lambda x: net(params, stats, x, bn_mode == "batch")[0]  # noqa: E731
        return jax.grad(lambda x: nll(logits(x), batch.y))(x)

    clean = jax.jit(slope)(weights(), batch.x)
    delta = jnp.clip(1.25 * 0.05 * jnp.sign(clean), -0.05, 0.05)
    x_adv = jnp.clip(batch.x + delta, 0, 1)
    unit = lambda g: g / jnp.sqrt((g**2).sum(1))[:, None]  # noqa: E731

    def expected(params, both=False):
        logits, moved = net(params, stats, x_adv, True)
        first = slope(params, batch.x) if both else clean
        cosine = (unit(first) * unit(slope(params, near))).sum(1)
        return nll(logits, batch.y) + 0.7 * (1 - cosine.mean()), moved

    options = {"strength": 0.7, "bn_mode": bn_mode}
    found, aux = check(gradalign.gradalign(MODEL, threat, **options), expected)
    assert float(aux.metrics["alignment"].count) == ROWS
    method = gradalign.gradalign(MODEL, threat, through_clean=True, **options)
    paper, _ = check(method, functools.partial(expected, both=True))
    assert np.abs(found["first"] - paper["first"]).max() > 1e-3


def test_gradalign_of_zero_gradients_has_no_penalty():
    dead = {**weights(), "second": jnp.zeros((HIDDEN, CLASSES))}
    method = gradalign.gradalign(MODEL, linf(0.05))
    grads, aux = jax.jit(method.grads)(
        dead, statistics(), (), inputs(), jnp.int32(0), jax.random.key(0)
    )
    assert float(aux.metrics["alignment"].count) == 0
    np.testing.assert_allclose(aux.metrics["loss"].total / ROWS, np.log(CLASSES))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_gradalign_of_confident_examples_is_finite():
    """Gradients whose squares leave float32: of a linear net they are parallel."""

    def apply(params, extra, x, *, train=False, key=None):
        return x @ params, extra

    model = Model(lambda key, x: (jnp.zeros((2, 2)), {}), apply)
    x = jnp.array([[0.75, 0.25], [0.25, 0.75]], jnp.float32)
    batch = Batch(x, jnp.array([0, 1]), jnp.arange(2))
    grads = jax.jit(gradalign.gradalign(model, linf(0.01), strength=2.0).grads)
    for margin, counted in ((1.0, 2), (40.0, 2), (60.0, 2), (80.0, 0), (200.0, 0)):
        params = margin * jnp.array([[1.0, -1.0], [-1.0, 1.0]], jnp.float32)
        found, aux = grads(params, {}, (), batch, jnp.int32(0), jax.random.key(0))
        assert np.isfinite(found).all() and np.abs(found).max() < 10, margin
        alignment = aux.metrics["alignment"]
        assert float(alignment.count) == counted, margin
        np.testing.assert_allclose(alignment.total, counted, rtol=1e-5)


def balls():
    return [linf(0.04), l2(0.15), l1(0.3)]


def in_ball(which, delta):
    """The nearest point of each ball, written again; all points are inside the box."""
    if which == 0:
        return jnp.clip(delta, -0.04, 0.04)
    if which == 1:
        length = jnp.sqrt((delta**2).sum(1))[:, None]
        return delta * jnp.minimum(1, 0.15 / length)
    size = -jnp.sort(-jnp.abs(delta), axis=1)  # Duchi et al. 2008
    count = jnp.arange(1, SIZE + 1)[None]
    level = (jnp.cumsum(size, axis=1) - 0.3) / count
    last_one = (size > level).sum(1)[:, None] - 1
    tau = jnp.maximum(jnp.take_along_axis(level, last_one, axis=1), 0)
    return jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - tau, 0)


def uphill(which, grad):
    """The steepest unit move of each norm; L1: one coordinate."""
    if which == 0:
        return jnp.sign(grad)
    if which == 1:
        return grad / jnp.sqrt((grad**2).sum(1))[:, None]
    return jnp.sign(grad) * (jnp.abs(grad) == jnp.abs(grad).max(1)[:, None])


SIZES = (0.04, 0.15, 0.3)


def moved_in(which, x, delta, grad, fraction):
    move = delta + fraction * SIZES[which] * uphill(which, grad)
    return in_ball(which, move)


def nll_each(z, y):
    return -(log_softmax(z) * jnp.eye(CLASSES)[y]).sum(1)


def lost_by(z, y):
    """The best wrong logit minus that of the label."""
    return (z - 1e6 * jnp.eye(CLASSES)[y]).max(1) - (z * jnp.eye(CLASSES)[y]).sum(1)


def of_two_logits(z, y):
    """It puts points in another order than the cross-entropy."""
    return z[:, 0] - z[:, 2]


@functools.partial(jax.jit, static_argnums=(1, 2))
def slope_at(x, train=False, raised=nll_each):
    batch = inputs()
    each = lambda x: raised(net(weights(), statistics(), x, train)[0], batch.y)  # noqa: E731
    return each(x), jax.grad(lambda x: each(x).sum())(x)


def two_steps(which, train=False, raised=nll_each):
    """PGD of two steps of half epsilon from x, written again."""
    x = inputs().x
    delta = jnp.zeros_like(x)
    for _ in range(2):
        _, slope = slope_at(x + delta, train, raised)
        delta = moved_in(which, x, delta, slope, 0.5)
    return x + delta


TWO_STEPS = pgd(2, 0.5, random_start=False, density=1 / SIZE, keep=last)


@pytest.mark.parametrize(
    ("how", "bn_mode", "raised", "inner"),
    [
        ("vmap", "eval", nll_each, label_loss),
        ("vmap", "batch", nll_each, label_loss),
        ("one each", "eval", nll_each, label_loss),
        ("vmap", "eval", lost_by, margin_loss),
    ],
)
def test_average_of_norms(how, bn_mode, raised, inner):
    batch, train = inputs(), bn_mode == "batch"
    points = [two_steps(i, train, raised) for i in range(3)]
    if raised is not nll_each:
        usual = [two_steps(i, train) for i in range(3)]
        assert any(bool((p != u).any()) for p, u in zip(points, usual, strict=True))
    assert len({round(float(jnp.abs(p - batch.x).sum()), 4) for p in points}) == 3

    def expected(params):
        stats, losses = statistics(), []
        for x in points:
            logits, stats = net(params, stats, x, True)
            losses.append(nll(logits, batch.y))
        return sum(losses) / 3, stats

    attack_fn = TWO_STEPS if how == "vmap" else [TWO_STEPS] * 3
    options = {"bn_mode": bn_mode, "inner": inner}
    method = multinorm.average(MODEL, balls(), attack_fn, **options)
    _, aux = check(method, expected)
    right = [net(weights(), statistics(), x, True)[0].argmax(1) for x in points]
    union = (jnp.stack(right) == batch.y[None]).all(0).sum()
    assert float(aux.metrics["accuracy"].total) == int(union)


@pytest.mark.parametrize(
    ("bn_mode", "raised", "inner"),
    [
        ("eval", nll_each, label_loss),
        ("batch", nll_each, label_loss),
        ("eval", of_two_logits, of_two_logits),
    ],
)
def test_maximum_over_norms(bn_mode, raised, inner):
    batch, train = inputs(), bn_mode == "batch"
    points = [two_steps(i, train, raised) for i in range(3)]
    losses = jnp.stack([slope_at(x, train, raised)[0] for x in points])
    best = losses.argmax(0)
    assert len(set(best.tolist())) > 1  # the worst norm differs from row to row
    if raised is not nll_each:
        usual = jnp.stack([slope_at(x, train)[0] for x in points])
        assert (usual.argmax(0) != best).any()
    x_adv = jnp.stack(points)[best, jnp.arange(ROWS)]

    def expected(params):
        logits, stats = net(params, statistics(), x_adv, True)
        return nll(logits, batch.y), stats

    options = {"bn_mode": bn_mode, "inner": inner}
    check(multinorm.maximum(MODEL, balls(), TWO_STEPS, **options), expected)


def test_multinorm_refuses():
    with pytest.raises(ValueError, match="1 threat given"):
        multinorm.average(MODEL, [linf(0.1)])
    with pytest.raises(ValueError, match="2 attacks for 3 threats"):
        multinorm.maximum(MODEL, balls(), [TWO_STEPS] * 2)
    with pytest.raises(ValueError, match="3 threats and 2 step sizes"):
        msd.msd(MODEL, balls(), step_sizes=(0.1, 0.1))
    with pytest.raises(ValueError, match="1 threat given"):
        eat.eat(MODEL, [linf(0.1)])


@MODES
def test_msd(bn_mode):
    """From x, each step the worst of three steepest moves; the highest loss is kept."""
    batch, x, train = inputs(), inputs().x, bn_mode == "batch"
    sizes = (0.3, 0.4, 0.6)
    delta, chosen = jnp.zeros_like(x), []
    best, best_loss = jnp.zeros_like(x), jnp.zeros(ROWS)
    for _ in range(4):
        _, grad = slope_at(x + delta, train)
        moves = [moved_in(i, x, delta, grad, size) for i, size in enumerate(sizes)]
        moves = jnp.stack(moves)
        losses = jnp.stack([slope_at(x + m, train)[0] for m in moves])
        chosen.append(losses.argmax(0))
        delta = moves[losses.argmax(0), jnp.arange(ROWS)]
        better = losses.max(0) > best_loss
        best = jnp.where(better[:, None], delta, best)
        best_loss = jnp.maximum(best_loss, losses.max(0))
    assert len(set(np.asarray(chosen).ravel())) > 1

    def expected(params):
        logits, stats = net(params, statistics(), x + best, True)
        return nll(logits, batch.y), stats

    options = {"num_steps": 4, "step_sizes": sizes, "density": 1 / SIZE}
    check(msd.msd(MODEL, balls(), bn_mode=bn_mode, **options), expected)


def test_eat():
    """The threat is drawn by how often it broke examples; the tally is the carry."""
    batch, params = inputs(), weights()
    args, threat_models = (params, statistics()), [linf(0.04), l2(0.15)]
    # The other threat has broken nothing, so it is certain which one is drawn.
    for certain, total, bn_mode in ((1, [8.0, 0.0], "eval"), (0, [2.0, 8.0], "batch")):
        method = eat.eat(MODEL, threat_models, TWO_STEPS, bn_mode=bn_mode)
        tally, train = (total, [8.0, 8.0]), bn_mode == "batch"
        carry = Mean(*map(jnp.asarray, tally))
        x_adv = two_steps(certain, train)

        def expected(params, x_adv=x_adv):
            logits, stats = net(params, statistics(), x_adv, True)
            return nll(logits, batch.y), stats

        _, aux = check(method, expected, carry)
        correct = net(*args, x_adv, train)[0].argmax(1) == batch.y
        total, count = np.array(tally[0]), np.array(tally[1])
        total[certain] += int(correct.sum())
        count[certain] += ROWS
        np.testing.assert_allclose(aux.carry.total, total)
        np.testing.assert_allclose(aux.carry.count, count)
        assert float(aux.metrics[f"share_{certain}"].total) == 1
    grads = jax.jit(method.grads)
    carry = Mean(jnp.array([6.0, 2.0]), jnp.array([8.0, 8.0]))  # odds 1 to 3
    draw = jax.vmap(
        lambda key: (
            grads(*args, carry, batch, jnp.int32(0), key)[1].metrics["share_1"].total
        )
    )
    share = float(draw(jax.random.split(jax.random.key(0), 400)).mean())
    assert 0.65 < share < 0.85


def with_more(batch, rows=4):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.uniform(0.2, 0.8, (rows, SIZE)))
    more = Batch(x, jnp.asarray(rng.integers(0, CLASSES, rows)), jnp.arange(10, 14))
    return batch._replace(streams={"generated": more}), more


def test_generated_data():
    """Two rows of the batch, one of the stream, and so on: one loss over all."""
    batch, more = with_more(inputs())
    x = jnp.concatenate([batch.x.reshape(4, 2, -1), more.x[:, None]], 1).reshape(12, -1)
    p, q = jnp.eye(CLASSES)[batch.y], 0.8 * jnp.eye(CLASSES)[more.y] + 0.2 / CLASSES
    y = jnp.concatenate([p.reshape(4, 2, -1), q[:, None]], 1).reshape(12, -1)

    def plain(params):
        logits, stats = net(params, statistics(), x, True)
        return -(log_softmax(logits) * y).sum() / 12, stats

    base = standard(MODEL)
    mixed = generated.with_stream(base, smoothing=0.2, num_classes=CLASSES)
    args = (weights(), statistics(), (), batch, jnp.int32(0), jax.random.key(0))
    found, aux = jax.jit(mixed.grads)(*args)
    (loss, stats), slopes = jax.value_and_grad(plain, has_aux=True)(weights())
    close(found, slopes)
    close((aux.metrics["loss"].total / 12, aux.extra), (loss, stats))
    with pytest.raises(ValueError, match="no stream 'more'; it has generated"):
        generated.with_stream(base, "more").grads(*args)
    with pytest.raises(ValueError, match="needs num_classes"):
        generated.with_stream(base, smoothing=0.1)


@pytest.mark.parametrize("soft", ["batch", "stream"])
def test_soft_labels_on_one_side_make_the_other_ones_one_hot(soft):
    """Whatever the sizes: 8 and 4 rows, as many classes as the soft side has."""
    batch, more = with_more(inputs())
    one_hot = jnp.eye(CLASSES)
    both = batch._replace(y=one_hot[batch.y]), more._replace(y=one_hot[more.y])
    mixed = generated.with_stream(standard(MODEL))

    def found(batch, more):
        batch = batch._replace(streams={"generated": more})
        key = jax.random.key(0)
        return mixed.grads(weights(), statistics(), (), batch, jnp.int32(0), key)[0]

    one_sided = (both[0], more) if soft == "batch" else (batch, both[1])
    close(found(*one_sided), found(*both))


def test_awp_of_trades_on_generated_data():
    """The wrappers combine: one attack, on both streams, at the weights themselves."""
    batch, more = with_more(inputs())
    index = jnp.concatenate([batch.index.reshape(4, 2), ~more.index[:, None]], 1)
    x = jnp.concatenate([batch.x.reshape(4, 2, -1), more.x[:, None]], 1).reshape(12, -1)
    y = jnp.concatenate([batch.y.reshape(4, 2), more.y[:, None]], 1).ravel()
    seen = []

    def attack_fn(key, problem):
        seen.append(problem)
        return pgd(2, 0.5, keep=last)(key, problem)

    inner = trades.trades(MODEL, linf(0.05), attack_fn)
    args = (weights(), statistics(), ())
    rest = (jnp.int32(0), jax.random.key(0))
    one = awp_file.awp(generated.with_stream(inner))
    other = generated.with_stream(awp_file.awp(inner))
    plain = awp_file.awp(inner)
    together = Batch(x, y, index.ravel())
    expected = jax.jit(plain.grads)(*args, together, *rest)
    assert len(seen) == 1 and seen[0].x.shape == x.shape
    for method in (one, other):
        close(jax.jit(method.grads)(*args, batch, *rest)[0], expected[0])


@pytest.mark.parametrize(
    ("bn_mode", "bound"), [("eval", True), ("batch", False)], ids=["bound", "closure"]
)
def test_hat(bn_mode, bound):
    """With the helper's weights as the carry, and with a helper that is a closure."""
    batch = inputs()
    x_adv = attacked_by_divergence(weights(), train=bn_mode == "batch")
    teacher = jax.tree.map(lambda w: w[::-1] + 0.1, weights())
    helper = logits_fn(MODEL, teacher, statistics())
    answer = net(teacher, statistics(), x_adv, False)[0].argmax(1)
    assert (answer != batch.y).any()

    def expected(params):
        clean, stats = net(params, statistics(), batch.x, True)
        adversarial, stats = net(params, stats, x_adv, True)
        far, stats = net(params, stats, batch.x + 2.0 * (x_adv - batch.x), True)
        robust = kl_sum(log_softmax(adversarial), jax.nn.softmax(clean)) / ROWS
        loss = nll(clean, batch.y) + 2.5 * robust + 0.5 * nll(far, answer)
        return loss, stats

    ask = helper if bound else lambda x: helper(x)
    method = hat.hat(MODEL, linf(0.1), ask, one_step, bn_mode=bn_mode)
    _, aux = check(method, expected)
    if bound:
        close(list(aux.carry), jax.tree.leaves((teacher, statistics())))
    else:
        assert aux.carry == ()


@MODES
def test_adversarial_logit_pairing(bn_mode):
    """Both halves in one pass: BatchNorm sees them together."""
    batch = inputs()
    x_adv = attacked_by_cross_entropy(weights(), train=bn_mode == "batch")

    def expected(params):
        both, y = jnp.concatenate([batch.x, x_adv]), jnp.tile(batch.y, 2)
        logits, stats = net(params, statistics(), both, True)
        squares = (logits[:ROWS] - logits[ROWS:]) ** 2
        return nll(logits, y) + 0.3 * squares.mean(), stats

    method = logit_pairing.adversarial_logit_pairing(
        MODEL, linf(0.1), one_step, strength=0.3, bn_mode=bn_mode
    )
    check(method, expected)


def test_the_attack_towards_the_least_likely_class():
    """As ALP's authors: the class is that of the clean example, in BatchNorm's eval."""
    batch, params = inputs(), weights()
    least = net(params, statistics(), batch.x, False)[0].argmin(-1)
    f = lambda x: net(params, statistics(), x, False)[0]  # noqa: E731
    x_adv = stepped(batch.x, lambda x: -nll(f(x), least) * ROWS)
    method = logit_pairing.adversarial_logit_pairing(
        MODEL, linf(0.1), one_step, raised=logit_pairing.least_likely
    )
    key = jax.random.key(0)
    found = method.stages.attack(params, statistics(), (), batch, 0, key)
    np.testing.assert_allclose(found, x_adv, rtol=1e-12)
    assert (np.asarray(least) != np.asarray(batch.y)).any()


def test_clean_logit_pairing():
    batch = inputs()
    key = jax.random.split(jax.random.key(4))[1]
    noise = [
        jax.random.normal(k, (SIZE,), jnp.float64)
        for k in example_keys(key, batch.index)
    ]
    x = batch.x + 0.2 * jnp.stack(noise)

    def expected(params):
        logits, stats = net(params, statistics(), x, True)
        pairs = [((logits[i] - logits[i + 1]) ** 2).mean() for i in range(0, ROWS, 2)]
        return nll(logits, batch.y) + 0.3 * jnp.stack(pairs).mean(), stats

    method = logit_pairing.clean_logit_pairing(MODEL, strength=0.3, noise=0.2)
    check(method, expected)
    odd = Batch(batch.x[:7], batch.y[:7])
    with pytest.raises(ValueError, match="7 rows; pairs need an even"):
        method.grads(weights(), statistics(), (), odd, 0, jax.random.key(0))
