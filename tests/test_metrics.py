import jax
import jax.numpy as jnp
import numpy as np

from robustjax.metrics import Mean, mean_of, merge, value


def test_merging_batches_of_different_size_is_the_mean_of_all_rows():
    rows = np.random.default_rng(0).normal(size=13).astype(np.float32)
    merged = merge(mean_of(jnp.asarray(rows[:4])), mean_of(jnp.asarray(rows[4:])))
    np.testing.assert_allclose(value(merged), rows.mean(), rtol=1e-6)


def test_masked_rows_count_neither_above_nor_below():
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    mean = mean_of(values, jnp.array([True, False, True, False]))
    assert (float(mean.total), float(mean.count)) == (4.0, 2.0)


def test_masked_rows_get_no_gradient():
    mask = jnp.array([True, False])
    grad = jax.grad(lambda v: value(mean_of(v, mask)))(jnp.array([2.0, jnp.nan]))
    assert grad.tolist() == [1.0, 0.0]


def test_booleans_count_as_numbers():
    assert float(value(mean_of(jnp.array([True, False, True, True])))) == 0.75


def test_nothing_counted_is_not_a_number():
    assert np.isnan(value(Mean(jnp.zeros(()), jnp.zeros(()))))


def test_a_scan_of_means_is_merged_by_a_sum():
    rows = jnp.arange(6.0).reshape(3, 2)
    _, stacked = jax.lax.scan(lambda c, row: (c, mean_of(row)), 0, rows)
    assert float(value(jax.tree.map(lambda v: v.sum(0), stacked))) == 2.5
