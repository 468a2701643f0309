"""What devices say to each other, counted in the compiled programs of four of them.

XLA's CPU compiler combines all-reduces as those for GPU and TPU do, so what is counted
is the optimised program itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import robustjax as rj
from robustjax.attacks.apgd import apgd
from robustjax.attacks.fab import fab
from robustjax.attacks.input_transforms import input_diversity, translation_invariant
from robustjax.attacks.square import square
from robustjax.data import augment
from robustjax.data.resident import resident
from robustjax.methods.madry import madry
from robustjax.methods.microbatch import microbatches
from robustjax.models import forms
from robustjax.models.base import from_linen, logits_fn
from robustjax.models.layers import BatchNorm, Conv, Dense
from robustjax.parallel import data_mesh, put_global, replicated, split_rows
from robustjax.threats import linf
from robustjax.training.dispatch import Dispatcher
from robustjax.training.optimizers import sgd
from robustjax.training.state import create_state, placement, sharing
from robustjax.training.step import make_train_step
from tests.parallel.hlo import collectives

ROWS, SHAPE = 16, (8, 8, 1)


class Net(nn.Module):
    """Two convolutions with BatchNorm in `groups` groups, and a dense layer."""

    groups: int
    width: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        for stride in (1, 2):
            x = Conv(self.width, stride=stride, padding=1)(x)
            x = BatchNorm(batch_groups=self.groups)(x, train=train)
            x = nn.relu(x)
        return Dense(10)(x.reshape(x.shape[0], -1))


def program(fn, mesh, whole, rows):
    """The optimised text of `fn(whole, rows)`, rows divided over the mesh."""
    arguments = put_global(whole, replicated(mesh)), put_global(rows, split_rows(mesh))
    jitted = jax.jit(fn)
    return jitted.lower(*arguments).compile().as_text()


@functools.cache
def weights(groups, width=4):
    model = from_linen(Net(groups, width))
    x = jnp.zeros((ROWS, *SHAPE))
    return model, jax.jit(model.init)(jax.random.key(0), x)


def transfer(key, problem):
    """MI-FGSM under DI and TI."""
    changed = translation_invariant(input_diversity(problem, smallest=0.7))
    return rj.momentum(2)(key, changed)


ATTACKS = {
    "fgsm": rj.fgsm(),
    "pgd, restarts": rj.pgd(2, num_restarts=2),
    "pgd, targets": rj.multi_target(rj.pgd(2), 3),
    "momentum": rj.momentum(2),
    "apgd": apgd(5),
}
PROGRAMS = {
    "Linf": {**ATTACKS, "square": square(3), "DI, TI": transfer},
    "L2": {**ATTACKS, "fab": fab(2)},
    "L1": {"pgd, restarts": ATTACKS["pgd, restarts"], "apgd": ATTACKS["apgd"]},
    "L0": {"pgd, restarts": ATTACKS["pgd, restarts"], "noise": rj.noise("sign", 2)},
}


@pytest.mark.parametrize(
    "norm",
    ["Linf", "L1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("L2", "L0"))],
)
def test_attacks_never_talk(norm):
    """BatchNorm in batch mode, a group for each device; all attacks in one program."""
    mesh = data_mesh()
    model, state = weights(mesh.size)

    def attack(whole, rows):
        f, threat = logits_fn(model, *whole[0], train=True), whole[1]
        x, y, index = rows
        problem = rj.untargeted(f, x, y, threat, index=index)
        key = jax.random.key(0)
        return {name: a(key, problem) for name, a in PROGRAMS[norm].items()}

    rows = np.zeros((ROWS, *SHAPE), np.float32), np.arange(ROWS) % 10, np.arange(ROWS)
    text = program(attack, mesh, (state, rj.threat(norm, 0.5)), rows)
    assert [c for c in collectives(text)] == []
    assert "num_partitions=4" in text  # it was divided at all


def dispatched(method, model, mesh, shard_params=False, *, shape=SHAPE, steps=1):
    """The program of training steps as `fit` runs it, augmentation included."""
    rng = np.random.default_rng(0)
    data = resident(rng.integers(0, 256, (64, *shape), np.uint8), np.arange(64) % 10)
    tx = sgd(0.1, clip_norm=1.0) if shard_params else sgd(0.1)
    run = Dispatcher(
        make_train_step(sharing(method, mesh) if shard_params else method, tx, 0.9),
        data,
        jax.random.key(1),
        batch_size=ROWS,
        steps_per_dispatch=steps,
        num_steps=10,
        augment=augment.compose(augment.random_crop, augment.random_flip),
        mix=None,
        mesh=mesh,
    )

    def fresh():
        return create_state(
            jax.random.key(0), model, method, tx, run.example(), ema=True
        )

    run.placement = placement(jax.eval_shape(fresh), mesh, shard_params)
    state = jax.jit(fresh)()
    state = put_global(state, run.placement)
    run(state, 0, 1)
    return collectives(run.compiled.as_text())


def sizes(shapes):
    return sorted(int(np.prod(shape)) for shape in shapes)


ATTACK = rj.pgd(2, 0.7, keep=rj.last)


def test_a_step_has_one_all_reduce():
    """Gradients, statistics of groups and metrics together; no data, no weights."""
    mesh = data_mesh()
    model, (params, extra) = weights(mesh.size)
    method = madry(model, linf(0.1), ATTACK, bn_mode="batch")
    (one,) = dispatched(method, model, mesh)
    assert one.kind == "all-reduce" and not one.in_loop
    expected = sizes(leaf.shape for leaf in jax.tree.leaves((params, extra)))
    assert sizes(one.shapes) == sorted([*expected, 1, 1])  # loss and accuracy


class Odd(nn.Module):
    """Channels, kernels, strides and sizes of which nothing divides anything."""

    groups: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        for kernel, stride, width in ((3, 1, 6), (3, 2, 7), (5, 1, 8), (3, 3, 33)):
            x = Conv(width, kernel, stride=stride, padding=kernel // 2)(x)
            x = BatchNorm(batch_groups=self.groups)(x, train=train)
            x = nn.relu(x)
        return Dense(10)(x.reshape(x.shape[0], -1))


def test_gradients_of_kernels_gather_nothing(monkeypatch):
    """Several steps in a loop, kernels' gradients in several parts."""
    monkeypatch.setattr(forms, "CACHED", 2**12)
    mesh, model = data_mesh(), from_linen(Odd(4))
    method = madry(model, linf(0.1), ATTACK, bn_mode="batch")
    found = dispatched(method, model, mesh, shape=(9, 8, 3), steps=10)
    assert [c.kind for c in found] == ["all-reduce"]


