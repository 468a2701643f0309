"""Microbatches against the whole batch: the same gradient, slice by slice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks.base import last
from robustjax.attacks.pgd import pgd
from robustjax.methods.base import Aux, from_loss, total_loss
from robustjax.methods.eat import eat
from robustjax.methods.free import free
from robustjax.methods.generated import with_stream
from robustjax.methods.madry import madry
from robustjax.methods.mart import mart
from robustjax.methods.microbatch import microbatches
from robustjax.methods.standard import standard
from robustjax.methods.trades import trades
from robustjax.models.base import Model
from robustjax.problems import example_keys
from robustjax.threats import l2, linf
from robustjax.types import Batch

KEY = jax.random.key(3)
ATTACK = pgd(2, 0.7, keep=last)
ROWS = 12
slow = pytest.mark.slow


def init(key, x):
    first, second = jax.random.split(key)
    hidden = jax.random.normal(first, (16, 8), jnp.float64)
    return (hidden, jax.random.normal(second, (8, 10), jnp.float64)), {}


def apply(params, extra, x, *, train=False, key=None):
    return jnp.tanh(x.reshape(len(x), -1) @ params[0]) @ params[1], extra


MODEL = Model(init, apply)

METHODS = {
    "standard": standard(MODEL),
    "madry": madry(MODEL, linf(0.1), ATTACK),
    "trades": trades(MODEL, l2(0.5), ATTACK),
    "mart": mart(MODEL, linf(0.1), ATTACK),
    "free": free(MODEL, linf(0.1)),
    "generated": with_stream(madry(MODEL, linf(0.1), ATTACK)),
    "eat": eat(MODEL, [linf(0.1), l2(0.5)], ATTACK),
}
QUICK = ("madry", "free")


def batch_of(mask=None, index=True):
    keys = jax.random.split(KEY, 4)
    x, other = (jax.random.uniform(k, (ROWS, 4, 4, 1), float) for k in keys[:2])
    y, labels = (jax.random.randint(k, (ROWS,), 0, 10) for k in keys[2:])
    rows = jnp.arange(5, 5 + ROWS) if index else None
    stream = Batch(other, labels, rows, mask)
    return Batch(x, y, rows, mask, {"generated": stream})


def both(method, n, batch):
    """Gradients and Aux of the whole batch, and of n slices."""
    params, extra = MODEL.init(KEY, batch.x)
    carry = method.init(params, batch)
    step = jnp.int32(0)
    return [
        jax.jit(m.grads)(params, extra, carry, batch, step, KEY)
        for m in (method, microbatches(method, n))
    ]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=slow) for n in METHODS]
)
def test_slices_give_the_gradient_of_the_whole_batch(name):
    # Of three slices each has another number of rows that count.
    mask = (jnp.arange(ROWS) % 4 != 1) & (jnp.arange(ROWS) < 10)
    for masked in (mask,) if name in QUICK else (None, mask):
        with jax.enable_x64(True):
            (whole, seen), (sliced, seen_sliced) = both(
                METHODS[name], 3, batch_of(masked)
            )
        for a, b in zip(*map(jax.tree.leaves, (whole, sliced)), strict=True):
            assert a.dtype == b.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        for name_of, mean in seen.metrics.items():
            if name_of.startswith("share"):  # of the draw, not of the rows
                continue
            other = seen_sliced.metrics[name_of]
            np.testing.assert_allclose(other.count, mean.count)
            np.testing.assert_allclose(other.total, mean.total, rtol=1e-9)
        carries = map(jax.tree.leaves, (seen.carry, seen_sliced.carry))
        for a, b in zip(*carries, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_slice_without_a_counted_row_changes_nothing():
    """Its mean is NaN, and it weighs nothing."""
    mask = jnp.arange(ROWS) % 3 != 1
    with jax.enable_x64(True):
        (whole, _), (sliced, _) = both(standard(MODEL), 3, batch_of(mask))
    for a, b in zip(*map(jax.tree.leaves, (whole, sliced)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_rows_without_an_index_keep_their_noise():
    def loss(params, extra, carry, batch, step, key):
        keys = example_keys(key, batch.index)
        noise = jax.vmap(jax.random.normal)(keys)
        total, metrics = total_loss(params * noise, batch, {})
        return total, Aux(extra, carry, metrics)

    method, batch = from_loss(loss), batch_of(index=False)
    numbered = batch._replace(index=jnp.arange(ROWS))
    found = microbatches(method, 3).grads(1.0, {}, (), batch, 0, KEY)[0]
    whole = method.grads(1.0, {}, (), numbered, 0, KEY)[0]
    np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_statistics_and_memory_pass_from_slice_to_slice():
    seen = []

    def apply(params, extra, x, *, train=False, key=None):
        seen.append(x.shape[0])
        statistics = 0.5 * extra["mean"] + 0.5 * x.mean()
        return x @ params, {"mean": statistics}

    def loss(params, extra, carry, batch, step, key):
        logits, extra = model.apply(params, extra, batch.x, train=True)
        total, metrics = total_loss(logits.sum(-1), batch, {"accuracy": logits})
        return total, Aux(extra, carry * 10 + batch.x[0, 0], metrics)

    model = Model(lambda key, x: (jnp.ones((1, 2)), {}), apply)
    method = from_loss(loss, lambda params, batch: jnp.zeros(()))
    batch = Batch(jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.zeros(4, jnp.int32))
    grads = microbatches(method, 2).grads
    found, aux = grads(
        jnp.ones((1, 2)), {"mean": jnp.zeros(())}, jnp.zeros(()), batch, 0, KEY
    )
    np.testing.assert_array_equal(found, [[2.5, 2.5]])
    assert set(seen) == {2}
    # Rows 0 and 2, mean 2, then 1 and 3, mean 3.
    assert float(aux.extra["mean"]) == 0.5 * (0.5 * 2) + 0.5 * 3
    assert float(aux.carry) == 12
    assert float(aux.metrics["loss"].count) == 4


def test_one_is_the_method_and_what_does_not_divide_is_refused():
    method = METHODS["madry"]
    assert microbatches(method, 1) is method
    with pytest.raises(ValueError, match="n is 0"):
        microbatches(method, 0)
    batch = Batch(jnp.zeros((12, 2)), jnp.zeros(12))
    with pytest.raises(ValueError, match="12 rows .* 5 microbatches.*multiple of 5"):
        microbatches(method, 5).grads(None, {}, (), batch, 0, KEY)
