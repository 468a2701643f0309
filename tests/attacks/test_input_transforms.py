"""DI and TI against loops over pixels, and against what they promise of a problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import robustjax as rj
from robustjax.attacks.input_transforms import (
    gaussian_weights,
    input_diversity,
    translation_invariant,
)

HEIGHT, WIDTH, FILL = 8, 6, 0.25
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(HEIGHT, WIDTH, 2)).astype(np.float32)


def weighted(x):
    return jnp.sum(x * WEIGHTS[None], (1, 2, 3))


def squared(x):
    """Logits whose gradient at T(x) tells both T(x) and the adjoint of T."""
    inner = weighted(x)
    return jnp.stack([0.5 * inner**2, jnp.zeros_like(inner)], 1)


def images(count):
    return RNG.uniform(size=(count, HEIGHT, WIDTH, 2)).astype(np.float32)


def problem_of(f, x, index=None):
    return rj.maximize(f, x, rj.linf(0.1), lambda z: z[:, 0], index=index)


@functools.partial(jax.jit, static_argnames=("f", "wrap"))
def gradient(x, index, key, f=squared, wrap=lambda problem: problem):
    return rj.score_and_grad(wrap(problem_of(f, x, index)), x, key)


def transformed_gradient(x, rows, columns, top, left):
    """T(x) pixel by pixel as the authors' resize and pad, then the chain rule."""
    canvas = np.full_like(x, FILL)
    for i in range(rows):
        for j in range(columns):
            canvas[top + i, left + j] = x[i * HEIGHT // rows, j * WIDTH // columns]
    inner = (canvas * WEIGHTS).sum()
    grad = np.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            source = i * HEIGHT // rows, j * WIDTH // columns
            grad[source] += inner * WEIGHTS[top + i, left + j]
    return grad


def diverse(problem):
    return input_diversity(problem, smallest=0.5, probability=0.75, fill=FILL)


def test_diversity_draws_every_resizing_and_no_other():
    """Each example's gradient is that of one of all transformations, found by trying
    them; sizes, places and the share of changed images are as often as they should."""
    count = 3000
    one = images(1)[0]
    x = np.repeat(one[None], count, 0)
    index = np.arange(count, dtype=np.int32)
    score, _, grad = gradient(x, index, jax.random.key(0), wrap=diverse)
    np.testing.assert_allclose(score, squared(x)[:, 0], rtol=1e-6)
    known = {(HEIGHT, 0, 0): transformed_gradient(one, HEIGHT, WIDTH, 0, 0)}
    for rows in (4, 5, 6, 7):
        columns = rows * WIDTH // HEIGHT
        for top in range(HEIGHT - rows + 1):
            for left in range(WIDTH - columns + 1):
                known[rows, top, left] = transformed_gradient(
                    one, rows, columns, top, left
                )
    away = np.stack(
        [np.abs(np.asarray(grad) - g).max((1, 2, 3)) for g in known.values()]
    )
    assert (away.min(0) < 1e-4).all()
    assert (np.sort(away, 0)[1] > 1e-3).all()  # no two of them look alike
    drawn = away.argmin(0)
    counts = np.bincount(drawn, minlength=len(known))
    assert (counts > 0).all()
    names = list(known)
    rows = np.array([names[i][0] for i in drawn])
    changed = rows < HEIGHT
    assert scipy.stats.binomtest(int(changed.sum()), count, 0.75).pvalue > 1e-3
    sizes = np.bincount(rows[changed], minlength=HEIGHT)[4:]
    assert scipy.stats.chisquare(sizes).pvalue > 1e-3
    for size in (4, 7):  # all places of one size are equally likely
        places = [counts[i] for i, name in enumerate(names) if name[0] == size]
        assert scipy.stats.chisquare(places).pvalue > 1e-3


def test_diversity_depends_on_the_index_and_the_key_only():
    x, index = images(8), np.arange(8, dtype=np.int32)
    first = gradient(x, index, jax.random.key(1), wrap=diverse)[2]
    turned = gradient(x[::-1], index[::-1], jax.random.key(1), wrap=diverse)[2]
    np.testing.assert_array_equal(first, turned[::-1])
    other = gradient(x, index, jax.random.key(2), wrap=diverse)[2]
    assert (np.abs(first - other).max((1, 2, 3)) > 1e-3).any()


def never(problem):
    return input_diversity(problem, smallest=0.5, probability=0.0)


def test_without_probability_nothing_changes():
    x, index = images(8), np.arange(8, dtype=np.int32)
    plain = gradient(x, index, jax.random.key(0))
    found = gradient(x, index, jax.random.key(0), wrap=never)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def convolved(grad, kernel):
    """`SAME` with zeros, channel by channel, by loops."""
    reach, out = len(kernel) // 2, np.zeros_like(grad)
    for i, j in np.ndindex(grad.shape[:2]):
        for a, b in np.ndindex(kernel.shape):
            row, column = i + a - reach, j + b - reach
            if 0 <= row < grad.shape[0] and 0 <= column < grad.shape[1]:
                out[i, j] += kernel[a, b] * grad[row, column]
    return out


def authors_kernel(size, deviations=3):
    """As Dong et al. build it: the normal density on a grid of 3 sigma, normalized."""
    line = scipy.stats.norm.pdf(np.linspace(-deviations, deviations, size))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


@pytest.mark.parametrize("size", [3, 7, 15, 21])  # 15 and 21 are wider than the image
def test_smoothing_is_the_authors_convolution(size):
    def smooth(problem):
        return translation_invariant(problem, size=size)

    x, index = images(2), np.arange(2, dtype=np.int32)
    plain = gradient(x, index, jax.random.key(0))
    found = gradient(x, index, jax.random.key(0), wrap=smooth)
    np.testing.assert_array_equal(found[0], plain[0])
    np.testing.assert_array_equal(found[1], plain[1])
    for row in range(2):
        expected = convolved(np.asarray(plain[2][row]), authors_kernel(size))
        np.testing.assert_allclose(found[2][row], expected, rtol=1e-4, atol=1e-5)


def test_kernel_of_one_pixel_and_a_wide_one():
    assert gaussian_weights(1).tolist() == [1.0]
    np.testing.assert_allclose(gaussian_weights(5, 1e6), 0.2)


def test_smoothing_is_the_mean_gradient_over_translations():
    """Dong et al.'s reason for it: for a linear score the weighted mean over shifted
    images, exactly."""

    def linear(x):
        return weighted(x)[:, None] * jnp.ones((1, 2))

    def over_shifts(x):
        line, total = gaussian_weights(5), 0.0
        for a, b in np.ndindex(5, 5):
            padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
            shifted = padded[:, a : a + HEIGHT, b : b + WIDTH]
            total += line[a] * line[b] * linear(shifted)[:, 0].sum()
        return total

    x, index = images(2), np.arange(2, dtype=np.int32)

    def smooth(problem):
        return translation_invariant(problem, size=5)

    found = gradient(x, index, jax.random.key(0), f=linear, wrap=smooth)[2]
    expected = jax.jit(jax.grad(over_shifts))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def both(problem):
    return translation_invariant(diverse(problem), size=3)


def test_they_compose():
    """TI outside of DI smooths the gradient that DI gives for the same key."""
    x, index = images(4), np.arange(4, dtype=np.int32)
    inner = gradient(x, index, jax.random.key(3), wrap=diverse)[2]
    outer = gradient(x, index, jax.random.key(3), wrap=both)[2]
    for row in range(4):
        expected = convolved(np.asarray(inner[row]), authors_kernel(3))
        np.testing.assert_allclose(outer[row], expected, rtol=1e-4, atol=1e-5)


def test_channels_first():
    def first(x):
        return squared(jnp.moveaxis(x, 1, -1))

    def wrap(problem):
        inner = input_diversity(
            problem, smallest=0.5, probability=0.75, fill=FILL, image_axes="CHW"
        )
        return translation_invariant(inner, size=3, image_axes="CHW")

    x, index = images(4), np.arange(4, dtype=np.int32)
    last = gradient(x, index, jax.random.key(3), wrap=both)[2]
    moved = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    found = gradient(moved, index, jax.random.key(3), f=first, wrap=wrap)[2]
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), last, rtol=1e-5, atol=1e-6)


