"""Schedules are data: the method of the step, bit for bit or nearly, in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks.base import Result, last, select
from robustjax.attacks.pgd import pgd
from robustjax.methods.awp import awp
from robustjax.methods.curriculum import (
    cat_step_size,
    curriculum,
    growing,
    in_turn,
    ramp,
    variable_pgd,
)
from robustjax.methods.free import free
from robustjax.methods.gradient_penalty import gradient_penalty
from robustjax.methods.madry import madry
from robustjax.methods.trades import trades
from robustjax.models.base import Model
from robustjax.problems import example_keys, untargeted
from robustjax.threats import l2, linf, random_start, size
from robustjax.types import Batch

ROWS, SIZE = 8, 5  # with these rows every number of steps is drawn


def apply(params, extra, x, *, train=False, key=None):
    return jnp.tanh(x @ params["first"]) @ params["second"], extra


def weights(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"first": (SIZE, 7), "second": (7, 3)}
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in shapes.items()
    }


MODEL = Model(lambda key, x: (weights(), {}), apply)
RNG = np.random.default_rng(1)
BATCH = Batch(
    jnp.asarray(RNG.uniform(0.1, 0.9, (ROWS, SIZE)), jnp.float32),
    jnp.asarray(RNG.integers(0, 3, ROWS), jnp.int32),
    jnp.arange(3, 3 + ROWS, dtype=jnp.int32),
)
ATTACK = pgd(2, 0.5, keep=last)
# Budgets, on the ramp too, are exact in float32, which threats hold them in.
TURNS = in_turn([l2(0.375), linf(0.125)], [10])
RAMP = ramp(linf(0.25), 16, first=0.5)
STEPS = growing(0, 3, 20)


def row_by_row(most):
    """CAT's attack: each row by PGD of a number of steps that is drawn for it."""

    def attack_fn(key, problem):
        key, key_rows = jax.random.split(jax.random.fold_in(key, 0))
        keys = example_keys(key_rows, problem.index)
        own = jax.vmap(lambda k: jax.random.randint(k, (), 0, most + 1))(keys)
        keys = example_keys(jax.random.split(key, 3)[0], problem.index)
        start = problem.x + random_start(problem.threat, keys, problem.x)
        found = Result(problem.x, *[jnp.zeros(ROWS)] * 3)  # 0 steps: no start either
        for k in range(1, most + 1):
            attacked = pgd(k, 0.5, keep=last)(key, problem._replace(start=start))
            found = select(own == k, attacked, found)
        return found

    return attack_fn


