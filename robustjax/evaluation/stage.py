"""What an evaluation runs: stages, the rows that they run on, and what comes out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses
from robustjax.attacks.base import Attack, AttackFn, Info, evaluate_point
from robustjax.problems import Problem
from robustjax.types import Array, Key, LossFn, PyTree

LOSSES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "cross_entropy": lambda z, y, target: losses.cross_entropy(z, y),
    "margin": lambda z, y, target: losses.margin_loss(z, y),
    "dlr": lambda z, y, target: losses.dlr(z, y),
    "dlr_targeted": losses.dlr_targeted,
    "difference": losses.difference,
}
"""What a stage may raise, `(logits, y, target) -> [B]`."""
SHARED = ("cross_entropy", "margin", "dlr_targeted")
"""Losses of one compiled program of APGD, chosen among by data."""


class Stage(NamedTuple):
    """One attack of a suite.

    name:      what the report calls it.
    make:      `settings -> Attack`, a module-level function (jit knows it by identity).
    settings:  a pytree; its leaves are data.
    num_steps: points evaluated for each row.
    loss:      a name of `LOSSES`.
    forward, backward: passes of one row in one step.
    chunk:     steps between two looks at who has fallen.
    hand_over: the field of the last state that the caller wants back, or None.
    samples:   random draws of the model that each score averages (EOT).
    raw:       the perturbation is judged as it is, not clipped into the box: for
               attacks of others, whose mistakes must be seen.
    losses:    names among which data choose, so that stages which differ in nothing
               else share a program; each takes its time to compile. (): `loss` alone.
    """

    name: str
    make: Callable[[Any], Attack]
    settings: PyTree
    num_steps: int
    loss: str = "cross_entropy"
    forward: int = 1
    backward: int = 1
    chunk: int = 10
    hand_over: str | None = None
    samples: int = 1
    raw: bool = False
    losses: tuple[str, ...] = ()


class OneShotState(NamedTuple):
    """`x_adv`: what the attack returned, to the bit; `delta`: its distance from x."""

    delta: Array
    x_adv: Array


class OneShot(NamedTuple):
    """An `AttackFn` as a kernel of one step, so that the driver drives only kernels."""

    attack_fn: AttackFn
    loss: LossFn | None = None

    def __call__(self, settings: PyTree) -> Attack:
        del settings

        def init(key: Key, problem: Problem) -> OneShotState:
            return OneShotState(jnp.zeros_like(problem.x), problem.x + 0)

        def step(
            key: Key, state: OneShotState, problem: Problem
        ) -> tuple[OneShotState, Info]:
            key_run, key_look = jax.random.split(key)
            result = self.attack_fn(key_run, problem)
            delta = result.x_adv - problem.x
            info = evaluate_point(problem, delta, key_look)
            # What it claims, also outside of the ball: the judge says no, and the
            # report tells. And what wins without being claimed.
            success = result.success | info.success
            x_adv = result.x_adv.astype(problem.x.dtype)
            return OneShotState(delta, x_adv), info._replace(success=success)

        return Attack(init, step)


class Rows(NamedTuple):
    """What an attack reads of each row; leaves lead with B, on host or device."""

    x: Any
    y: Any
    index: Any
    target: Any
    epsilon: Any


class Passes(NamedTuple):
    """Forward and backward passes: counted (a row once), executed (padding too)."""

    forward: int = 0
    backward: int = 0
    executed_forward: int = 0
    executed_backward: int = 0

    def executed(self) -> int:
        """Both ways, padding included."""
        return self.executed_forward + self.executed_backward

    def __add__(self, other: Any) -> "Passes":
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))


class Outcome(NamedTuple):
    """What a stage gave for its rows, in their order, on the host.

    broken:  `[n]` bool, confirmed by the judge.
    x_adv:   `[n, ...]`: where broken that point, elsewhere the one of smallest margin.
    margin:  `[n]` the smallest margin reached (`inf`: none was measured).
    doubted: `[n]` bool: a claim that the judge did not confirm.
    handed:  `[n, ...]` the state's field that `hand_over` names, or an empty array.
    refused: `[n]` bool: a claim that lies outside of ball or box.
    passes:  counted and executed.
    """

    broken: np.ndarray
    x_adv: np.ndarray
    margin: np.ndarray
    doubted: np.ndarray
    handed: np.ndarray
    refused: np.ndarray
    passes: Passes
