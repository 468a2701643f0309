"""Geometry of one example: balls, nearest points, steepest moves, uniform samples.

A norm is a frozen, leafless pytree. Its methods take ONE example of any shape; who
holds a batch vmaps. Nothing here sorts, and no loop waits for the slowest example:
every threshold is found in a fixed number of passes, so a batch may be sharded.

Arithmetic is float32 (float64 for float64 inputs); half precision and integers are
computed and returned in float32. `epsilon` may be 0 (only the zero perturbation) or
infinite (only the box counts).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from robustjax.types import Array, Key

Shape = tuple[int, ...]


class Norm(Protocol):
    """What every norm can do, for ONE example of any shape.

    Args:
      delta: a perturbation; a gradient `grad` has the same shape.
      epsilon: scalar budget >= 0, in input units (L0: a number of coordinates).
      low, high: how far each coordinate may move, `low <= 0 <= high`; scalars or
        arrays of delta's shape.
      density: the fraction of coordinates that a sparse move changes.
    """

    def size(self, delta: Array) -> Array:
        """The norm of delta, a scalar."""
        ...

    def project(self, delta: Array, epsilon: ArrayLike) -> Array:
        """The nearest point, `argmin ||d - delta||_2` with `size(d) <= epsilon`."""
        ...

    def project_box(
        self, delta: Array, epsilon: ArrayLike, low: ArrayLike, high: ArrayLike
    ) -> Array:
        """The nearest point of ball and box at once, `low <= d <= high`."""
        ...

    def steepest(self, grad: Array) -> Array:
        """The move of the unit ball with `<grad, steepest(grad)> = dual(grad)`."""
        ...

    def sparse_steepest(self, grad: Array, density: ArrayLike) -> Array:
        """L1, L0: a unit move along the top coordinates; Linf, L2: `steepest`."""
        ...

    def dual(self, grad: Array) -> Array:
        """How much the linear function `grad` can gain in the unit ball, a scalar."""
        ...

    def stride(self, epsilon: ArrayLike, width: Array) -> Array:
        """How far a unit move goes in each coordinate, in the shape of `width`.

        Epsilon, where it is a length; where it is a count, the width of the box.
        """
        ...

    def free(self, grad: Array, stuck: Array) -> Array:
        """The gradient for the next move, given which coordinates cannot follow it."""
        ...

    def sample(
        self, key: Key, epsilon: ArrayLike, shape: Shape, dtype: Any = jnp.float32
    ) -> Array:
        """A point of the ball, uniformly distributed."""
        ...


def _register(cls):
    """A frozen dataclass without leaves becomes a pytree, which *is* its structure.

    Not `register_dataclass`: to JAX two dataclasses without fields have equal
    structures, whatever their classes, so that now and then (where the hashes agree by
    chance) `jit` would run the program of one norm for another.
    """
    return jax.tree_util.register_static(cls)


def _float(value: Any) -> Array:
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _flat(
    nearest: Callable[..., Array], delta: Array, epsilon: Any, low: Any, high: Any
) -> Array:
    """`nearest` on vectors: on CPU sums over three axes took ten times as long."""
    delta = _float(delta)
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, delta.dtype), delta.shape).ravel()
        if jnp.ndim(bound)
        else jnp.asarray(bound, delta.dtype)
        for bound in (low, high)
    )
    epsilon = jnp.asarray(epsilon, delta.dtype)
    return nearest(delta.ravel(), epsilon, low, high).reshape(delta.shape)


def _inverse(epsilon: Array) -> Array:
    """`1 / epsilon`, and 0 where that is not a finite number (epsilon 0)."""
    inverse = 1 / jnp.where(epsilon > jnp.finfo(epsilon.dtype).tiny, epsilon, jnp.inf)
    return jnp.where(jnp.isfinite(inverse), inverse, 0)


def _unit_max(value: Array) -> tuple[Array, Array]:
    """`value / max|value|` (0 stays 0), whose squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(value), initial=0)
    usable = largest >= jnp.finfo(value.dtype).tiny
    return value / jnp.where(usable, largest, 1), largest


def _euclidean(value: Array) -> Array:
    unit, largest = _unit_max(value)
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit)))


