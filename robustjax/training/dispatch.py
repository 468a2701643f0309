"""One compiled program for any stretch of steps, with metrics summed on the device."""

import collections
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.data.resident import Resident, batch_indices, take, to_float
from robustjax.metrics import Mean
from robustjax.parallel import (
    constrain_rows,
    fetch,
    num_processes,
    put_global,
    put_rows,
    replicated,
)
from robustjax.training.state import TrainState
from robustjax.types import Array, Batch, Key, PyTree

HostBatches = Callable[[int], Batch]


class Totals(NamedTuple):
    """What a stretch of steps adds up.

    metrics:  name -> `Mean`.
    bad_step: int32, the first step after which something was not finite; -1: none.
    bad:      bool per watched leaf, which ones were not at that step.
    """

    metrics: PyTree
    bad_step: Array
    bad: Array


class Dispatcher:
    """Runs steps on the device: `state = dispatcher(state, start, stop)`.

    The number of steps of a call is data, so one program serves every stretch. With
    `steps_per_dispatch=1` the program is a bare step without a loop.
    """

    def __init__(
        self,
        step: Callable[[TrainState, Batch], tuple[TrainState, Any]],
        data: Resident | HostBatches,
        data_key: Key,
        *,
        batch_size: int,
        steps_per_dispatch: int,
        num_steps: int,
        augment: Callable[[Key, Array, Array], Array] | None,
        mix: Callable[[Key, Batch], Batch] | None,
        mesh: Any,
        streams: Mapping[str, tuple[Resident, int]] | None = None,
        compiler_options: Mapping[str, bool | int | str] | None = None,
    ):
        order_key, self.augment_key, self.mix_key = jax.random.split(data_key, 3)
        self.stream_key = jax.random.fold_in(data_key, 3)
        self.step, self.augment, self.mix, self.mesh = step, augment, mix, mesh
        self.batch_size = batch_size
        self.compiler_options = dict(compiler_options or {})
        self.looped = steps_per_dispatch > 1
        self.host = None if isinstance(data, Resident) else data
        # The order of the examples is made for a window of steps at a time: a sort per
        # epoch and not per step. Windows begin at multiples of their length.
        self.window = steps_per_dispatch if self.looped else min(100, num_steps)
        self.rows_start, self.rows = -1, None
        self.data = None
        streams = dict(sorted((streams or {}).items()))
        self.stream_rows = {name: rows for name, (_, rows) in streams.items()}
        self.sharding = None if mesh is None else replicated(mesh)
        self.placement: PyTree = self.sharding  # of the state; may be a tree, too
        if isinstance(data, Resident):
            sets = {name: other for name, (other, _) in streams.items()}
            self.data = put_global((data, sets), self.sharding)
            # Of a function of the module and not a closure: trainings of one shape
            # share the program.
            self.make_rows = functools.partial(
                jax.jit(
                    _rows,
                    static_argnames=("impl", "window", "n", "batch_size"),
                    out_shardings=self.sharding,
                ),
                np.asarray(jax.random.key_data(order_key)),
                impl=jax.random.key_impl(order_key),
                window=self.window,
                n=data.x.shape[0],
                batch_size=batch_size,
            )
        self.totals: Totals | None = None
        self.names: list[str] = []
        self.compiled: Any = None
        self.ahead: collections.deque[Array] = collections.deque()

    def example(self) -> Batch:
        """A batch of zeros of the shapes to come; costs nothing inside a trace."""
        batch = jax.eval_shape(self.draw, *self.drawn_from())
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)

    def drawn_from(self) -> tuple[Any, Any]:
        """Of what shapes `draw` makes a batch: of the data and the rows of a step."""
        if self.host is not None:  # the function gives the rows of this process
            own = jax.eval_shape(lambda batch: batch, self.host(0))
            batch = jax.tree.map(self._of_all, own)
            if (rows := batch.x.shape[0]) != self.batch_size:
                raise ValueError(
                    f"batch_size is {self.batch_size}, but data(0) makes batches of "
                    f"{rows} rows, all processes together; give batch_size={rows}."
                )
            return None, batch
        index = np.arange(self.batch_size, dtype=np.int32)
        return jax.eval_shape(lambda *of: of, self.data, index)

    def draw(self, data: Any, rows: Any, t: Array | int = 0, mesh: Any = None) -> Batch:
        """Inside a trace: the batch of step `t`, augmented and mixed."""
        if self.host is not None:
            return self._mixed(rows, t)
        return self._batch(data, rows, t, mesh)

    def _of_all(self, leaf: Any) -> jax.ShapeDtypeStruct:
        rows = leaf.shape[0] * num_processes()
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

    def __call__(
        self,
        state: TrainState,
        start: int,
        stop: int,
        on_compile: Callable[[str], None] = lambda text: None,
    ) -> TrainState:
        """Run the steps `start .. stop - 1`; `state` is consumed."""
        feed = self._feed(start)
        if self.totals is None:
            self.totals = self._zeros(state)
        bounds = np.int32(start), np.int32(stop)
        if self.compiled is None:
            began = time.monotonic()
            # On a mesh what comes out must lie as what goes in: the compiler would
            # divide a carry that has rows.
            placed: dict[str, Any] = {}
            if self.mesh is not None:
                placed["out_shardings"] = (self.placement, self.sharding, self.sharding)
            jitted = jax.jit(
                self._run,
                donate_argnums=(0, 1),
                compiler_options=self.compiler_options,
                **placed,
            )
            arguments = (state, self.totals, self.data, feed, *bounds)
            self.compiled = jitted.lower(*arguments).compile()
            on_compile(f"compiled in {time.monotonic() - began:.1f} s")
        state, self.totals, done = self.compiled(
            state, self.totals, self.data, feed, *bounds
        )
        # The host runs at most two calls ahead of the device: who is asked to stop, or
        # finds that something is not finite, does not find hundreds of steps queued.
        self.ahead.append(done)
        if len(self.ahead) > 2:
            jax.block_until_ready(self.ahead.popleft())
        return state

    def peek(self) -> dict[str, float]:
        """The means since the last `collect`; waits for the device.

        Raises:
          FloatingPointError: something is no longer finite.
        """
        assert self.totals is not None
        totals: Totals = fetch(self.totals)
        if totals.bad_step >= 0:
            names = [n for n, bad in zip(self.names, totals.bad, strict=True) if bad]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise FloatingPointError(
                f"{', '.join(names[:3])}{more} became NaN or infinite in step "
                f"{totals.bad_step}; the checkpoint from before is kept. Lower the "
                "learning rate, clip the gradient (clip_norm=1.0) or warm up longer, "
                "and start a new run."
            )
        return {
            name: float(mean.total) / float(mean.count) if mean.count else math.nan
            for name, mean in totals.metrics.items()
        }

    def collect(self, state: TrainState) -> dict[str, float]:
        """The means since the last `collect`, which begin anew."""
        means = self.peek()
        self.totals = put_global(_cleared(self.totals), self.sharding)
        return means

    def sums(self) -> dict[str, Any]:
        """What was added up since the last `collect`, as JSON holds it exactly."""
        assert self.totals is not None
        metrics = fetch(self.totals.metrics)
        return {name: [mean.total, mean.count] for name, mean in metrics.items()}

    def go_on_from(self, state: TrainState, sums: Mapping[str, Any]) -> None:
        """Begin with these `sums`: those of a run that was interrupted."""
        zeros = self._zeros(state)
        metrics = {
            name: Mean(
                *(jnp.asarray(v, z.dtype) for v, z in zip(sums[name], m, strict=True))
            )
            for name, m in zeros.metrics.items()
        }
        totals = fetch(zeros)._replace(metrics=metrics)
        self.totals = put_global(totals, self.sharding)

    def _feed(self, start: int) -> Any:
        """What one call reads beside the resident set."""
        if self.host is not None:
            return put_rows(jax.tree.map(np.asarray, self.host(start)), self.mesh)
        first = start // self.window * self.window
        if first != self.rows_start:
            self.rows, self.rows_start = self.make_rows(np.int32(first)), first
        return self.rows

    def _run(
        self,
        state: TrainState,
        totals: Totals,
        data: Any,
        feed: Any,
        start: Array,
        stop: Array,
    ) -> tuple[TrainState, Totals, Array]:
        def one(t: Array, carry: tuple[TrainState, Totals]):
            state, totals = carry
            rows = feed if self.host is not None else feed[t % self.window]
            batch = self.draw(data, rows, t, self.mesh)
            # Else every use of the images draws and crops them again.
            batch = jax.lax.optimization_barrier(constrain_rows(batch, self.mesh))
            state, metrics = self.step(state, batch)
            return state, self._added(totals, state, metrics, t)

        if self.looped:
            state, totals = jax.lax.fori_loop(start, stop, one, (state, totals))
        else:
            state, totals = one(start, (state, totals))
        return state, totals, state.step + 0

    def _batch(self, data: Any, index: Array, t: Array | int, mesh: Any) -> Batch:
        own, sets = data
        augment_key = jax.random.fold_in(self.augment_key, t)
        batch = self._rows(own, index, augment_key, mesh)
        streams = {}
        for number, (name, other) in enumerate(sets.items()):
            key = jax.random.fold_in(jax.random.fold_in(self.stream_key, t), number)
            draw_key, augment_key = jax.random.split(key)
            shape, n = (self.stream_rows[name],), other.x.shape[0]
            drawn = jax.random.randint(draw_key, shape, 0, n, jnp.int32)
            streams[name] = self._rows(other, drawn, augment_key, mesh)
        return self._mixed(batch._replace(streams=streams or None), t)

    def _rows(self, data: Resident, index: Array, augment_key: Key, mesh: Any) -> Batch:
        # Divided here already, so that each device augments its own rows only.
        batch = constrain_rows(take(data, index), mesh)
        x = batch.x
        if self.augment is not None:
            x = self.augment(augment_key, x, batch.index)
        return batch._replace(x=to_float(x, data.scale))

    def _mixed(self, batch: Batch, t: Array | int) -> Batch:
        if self.mix is None:
            return batch
        return self.mix(jax.random.fold_in(self.mix_key, t), batch)

    def _zeros(self, state: TrainState) -> Totals:
        """Totals of nothing; also learns the names of the watched leaves."""

        def one(state: TrainState):
            state, metrics = self.step(state, self.example())
            return metrics, _watched(state, metrics)

        metrics, watched = jax.eval_shape(one, state)
        self.names = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(watched)
        ]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)
        none_bad = jnp.zeros(len(self.names), bool)
        totals = Totals(zeros, jnp.full((), -1, jnp.int32), none_bad)
        return put_global(totals, self.sharding)

    def _added(
        self, totals: Totals, state: TrainState, metrics: PyTree, t: Array
    ) -> Totals:
        leaves = jax.tree.leaves(_watched(state, metrics))
        bad = ~jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
        first = (totals.bad_step < 0) & bad.any()
        return Totals(
            jax.tree.map(jnp.add, totals.metrics, metrics),
            jnp.where(first, jnp.asarray(t, jnp.int32), totals.bad_step),
            jnp.where(first, bad, totals.bad),
        )


def _watched(state: TrainState, metrics: PyTree) -> dict[str, PyTree]:
    """What must stay finite; the names are what a message calls them."""
    totals = {name: mean.total for name, mean in metrics.items()}
    watched = {"metrics": totals, "params": state.params, "statistics": state.extra}
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.zeros(()),
        watched,
    )


def _rows(
    key: Array, start: Array, *, impl: Any, window: int, n: int, batch_size: int
) -> Array:
    """Of the steps from `start` on; `key` as words, which all processes may share."""
    key = jax.random.wrap_key_data(key, impl=impl)
    return batch_indices(key, start, window, n, batch_size)


def _cleared(totals: Totals | None) -> Totals:
    assert totals is not None
    return Totals(
        jax.tree.map(jnp.zeros_like, totals.metrics),
        jnp.full((), -1, jnp.int32),
        jnp.zeros_like(totals.bad),
    )
