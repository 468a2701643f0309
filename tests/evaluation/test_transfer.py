"""The transfer matrix against closed forms, counting by hand, and a bootstrap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax.attacks.input_transforms import input_diversity
from robustjax.evaluation.checks import ModelWarning
from robustjax.evaluation.intervals import wilson
from robustjax.evaluation.transfer import TransferMatrix, transfer_matrix

RNG = np.random.default_rng(0)
COUNT, SIZE = 60, 6
X = RNG.uniform(0.2, 0.8, (COUNT, SIZE)).astype(np.float32)
PLANES = {name: RNG.normal(size=SIZE).astype(np.float32) for name in "abc"}
Y = (X @ PLANES["a"] > X.mean() * PLANES["a"].sum()).astype(np.int32)
EPSILON = 0.05


def score(w, x):
    """Of class 1; class 0 has its negative."""
    return (x - X.mean()) @ w


def linear(w, x):
    z = score(w, x)
    return jnp.stack([-z, z], 1)


MODELS = {n: jax.tree_util.Partial(linear, jnp.asarray(w)) for n, w in PLANES.items()}
FGSM, NOISY = rj.fgsm(), rj.pgd(2, 0.5, keep=rj.last)
ATTACKS = {"FGSM": FGSM, "PGD": NOISY}


def test_linear_models_have_a_closed_form():
    """FGSM on a linear model is x - epsilon * sign; the rest is counting."""
    found = transfer_matrix(
        MODELS, None, {"FGSM": FGSM}, X, Y, rj.linf(EPSILON), batch_size=16
    )
    assert found.attacks == ("FGSM",)
    assert found.sources == found.targets == ("a", "b", "c")
    sign = np.where(Y == 1, -1, 1)[:, None]
    for s, source in enumerate("abc"):
        x_adv = X + EPSILON * sign * np.sign(PLANES[source])
        for t, target in enumerate("abc"):
            right = (score(PLANES[target], X) > 0) == Y
            wrong = (score(PLANES[target], x_adv) > 0) != Y
            np.testing.assert_array_equal(found.correct[t], right)
            np.testing.assert_array_equal(found.wrong[0, s, t], wrong)
            fooled, total = (right & wrong).sum(), right.sum()
            assert 0 < total
            assert found.rate[0, s, t] == fooled / total
            assert found.error[0, s, t] == wrong.mean()
            assert found.clean_error[t] == pytest.approx(1 - right.mean())
            assert tuple(found.intervals()[0, s, t]) == wilson(fooled, total)
    assert found.pairs() == ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
    mean = np.mean([found.rate[0, s, t] for s, t in found.pairs()])
    assert found.mean_rate("FGSM").value == pytest.approx(mean)


@functools.cache
def straight():
    return transfer_matrix(MODELS, None, ATTACKS, X, Y, rj.linf(EPSILON), batch_size=16)


def test_no_result_depends_on_an_order_or_on_company():
    """Models, attacks and examples in another order, or fewer of them: the same bits,
    random starts included."""
    turned = transfer_matrix(
        dict(reversed(MODELS.items())),
        {"c": MODELS["c"], "a": MODELS["a"]},
        dict(reversed(ATTACKS.items())),
        *(X[::-1], Y[::-1], rj.linf(EPSILON)),
        index=np.arange(COUNT)[::-1],
        batch_size=16,
    )
    np.testing.assert_array_equal(turned.correct[::-1, ::-1], straight().correct[::2])
    np.testing.assert_array_equal(
        turned.wrong[::-1, ::-1, ::-1, ::-1], straight().wrong[:, :, ::2]
    )
    np.testing.assert_array_equal(turned.index, np.arange(COUNT)[::-1])
    one = {"b": MODELS["b"]}
    alone = transfer_matrix(
        one, None, {"PGD": NOISY}, X, Y, rj.linf(EPSILON), batch_size=16
    )
    np.testing.assert_array_equal(alone.wrong[0, 0, 0], straight().wrong[1, 1, 1])
    other = transfer_matrix(
        *(MODELS, None, {"PGD": NOISY}, X, Y, rj.linf(EPSILON)),
        key=jax.random.key(1),
        batch_size=16,
    )
    assert (other.wrong[0] != straight().wrong[1]).any()


def test_batch_size_changes_nothing_where_the_transformations_are_random():
    def f(x):
        return linear(jnp.tile(jnp.asarray(PLANES["a"]), 6), x.reshape(len(x), -1))

    def attack_fn(key, problem):
        return NOISY(key, input_diversity(problem, smallest=0.5))

    x = RNG.uniform(size=(10, 6, 6, 1)).astype(np.float32)
    y = np.asarray(rj.predictions(f(x)))
    found = [
        transfer_matrix({"a": f}, None, {"DI": attack_fn}, x, y, rj.linf(0.05), **how)
        for how in ({"batch_size": 10}, {"batch_size": 4})
    ]
    np.testing.assert_array_equal(found[0].wrong, found[1].wrong)


def test_the_diagonal_is_the_white_box_attack():
    index = np.arange(COUNT, dtype=np.int32)
    key, _ = jax.random.split(jax.random.key(0))
    for s, f in enumerate(MODELS.values()):
        result = rj.attack(
            *(f, X, Y, rj.linf(EPSILON), NOISY), key=key, index=index, batch_size=16
        )
        np.testing.assert_array_equal(straight().wrong[1, s, s], result.success)


def test_an_epsilon_for_each_example_follows_its_example():
    epsilon = np.where(np.arange(COUNT) % 2, 0.0, EPSILON).astype(np.float32)
    found = transfer_matrix(
        *(MODELS, None, {"FGSM": FGSM}, X[::-1], Y[::-1], rj.linf(epsilon[::-1])),
        index=np.arange(COUNT)[::-1],
        batch_size=16,
    )
    wrong = found.wrong[0, ..., ::-1]
    np.testing.assert_array_equal(wrong[..., ::2], straight().wrong[0, ..., ::2])
    still = ~straight().correct[None, :, 1::2]
    assert (wrong[..., 1::2] == still).all()  # no budget: wrong only as without attack


def outside(key, problem):
    delta = jnp.full_like(problem.x, 0.1).at[::2].set(jnp.nan)
    zeros = jnp.zeros(len(problem.x))
    return rj.Result(problem.x + delta, zeros > -1, zeros, zeros)


def test_points_outside_of_the_ball_count_for_nothing():
    with pytest.warns(ModelWarning, match=f"cheat on a: {COUNT} of {COUNT} points"):
        found = transfer_matrix(
            {"a": MODELS["a"]}, MODELS, {"cheat": outside}, X, Y, rj.linf(EPSILON)
        )
    assert found.refused.tolist() == [[COUNT]]
    assert (found.fooled == 0).all()
    np.testing.assert_array_equal(found.wrong[0, 0], ~found.correct)


def test_a_target_that_answers_nan_is_wrong_and_one_never_right_has_no_rate():
    targets = {
        "nan": lambda x: jnp.where(x[:, :2] == X[0, 0], jnp.nan, 1.0) * x[:, :2],
        "never": lambda x: jax.nn.one_hot(jnp.full(len(x), 2), 3),
    }
    x, y = X, np.zeros(COUNT, np.int32)
    found = transfer_matrix(
        {"a": MODELS["a"]}, targets, {"FGSM": FGSM}, x, y, rj.linf(0.0)
    )
    assert not found.correct[0, 0]
    assert found.wrong[0, 0, 0, 0]
    assert found.total[1] == 0
    assert np.isnan(found.rate[0, 0, 1])
    assert found.intervals()[0, 0, 1].tolist() == [0, 1]
    assert found.pairs() == ((0, 0),)


def random_matrix(count):
    """Two attacks, two nets, verdicts that hang together as real ones do."""
    rng = np.random.default_rng(1)
    hard = rng.uniform(size=count)  # one number for an image: pairs share it
    correct = rng.uniform(size=(2, count)) < np.array([[0.9], [0.5]])
    level = np.array([0.5, 0.35])[:, None, None, None]
    wrong = hard + 0.3 * rng.normal(size=(2, 2, 2, count)) < level
    names = ("A", "B"), ("a", "b"), ("a", "b")
    return TransferMatrix(
        *names, np.arange(count), correct, wrong, np.zeros((2, 2), int)
    )


def test_differences_agree_with_a_bootstrap_over_images():
    """Resampling images, all verdicts of one together: value and both ends."""
    found, count = random_matrix(1000), 1000
    rng, draws = np.random.default_rng(2), []
    for _ in range(2000):
        take = rng.integers(0, count, count)
        rates = [
            (found.correct[t, take] * found.wrong[a, s, t, take]).sum()
            / found.correct[t, take].sum()
            for a in (0, 1)
            for s, t in ((0, 1), (1, 0))
        ]
        draws.append((np.mean(rates[:2]) - np.mean(rates[2:]), np.mean(rates[:2])))
    for column, got in enumerate((found.difference("A", "B"), found.mean_rate("A"))):
        low, high = np.quantile([d[column] for d in draws], [0.025, 0.975])
        width = high - low
        assert got.low == pytest.approx(low, abs=0.1 * width)
        assert got.high == pytest.approx(high, abs=0.1 * width)
        assert got.low < got.value < got.high
    reverse = found.difference("B", "A")
    assert reverse.value == pytest.approx(-found.difference("A", "B").value)


def test_one_pair_of_models_has_mcnemars_variance():
    many = random_matrix(400)
    found = dataclasses.replace(  # a -> b is the only pair
        many,
        sources=("a",),
        correct=np.ones((2, 400), bool),
        wrong=many.wrong[:, :1],
        refused=many.refused[:, :1],
    )
    b = (found.wrong[0, 0, 1] & ~found.wrong[1, 0, 1]).sum()
    c = (~found.wrong[0, 0, 1] & found.wrong[1, 0, 1]).sum()
    got = found.difference("A", "B")
    assert got.value == pytest.approx((b - c) / 400)
    variance = (b + c - (b - c) ** 2 / 400) / 400 / 399
    assert (got.high - got.low) / 2 == pytest.approx(1.959964 * variance**0.5, rel=1e-5)


def test_intervals_cover_no_difference_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        hard = rng.uniform(size=200)
        wrong = hard + 0.3 * rng.normal(size=(2, 2, 2, 200)) < 0.5
        names = ("A", "B"), ("a", "b"), ("a", "b")
        correct = rng.uniform(size=(2, 200)) < 0.9
        rest = np.arange(200), correct, wrong, np.zeros((2, 2), int)
        got = TransferMatrix(*names, *rest).difference("A", "B")
        covered += got.low <= 0 <= got.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_table_names_what_it_shows():
    text = str(straight())
    assert text.splitlines()[0].startswith("FGSM: % fooled")
    assert f"{100 * straight().rate[0, 0, 1]:.1f}" in text
    assert text.count("source") == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sources": list(MODELS.values())}, TypeError, "sources is list"),
        ({"targets": {}}, TypeError, "targets is dict"),
        ({"attacks": {}}, TypeError, "attacks is dict"),
        ({"attacks": {"pgd": rj.pgd}}, TypeError, "call it, pgd"),
        ({"x": X * 255}, ValueError, "divide by 255"),
        ({"y": Y.astype(float)}, TypeError, "y has dtype"),
        ({"y": Y + 7}, ValueError, "the model has 2 classes"),
        ({"threat": 0.1}, TypeError, "is no ThreatModel"),
        ({"key": 3}, TypeError, "key=3"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"index": [0, 0, *range(2, COUNT)]}, ValueError, "names 1 examples twice"),
        ({"targets": {"n": lambda x: x[0]}}, ValueError, "must return logits"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    given = {
        "sources": MODELS,
        "targets": None,
        "attacks": ATTACKS,
        "x": X,
        "y": Y,
        "threat": rj.linf(EPSILON),
        **change,
    }
    with pytest.raises(error, match=message):
        transfer_matrix(**given)


def test_bad_questions_are_named():
    with pytest.raises(ValueError, match="attack 'C' is not in the matrix: A, B"):
        random_matrix(10).difference("A", "C")
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        random_matrix(10).mean_rate("A", confidence=1.0)
    one = transfer_matrix(
        {"a": MODELS["a"]}, None, {"FGSM": FGSM}, X, Y, rj.linf(EPSILON)
    )
    with pytest.raises(ValueError, match="no transfer among"):
        one.mean_rate("FGSM")