def test_global_statistics_bring_their_own():
    """Batch statistics over all devices: small, per channel, where they are taken."""
    mesh = data_mesh()
    model, _ = weights(1)
    method = madry(model, linf(0.1), ATTACK, bn_mode="eval")
    found = dispatched(method, model, mesh)
    assert {c.kind for c in found} == {"all-reduce"}
    # The attack sees running statistics: nothing in its loop.
    assert not [c for c in found if c.in_loop]
    small = [c for c in found if max(sizes(c.shapes)) <= 4]
    assert 4 <= len(small) < len(found) <= 4 * 2 + 1  # two layers, forward, backward
    assert all("BatchNorm" in c.name for c in small)


def test_microbatches_keep_their_rows():
    """One all-reduce per microbatch, in their loop; the cutting of rows is silent."""
    mesh = data_mesh()
    model, (params, _) = weights(mesh.size)
    method = microbatches(madry(model, linf(0.1), ATTACK, bn_mode="batch"), 2)
    (one,) = dispatched(method, model, mesh)
    assert one.kind == "all-reduce" and one.in_loop
    assert len(one.shapes) >= len(jax.tree.leaves(params))


def test_shared_weights_are_gathered_once_and_outside_of_the_attack():
    mesh = data_mesh()
    model, (params, _) = weights(mesh.size, 32)
    method = madry(model, linf(0.1), ATTACK, bn_mode="batch")
    found = dispatched(method, model, mesh, shard_params=True)
    assert not [c for c in found if c.in_loop]
    gathers = [c for c in found if c.kind == "all-gather"]
    divided = [w.size for w in jax.tree.leaves(params) if w.size >= 4096]
    assert len(divided) == 2
    moved = [size for c in gathers for size in sizes(c.shapes)]
    assert sorted(moved) == sorted(divided)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
