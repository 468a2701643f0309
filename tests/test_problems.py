"""Signs, targets, keys, EOT and BPDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax.problems import ranked_class, with_key

X = jnp.array([[0.2, 0.9, 0.4], [0.8, 0.1, 0.3]])
Y = jnp.array([1, 1])


def _identity(x):
    return x


def test_untargeted_raises_the_loss_of_the_label():
    problem = rj.untargeted(_identity, X, Y, rj.linf(0.1))
    score, logits = problem.score(X, None)
    np.testing.assert_allclose(score, rj.losses.cross_entropy(X, Y))
    assert problem.success(logits).tolist() == [False, True]


def test_targeted_lowers_the_loss_of_the_target():
    problem = rj.targeted(_identity, X, jnp.array([0, 0]), rj.linf(0.1))
    score, logits = problem.score(X, None)
    np.testing.assert_allclose(score, -rj.losses.cross_entropy(X, jnp.array([0, 0])))
    assert problem.success(logits).tolist() == [False, True]


def test_an_attack_moves_towards_its_target():
    target = jnp.array([2, 2])
    problem = rj.targeted(_identity, X, target, rj.linf(0.3))
    result = rj.pgd(20)(jax.random.key(0), problem)
    assert result.success.tolist() == [True, True]
    assert jnp.argmax(result.x_adv, -1).tolist() == [2, 2]


def test_nan_logits_count_as_broken():
    logits = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0]])
    assert rj.predictions(logits).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("fn", "takes"),
    [
        (lambda x: x, False),
        (lambda x, key: x, True),
        (lambda x, key=None: x, True),
        (lambda x, train=False: x, False),
        (jax.tree_util.Partial(lambda w, x: w * x, 2.0), False),
        (jax.tree_util.Partial(lambda w, x, key=None: w * x, 2.0), True),
    ],
)
def test_models_may_or_may_not_take_a_key(fn, takes):
    assert rj.problems.takes_key(fn) is takes
    assert with_key(fn)(jnp.ones(2), jax.random.key(0)).shape == (2,)


def test_example_keys_belong_to_examples():
    index = jnp.array([4, 0, 9])
    keys = rj.example_keys(jax.random.key(1), index)
    again = rj.example_keys(jax.random.key(1), index[::-1])[::-1]
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(again))
    assert len({tuple(k) for k in jax.random.key_data(keys).tolist()}) == 3


def test_ranked_class_leaves_the_label_out():
    logits = jnp.array([[5.0, 1.0, 3.0, 2.0]])
    got = [int(ranked_class(logits, jnp.array([2]), r)[0]) for r in (1, 2, 3)]
    assert got == [0, 3, 1]


def test_eot_averages_scores_and_logits():
    def noisy(x, key):
        return x + jax.random.normal(key, x.shape)

    problem = rj.untargeted(noisy, X, Y, rj.linf(0.1))
    key = jax.random.key(5)
    score, logits = rj.eot(problem, 7).score(X, key)
    each = [problem.score(X, k) for k in jax.random.split(key, 7)]
    np.testing.assert_allclose(score, np.mean([s for s, _ in each], 0), rtol=1e-5)
    np.testing.assert_allclose(logits, np.mean([z for _, z in each], 0), rtol=1e-5)


def test_eot_finds_the_gradient_that_noise_hides():
    """A random sign flips the gradient half of the time; the expectation does not."""

    def flipping(x, key):
        noise = 6 * jax.random.normal(key, (x.shape[0], 1))
        return jnp.concatenate(
            [
                noise * jnp.sum(x, -1, keepdims=True) + x[:, :1],
                -noise * jnp.sum(x, -1, keepdims=True),
            ],
            -1,
        )

    x, y = jnp.full((1, 4), 0.5), jnp.array([0])
    problem = rj.maximize(flipping, x, rj.linf(0.1), lambda z: -z[:, 0] - z[:, 1])
    result = rj.pgd(10, random_start=False)(jax.random.key(0), rj.eot(problem, 4))
    assert float(result.x_adv[0, 0]) == pytest.approx(0.4, abs=1e-6)
    assert y.shape == (1,)


def test_bpda_keeps_the_value_and_mends_the_gradient():
    def quantize(x):
        return jnp.round(x * 4) / 4

    def plain(x):
        return 10 * quantize(x)

    def mended(x):
        return 10 * rj.bpda(quantize)(x)

    np.testing.assert_array_equal(plain(X), mended(X))
    stuck = rj.attack(plain, X, jnp.array([1, 0]), rj.linf(0.35), rj.fgsm())
    freed = rj.attack(mended, X, jnp.array([1, 0]), rj.linf(0.35), rj.fgsm())
    assert not stuck.success.any()
    assert freed.success.all()


def test_bpda_refuses_a_stand_in_of_another_shape():
    wrong = rj.bpda(lambda x: x, lambda x: x[:1])
    with pytest.raises(ValueError, match="stand-in must return the shape"):
        jax.grad(lambda x: wrong(x).sum())(X)


def test_score_and_grad_is_row_by_row_and_finite():
    def bad(x):
        return jnp.sqrt(x - 0.2) * jnp.ones((1, 3))

    problem = rj.untargeted(bad, X, Y, rj.linf(0.1))
    score, _, grad = rj.score_and_grad(problem, X, None)
    assert np.isfinite(grad).all()
    assert not np.isnan(score).any()


def test_multi_target_needs_labels_and_attacks_each_class_once():
    problem = rj.maximize(_identity, X, rj.linf(0.3), lambda z: z[:, 0])
    with pytest.raises(ValueError, match="build it with untargeted"):
        rj.multi_target(rj.fgsm(), 2)(jax.random.key(0), problem)
    labeled = rj.untargeted(_identity, X, jnp.array([1, 0]), rj.linf(0.3))
    result = rj.multi_target(rj.pgd(10), 9)(jax.random.key(0), labeled)
    assert result.success.all()


def test_a_start_comes_before_the_attacks_own():
    start = jnp.clip(X + 0.05, 0, 1)
    problem = rj.untargeted(_identity, X, Y, rj.linf(0.1), start=start)
    result = rj.run(rj.gradient_ascent(rj.steepest), 0)(jax.random.key(0), problem)
    np.testing.assert_allclose(result.x_adv, start, atol=1e-6)


def test_keep_worst_never_falls_with_more_steps():
    w = jax.random.normal(jax.random.key(2), (2, 6, 4))

    def wavy(x):
        return jnp.sin(9 * x @ w[0]) + jnp.cos(7 * x @ w[1])

    x = jax.random.uniform(jax.random.key(3), (16, 6))
    problem = rj.untargeted(wavy, x, jnp.argmax(wavy(x), -1), rj.linf(0.2))
    kernel = rj.gradient_ascent(rj.steepest)
    results = [rj.run(kernel, n)(jax.random.key(0), problem) for n in (0, 1, 3, 10)]
    for few, many in zip(results, results[1:], strict=False):
        assert (many.success >= few.success).all()
        kept = many.success == few.success
        assert (many.score >= few.score)[kept].all()


def test_no_gradient_flows_through_an_attack():
    def total(w):
        problem = rj.untargeted(lambda x: x * w, X, Y, rj.linf(0.1))
        return rj.pgd(3)(jax.random.key(0), problem).x_adv.sum()

    assert float(jax.grad(total)(jnp.float32(2.0))) == 0.0


def test_an_absolute_step_size_is_noticed():
    """2/255 is meant where epsilon is 8/255; here it is 2/255 of epsilon."""
    with pytest.warns(UserWarning, match="10 steps reach 0.078 epsilon, short of"):
        rj.pgd(10, 2 / 255)
    with pytest.raises(TypeError, match="step_size='2/255': give a number"):
        rj.pgd(10, "2/255")  # type: ignore[arg-type]
    rj.pgd(10, 0.1), rj.momentum(10, 0.1), rj.fgsm(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rj.pgd(0), "num_steps=0"),
        (lambda: rj.pgd(3, step_size=-1.0), "step_size=-1.0"),
        (lambda: rj.restarts(rj.fgsm(), 0), "n=0"),
        (lambda: rj.multi_target(rj.fgsm(), 0), "num_targets=0"),
        (lambda: rj.sequence(), "got no attack"),
        (lambda: rj.noise("salt"), "kind='salt'"),
        (lambda: rj.noise(num_samples=0), "num_samples=0"),
        (lambda: rj.over_threats(rj.fgsm(), [rj.linf(0.1)], "pmap"), "how='pmap'"),
        (lambda: rj.eot(None, 0), "num_samples=0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("model_type", "x_type"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float64, jnp.float32),
        (jnp.float32, jnp.float64),
    ],
)
def test_logits_and_scores_have_the_type_of_x(model_type, x_type):
    """Attacks carry scores: a model that computes in another type ran into a scan whose
    carry changed its type."""
    with jax.enable_x64(True):
        w = jnp.asarray([[1.0, -1.0], [-1.0, 1.0]], model_type)
        x = jnp.asarray([[0.6, 0.5], [0.9, 0.1]], x_type)
        problem = rj.untargeted(
            lambda x: x.astype(model_type) @ w, x, jnp.zeros(2, jnp.int32), rj.linf(0.2)
        )
        score, logits = problem.score(x, None)
        assert score.dtype == logits.dtype == x_type
        result = rj.pgd(3)(jax.random.key(0), problem)
        assert result.success.tolist() == [True, False]
        assert result.x_adv.dtype == x_type