def float_bits(value: Array) -> Array:
    """Magnitudes as integers of the same order, one for each float.

    >>> float_bits(jnp.float32(0.0)), float_bits(jnp.float32(-1.0)) > 0
    (Array(0, dtype=int32), Array(True, dtype=bool))
    """
    dtype = jnp.int64 if value.dtype == jnp.float64 else jnp.int32
    return jax.lax.bitcast_convert_type(jnp.abs(value), dtype)


def _unbits(bits: Array) -> Array:
    dtype = jnp.float64 if bits.dtype == jnp.int64 else jnp.float32
    return jax.lax.bitcast_convert_type(bits, dtype)


def _top(rank: Array, k: Array) -> Array:
    """True at the `k` largest of the non-negative integers `rank`; ties: the first.

    The k-th largest value is built bit by bit from the highest: exact, and each bit
    is one counting pass.
    """
    flat = rank.ravel()
    k = jnp.clip(k, 0, flat.size)
    top_bit = jnp.iinfo(flat.dtype).bits - 2

    def body(i, threshold):
        bit = jnp.left_shift(jnp.ones((), flat.dtype), (top_bit - i).astype(flat.dtype))
        trial = threshold | bit
        return jnp.where(jnp.sum(flat >= trial) >= k, trial, threshold)

    threshold = jax.lax.fori_loop(0, top_bit + 1, body, jnp.zeros((), flat.dtype))
    above, ties = flat > threshold, flat == threshold
    free = k - jnp.sum(above)
    keep = above | (ties & (jnp.cumsum(ties) <= free))
    return (keep & (k > 0)).reshape(rank.shape)


def _first_largest(value: Array) -> Array:
    """True at the first coordinate of largest magnitude."""
    flat = jnp.abs(value).ravel()
    position = jnp.arange(flat.size)
    first = jnp.min(jnp.where(flat == jnp.max(flat), position, flat.size))
    return (position == first).reshape(value.shape)


def _density_count(density: ArrayLike, size: int) -> Array:
    count = jnp.round(jnp.asarray(density, jnp.float32) * size)
    return jnp.clip(count, 1, size).astype(jnp.int32)


def _whole(epsilon: Array, size: int) -> Array:
    return jnp.clip(jnp.floor(epsilon), 0, size).astype(jnp.int32)


def threshold_between(
    reached: Callable[[Array], Array], last: Array
) -> tuple[Array, Array]:
    """Neighboring floats `low < high` between which a monotone `reached` turns True.

    Bisection over bit patterns: all of [0, last] in one pass per bit, to the last
    bit, however far apart the magnitudes are. Needs `reached(last)`, not `reached(0)`.
    """

    def body(_, bracket):
        low, high = bracket
        middle = low + jnp.right_shift(high - low, 1)
        done = reached(_unbits(middle))
        return jnp.where(done, low, middle), jnp.where(done, middle, high)

    high = float_bits(last)
    passes = jnp.iinfo(high.dtype).bits - 1
    low, high = jax.lax.fori_loop(0, passes, body, (jnp.zeros_like(high), high))
    return _unbits(low), _unbits(high)


def _l2_nearest(delta: Array, epsilon: Array, low: Array, high: Array) -> Array:
    """`clip(t * delta, low, high)`, the largest t <= 1 inside the ball."""
    inverse = _inverse(epsilon)
    size = jnp.abs(delta)
    # Not also epsilon: a coordinate that epsilon stops would hide what t adds.
    cap = jnp.where(delta < 0, -low, high)

    def outside(t):
        return jnp.sum(jnp.square(jnp.minimum(t * size, cap) * inverse)) > 1

    one = jnp.ones((), delta.dtype)
    t = jnp.where(outside(one), threshold_between(outside, one)[0], one)
    return jnp.clip(t * delta, jnp.maximum(low, -epsilon), jnp.minimum(high, epsilon))


def _l1_nearest(delta: Array, epsilon: Array, low: Array, high: Array) -> Array:
    """`sign(delta) * clip(|delta| - tau, 0, cap)`, tau >= 0 the least inside."""
    inverse = _inverse(epsilon)
    size = jnp.abs(delta)
    cap = jnp.minimum(jnp.where(delta < 0, -low, high), epsilon)

    def moved(tau):
        return jnp.clip(size - tau, 0, cap)

    def total(tau):
        return jnp.sum(moved(tau) * inverse)

    below, tau = threshold_between(
        lambda tau: total(tau) <= 1, jnp.max(size, initial=0)
    )
    # What the floats between the two cannot resolve, their mixture of sum epsilon
    # does: it has the right size even where |delta| is 1e30.
    outer, inner = total(below), total(tau)
    weight = jnp.clip((1 - inner) / jnp.maximum(outer - inner, 1e-30), 0, 1)
    mixed = moved(tau) + weight * (moved(below) - moved(tau))
    inside = total(jnp.zeros((), delta.dtype)) <= 1
    magnitude = jnp.where(inside, moved(0), jnp.minimum(mixed, cap))
    return jnp.sign(delta) * magnitude


