"""`attack_step`: evaluate, take the gradient, move along it, project.

The kernel of the gradient family. What turns a gradient into a move is an optax
transformation, so momentum, schedules and Adam come from optax.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from robustjax import threats
from robustjax.attacks.base import Attack, Info, first_delta, inform
from robustjax.gradients import score_and_grad
from robustjax.norms import Norm
from robustjax.problems import Problem
from robustjax.types import Array, Key, PyTree


class GradientState(NamedTuple):
    """Where a gradient attack stands: `delta` `[B, ...]`, the optimizer's state."""

    delta: Array
    opt_state: PyTree


def steepest(norm: Norm) -> optax.GradientTransformation:
    """The direction of steepest ascent in the unit ball of `norm`, per row.

    `argmax <g, d>` over `||d|| <= 1`: sign for Linf, `g / ||g||_2` for L2, one
    coordinate for L1 and L0.

    >>> import jax.numpy as jnp
    >>> from robustjax.norms import Linf
    >>> grad = jnp.array([[-2.0, 0.5]])
    >>> steepest(Linf()).update(grad, optax.EmptyState())[0].tolist()
    [[-1.0, 1.0]]
    """
    return _rowwise(norm.steepest)


def sparse_steepest(norm: Norm, density: float = 0.005) -> optax.GradientTransformation:
    """As `steepest`, but L1 moves the top `density` fraction of coordinates, L0 all.

    One coordinate per step needs as many steps as there are coordinates to change,
    so practical L1 attacks spread the move (Tramer and Boneh, arXiv 1904.13000).
    Under L0 the projection chooses among them. Linf and L2 are not changed.

    >>> import jax.numpy as jnp
    >>> from robustjax.norms import L1
    >>> move = sparse_steepest(L1(), density=0.5)
    >>> move.update(jnp.array([[3.0, -2.0, 1.0, 0.0]]), optax.EmptyState())[0].tolist()
    [[0.5, -0.5, 0.0, 0.0]]
    """
    return _rowwise(lambda grad: norm.sparse_steepest(grad, density))


def normalize_l1() -> optax.GradientTransformation:
    """Divide each row's gradient by its L1 norm (a zero gradient stays 0).

    What MI-FGSM does before it adds momentum.

    >>> import jax.numpy as jnp
    >>> normalize_l1().update(jnp.array([[3.0, 1.0]]), optax.EmptyState())[0].tolist()
    [[0.75, 0.25]]
    """

    def one(grad: Array) -> Array:
        # Scaled by its largest entry first: the sum of tiny gradients must not vanish.
        largest = jnp.max(jnp.abs(grad))
        scaled = grad / jnp.where(largest > 0, largest, 1.0)
        return scaled / jnp.maximum(jnp.sum(jnp.abs(scaled)), 1.0)

    return _rowwise(one)


def first_scale() -> optax.GradientTransformation:
    """Divide each row's gradients by the largest entry of its first non-zero one.

    Adam squares, and adds 1e-8 to what it divides by: gradients far below or above 1
    would stall it. The divisor stays, so Adam's averages keep their meaning.

    >>> import jax.numpy as jnp
    >>> move = first_scale()
    >>> state = move.init(jnp.zeros((1, 2)))
    >>> update, state = move.update(jnp.array([[4.0, -2.0]]), state)
    >>> update.tolist(), move.update(jnp.array([[8.0, 0.0]]), state)[0].tolist()
    ([[1.0, -0.5]], [[2.0, 0.0]])
    """

    def init(params):
        return jax.vmap(lambda row: jnp.zeros((), row.dtype))(params)

    def update(updates, state, params=None):
        del params
        largest = jax.vmap(lambda row: jnp.max(jnp.abs(row)))(updates)
        state = jnp.where(state > 0, state, largest)
        divisor = jnp.where(state > 0, state, 1)
        return jax.vmap(jnp.divide)(updates, divisor), state

    return optax.GradientTransformation(init, update)


def _rowwise(move: Callable[[Array], Array]) -> optax.GradientTransformation:
    """A rule for the gradient of one example as a transformation of `[B, ...]`."""
    return optax.stateless(lambda grads, _: jax.vmap(move)(jnp.asarray(grads)))


def attack_step(
    key: Key,
    state: GradientState,
    problem: Problem,
    direction: optax.GradientTransformation,
) -> tuple[GradientState, Info]:
    """One step of gradient ascent on the score, inside ball and box.

    `delta <- project(x, delta + epsilon * direction(grad))`, where the gradient leaves
    out the coordinates on a face of the box that it would push through that face.

    Args:
      key: for models that are random; consumed.
      state: where the attack stands.
      problem: what to maximize.
      direction: turns gradients `[B, ...]` into moves in units of epsilon. Build it
        inside the trace from the norm, e.g.
        `optax.chain(steepest(threat.norm), optax.scale(0.1))`.

    Returns:
      The next state, and `Info` on the point that was evaluated (before the move).

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x @ jnp.eye(2), x, y, rj.linf(0.1))
    >>> direction = optax.chain(steepest(problem.threat.norm), optax.scale(1.0))
    >>> state = GradientState(jnp.zeros_like(x), direction.init(x))
    >>> state, info = attack_step(jax.random.key(0), state, problem, direction)
    >>> state.delta, info.size.tolist()
    (Array([[-0.1,  0.1]], dtype=float32), [0.0])
    """
    threat = problem.threat
    x_adv = threats.apply(threat, problem.x, state.delta)
    score, logits, grad = score_and_grad(problem, x_adv, key)
    grad = threats.free_gradient(threat, x_adv, grad)
    updates, opt_state = direction.update(grad, state.opt_state, state.delta)
    move = threats.scale(threat, jnp.asarray(updates))
    delta = threats.project(threat, problem.x, state.delta + move)
    info = inform(problem, state.delta, score, logits)
    return GradientState(delta, opt_state), info


def gradient_ascent(
    direction: Callable[[Norm], optax.GradientTransformation],
    random_start: bool = True,
) -> Attack:
    """`attack_step` as a kernel for `run`.

    Args:
      direction: `norm -> optax transformation`, called inside the trace.
      random_start: begin uniformly in the ball (projected on the box), else at `x`.
        A problem's own `start` comes before either.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> kernel = gradient_ascent(lambda n: optax.chain(steepest(n), optax.scale(0.5)))
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> rj.run(kernel, 4)(jax.random.key(0), problem).success.tolist()
    [True]
    """

    def init(key: Key, problem: Problem) -> GradientState:
        delta = first_delta(problem, key, random_start)
        return GradientState(delta, direction(problem.threat.norm).init(delta))

    def step(
        key: Key, state: GradientState, problem: Problem
    ) -> tuple[GradientState, Info]:
        return attack_step(key, state, problem, direction(problem.threat.norm))

    return Attack(init, step)