# name -> (the curriculum, step -> the method that it should be there)
CASES = {
    "ramp": (
        lambda s: madry(MODEL, RAMP(s), ATTACK),
        lambda s: madry(MODEL, linf(0.25 * (0.5 + s / 32)), ATTACK),
    ),
    "L2 before Linf": (
        lambda s: madry(MODEL, TURNS(s), ATTACK),
        lambda s: madry(MODEL, l2(0.375) if s < 10 else linf(0.125), ATTACK),
    ),
    "growing steps": (
        lambda s: madry(MODEL, linf(0.1), variable_pgd(1 + STEPS(s), 0.4)),
        lambda s: madry(MODEL, linf(0.1), pgd(1 + s // 5, 0.4, keep=last)),
    ),
    "growing steps, mixed": (
        lambda s: madry(
            MODEL, linf(0.125), variable_pgd(1 + STEPS(s), 0.5, mixed=True)
        ),
        lambda s: madry(MODEL, linf(0.125), row_by_row(1 + s // 5)),
    ),
    "L2 before Linf, TRADES": (
        lambda s: trades(MODEL, TURNS(s), ATTACK),
        lambda s: trades(MODEL, l2(0.375) if s < 10 else linf(0.125), ATTACK),
    ),
    "L2 before Linf, gradient penalty": (
        lambda s: gradient_penalty(MODEL, TURNS(s)),
        lambda s: gradient_penalty(MODEL, l2(0.375) if s < 10 else linf(0.125)),
    ),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def check(found, wanted, steps):
    compiled = jax.jit(found.grads)
    params = weights("float64")
    batch = BATCH._replace(x=BATCH.x.astype("float64"))
    for step in steps:
        inputs = (params, {}, (), batch, jnp.int32(step), jax.random.key(step))
        grads, aux = compiled(*inputs)
        by_itself, aux_by_itself = jax.jit(wanted(step).grads)(*inputs)
        for a, b in zip(
            *map(jax.tree.leaves, ((grads, aux), (by_itself, aux_by_itself))),
            strict=True,
        ):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert compiled._cache_size() == 1


OTHERS = ("L2 before Linf, TRADES", "L2 before Linf, gradient penalty")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in CASES if name not in OTHERS),
        *(
            pytest.param(name, marks=(pytest.mark.slow, pytest.mark.quick))
            for name in OTHERS
        ),
    ],
)
def test_each_step_is_that_of_its_method_and_nothing_is_traced_anew(name):
    build, wanted = CASES[name]
    check(curriculum(build), wanted, steps=(9, 10))


@pytest.mark.usefixtures("float64")
def test_wrappers_find_the_stages():
    build, wanted = CASES["L2 before Linf"]
    check(awp(curriculum(build)), lambda s: awp(wanted(s)), steps=(30,))
    assert curriculum(lambda s: gradient_penalty(MODEL, TURNS(s))).stages is None


def test_carry_and_repeats_are_the_methods():
    scheduled = curriculum(lambda s: free(MODEL, RAMP(s), repeats=3))
    assert scheduled.repeats == 3
    assert jax.tree.leaves(scheduled.init(weights(), BATCH))[0].shape == (ROWS, SIZE)


def problem(threat=None):
    f = lambda x: apply(weights(), {}, x)[0]  # noqa: E731
    threat = linf(0.1) if threat is None else threat
    return untargeted(f, BATCH.x, BATCH.y, threat, index=BATCH.index)


@jax.jit
def attacked(count, key):
    return variable_pgd(count)(key, problem())


@pytest.mark.parametrize("count", [1, 4])
def test_a_variable_number_of_steps_is_pgd(count):
    key = jax.random.key(7)
    result = attacked(count, key)
    by_pgd = jax.jit(lambda key: pgd(count, keep=last)(key, problem()))(key)
    np.testing.assert_allclose(result.x_adv, by_pgd.x_adv, atol=1e-6)
    np.testing.assert_allclose(result.score, by_pgd.score, rtol=1e-5)
    assert (result.success == by_pgd.success).all()
    assert attacked._cache_size() == 1


def test_no_steps_leave_the_example_clean():
    np.testing.assert_array_equal(attacked(0, jax.random.key(0)).x_adv, BATCH.x)


def test_mixed_rows_have_all_numbers_of_steps_by_example():
    """Constant gradients, tiny steps: the size of the move counts the steps."""
    weights = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    rows = 400
    x, y = jnp.full((rows, 2), 0.5), jnp.ones(rows, jnp.int32)
    index = jnp.arange(rows, dtype=jnp.int32)

    @jax.jit
    def sizes(order):
        given = untargeted(lambda x: x @ weights, x, y, linf(0.1), index=order)
        attack_fn = variable_pgd(3, 0.1, mixed=True, random_start=False)
        result = attack_fn(jax.random.key(0), given)
        return size(linf(0.1), result.x_adv - x)

    counts = np.asarray(jnp.round(sizes(index) / 0.01)).astype(int)
    assert set(counts) == {0, 1, 2, 3}
    assert np.abs(np.bincount(counts) - 100).max() < 50  # 5.8 standard deviations
    turned = np.asarray(jnp.round(sizes(index[::-1]) / 0.01)).astype(int)
    np.testing.assert_array_equal(turned[::-1], counts)


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_cat_draws_step_sizes_as_its_authors(k):
    """np.random.uniform(1, 10 / k) * 2 / k, which falls from k = 11 on."""
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(cat_step_size, in_axes=(0, None))(keys, jnp.int32(k))
    ends = sorted((2 / k, 2 / k * 10 / k))
    spread = (ends[1] - ends[0]) / 100
    np.testing.assert_allclose([drawn.min(), drawn.max()], ends, atol=spread)
    assert abs(float(drawn.mean()) - sum(ends) / 2) < 3 * spread


def test_cats_attack_is_the_one_by_hand():
    """Row by row: a number of steps, a step size, a start, sign ascent, two clips."""
    key = jax.random.key(2)
    given = problem(linf(0.1))._replace(index=jnp.arange(ROWS, dtype=jnp.int32))
    attack_fn = variable_pgd(3, cat_step_size, mixed=True)
    found = jax.jit(lambda key: attack_fn(key, given).x_adv)(key)

    key, key_mix = jax.random.split(jax.random.fold_in(key, 0))
    key, key_size = jax.random.split(key)
    mix, sizes = (example_keys(k, given.index) for k in (key_mix, key_size))
    starts = example_keys(jax.random.split(key, 3)[0], given.index)
    first, second = (np.asarray(w, np.float64) for w in weights().values())
    expected, numbers = [], set()
    for row in range(ROWS):
        number = int(jax.random.randint(mix[row], (), 0, 4))
        numbers.add(number)
        clean = np.asarray(given.x[row], np.float64)
        low, high = np.maximum(clean - 0.1, 0), np.minimum(clean + 0.1, 1)
        x = clean
        if number:
            size = 0.1 * float(cat_step_size(sizes[row], jnp.int32(number)))
            one = slice(row, row + 1)
            x = clean + random_start(given.threat, starts[one], given.x[one])[0]
        for _ in range(number):
            hidden = np.tanh(x @ first)
            p = np.exp(hidden @ second)
            wrong = p / p.sum() - np.eye(3)[int(given.y[row])]
            gradient = first @ ((1 - hidden**2) * (second @ wrong))
            x = np.clip(x + size * np.sign(gradient), low, high)
        expected.append(x)
    assert numbers == {0, 1, 2, 3}
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_cost_is_that_of_the_steps():
    """Gradients are counted on the host, inside the compiled attack."""
    seen = []

    def counted(x):
        jax.debug.callback(lambda: seen.append(1))
        return x @ jnp.ones((SIZE, 3))

    @jax.jit
    def run(count):
        given = untargeted(counted, BATCH.x, BATCH.y, linf(0.1))
        return variable_pgd(count)(jax.random.key(0), given).x_adv

    for count in (2, 5):
        seen.clear()
        run(count).block_until_ready()
        jax.effects_barrier()
        assert len(seen) == count + 1  # and the look at the last point


def test_schedules():
    assert [int(growing(2, 5, 40)(s)) for s in (0, 9, 10, 20, 39, 40, 10**9)] == [
        2, 2, 3, 4, 5, 5, 5,
    ]  # fmt: skip
    assert int(growing(0, 7, 2**31 - 1)(jnp.int32(2**31 - 2))) == 7
    late = ramp(linf(0.4), 10, first=0.5, delay=5)
    np.testing.assert_allclose(
        [late(s).epsilon for s in (0, 5, 10, 15, 99)], [0.2, 0.2, 0.3, 0.4, 0.4]
    )
    three = in_turn([l2(1.0), l2(2.0), linf(0.3)], [4, 8])
    found = [float(three(s).epsilon) for s in (0, 3, 4, 7, 8, 99)]
    np.testing.assert_allclose(found, [1, 1, 2, 2, 0.3, 0.3], rtol=1e-6)
    delta = jnp.array([[0.3, 0.4]])
    measured = [float(size(three(s), delta)[0]) for s in (0, 4, 8)]
    np.testing.assert_allclose(measured, [0.5, 0.5, 0.4], rtol=1e-6)


def test_what_makes_no_schedule_is_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        ramp(linf(0.1), 0)
    with pytest.warns(UserWarning, match="wider than the box"):
        ramp(linf(8), 10)
    for switches in ([], [3, 3], [5, 4], [1]):
        with pytest.raises(ValueError, match="rising order"):
            in_turn([l2(1.0), linf(0.1), linf(0.2)], switches)
    for numbers in ((3, 2, 10), (-1, 2, 10), (0, 2, 0)):
        with pytest.raises(ValueError, match="0 <= first <= final"):
            growing(*numbers)
    with pytest.raises(ValueError, match="num_steps=-1"):
        variable_pgd(-1)
    with pytest.raises(TypeError, match=r"build\(0\) is 3, no Method"):
        curriculum(lambda step: 3)  # type: ignore[arg-type, return-value]