@_register
@dataclasses.dataclass(frozen=True)
class Linf:
    """`max |delta|`; dual `sum |grad|`, steepest `sign(grad)`.

    >>> print(Linf().project_box(jnp.array([3.0, -2.0]), 1.0, -0.5, 2.0))
    [ 1.  -0.5]
    """

    def size(self, delta: Array) -> Array:
        return jnp.max(jnp.abs(_float(delta)), initial=0)

    def project(self, delta: Array, epsilon: ArrayLike) -> Array:
        delta = _float(delta)
        epsilon = jnp.asarray(epsilon, delta.dtype)
        return jnp.clip(delta, -epsilon, epsilon)

    def project_box(
        self, delta: Array, epsilon: ArrayLike, low: ArrayLike, high: ArrayLike
    ) -> Array:
        return jnp.clip(self.project(delta, epsilon), low, high)

    def steepest(self, grad: Array) -> Array:
        return jnp.sign(_float(grad))

    def sparse_steepest(self, grad: Array, density: ArrayLike) -> Array:
        return self.steepest(grad)

    def dual(self, grad: Array) -> Array:
        return jnp.sum(jnp.abs(_float(grad)))

    def stride(self, epsilon: ArrayLike, width: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(epsilon, width.dtype), width.shape)

    def free(self, grad: Array, stuck: Array) -> Array:
        return jnp.where(stuck, 0, _float(grad))

    def sample(
        self, key: Key, epsilon: ArrayLike, shape: Shape, dtype: Any = jnp.float32
    ) -> Array:
        dtype = jnp.promote_types(dtype, jnp.float32)
        epsilon = jnp.asarray(epsilon, dtype)
        return epsilon * jax.random.uniform(key, shape, dtype, -1, 1)


@_register
@dataclasses.dataclass(frozen=True)
class L2:
    """`sqrt(sum delta^2)`, its own dual; steepest `grad / ||grad||`.

    With the box the nearest point is `clip(t * delta, low, high)`: its size grows
    with t, and the largest t <= 1 inside the ball is found to the last bit.

    >>> print(L2().project(jnp.array([3.0, 4.0]), 1.0))
    [0.6 0.8]
    >>> print(L2().project_box(jnp.array([3.0, 4.0]), 1.0, -1.0, 0.6))
    [0.6 0.6]
    """

    def size(self, delta: Array) -> Array:
        return _euclidean(_float(delta))

    def project(self, delta: Array, epsilon: ArrayLike) -> Array:
        delta = _float(delta)
        epsilon = jnp.asarray(epsilon, delta.dtype)
        unit, largest = _unit_max(delta)
        length = jnp.sqrt(jnp.sum(jnp.square(unit)))
        inside = largest * length <= epsilon
        scaled = unit * (epsilon / jnp.where(inside, 1, length))
        return jnp.where(inside, delta, scaled)

    def project_box(
        self, delta: Array, epsilon: ArrayLike, low: ArrayLike, high: ArrayLike
    ) -> Array:
        return _flat(_l2_nearest, delta, epsilon, low, high)

    def steepest(self, grad: Array) -> Array:
        unit, _ = _unit_max(_float(grad))
        length = jnp.sqrt(jnp.sum(jnp.square(unit)))
        return unit / jnp.where(length > 0, length, 1)

    def sparse_steepest(self, grad: Array, density: ArrayLike) -> Array:
        return self.steepest(grad)

    def dual(self, grad: Array) -> Array:
        return _euclidean(_float(grad))

    def stride(self, epsilon: ArrayLike, width: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(epsilon, width.dtype), width.shape)

    def free(self, grad: Array, stuck: Array) -> Array:
        return jnp.where(stuck, 0, _float(grad))

    def sample(
        self, key: Key, epsilon: ArrayLike, shape: Shape, dtype: Any = jnp.float32
    ) -> Array:
        dtype = jnp.promote_types(dtype, jnp.float32)
        key_direction, key_radius = jax.random.split(key)
        direction = self.steepest(jax.random.normal(key_direction, shape, dtype))
        radius = jax.random.uniform(key_radius, (), dtype) ** (1 / direction.size)
        return jnp.asarray(epsilon, dtype) * radius * direction


