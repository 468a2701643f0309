"""The attack contract, its driver and its combinators.

An attack's file holds its own idea: an `init` and a `step`. Best points, restarts,
targets and sequences are kept here, once, for all of them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from robustjax import threats
from robustjax.losses import dlr_targeted
from robustjax.problems import Problem, example_keys, ranked_class
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, PyTree


class Info(NamedTuple):
    """What a person wants to know of the point that a step has just evaluated.

    delta:   `[B, ...]` the perturbation that was evaluated, before the move.
    score:   `[B]`.
    success: `[B]` bool, whether the point wins inside the ball.
    size:    `[B]`, the norm of `delta`.
    logits:  `[B, K]` of the model there. The evaluation ranks examples by their margin;
             without it (None) it ranks by what other attacks found.
    """

    delta: Array
    score: Array
    success: Array
    size: Array
    logits: Array | None = None


class Result(NamedTuple):
    """What an attack returns.

    x_adv:   `[B, ...]`, in the ball and in the box.
    success: `[B]` bool, whether `x_adv` wins.
    size:    `[B]`, the norm of `x_adv - x`.
    score:   `[B]`, the score at `x_adv`.
    """

    x_adv: Array
    success: Array
    size: Array
    score: Array


class Attack(NamedTuple):
    """A kernel: `init(key, problem)` and `step(key, state, problem)`.

    `init` returns a state, `step` the next state and an `Info`. State is what the next
    step needs; `Info` describes the point just evaluated.
    """

    init: Callable[[Key, Problem], PyTree]
    step: Callable[[Key, PyTree, Problem], tuple[PyTree, Info]]


class AttackFn(Protocol):
    """`(key, problem) -> Result`: what drivers and combinators make and take."""

    def __call__(self, key: Key, problem: Problem) -> Result: ...


def check_attack_fn(attack_fn: Any) -> None:
    """Raise TypeError where this is no attack, such as the function that makes one.

    An attack takes `(key, problem)`; in a maker the first argument has a default.

    >>> from robustjax.attacks.pgd import pgd
    >>> check_attack_fn(pgd)
    Traceback (most recent call last):
    ...
    TypeError: the attack is pgd(num_steps, ...), which makes one: call it, pgd().
    """
    if not callable(attack_fn):
        raise TypeError(
            f"the attack is {attack_fn!r}, no function (key, problem): give one such "
            "as robustjax.pgd(10)."
        )
    try:
        signature = inspect.signature(attack_fn)
    except (TypeError, ValueError):  # a callable without a signature
        return
    name = getattr(attack_fn, "__name__", "attack")
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].default is not inspect.Parameter.empty:
        raise TypeError(
            f"the attack is {name}({parameters[0].name}, ...), which makes one: call "
            f"it, {name}()."
        )
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(
            f"the attack is {name}{signature}; an attack takes (key, problem)."
        ) from None


def last(best: Info | Result, new: Info | Result) -> Array:
    """Keep the newest point, `[B]` True.

    >>> import jax.numpy as jnp
    >>> d, no, yes = jnp.zeros((1, 2)), jnp.array([False]), jnp.array([True])
    >>> best = Info(d, jnp.array([2.0]), no, jnp.array([1.0]))
    >>> new = Info(d, jnp.array([1.0]), yes, jnp.array([3.0]))
    >>> last(best, new).tolist()
    [True]
    """
    return jnp.ones_like(new.success)


def worst(best: Info | Result, new: Info | Result) -> Array:
    """Keep the worst point for the model: a success beats none, then the larger score.

    A success once found is never lost.

    >>> import jax.numpy as jnp
    >>> d, no, yes = jnp.zeros((1, 2)), jnp.array([False]), jnp.array([True])
    >>> best = Info(d, jnp.array([2.0]), no, jnp.array([1.0]))
    >>> new = Info(d, jnp.array([1.0]), yes, jnp.array([3.0]))
    >>> worst(best, new).tolist(), worst(new, best).tolist()
    ([True], [False])
    """
    better = (new.success == best.success) & (new.score > best.score)
    return (new.success & ~best.success) | better


def smallest(best: Info | Result, new: Info | Result) -> Array:
    """Keep the smallest success; before the first one, the larger score.

    >>> import jax.numpy as jnp
    >>> d, no, yes = jnp.zeros((1, 2)), jnp.array([False]), jnp.array([True])
    >>> best = Info(d, jnp.array([2.0]), no, jnp.array([1.0]))
    >>> new = Info(d, jnp.array([1.0]), yes, jnp.array([3.0]))
    >>> smallest(best, new).tolist(), smallest(new, best).tolist()
    ([True], [False])
    """
    first = new.success & ~best.success
    smaller = new.success & best.success & (new.size < best.size)
    closer = ~new.success & ~best.success & (new.score > best.score)
    return first | smaller | closer


Keep = Callable[[Any, Any], Array]


def select(take: Array, new: PyTree, old: PyTree) -> PyTree:
    """Row by row: `new` where `take` `[B]`, else `old`, for trees of `[B, ...]`.

    >>> import jax.numpy as jnp
    >>> select(jnp.array([True, False]), jnp.ones((2, 2)), jnp.zeros((2, 2))).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """

    def leaf(a: Array, b: Array) -> Array:
        return jnp.where(take.reshape(take.shape + (1,) * (a.ndim - take.ndim)), a, b)

    return jax.tree.map(leaf, new, old)


def evaluate_point(problem: Problem, delta: Array, key: Key | None) -> Info:
    """Evaluate `x + delta` `[B, ...]`, without a gradient."""
    x_adv = threats.apply(problem.threat, problem.x, delta)
    score, logits = problem.score(x_adv, key)
    return inform(problem, delta, score, logits)


def inform(problem: Problem, delta: Array, score: Array, logits: Array) -> Info:
    """The `Info` of an evaluated point: it wins only inside the ball.

    A NaN score counts as `-inf`. Minimal-norm attacks walk outside of the ball; the
    ball allows a rounding error, `1e-6 max(1, epsilon)`.

    Args:
      problem: what is attacked.
      delta: `[B, ...]` the perturbation that was evaluated.
      score, logits: `[B]` and `[B, K]`, what the problem said of it.
    """
    threat = problem.threat
    size = threats.size(threat, delta)
    inside = size <= threat.epsilon + 1e-6 * jnp.maximum(1, threat.epsilon)
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    return Info(delta, score, problem.success(logits) & inside, size, logits)


def first_delta(problem: Problem, key: Key, random_start: bool) -> Array:
    """Where an attack begins, `[B, ...]`: `problem.start`, a random point, or 0."""
    if problem.start is not None:
        return threats.project(problem.threat, problem.x, problem.start - problem.x)
    if not random_start:
        # A zero that the compiler sees is folded through the first step, for seconds.
        return jax.lax.optimization_barrier(jnp.zeros_like(problem.x))
    keys = example_keys(key, problem.index)
    return threats.random_start(problem.threat, keys, problem.x)


def _nothing_found(problem: Problem) -> Info:
    """What any evaluated point beats."""
    rows = problem.x.shape[:1]
    return Info(
        jnp.zeros_like(problem.x),
        jnp.full(rows, -jnp.inf, problem.x.dtype),
        jnp.zeros(rows, bool),
        jnp.zeros(rows, problem.x.dtype),
    )


def run(attack: Attack, num_steps: int, keep: Keep = worst) -> AttackFn:
    """Drive an attack for `num_steps` steps and keep one point per row.

    The points compared are the `num_steps` evaluated ones and the last move's. The
    step's key is `fold_in(key, t)`, so a longer run begins as the shorter one did, and
    with `keep=worst` more steps lose neither a success nor, without one, score. With
    `keep=last` nothing but the last point is kept, and where only `x_adv` is used
    (training) the compiler drops its evaluation. No gradient flows through the result.

    Args:
      attack: the kernel.
      num_steps: moves; 0 only evaluates the start.
      keep: `last`, `worst` or `smallest`; `(best, new) -> [B]` bool, take the new?

    Raises:
      ValueError: if `num_steps` is negative.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> kernel = rj.gradient_ascent(lambda norm: rj.steepest(norm), False)
    >>> run(kernel, 1)(jax.random.key(0), problem).x_adv
    Array([[0.4, 0.6]], dtype=float32)
    """
    if num_steps < 0:
        raise ValueError(f"num_steps={num_steps}: must be 0 or more.")

    def attack_fn(key: Key, problem: Problem) -> Result:
        key_init, key_steps, key_final = jax.random.split(key, 3)
        state = attack.init(key_init, problem)
        best = _nothing_found(problem)

        def body(carry, t):
            state, best = carry
            state, info = attack.step(jax.random.fold_in(key_steps, t), state, problem)
            if keep is not last:
                info = info._replace(logits=None)  # the driver keeps points only
                best = select(keep(best, info), info, best)
            return (state, best), None

        (state, best), _ = jax.lax.scan(body, (state, best), jnp.arange(num_steps))
        final = evaluate_point(problem, state.delta, key_final)
        if keep is not last:
            final = final._replace(logits=None)
            final = select(keep(best, final), final, best)
        x_adv = threats.apply(problem.threat, problem.x, final.delta)
        result = Result(x_adv, final.success, final.size, final.score)
        return jax.lax.stop_gradient(result)

    return attack_fn


def restarts(attack_fn: AttackFn, n: int, keep: Keep = worst) -> AttackFn:
    """Run an attack `n` times with fresh keys and keep one result per row.

    The runs follow one another in a scan: memory is that of one run, and restart `i`
    is the same whatever `n` is. A problem's `start` is that of the first run; the
    others begin as the attack itself does.

    Raises:
      ValueError: if `n` is below 1.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> restarts(rj.noise(), 20)(jax.random.key(0), problem).success.tolist()
    [True]
    """
    if n < 1:
        raise ValueError(f"n={n}: restarts needs at least one run.")

    def restarted(key: Key, problem: Problem) -> Result:
        best = attack_fn(jax.random.fold_in(key, 0), problem)
        if n == 1:
            return best
        afresh = problem._replace(start=None)

        def body(best, i):
            new = attack_fn(jax.random.fold_in(key, i), afresh)
            return select(keep(best, new), new, best), None

        return jax.lax.scan(body, best, jnp.arange(1, n))[0]

    return restarted


def multi_target(
    attack_fn: AttackFn,
    num_targets: int,
    loss: Callable[[Array, Array, Array], Array] = dlr_targeted,
    keep: Keep = worst,
) -> AttackFn:
    """Attack the `num_targets` best other classes of the clean point, one by one.

    Each run raises `loss(logits, y, target)`; success stays the problem's own (the
    prediction differs from `y`). Where there are fewer other classes than targets,
    each is attacked once. Under `eot` the loss sees the mean logits.
    Reference: Gowal et al., arXiv 1910.09338; Croce and Hein, arXiv 2003.01690.

    Raises:
      ValueError: if the problem has no `y`, or `num_targets` is below 1.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 3), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> multi_target(rj.fgsm(), 2)(jax.random.key(0), problem).success.tolist()
    [True]
    """
    if num_targets < 1:
        raise ValueError(f"num_targets={num_targets}: needs at least one target.")

    def attacked(key: Key, problem: Problem) -> Result:
        y = problem.y
        if y is None:
            raise ValueError(
                "multi_target needs a problem with labels: build it with untargeted()."
            )
        key_clean, key_runs = jax.random.split(key)
        _, logits = problem.score(problem.x, key_clean)
        count = min(num_targets, logits.shape[-1] - 1)

        def one(rank: int | Array, target: Array) -> Result:
            def score(x_adv: Array, key: Key | None) -> tuple[Array, Array]:
                _, logits = problem.score(x_adv, key)
                return loss(logits, y, target), logits

            run_key = jax.random.fold_in(key_runs, rank)
            return attack_fn(run_key, problem._replace(score=score))

        best = one(0, ranked_class(logits, y, 1))
        if count == 1:
            return best
        targets = jnp.stack(
            [ranked_class(logits, y, rank) for rank in range(2, count + 1)]
        )

        def body(best, item):
            new = one(*item)
            return select(keep(best, new), new, best), None

        return jax.lax.scan(body, best, (jnp.arange(1, count), targets))[0]

    return attacked


def sequence(
    *attack_fns: AttackFn, keep: Keep = worst, hand_over: bool = False
) -> AttackFn:
    """Run attacks one after the other and keep one result per row.

    Args:
      attack_fns: at least one.
      keep: which of two results to keep.
      hand_over: start each attack where the kept result of those before it lies
        (`problem.start`), instead of where it would start by itself.

    Raises:
      ValueError: if there is no attack.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> attack_fn = sequence(rj.noise(), rj.fgsm(), hand_over=True)
    >>> attack_fn(jax.random.key(0), problem).success.tolist()
    [True]
    """
    if not attack_fns:
        raise ValueError("sequence() got no attack: pass at least one AttackFn.")

    def attacked(key: Key, problem: Problem) -> Result:
        best = attack_fns[0](jax.random.fold_in(key, 0), problem)
        for i, attack_fn in enumerate(attack_fns[1:], start=1):
            if hand_over:
                problem = problem._replace(start=best.x_adv)
            new = attack_fn(jax.random.fold_in(key, i), problem)
            best = select(keep(best, new), new, best)
        return best

    return attacked


def over_threats(
    attack_fn: AttackFn,
    threat_models: ThreatModel | Sequence[ThreatModel],
    how: str = "map",
) -> AttackFn:
    """Attack one problem under several threat models at once.

    Args:
      attack_fn: any attack.
      threat_models: a sequence of threats, or a stacked one (`threats.stack`).
      how: `"vmap"`, one program for all at once; `"map"`, one program, one threat
        after the other; `"loop"`, a program for each, smaller and specialized.

    Returns:
      An AttackFn whose Result has a leading axis `[N, B, ...]`, one per threat. The
      problem's own threat is not used.

    Raises:
      ValueError: if `how` is none of the three.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> over = over_threats(rj.fgsm(), [rj.linf(0.1), rj.l2(0.1)], how="vmap")
    >>> over(jax.random.key(0), problem).size.round(3)
    Array([[0.1],
           [0.1]], dtype=float32)
    """
    if how not in ("vmap", "map", "loop"):
        raise ValueError(f"how={how!r}: use 'vmap', 'map' or 'loop'.")

    def attacked(key: Key, problem: Problem) -> Result:
        def one(threat: ThreatModel) -> Result:
            return attack_fn(key, problem._replace(threat=threat))

        if how == "loop":
            each = threat_models
            if isinstance(each, ThreatModel):
                each = threats.unstack(each)
            results = [one(threat) for threat in each]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
        together = threat_models
        if not isinstance(together, ThreatModel):
            together = threats.stack(together)
        return jax.vmap(one)(together) if how == "vmap" else jax.lax.map(one, together)

    return attacked
