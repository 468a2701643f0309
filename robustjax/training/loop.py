"""`fit`: train a model by a method, with checkpoints, a live line and exact resume.

What makes resume exact: the state holds everything that changes; batches, augmentation
and all other randomness follow from (key, step); one compiled program runs any stretch
of steps; checkpoints hold whole stretches.
"""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import optax

from robustjax.data.resident import Resident
from robustjax.digests import program_digest, tree_digest
from robustjax.logging import LiveLine, plain
from robustjax.methods.base import Method
from robustjax.models.base import Model
from robustjax.models.compiling import quick_options
from robustjax.parallel import (
    check_rows,
    fetch,
    is_writer,
    num_processes,
    place,
    put_global,
    replicated,
    sigterm_noted,
)
from robustjax.training import checkpoint, run_folder
from robustjax.training.arguments import (
    averaging_at,
    check_counts,
    check_floats,
    check_kinds,
    check_labels,
    check_streams,
    check_streams_read,
    fingerprint,
    length,
)
from robustjax.training.dispatch import Dispatcher, HostBatches
from robustjax.training.monitors import CatastrophicOverfitting
from robustjax.training.progress import Progress
from robustjax.training.state import TrainState, create_state, placement, sharing
from robustjax.training.step import Decay, make_train_step
from robustjax.training.weights import load_weights, weights_of
from robustjax.types import Array, Batch, Key, PyTree

Validate = Callable[[PyTree, PyTree], Mapping[str, Any]]


TRACING = ("jax", "flax", "optax", "robustjax")
"""Packages of which another version may trace the same step otherwise."""

EXIT_CODE = 128 + 15
"""Of a run that SIGTERM ended, as shells have it."""


class Preempted(SystemExit):
    """SIGTERM came: a checkpoint is saved, the process ends with exit code 143."""