@_register
@dataclasses.dataclass(frozen=True)
class L1:
    """`sum |delta|`; dual `max |grad|`, steepest one signed coordinate.

    The nearest point is `sign(delta) * clip(|delta| - tau, 0, cap)`, cap being the box
    in the direction of delta and tau >= 0 the least with a sum <= epsilon.
    `sparse_steepest` shares a unit of l1 norm equally among the top coordinates.

    Reference: Croce & Hein, "Mind the box", arXiv 2103.01208.
    Differs from the authors' code: bisection to the last bit instead of sorting.

    >>> print(L1().project(jnp.array([2.0, -1.5, 0.25]), 1.0))
    [ 0.75 -0.25  0.  ]
    >>> print(L1().project_box(jnp.array([2.0, -1.5, 0.25]), 1.0, -1.0, 0.5).round(3))
    [ 0.5 -0.5  0. ]
    >>> print(L1().sparse_steepest(jnp.array([2.0, -1.5, 0.25]), 2 / 3))
    [ 0.5 -0.5  0. ]
    """

    def size(self, delta: Array) -> Array:
        return jnp.sum(jnp.abs(_float(delta)))

    def project(self, delta: Array, epsilon: ArrayLike) -> Array:
        return _flat(_l1_nearest, delta, epsilon, -jnp.inf, jnp.inf)

    def project_box(
        self, delta: Array, epsilon: ArrayLike, low: ArrayLike, high: ArrayLike
    ) -> Array:
        return _flat(_l1_nearest, delta, epsilon, low, high)

    def steepest(self, grad: Array) -> Array:
        grad = _float(grad)
        return jnp.where(_first_largest(grad), jnp.sign(grad), 0)

    def sparse_steepest(self, grad: Array, density: ArrayLike) -> Array:
        grad = _float(grad)
        kept = _top(float_bits(grad), _density_count(density, grad.size))
        signs = jnp.where(kept, jnp.sign(grad), 0)
        return signs / jnp.maximum(jnp.sum(jnp.abs(signs)), 1)

    def dual(self, grad: Array) -> Array:
        return jnp.max(jnp.abs(_float(grad)), initial=0)

    def stride(self, epsilon: ArrayLike, width: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(epsilon, width.dtype), width.shape)

    def free(self, grad: Array, stuck: Array) -> Array:
        return jnp.where(stuck, 0, _float(grad))

    def sample(
        self, key: Key, epsilon: ArrayLike, shape: Shape, dtype: Any = jnp.float32
    ) -> Array:
        dtype = jnp.promote_types(dtype, jnp.float32)
        key_direction, key_radius = jax.random.split(key)
        laplace = jax.random.laplace(key_direction, shape, dtype)
        total = jnp.sum(jnp.abs(laplace))
        direction = laplace / jnp.where(total > 0, total, 1)
        radius = jax.random.uniform(key_radius, (), dtype) ** (1 / laplace.size)
        return jnp.asarray(epsilon, dtype) * radius * direction


