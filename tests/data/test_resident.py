import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robustjax.data import (
    batch_at,
    batch_indices,
    epoch_order,
    eval_batches,
    load,
    resident,
    split_validation,
    take,
    to_float,
)

KEY = jax.random.key(3)


def small(n=23):
    x = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1)
    return resident(x, np.arange(n), 255)


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, again, second = (np.asarray(epoch_order(KEY, e, 50)) for e in (0, 0, 1))
    assert first.dtype == np.int32
    np.testing.assert_array_equal(np.sort(first), np.arange(50))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("step", [0, 3, 4, 13])
def test_indices_follow_from_key_and_step_alone(step, num_steps):
    n, batch = 23, 5  # 4 steps per epoch, 3 examples dropped
    rows = jax.jit(batch_indices, static_argnums=(2, 3, 4))(
        KEY, step, num_steps, n, batch
    )
    for i in range(num_steps):
        epoch, place = divmod(step + i, 4)
        order = epoch_order(KEY, epoch, n)
        np.testing.assert_array_equal(
            rows[i], order[place * batch : (place + 1) * batch]
        )


def test_batch_at_equals_take_in_a_scan():
    data = small()

    @jax.jit
    def scanned(data, key):
        rows = batch_indices(key, 2, 6, data.x.shape[0], 5)
        return lax.scan(lambda c, index: (c, take(data, index)), 0, rows)[1]

    batches = scanned(data, KEY)
    assert batches.x.dtype == jnp.uint8
    for i in range(6):
        batch = jax.jit(batch_at, static_argnums=3)(data, KEY, 2 + i, 5)
        np.testing.assert_array_equal(batch.index, batches.index[i])
        np.testing.assert_array_equal(batch.y, batch.index)
        np.testing.assert_array_equal(batch.x, to_float(batches.x[i], 255))


def test_resident_is_data_and_does_not_retrace():
    traces = []

    @jax.jit
    def first(data, step):
        traces.append(1)
        return batch_at(data, KEY, step, 5).x

    first(small(), 0)
    first(small()._replace(scale=jnp.float32(16)), 9)
    assert len(traces) == 1


def test_to_float_gives_the_same_bits_everywhere():
    x = np.arange(256, dtype=np.uint8)
    for max_value in range(1, 256):
        host = next(eval_batches(x, x, 256, max_value)).x
        for fn in (
            (to_float, jax.jit(to_float)) if max_value in (255, 16) else (to_float,)
        ):
            np.testing.assert_array_equal(fn(x, max_value), host)
        np.testing.assert_allclose(host, x / max_value, rtol=2e-7)
        assert host[max_value] <= 1
    assert host[255] == 1


@pytest.mark.parametrize("batch_size", [1, 4, 10, 16])
def test_eval_batches_count_every_example_once(batch_size):
    x = np.arange(10 * 3, dtype=np.uint8).reshape(10, 3)
    seen = []
    for batch in eval_batches(x, np.arange(10), batch_size, 255):
        assert batch.x.shape == (batch_size, 3) and batch.x.dtype == np.float32
        np.testing.assert_array_equal(batch.x, to_float(x[batch.index], 255))
        seen += batch.y[batch.mask].tolist()
    assert seen == list(range(10))


def test_split_validation_is_a_partition_and_repeats():
    x, y = np.arange(40).reshape(20, 2), np.arange(20)
    (xt, yt), (xv, yv) = split_validation(1, x, y, 6)
    assert len(yv) == 6 and sorted([*yt, *yv]) == list(range(20))
    np.testing.assert_array_equal(xt, x[yt])
    np.testing.assert_array_equal(xv, x[yv])
    np.testing.assert_array_equal(
        yv, split_validation(jax.random.key(1), x, y, 6)[1][1]
    )
    assert list(yv) != list(split_validation(2, x, y, 6)[1][1])


def test_errors_say_what_is_wrong():
    x, y = np.zeros((4, 2), np.uint8), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match="batch_size is 5 with 4"):
        batch_at(resident(x, y, 255), KEY, 0, 5)
    with pytest.raises(ValueError, match="max_value is needed"):
        eval_batches(x, y, 2)
    with pytest.raises(ValueError, match="num_validation is 4"):
        split_validation(0, x, y, 4)


DARK = np.full((4, 2), 16, np.uint8)
LABELS = np.arange(4)


@pytest.mark.parametrize(
    ("x", "y", "max_value", "error", "message"),
    [
        (DARK / np.float32(16), LABELS, 1, TypeError, "x is float32; .* uint8"),
        ([[0.5]], [0], 1, TypeError, "x is float64"),
        (DARK, LABELS[:3], 16, ValueError, r"x has shape \(4, 2\) and y \(3,\)"),
        (DARK[:0], LABELS[:0], 16, ValueError, "as many labels as examples"),
        (DARK, 3, 16, ValueError, "as many labels as examples"),
        (DARK, np.eye(4), 16, ValueError, r"y.argmax\(-1\)"),
        (DARK, LABELS + 0.5, 16, TypeError, "y is float64; labels are integers"),
        (DARK, LABELS - 1, 16, ValueError, "y has the label -1"),
        (DARK, LABELS, None, ValueError, "no pixel above 16, .*max_value=255"),
        (DARK, LABELS, 0, ValueError, "max_value is 0"),
        (DARK, LABELS, 15, ValueError, "max_value is 15, but x has the pixel 16"),
    ],
)
def test_bad_sets_are_refused(x, y, max_value, error, message):
    with pytest.raises(error, match=message):
        resident(x, y, max_value)


def test_which_value_stands_for_one():
    assert float(resident(DARK, LABELS, 255).scale) == 255  # said: they are dark
    assert float(resident(DARK * 8, LABELS).scale) == 255  # 128: bright enough
    digits = load("digits")
    with pytest.raises(ValueError, match="16 for the digits"):
        resident(digits.x_train, digits.y_train)
