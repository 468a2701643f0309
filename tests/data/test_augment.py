from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robustjax.data import compose, cutmix, cutout, random_crop, random_flip, to_float

KEY = jax.random.key(7)
INDEX = jnp.arange(16, dtype=jnp.int32)
X = np.random.RandomState(0).randint(1, 256, (16, 8, 10, 3)).astype(np.uint8)
ALL = {
    "crop": random_crop,
    "flip": random_flip,
    "cutout": partial(cutout, size=4),
    "all": compose(random_crop, random_flip, partial(cutout, size=4)),
}


@pytest.mark.parametrize("name", ALL)
def test_an_example_depends_on_key_and_index_only(name):
    fn = ALL[name]
    out = np.asarray(fn(KEY, X, INDEX))
    order = np.random.RandomState(1).permutation(16)[:5]
    np.testing.assert_array_equal(fn(KEY, X[order], INDEX[order]), out[order])
    assert (out != np.asarray(fn(jax.random.key(8), X, INDEX))).any()
    assert (out != X).any()


@pytest.mark.parametrize("name", ALL)
def test_uint8_equals_float_and_jit_in_a_scan(name):
    fn = ALL[name]
    out = fn(KEY, X, INDEX)
    assert out.dtype == jnp.uint8 and out.shape == X.shape
    as_float = fn(KEY, to_float(X, 255), INDEX)
    np.testing.assert_array_equal(to_float(out, 255), as_float)

    @jax.jit
    def scanned(x):
        return lax.scan(lambda c, k: (c, fn(k, x, INDEX)), 0, KEY[None])[1][0]

    np.testing.assert_array_equal(scanned(X), out)


def test_crop_is_a_window_of_the_padded_image():
    out = np.asarray(random_crop(KEY, X, INDEX, padding=2))
    padded = np.pad(X, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = []
    for i in range(16):
        fits = [
            (h, w)
            for h in range(5)
            for w in range(5)
            if (padded[i, h : h + 8, w : w + 10] == out[i]).all()
        ]
        assert len(fits) == 1
        places += fits
    assert len(set(places)) > 5
    np.testing.assert_array_equal(random_crop(KEY, X, INDEX, padding=0), X)


def test_crop_offsets_are_uniform():
    # One bright pixel in the middle says where the window lay.
    x = np.zeros((2000, 5, 5, 1), np.uint8)
    x[:, 2, 2] = 1
    out = np.asarray(random_crop(KEY, x, jnp.arange(2000), padding=1))
    counts = out.sum(0)[1:4, 1:4, 0]
    assert counts.sum() == 2000  # nine places, 222 expected, deviation 14
    assert counts.min() > 222 - 70 and counts.max() < 222 + 70


def test_flip_is_a_mirror_for_half():
    x = np.tile(np.arange(4, dtype=np.uint8).reshape(1, 1, 4, 1), (1000, 2, 1, 1))
    out = np.asarray(random_flip(KEY, x, jnp.arange(1000)))
    flipped = (out == x[:, :, ::-1]).all((1, 2, 3))
    assert ((out == x).all((1, 2, 3)) ^ flipped).all()
    assert 420 < flipped.sum() < 580


def test_cutout_blanks_one_square_cut_off_at_the_border():
    x = np.ones((300, 8, 8, 1), np.uint8)
    gone = np.asarray(cutout(KEY, x, jnp.arange(300), size=4))[..., 0] == 0
    rows, columns = gone.any(2), gone.any(1)
    np.testing.assert_array_equal(gone, rows[:, :, None] & columns[:, None])
    sides = rows.sum(1)
    assert sides.max() == 4 and sides.min() == 2
    filled = cutout(KEY, x, jnp.arange(300), size=4, fill=9)
    np.testing.assert_array_equal(np.asarray(filled)[..., 0] == 9, gone)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_cutmix_shares_are_those_of_the_pixels(alpha):
    x = np.arange(64, dtype=np.uint8).reshape(64, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    y = jnp.arange(64, dtype=jnp.int32)
    mixed = jax.jit(partial(cutmix, alpha=alpha))(KEY, x, y, y)
    own = np.asarray(mixed.x)[..., 0] == np.arange(64).reshape(-1, 1, 1)
    other = np.asarray(mixed.x)[..., 0] == np.roll(np.arange(64), -1).reshape(-1, 1, 1)
    assert (own ^ other).all()
    np.testing.assert_allclose(own.mean((1, 2)), mixed.lam, atol=1e-6)
    np.testing.assert_array_equal(mixed.y_a, y)
    np.testing.assert_array_equal(mixed.y_b, np.roll(np.arange(64), -1))
    assert 0.3 < float(mixed.lam.mean()) < 0.9 and float(mixed.lam.std()) > 0.1


def test_compose_of_nothing_is_the_identity():
    np.testing.assert_array_equal(compose()(KEY, X, INDEX), X)


def test_errors():
    with pytest.raises(ValueError, match=r"\(16, 8\)"):
        random_crop(KEY, X[:, :, 0, 0], INDEX)
    with pytest.raises(ValueError, match="padding is -1"):
        random_crop(KEY, X, INDEX, padding=-1)
    with pytest.raises(ValueError, match="size is 0"):
        cutout(KEY, X, INDEX, size=0)
    with pytest.raises(ValueError, match="alpha is 0"):
        cutmix(KEY, X, INDEX, INDEX, alpha=0)