@_register
@dataclasses.dataclass(frozen=True)
class L0:
    """How many coordinates are not zero, as a float.

    The unit ball is meant together with `max |delta| <= 1`, so that `steepest` and
    `dual` are finite; projections bound the count only (and the box). A fractional
    epsilon is rounded down. With the box the coordinates that stay are those that save
    most, `delta^2 - (delta - clip(delta))^2`. Ties go to the first coordinate.

    >>> print(L0().project(jnp.array([2.0, -1.5, 0.25]), 1.0))
    [2. 0. 0.]
    >>> print(L0().project_box(jnp.array([2.0, -1.5, 0.25]), 1.0, -1.0, 0.1))
    [ 0. -1.  0.]
    """

    def size(self, delta: Array) -> Array:
        delta = _float(delta)
        return jnp.sum((delta != 0).astype(delta.dtype))

    def project(self, delta: Array, epsilon: ArrayLike) -> Array:
        delta = _float(delta)
        epsilon = jnp.asarray(epsilon, delta.dtype)
        return jnp.where(_top(float_bits(delta), _whole(epsilon, delta.size)), delta, 0)

    def project_box(
        self, delta: Array, epsilon: ArrayLike, low: ArrayLike, high: ArrayLike
    ) -> Array:
        delta = _float(delta)
        epsilon = jnp.asarray(epsilon, delta.dtype)
        clipped = jnp.clip(delta, low, high)
        _, largest = _unit_max(delta)
        scale = jnp.where(largest > 0, largest, 1)
        size, kept = jnp.abs(delta) / scale, jnp.abs(clipped) / scale
        # size^2 - (size - kept)^2: what keeping this coordinate saves.
        saving = jnp.maximum(kept * (2 * size - kept), 0)
        return jnp.where(
            _top(float_bits(saving), _whole(epsilon, delta.size)), clipped, 0
        )

    def steepest(self, grad: Array) -> Array:
        grad = _float(grad)
        return jnp.where(_first_largest(grad), jnp.sign(grad), 0)

    def sparse_steepest(self, grad: Array, density: ArrayLike) -> Array:
        # The projection keeps epsilon coordinates: leaving some out here only hides
        # candidates from it.
        return _unit_max(_float(grad))[0]

    def dual(self, grad: Array) -> Array:
        return jnp.max(jnp.abs(_float(grad)), initial=0)

    def stride(self, epsilon: ArrayLike, width: Array) -> Array:
        # A count says nothing of how far a coordinate may go: the box does.
        return jnp.where(jnp.isfinite(width), width, 1)

    def free(self, grad: Array, stuck: Array) -> Array:
        # On a face a coordinate has done all it can, and must go on counting as good.
        return _float(grad)

    def sample(
        self, key: Key, epsilon: ArrayLike, shape: Shape, dtype: Any = jnp.float32
    ) -> Array:
        dtype = jnp.promote_types(dtype, jnp.float32)
        key_place, key_value = jax.random.split(key)
        draw = jax.random.bits(key_place, shape, jnp.uint32)
        rank = jax.lax.shift_right_logical(draw, jnp.uint32(1)).astype(jnp.int32)
        kept = _top(rank, _whole(jnp.asarray(epsilon, dtype), rank.size))
        return jnp.where(kept, jax.random.uniform(key_value, shape, dtype, -1, 1), 0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["members"]
)
@dataclasses.dataclass(frozen=True)
class AnyOf:
    """The norm `members[index]`, chosen when the program runs.

    `index` is the only leaf, so the norm is data: `jax.vmap` runs over norms.

    Args:
      members: the norms to choose from (static).
      index: int32 scalar; a leading axis only under `jax.vmap` or `jax.lax.map`.

    >>> norm = AnyOf((Linf(), L1()), jnp.int32(1))
    >>> float(norm.size(jnp.array([1.0, -2.0])))
    3.0
    """

    members: tuple[Norm, ...]
    index: Array

    def _switch(self, call: Callable[..., Array], *args: Any) -> Array:
        branches = [functools.partial(call, member) for member in self.members]
        return jax.lax.switch(self.index, branches, *args)

    def size(self, delta: Array) -> Array:
        return self._switch(lambda m, d: m.size(d), delta)

    def project(self, delta: Array, epsilon: ArrayLike) -> Array:
        return self._switch(lambda m, *a: m.project(*a), delta, epsilon)

    def project_box(
        self, delta: Array, epsilon: ArrayLike, low: ArrayLike, high: ArrayLike
    ) -> Array:
        return self._switch(lambda m, *a: m.project_box(*a), delta, epsilon, low, high)

    def steepest(self, grad: Array) -> Array:
        return self._switch(lambda m, g: m.steepest(g), grad)

    def sparse_steepest(self, grad: Array, density: ArrayLike) -> Array:
        return self._switch(lambda m, *a: m.sparse_steepest(*a), grad, density)

    def dual(self, grad: Array) -> Array:
        return self._switch(lambda m, g: m.dual(g), grad)

    def stride(self, epsilon: ArrayLike, width: Array) -> Array:
        return self._switch(lambda m, *a: m.stride(*a), epsilon, width)

    def free(self, grad: Array, stuck: Array) -> Array:
        return self._switch(lambda m, *a: m.free(*a), grad, stuck)

    def sample(
        self, key: Key, epsilon: ArrayLike, shape: Shape, dtype: Any = jnp.float32
    ) -> Array:
        return self._switch(lambda m, *a: m.sample(*a, shape, dtype), key, epsilon)