def test_broken_numbers_stay_where_they_are():
    """A NaN in the gradient of one pixel harms that pixel only; inf logits stay inf."""

    def broken(x):
        pixel = jnp.where(x[:, 0, 0, 0] > 2, jnp.inf, x[:, 0, 0, 0] * 0.0)
        inner = weighted(x) + jnp.sqrt(pixel)  # gradient 0 * inf
        return jnp.stack([inner, jnp.full_like(inner, -jnp.inf)], 1)

    def smooth(problem):
        return translation_invariant(problem, size=3)

    x, index = images(2), np.arange(2, dtype=np.int32)
    plain = np.asarray(gradient(x, index, jax.random.key(0), f=broken)[2])
    assert (plain[:, 0, 0, 0] == 0).all()  # what score_and_grad made of the NaN
    found = gradient(x, index, jax.random.key(0), f=broken, wrap=smooth)
    expected = convolved(plain[0], authors_kernel(3))
    np.testing.assert_allclose(found[2][0], expected, rtol=1e-4, atol=1e-5)
    found = gradient(x, index, jax.random.key(0), f=broken, wrap=never)
    assert (found[1][:, 1] == -np.inf).all()
    np.testing.assert_array_equal(found[2], plain)


def test_an_attack_through_both_reports_the_point_itself():
    """`success` is the plain model's word on `x_adv`, for every way of keeping."""
    x = images(64)
    y = np.zeros(64, np.int32)

    def f(x):
        inner = weighted(x)
        return jnp.stack([inner, jnp.full_like(inner, 0.3)], 1)

    clean = np.asarray(rj.predictions(f(x)))
    for keep in (rj.last, rj.worst):
        attack = rj.momentum(5, keep=keep)
        found = rj.attack(
            f, x, y, rj.linf(0.05), lambda key, p, a=attack: a(key, both(p))
        )
        judged = np.asarray(rj.predictions(f(found.x_adv)))
        np.testing.assert_array_equal(found.success, judged != y)
        assert (judged != y).sum() > (clean != y).sum()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda p: input_diversity(p, smallest=1.0), "smallest=1.0"),
        (lambda p: input_diversity(p, smallest=0.01), "at least 0.125"),
        (lambda p: input_diversity(p, probability=1.5), "probability=1.5"),
        (lambda p: input_diversity(p, image_axes="WHC"), "image_axes='WHC'"),
        (lambda p: translation_invariant(p, size=4), "size=4"),
        (lambda p: translation_invariant(p, size=-1), "size=-1"),
        (lambda p: translation_invariant(p, sigma=0.0), "sigma=0.0"),
    ],
)
def test_bad_arguments_are_named(wrap, message):
    with pytest.raises(ValueError, match=message):
        wrap(problem_of(squared, images(1)))


def test_vectors_and_missing_keys_are_refused():
    flat = problem_of(lambda x: x, np.zeros((2, 5), np.float32))
    for wrap in (input_diversity, translation_invariant):
        with pytest.raises(ValueError, match=r"shape \(2, 5\).*need images"):
            wrap(flat)
    with pytest.raises(ValueError, match="with a key"):
        diverse(problem_of(squared, images(1))).score(images(1), None)
