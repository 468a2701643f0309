"""Compiles one program of an experiment for a TPU topology; run by main.py.

Reads a job as JSON from standard input and prints one line of JSON: the folder of the
compiled plan. The TPU compiler writes much to standard error, which main.py keeps.
"""

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from robustjax import models, parallel
from robustjax.methods.microbatch import microbatches
from robustjax.problems import predictions, untargeted
from robustjax.training.state import create_state, placement, sharing
from robustjax.training.step import make_train_step
from robustjax.types import Batch

PROGRAMS = ("step", "attack", "evaluation")
TEXT, FIGURES = "program.hlo.gz", "figures.json"


def read_workload(experiment: str, flags: list[str]) -> tuple[Any, bool]:
    """The experiment's `workload` for these flags; whether devices share weights."""
    module = importlib.import_module(f"experiments.{experiment}")
    from experiments import common, machine

    config = common.parse(module.PRESETS, module.__doc__, flags)
    return module.workload(config), machine.of(config).shard_params


def lowered(
    workload: Any,
    shared: bool,
    program: str,
    topology: str,
    per_device: int,
    pieces: int,
):
    """The program, lowered for all devices of the topology, placed as `fit` does it:
    rows are split over them, weights too if `shared`, everything else is on each."""
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = parallel.data_mesh(devices)
    whole, rows = parallel.replicated(mesh), parallel.split_rows(mesh)
    method = workload.method
    if pieces > 1:
        method = microbatches(method, pieces)
    shared = shared and len(devices) > 1
    if shared:
        method = sharing(method, mesh)

    def batch_of(count: int) -> Batch:
        label = jax.ShapeDtypeStruct((count,), jnp.int32)
        x = jax.ShapeDtypeStruct((count, *workload.shape), jnp.float32)
        return Batch(x, label, label)

    def placed(tree: Any, where: Any) -> Any:
        def leaf(s: Any, at: Any) -> Any:
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at)

        return jax.tree.map(leaf, tree, where)

    def fresh(key: Any, batch: Batch):
        ema = workload.ema_decay is not None
        return create_state(key, workload.model, method, workload.tx, batch, ema=ema)

    example = batch_of(per_device)
    shapes = jax.eval_shape(fresh, jax.random.key(0), example)
    lies = placement(shapes, mesh, shared)
    state = placed(shapes, lies)
    full = batch_of(per_device * len(devices))
    batch = placed(full, jax.tree.map(lambda _: rows, full))

    if program == "step":
        step = make_train_step(method, workload.tx, workload.ema_decay)
        out = (lies, whole)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
        return jitted.lower(state, batch)

    def attack(state: Any, batch: Batch):
        f = models.logits_fn(workload.model, state.params, state.extra)
        problem = untargeted(f, batch.x, batch.y, workload.threat, index=batch.index)
        return workload.attack_fn(state.key, problem).x_adv

    def evaluation(state: Any, batch: Batch):
        f = models.logits_fn(workload.model, state.params, state.extra)
        problem = untargeted(f, batch.x, batch.y, workload.threat, index=batch.index)
        x_adv = workload.evaluation(state.key, problem).x_adv
        return predictions(f(batch.x)) == batch.y, predictions(f(x_adv)) == batch.y

    function = {"attack": attack, "evaluation": evaluation}[program]
    return jax.jit(function, out_shardings=rows).lower(state, batch)


def cache_key(text: str, job: dict[str, Any], versions: dict[str, str]) -> str:
    """Of what decides the compiled program."""
    parts = [text, job["topology"], job["options"], versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def main() -> None:
    job = json.load(sys.stdin)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        folder = run(job)
    print(json.dumps({"folder": str(folder)}), file=out)


def run(job: dict[str, Any]) -> Path:
    workload, shared = read_workload(job["experiment"], job["flags"])
    sizes = (job["topology"], job["per_device"], job["pieces"])
    low = lowered(workload, shared, job["program"], *sizes)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    folder = Path(job["cache"]) / cache_key(low.as_text(), job, versions)
    if (folder / FIGURES).exists():
        return folder
    began = time.monotonic()
    compiled = low.compile(compiler_options=job["options"] or None)
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{TEXT}.{os.getpid()}"
    with gzip.open(partial, "wt") as file:
        file.write(compiled.as_text())
    partial.rename(folder / TEXT)
    figures = {
        "job": {k: v for k, v in job.items() if k != "cache"},
        "versions": versions,
        "compile_seconds": seconds,
        "memory": {n: getattr(memory, f"{n}_size_in_bytes") for n in names},
        "batch_size": workload.batch_size,
        "attack_steps": workload.attack_steps,
        "evaluation_steps": workload.evaluation_steps,
    }
    partial = folder / f"{FIGURES}.{os.getpid()}"
    partial.write_text(json.dumps(figures, indent=1))
    partial.rename(folder / FIGURES)  # last: a folder with it is complete
    return folder


if __name__ == "__main__":
    main()
