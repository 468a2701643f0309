"""APGD: projected gradient ascent that chooses its own step sizes, row by row.

The strongest of the gradient attacks without a parameter to tune, and the first two of
AutoAttack's four. Its L1 form (`sparse`) also chooses how many coordinates to move.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robustjax import threats
from robustjax.attacks.base import (
    Attack,
    AttackFn,
    Info,
    Result,
    evaluate_point,
    first_delta,
    inform,
    multi_target,
    restarts,
    run,
    select,
)
from robustjax.gradients import score_and_grad
from robustjax.losses import dlr_targeted
from robustjax.norms import L1, L2, Norm
from robustjax.problems import Problem, example_keys
from robustjax.types import Array, Key

# Constants of the L1 rule (arXiv 2103.01208 and its code).
_FEWER = 0.95  # as many changed coordinates as before, or less than this part of them?
_SHRINK = 1.5  # what step sizes, and changed coordinates, are divided by
_SMALLEST = 0.1  # the least step size, of the first one


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "window",
        "decrement",
        "smallest_window",
        "rho",
        "first_step",
        "momentum",
        "density",
        "grain",
    ],
    meta_fields=["reference", "sparse", "random_start"],
)
@dataclasses.dataclass(frozen=True)
class Apgd:
    """Settings of APGD; `apgd_settings` makes them. Numbers are data, forms are not.

    Args:
      window: moves before the first checkpoint.
      decrement: by how much each window is shorter than the one before.
      smallest_window: where that ends.
      rho: a window in which at most this part of the moves raised the score halves the
        step size.
      first_step: the first step size, in units of epsilon.
      momentum: the weight of the new move against the last one; 1 is no momentum.
      density: the fraction of coordinates that an L1 move changes; with `sparse` the
        first such fraction.
      grain: gradients are rounded to multiples of `grain` times their root mean square,
        0: not at all, 1 at most. Of use under L2; not with `reference`.
      reference: keep what parity with the authors' code needs.
      sparse: the L1 rule.
      random_start: begin at a random point, False: at x.
    """

    window: Any
    decrement: Any
    smallest_window: Any
    rho: Any
    first_step: Any
    momentum: Any
    density: Any
    grain: Any = 0.0
    reference: bool = True
    sparse: bool = False
    random_start: bool = True


class ApgdState(NamedTuple):
    """Where APGD stands; every leaf `[B, ...]`.

    delta:      the next point to evaluate; `previous`, where the last move began.
    best:       the point of the highest score so far, with `best_score`, `best_grad`.
    last_score: of the point evaluated last.
    moves:      points evaluated so far.
    step_size:  in units of epsilon.
    density:    fraction of coordinates that an L1 move changes.
    since, window: moves since the last checkpoint, and how many make it full.
    increases:  how many of them raised the score.
    halved, best_at_check, changed: of the last checkpoint: was the step size halved,
        the best score, how many coordinates of the best point were changed.
    """

    delta: Array
    previous: Array
    best: Array
    best_grad: Array
    best_score: Array
    last_score: Array
    moves: Array
    step_size: Array
    density: Array
    since: Array
    window: Array
    increases: Array
    halved: Array
    best_at_check: Array
    changed: Array


def apgd_settings(
    num_steps: int = 100,
    norm: Norm | None = None,
    rho: float = 0.75,
    first_step: float | None = None,
    momentum: float = 0.75,
    reference: bool = True,
    grain: float = 0.0,
    density: float = 0.2,
    random_start: bool = True,
) -> Apgd:
    """The schedule for `num_steps` moves.

    Windows: the first has `max(int(.22 N), 1)` moves, each next one
    `max(int(.03 N), 1)` fewer, down to `max(int(.06 N), 1)`. Under L1 all have
    `max(int(.04 N), 1)`.

    Args:
      num_steps: N, the moves that the schedule is made for.
      norm: `L1()` takes the sparse rule; None, and any other norm, the usual one.
      rho: see `Apgd`.
      first_step: in units of epsilon; None means 2, under L1 1.
      momentum: see `Apgd`; the sparse rule has none.
      reference: keep what parity with the authors' code needs, see `kernel`.
      grain: see `Apgd`.
      density: the fraction of coordinates that the first moves of the sparse rule
        change; other rules have none.
      random_start: see `Apgd`.

    Raises:
      ValueError: for fewer than one step, or a number out of its range.

    >>> settings = apgd_settings(100)
    >>> settings.window, settings.decrement, settings.smallest_window
    (22, 3, 6)
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: APGD needs at least one step.")
    sparse = isinstance(norm, L1)
    if first_step is None:
        first_step = 1.0 if sparse else 2.0
    if not first_step > 0:
        raise ValueError(
            f"first_step={first_step}: must be above 0; it is in units of epsilon."
        )
    for name, value in (("rho", rho), ("momentum", momentum)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie in [0, 1]; 0.75 is usual.")
    if not 0 <= grain <= 1:  # above 1 all entries could become 0
        raise ValueError(f"grain={grain}: must lie in [0, 1]; 0 does not round.")
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: must lie in (0, 1]; 0.2 is usual.")
    if grain and reference:
        raise ValueError(f"grain={grain} needs reference=False: theirs does not round.")
    first, last, decrement = 0.22, 0.06, max(int(0.03 * num_steps), 1)
    if sparse:
        first, last, decrement = 0.04, 0.04, 0
    return Apgd(
        window=max(int(first * num_steps), 1),
        decrement=decrement,
        smallest_window=max(int(last * num_steps), 1),
        rho=float(rho),
        first_step=float(first_step),
        momentum=float(momentum),
        # Where the norm is data (AnyOf) L1 moves as many coordinates as PGD does.
        density=float(density) if sparse else 0.005,
        grain=float(grain),
        reference=reference,
        sparse=sparse,
        random_start=random_start,
    )


def kernel(settings: Apgd) -> Attack:
    """APGD as `init` and `step`; each row has its own counters and step size.

    `z = project(delta + step_size * epsilon * steepest(grad))`,
    `delta <- project(delta + a (z - delta) + (1 - a) (delta - previous))`, a = 1 at
    the first move. At a checkpoint the step size is halved, and the row goes on from
    its best point with the gradient found there, where at most `rho * window` moves
    raised the score, or where the best score did not rise in the window and the step
    size was not halved before it. The start: `problem.start`, or random, or x.

    The sparse rule (L1) has no momentum and moves the top `density` fraction of
    coordinates. At a checkpoint the number of changed coordinates of the best point is
    compared with that of the last one: below 95 % of it the step size is epsilon again
    and the row goes on from its best point; else the step size is divided by 1.5, down
    to epsilon / 10. `density` is that number, as a fraction, over 1.5.

    With `reference`: the first window compares its first score with 0 instead of the
    start's; L2 projects on the ball, then on the box; the start lies on the surface of
    the ball (Linf: noise divided by its largest entry). Without: neither, the start is
    uniform in the ball (L1: normal noise projected, in both), and the gradient leaves
    out coordinates that would leave the box.

    Reference: Croce and Hein, arXiv 2003.01690; for L1, arXiv 2103.01208; their
    repository fra31/auto-attack.
    Differs from the authors' code: any norm. L0, and a norm that is data (AnyOf),
    follow the rule of Linf and L2 with `norm.sparse_steepest` and the exact projection.
    At ties the sparse rule moves the first coordinates, not all. A NaN score is the
    worst one, and what is not finite in a gradient is 0.

    Raises:
      ValueError: sparse settings under another norm than L1.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> attack = kernel(apgd_settings(10))
    >>> state = attack.init(jax.random.key(0), problem)
    >>> state, info = attack.step(jax.random.key(1), state, problem)
    >>> state.delta
    Array([[-0.1,  0.1]], dtype=float32)
    """

    def init(key: Key, problem: Problem) -> ApgdState:
        _check_norm(settings, problem.threat.norm)
        x = problem.x
        rows, features = x.shape[:1], x[0].size
        delta = _start(settings, key, problem)
        real = functools.partial(jnp.full, rows, dtype=x.dtype)
        whole = functools.partial(jnp.full, rows, dtype=jnp.int32)
        changed, density = real(features), real(settings.density)
        if settings.sparse and problem.start is not None:
            changed = _changed(problem, delta)
            density = changed / (features * _SHRINK)
        return ApgdState(
            delta,
            previous=delta,
            best=delta,
            best_grad=jnp.zeros_like(x),
            best_score=real(-jnp.inf),
            last_score=real(-jnp.inf),
            moves=whole(0),
            step_size=real(settings.first_step),
            density=density,
            since=whole(0),
            window=whole(settings.window),
            increases=whole(0),
            halved=jnp.ones(rows, bool),  # so the first checkpoint cannot be the second
            best_at_check=real(-jnp.inf),
            changed=changed,
        )

    def step(key: Key, state: ApgdState, problem: Problem) -> tuple[ApgdState, Info]:
        x_adv = threats.apply(problem.threat, problem.x, state.delta)
        score, logits, grad = score_and_grad(problem, x_adv, key)
        score = score.astype(problem.x.dtype)
        info = inform(problem, state.delta, score, logits)
        state = _count(settings, state, score, grad)
        check = state.since == state.window
        rule = _check_sparse if settings.sparse else _check
        again, changes = rule(settings, state, problem)
        shorter = jnp.maximum(
            state.window - settings.decrement, settings.smallest_window
        )
        checked = state._replace(
            since=jnp.zeros_like(state.since),
            increases=jnp.zeros_like(state.increases),
            window=shorter.astype(jnp.int32),
            best_at_check=state.best_score,
            **changes,
        )
        state = select(check, checked, state)
        # Momentum looks back to where the last move began, after such a return.
        old, new = (state.delta, grad), (state.best, state.best_grad)
        delta, grad = select(check & again, new, old)
        moved = _move(settings, state, problem, delta, grad)
        moves = state.moves + 1
        return state._replace(delta=moved, previous=delta, moves=moves), info

    return Attack(init, step)


def apgd(
    num_steps: int = 100,
    *,
    num_restarts: int = 1,
    rho: float = 0.75,
    reference: bool = True,
    large_epsilon_phases: bool = True,
) -> AttackFn:
    """Auto-PGD on the problem's own loss: see `kernel` for the rule.

    `num_steps` moves, so `num_steps + 1` points, per restart. Under L1 the attack has
    three phases with 3, 2 and 1 times epsilon (`phases`), each from the best point of
    the one before, projected; what is found before the last one does not count.
    Reference: Croce and Hein, arXiv 2003.01690 and 2103.01208.
    Differs from the authors' code: of several successes the one with the highest score
    is returned, there the latest; every restart attacks all rows.

    Args:
      num_steps: moves per restart, all phases together.
      num_restarts: random restarts, the worst for the model is kept.
      rho: see `Apgd`.
      reference: see `kernel`.
      large_epsilon_phases: only of use under L1, from 3 steps on.

    Raises:
      ValueError: for fewer than one step or restart, or `rho` outside [0, 1].

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> apgd(10)(jax.random.key(0), problem).x_adv
    Array([[0.4, 0.6]], dtype=float32)
    """
    apgd_settings(num_steps, rho=rho)  # bad numbers raise here, not in the trace

    def settings(count: int, norm: Norm) -> Apgd:
        return apgd_settings(count, norm, rho, reference=reference)

    def one(key: Key, problem: Problem) -> Result:
        threat = problem.threat
        phased = large_epsilon_phases and num_steps >= 3
        if not (phased and isinstance(threat.norm, L1)):
            attack = kernel(settings(num_steps, threat.norm))
            return run(attack, num_steps)(key, problem)
        *wide, (_, count) = phases(num_steps)
        for_wide = wide[0][1]  # the same for both: one program, run twice
        start = problem.start
        if start is None:
            start = problem.x + _normal(jax.random.fold_in(key, 3), problem)

        def body(start: Array, phase: tuple[Array, Array]) -> tuple[Array, None]:
            number, multiple = phase
            epsilon = threat.epsilon * multiple
            wider = problem._replace(
                threat=dataclasses.replace(threat, epsilon=epsilon), start=start
            )
            attack = kernel(settings(for_wide, threat.norm))
            phase_key = jax.random.fold_in(key, number)
            return run(attack, for_wide, _highest)(phase_key, wider).x_adv, None

        multiples = jnp.asarray([multiple for multiple, _ in wide], jnp.float32)
        start, _ = jax.lax.scan(body, start, (jnp.arange(len(wide)), multiples))
        attack = kernel(settings(count, threat.norm))
        final = problem._replace(start=start)
        return run(attack, count)(jax.random.fold_in(key, 2), final)

    return restarts(one, num_restarts)


def apgd_training(num_steps: int = 10) -> AttackFn:
    """APGD as the inner attack of E-AT and RAMP: what to learn from, not a verdict.

    It starts at x, under L1 in one phase whose first moves change 5 % of the
    coordinates, and returns the point of the highest score, success or not. `success`
    says whether any point on the way fooled the model, so it can be True where `x_adv`
    does not: E-AT counts robust accuracy so.
    Reference: Croce and Hein, arXiv 2105.12508 (`apgd_train` of their repository
    fra31/robust-finetuning).

    Args:
      num_steps: moves.

    Raises:
      ValueError: for fewer than one step.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> apgd_training(10)(jax.random.key(0), problem).x_adv
    Array([[0.4, 0.6]], dtype=float32)
    """
    apgd_settings(num_steps)  # bad numbers raise here, not in the trace

    def attack_fn(key: Key, problem: Problem) -> Result:
        settings = apgd_settings(
            num_steps, problem.threat.norm, density=0.05, random_start=False
        )
        attack = kernel(settings)
        key_init, key_steps, key_final = jax.random.split(key, 3)

        def body(carry: tuple[ApgdState, Array], t: Array) -> tuple[Any, None]:
            state, fooled = carry
            step_key = jax.random.fold_in(key_steps, t)
            state, info = attack.step(step_key, state, problem)
            return (state, fooled | info.success), None

        begun = attack.init(key_init, problem), jnp.zeros(problem.x.shape[:1], bool)
        (state, fooled), _ = jax.lax.scan(body, begun, jnp.arange(num_steps))
        final = evaluate_point(problem, state.delta, key_final)
        score = jnp.maximum(final.score, state.best_score)
        delta = select(final.score > state.best_score, final.delta, state.best)
        x_adv = threats.apply(problem.threat, problem.x, delta)
        size = threats.size(problem.threat, delta)
        result = Result(x_adv, fooled | final.success, size, score)
        return jax.lax.stop_gradient(result)

    return attack_fn


def apgd_targeted(
    num_steps: int = 100,
    num_targets: int = 9,
    *,
    num_restarts: int = 1,
    rho: float = 0.75,
    reference: bool = True,
    large_epsilon_phases: bool = True,
) -> AttackFn:
    """APGD on the targeted DLR loss, for the best other classes of the clean point.

    AutoAttack's second attack: 9 targets, under L1 5. See `apgd` and `multi_target`.
    Reference: Croce and Hein, arXiv 2003.01690.
    Differs from the authors' code: every target attacks all rows; where the clean
    prediction is wrong the targets are still classes other than `y`.

    Args:
      num_targets: targets; where there are fewer other classes, each is attacked once.
      num_steps, num_restarts, rho, reference, large_epsilon_phases: see `apgd`, for
        each target.

    Raises:
      ValueError: as `apgd`, for fewer than one target, or without labels.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 3), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> attack_fn = apgd_targeted(10, 1)
    >>> jax.jit(lambda key: attack_fn(key, problem).success)(jax.random.key(0)).tolist()
    [True]
    """
    one = apgd(
        num_steps,
        num_restarts=num_restarts,
        rho=rho,
        reference=reference,
        large_epsilon_phases=large_epsilon_phases,
    )
    return multi_target(one, num_targets, dlr_targeted)


def phases(num_steps: int) -> list[tuple[float, int]]:
    """L1's phases, `(multiple of epsilon, moves)`: `ceil(.3 N)` twice, then the rest.

    Fewer than 3 steps make one phase.

    >>> phases(100)
    [(3.0, 30), (2.0, 30), (1.0, 40)]
    """
    wide = math.ceil(0.3 * num_steps)
    if num_steps < 3:
        return [(1.0, num_steps)]
    return [(3.0, wide), (2.0, wide), (1.0, num_steps - 2 * wide)]


def _highest(best: Info | Result, new: Info | Result) -> Array:
    """Keep the higher score, success or not: where the next phase begins."""
    return new.score > best.score


def _check_norm(settings: Apgd, norm: Norm) -> None:
    if settings.sparse and not isinstance(norm, L1):
        raise ValueError(
            f"these settings are for L1 (sparse=True), the problem's norm is {norm}: "
            "make them with apgd_settings(num_steps, norm=problem.threat.norm)."
        )


def _normal(key: Key, problem: Problem) -> Array:
    """Standard normal noise, `[B, ...]`, each row from its example's key."""
    x = problem.x
    keys = example_keys(key, problem.index)
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def _start(settings: Apgd, key: Key, problem: Problem) -> Array:
    threat, x = problem.threat, problem.x
    given = problem.start is not None or not settings.random_start
    if given or not (settings.sparse or settings.reference):
        return first_delta(problem, key, settings.random_start)
    if settings.sparse:
        return threats.project(threat, x, _normal(key, problem))
    draw = threats.sample(threat, example_keys(key, problem.index), x)
    surface = threats.rescale(threat, draw)
    # An infinite ball has no surface: there a point around the box.
    return _project(settings, problem, jnp.where(jnp.isfinite(surface), surface, draw))


def _project(settings: Apgd, problem: Problem, delta: Array) -> Array:
    sequential = settings.reference and isinstance(problem.threat.norm, L2)
    project = threats.project_sequential if sequential else threats.project
    return project(problem.threat, problem.x, delta)


def _changed(problem: Problem, delta: Array) -> Array:
    """How many coordinates the model sees changed, `[B]`."""
    x_adv = threats.apply(problem.threat, problem.x, delta)
    differs = (x_adv != problem.x).reshape(delta.shape[0], -1)
    return jnp.sum(differs, axis=-1).astype(delta.dtype)


def _count(settings: Apgd, state: ApgdState, score: Array, grad: Array) -> ApgdState:
    """Record the point just evaluated; the start is counted as no move."""
    start = state.moves == 0
    better = start | (score > state.best_score)
    new = (state.delta, grad, score)
    old = (state.best, state.best_grad, state.best_score)
    best, best_grad, best_score = select(better, new, old)
    rises = (~start & (score > state.last_score)).astype(jnp.int32)
    # The authors' table of scores still holds zeros where the first move looks back.
    first = jnp.zeros_like(score) if settings.reference else score
    return state._replace(
        best=best,
        best_grad=best_grad,
        best_score=best_score,
        last_score=jnp.where(start, first, score),
        since=state.since + ~start,
        increases=state.increases + rises,
    )


def _check(
    settings: Apgd, state: ApgdState, problem: Problem
) -> tuple[Array, dict[str, Array]]:
    """Which rows halve their step size at a checkpoint, and what it changes."""
    del problem
    few = state.increases <= settings.rho * state.window
    no_gain = ~state.halved & (state.best_at_check >= state.best_score)
    again = few | no_gain
    step_size = jnp.where(again, 0.5 * state.step_size, state.step_size)
    return again, {"step_size": step_size, "halved": again}


def _check_sparse(
    settings: Apgd, state: ApgdState, problem: Problem
) -> tuple[Array, dict[str, Array]]:
    """The L1 rule: steps are long again while the best point becomes sparser."""
    changed = _changed(problem, state.best)
    again = changed < _FEWER * state.changed
    longest = settings.first_step
    shorter = jnp.maximum(state.step_size / _SHRINK, _SMALLEST * longest)
    step_size = jnp.where(again, longest, shorter).astype(state.step_size.dtype)
    density = changed / (problem.x[0].size * _SHRINK)
    return again, {"step_size": step_size, "density": density, "changed": changed}


def _move(
    settings: Apgd, state: ApgdState, problem: Problem, delta: Array, grad: Array
) -> Array:
    """The next point, `[B, ...]`, from `delta` with the gradient there."""
    threat, x = problem.threat, problem.x
    if not settings.reference:
        x_adv = threats.apply(threat, x, delta)
        grad = threats.free_gradient(threat, x_adv, grad)
        grad = jax.vmap(_coarse, (0, None))(grad, settings.grain)

    def stretch(weight: Array, value: Array) -> Array:
        return jax.vmap(jnp.multiply)(weight, value)

    density = state.density
    if settings.sparse and settings.reference:  # rounded up, so never below 2 of 2
        features = x[0].size
        density = (features - jnp.floor((1 - density) * features)) / features
    direction = jax.vmap(threat.norm.sparse_steepest)(grad, density)
    step = threats.scale(threat, stretch(state.step_size, direction))
    # An infinite budget makes infinite steps: as far as numbers go is far enough.
    ahead = _project(settings, problem, delta + jnp.nan_to_num(step))
    if settings.sparse:
        return ahead
    a = jnp.where(state.moves == 0, 1.0, settings.momentum).astype(delta.dtype)
    pulled = stretch(a, ahead - delta) + stretch(1 - a, delta - state.previous)
    return _project(settings, problem, delta + pulled)


def _coarse(grad: Array, grain: Array) -> Array:
    """One gradient, `[...]`, in multiples of `grain` times its root mean square.

    The last bits of a gradient depend on the order of sums and on the scale of the
    logits. In a net of ReLUs they decide sooner or later on which side of a kink a
    point lies, and two runs part. Rounded, nearly all steps are equal bit for bit; the
    direction loses little (for normal entries and `grain` 1 the cosine is 0.96).
    """
    unit = grain * jnp.sqrt(jnp.mean(grad**2))
    fits = (unit > 0) & jnp.isfinite(unit)  # else the squares under- or overflowed
    return jnp.where(fits, jnp.round(grad / jnp.where(fits, unit, 1)), grad)
