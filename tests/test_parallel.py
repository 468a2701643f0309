import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import parallel


def test_rows_are_split_and_come_back_whole():
    mesh = parallel.data_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == 4
    x = np.arange(8.0).reshape(8, 1)
    split = parallel.put_global(x, parallel.split_rows(mesh))
    assert {s.data.shape for s in split.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(parallel.fetch(split), x)


def test_replicated_keys_keep_their_type():
    mesh = parallel.data_mesh(jax.devices()[:2])
    key = parallel.put_global(jax.random.key(1), parallel.replicated(mesh))
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert len(key.devices()) == 2


def test_constraint_inside_a_trace():
    mesh = parallel.data_mesh()
    out = jax.jit(lambda x: parallel.constrain_rows(x + 1, mesh))(jnp.zeros((4, 3)))
    assert out.sharding.is_equivalent_to(parallel.split_rows(mesh), 2)
    assert parallel.constrain_rows("as it is", None) == "as it is"


def test_messages_name_the_number_and_the_fix():
    with pytest.raises(ValueError, match="batch_size 6 .* 4 devices.*multiple of 4"):
        parallel.check_rows(6, parallel.data_mesh())
    with pytest.raises(ValueError, match="devices is empty"):
        parallel.data_mesh([])


def test_one_process_writes_and_never_waits():
    assert parallel.is_writer()
    parallel.wait_for_all("alone")