class FitResult(NamedTuple):
    """What a training gives.

    state:   after the last step.
    params:  the weights to use: the best by validation, averaged where `ema_decay` was
             given; without `validate` those after the last step.
    extra:   the statistics that belong to `params`.
    metrics: what `validate` said of them, and "step"; without `validate` the last
             training row.
    history: the rows of `metrics.jsonl`, from the first step on.
    """

    state: TrainState
    params: PyTree
    extra: PyTree
    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def fit(
    key: Key,
    model: Model,
    method: Method,
    tx: optax.GradientTransformation,
    data: Resident | HostBatches,
    *,
    batch_size: int,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    streams: Mapping[str, tuple[Resident, int]] | None = None,
    augment: Callable[[Key, Array, Array], Array] | None = None,
    mix: Callable[[Key, Batch], Batch] | None = None,
    validate: Validate | None = None,
    best_metric: str = "robust_accuracy",
    checkpoint_every: int | None = None,
    out: str | Path | None = None,
    config: Any = None,
    ema_decay: Decay | None = None,
    steps_per_dispatch: int = 1,
    log_every: int | None = None,
    log: bool | TextIO = True,
    mesh: Any = None,
    shard_params: bool = False,
    start: tuple[PyTree, PyTree] | None = None,
    compiler_options: Mapping[str, bool | int | str] | None = None,
) -> FitResult:
    """Train `model` by `method`.

    The same call on the same `out` goes on where the run stopped, and ends with the
    bits of an unbroken run (on CPU; on GPU under `--xla_gpu_deterministic_ops=true`).
    With `out`, SIGTERM (a machine is taken away) ends it after the calls that are under
    way, three at most, with a checkpoint of the last step. With several processes
    (`parallel.initialize`) all make the same call, with a mesh of all devices and an
    `out` that all of them see.

    Args:
      key: decides the weights, the order of the data and all noise.
      model: what is trained.
      method: how; see `robustjax.methods`.
      tx: the optax optimizer; its schedule counts updates.
      data: a `Resident` set, or `step -> Batch` for sets that do not fit on the device
        (it must give the same batch for the same step whenever asked; of several
        processes each gives its own rows, an equal part of the batch).
      batch_size: rows per step; an epoch drops its last, incomplete batch.
      num_steps: how many batches to learn from.
      num_epochs: the same in passes over a `Resident` set; give one of the two.
      streams: name -> (further `Resident` set, rows per step): every batch gets
        `streams[name]`, drawn at random with replacement; see `with_stream`.
      augment: `(key, x, index) -> x` on the uint8 pixels of `Resident` sets, inside the
        compiled step. A function's batches are prepared by `mix`.
      mix: `(key, batch) -> batch` after it, on float inputs (of a function on what it
        gives, floats or not); may soften the labels.
      validate: `(params, extra) -> {name: number}`, called at every checkpoint; see
        `training.monitors`. A number "stop" other than 0 ends the run there, without a
        checkpoint of that step, which is the best one only if no other was validated.
        If it raises (but by a monitor that stops), the step's checkpoint is saved
        before, in `out`, by one process; the same call goes on with validate.
      best_metric: which of its numbers chooses the best checkpoint; larger is better.
      checkpoint_every: steps between checkpoints; None: one epoch, or `num_steps`.
      out: the run's folder; None: nothing is written.
      config: a dataclass or dict that describes the run: written to `config.json`, and
        compared on resume. None: what the steps compute is compared instead.
      ema_decay: keep moving averages; see `make_train_step`. Compared on resume; of a
        function, its values at six steps.
      steps_per_dispatch: steps per compiled call. More than 1 saves the dispatch of
        small models, and on CPU asks for temporary memory once per call, not per step.
        On CPU leave 1 for models with ordinary convolutions: XLA runs their gradients
        10 to 15 times slower inside a loop (the zoo's do not suffer).
      log_every: steps between training rows; None: at most 50, and every checkpoint.
      log: the live line: True for standard output, a stream, or False for silence.
      mesh: `parallel.data_mesh(...)`: split every batch over devices.
      shard_params: the devices of the mesh share weights, averages and the optimizer's
        state instead of holding each all (`parallel.spread`); weights are gathered once
        per step, before the attack.
      start: `(params, extra)` to begin from instead of `model.init`.
      compiler_options: for the compiled step, as of `jax.jit`. On CPU
        `models.convolution_options()` saves a fifth or more of a ResNet's step. They
        move the last bits, so a resume refuses others.

    Returns:
      A `FitResult`.

    Raises:
      TypeError: an argument of another kind; the message says what to give.
      ValueError: arguments that do not fit together, or a run in `out` that was started
        with others: the message names the field, its value then and now. `num_steps`
        is among them, because the schedule in `tx` was made for it; log_every, log,
        steps_per_dispatch, mesh and shard_params may change. Functions have no
        values: what tells model, method, tx, augment, mix, start, validate and a
        `data` function of one run from those of another belongs into `config`.
        Without `config` what JAX traces of the first weights and a step is compared
        (`digests`), and the bits of `start`: all of these but validate, a
        `data` function and callbacks. `config={}` compares neither.
      Preempted: after SIGTERM; uncaught it ends the process with exit code 143.
      FloatingPointError: a loss or weight is no longer finite; the message names the
        step and the leaf, and the last checkpoint is kept.
      OSError: a checkpoint cannot be written; the earlier ones are kept.
    """
    check_kinds(key, model, method, tx, data)
    check_counts(batch_size=batch_size, num_steps=num_steps, num_epochs=num_epochs)
    resident = isinstance(data, Resident)
    num_steps, per_epoch = length(data, batch_size, num_steps, num_epochs)
    if checkpoint_every is None:
        checkpoint_every = min(per_epoch or num_steps, num_steps)
    check_counts(
        checkpoint_every=checkpoint_every,
        steps_per_dispatch=steps_per_dispatch,
        log_every=log_every,
    )
    if not resident and steps_per_dispatch > 1:
        raise ValueError(
            f"steps_per_dispatch is {steps_per_dispatch}, but `data` is a function "
            "that the host calls for every step; give 1."
        )
    check_streams(streams, resident)
    if augment is not None and not resident:
        raise ValueError(
            "augment is for Resident sets; what a function `step -> Batch` gives is "
            "prepared by mix: mix=lambda key, batch: batch._replace(x=to_float(augment("
            "key, batch.x, batch.index), 255))."
        )
    for rows in (batch_size, *(rows for _, rows in (streams or {}).values())):
        check_rows(rows, mesh)
    if shard_params and mesh is None:
        raise ValueError("shard_params needs a mesh: give mesh=parallel.data_mesh().")
    sharding = None if mesh is None else replicated(mesh)
    state_key, data_key = jax.random.split(key)
    train_step = make_train_step(method, tx, ema_decay)
    if shard_params:
        method = sharing(method, mesh)
    run_steps = Dispatcher(
        make_train_step(method, tx, ema_decay),
        data,
        data_key,
        batch_size=batch_size,
        steps_per_dispatch=steps_per_dispatch,
        num_steps=num_steps,
        augment=augment,
        mix=mix,
        mesh=mesh,
        streams=streams,
        compiler_options=compiler_options,
    )

    def fresh(start: tuple[PyTree, PyTree] | None) -> TrainState:
        example = run_steps.example()
        check_floats(example)
        ema = ema_decay is not None
        state = create_state(
            state_key, model, method, tx, example, ema=ema, start=start
        )
        sets = {"data": data}
        sets |= {f"streams[{n!r}]": rows for n, (rows, _) in (streams or {}).items()}
        check_labels(model, (state.params, state.extra), example.x, sets)
        check_streams_read(method, state, example)
        return state

    def program(start: Any, data: Any, rows: Any) -> Any:
        """All that `config` would tell apart: the first weights, a batch, a step."""
        return train_step(fresh(start), run_steps.draw(data, rows))

    out = None if out is None else Path(out)
    remembered, history, settings = None, [], {}
    if out is not None:
        settings = {
            "key": jax.random.key_data(key),
            "batch_size": batch_size,
            "num_steps": num_steps,
            "checkpoint_every": checkpoint_every,
            "best_metric": best_metric,
            "ema_decay": averaging_at(ema_decay, num_steps),
            "data": fingerprint(data, streams),
            "compiler_options": dict(compiler_options or {}),
            "config": {} if config is None else config,
        }
        if config is None:
            shapes = jax.eval_shape(lambda start: start, start), *run_steps.drawn_from()
            settings["program"] = {
                "versions": {name: version(name) for name in TRACING},
                "digest": program_digest(jax.make_jaxpr(program)(*shapes)),
                "start": tree_digest(start),
            }
        remembered, history = run_folder.open_run(out, settings, config)
    best: dict[str, Any] | None = None
    seconds = 0.0
    # The full level takes half a minute for the random numbers of a ResNet's weights.
    made = functools.partial(jax.jit, compiler_options=quick_options(1))
    if mesh is not None:
        shapes = jax.eval_shape(fresh, start)
        run_steps.placement = placement(shapes, mesh, shard_params)
    if remembered is not None and out is not None:
        folder, last = out / run_folder.CHECKPOINTS, remembered["step"]
        shapes = jax.eval_shape(fresh, start)
        state = checkpoint.restore(folder, last, shapes, run_steps.placement)
        best, seconds = remembered["best"], remembered["seconds"]
        if remembered.get("sums"):
            run_steps.go_on_from(state, remembered["sums"])
    elif shard_params:  # never whole on one device
        state = made(fresh, out_shardings=run_steps.placement)(start)
    else:
        state = put_global(made(fresh)(start), sharding)
    best_weights: tuple[PyTree, PyTree] | None = None

    line = LiveLine(_stream(log))
    step = int(fetch(state.step))
    images = batch_size + sum(rows for _, rows in (streams or {}).values())
    progress = Progress(line, step, num_steps, per_epoch, images, seconds)
    if step:
        progress.note(f"{out}: going on from step {step} of {num_steps}")
    log_every = log_every or min(50, checkpoint_every)
    next_log = _next(step, log_every)

    def whole(weights: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        return place(weights, sharding) if shard_params else weights

    def write(row: dict[str, Any]) -> None:
        row = plain(row)
        history.append(row)
        if out is not None and is_writer():
            run_folder.append(out, row)

    def save(**more: Any) -> None:
        nonlocal remembered
        earlier, remembered = (
            remembered,
            {
                "step": step,
                "settings": plain(settings),
                "best": best,
                "seconds": progress.seconds,
                **more,
            },
        )
        assert out is not None
        run_folder.checkpoint_now(out, step, state, remembered, earlier)

    def validated(weights: tuple[PyTree, PyTree]) -> dict[str, float]:
        """What `validate` says. If it raises, the steps before it are not lost."""
        assert validate is not None
        try:
            metrics = {n: float(v) for n, v in validate(*weights).items()}
            if best_metric not in metrics:
                raise ValueError(
                    f"validate returned {', '.join(metrics) or 'nothing'}, without "
                    f"the best_metric {best_metric!r}; return it, or name another."
                )
        except CatastrophicOverfitting:  # what it stops is not worth keeping
            raise
        except Exception as error:
            # Of several processes one alone may have failed: it cannot save alone.
            if out is not None and num_processes() == 1:
                with contextlib.suppress(OSError):  # a full disc is not the news
                    save(validated=False)
                    error.add_note(
                        f"The checkpoint of step {step} is in {out}; the same call "
                        "goes on from it, with validate."
                    )
            raise
        return metrics

    # The last process trained to a checkpoint, and validate raised.
    waiting = validate is not None and (remembered or {}).get("validated") is False
    noted = contextlib.nullcontext(lambda: False) if out is None else sigterm_noted()
    with noted as preempted:
        while step < num_steps or waiting:
            save_at = step
            if not waiting:
                save_at = min(_next(step, checkpoint_every), num_steps)
                stop = min(save_at, _next(step, steps_per_dispatch))
                state = run_steps(state, step, stop, on_compile=progress.note)
                step = stop
                if step >= next_log or step == save_at:
                    progress.row(step, run_steps.collect(state), write)
                    next_log = _next(step, log_every)
                else:
                    progress.show(step, run_steps.peek)
            stopping = preempted()
            if step < save_at and not stopping:
                continue
            if not waiting:
                run_steps.peek()  # what is not finite is not saved
            waiting = False
            if validate is not None and step == save_at:
                began = time.monotonic()
                weights = whole(weights_of(state))
                metrics = validated(weights)
                write({"kind": "validate", "step": step, **metrics})
                stopped = bool(metrics.get("stop"))
                is_best = best is None or (
                    not stopped and _better(metrics[best_metric], best[best_metric])
                )
                if is_best:
                    best = plain({"step": step, **metrics})
                    best_weights = (
                        jax.tree.map(jnp.array, weights) if out is None else None
                    )
                progress.validated(step, metrics, is_best, time.monotonic() - began)
                if stopped:
                    note = f"validate asks to stop after step {step}"
                    if is_best:  # there was none before
                        note += (
                            ", the first that was validated: the result is this step; "
                            "a smaller checkpoint_every keeps one from before"
                        )
                    progress.note(note)
                    break
            if out is not None:
                # In the middle of a training row: what it has added up so far.
                save(sums=None if step == save_at else run_steps.sums())
                progress.go_on()
            if stopping:
                progress.note(
                    f"SIGTERM: stopped after step {step} of {num_steps}; its "
                    f"checkpoint is in {out}. The same command goes on from it. Exit "
                    f"code {EXIT_CODE}."
                )
                raise Preempted(EXIT_CODE)

    progress.finished()
    if best is None or best["step"] == step:
        params, extra = whole(weights_of(state))
    elif best_weights is not None:
        params, extra = best_weights
    else:
        assert out is not None  # without a folder the best weights are in memory
        params, extra = load_weights(out, weights_of(state), best["step"], sharding)
    rows = [row for row in history if row["kind"] == "train"]
    return FitResult(state, params, extra, best or (rows[-1] if rows else {}), history)


def _next(step: int, every: int) -> int:
    """The first multiple of `every` after `step`: boundaries ignore where we began."""
    return (step // every + 1) * every


def _better(new: float, old: float | None) -> bool:
    return math.isfinite(new) and (old is None or new > old)


def _stream(log: bool | TextIO) -> TextIO | None:
    if not is_writer() or log is False:
        return None
    return sys.stdout if log is True else log
