"""What to watch during a training, as functions for `fit`'s `validate`, and a wrapper.

Each is `(params, extra) -> {name: number}` and remembers nothing, so a resumed run sees
what an unbroken one sees. `together` joins them. `fit` itself stops at values that are
not finite, and names the first offender; `with_norms` adds norms to its training rows.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import threats
from robustjax.attacks.base import AttackFn, check_attack_fn, last
from robustjax.attacks.pgd import pgd
from robustjax.gradients import score_and_grad
from robustjax.losses import cross_entropy
from robustjax.methods.base import Method
from robustjax.methods.gradalign import cosine
from robustjax.metrics import Mean
from robustjax.models.base import Model, logits_fn, require_model
from robustjax.models.compiling import convolution_options, quick_options
from robustjax.problems import Problem, example_keys, predictions, untargeted
from robustjax.threats import ThreatModel
from robustjax.types import Array, PyTree

Monitor = Callable[[PyTree, PyTree], Mapping[str, float]]
Examples = tuple[Any, Any]
"""`(x [N, ...] floats in the model's box, y [N])`."""


class CatastrophicOverfitting(RuntimeError):
    """A single-step method has learned to fool its attack; PGD breaks the model."""


def together(*monitors: Monitor) -> Monitor:
    """All numbers of several monitors.

    Raises:
      ValueError: when called, where two monitors use one name.

    >>> both = together(lambda p, e: {"a": 1.0}, lambda p, e: {"b": 2.0})
    >>> both({}, {})
    {'a': 1.0, 'b': 2.0}
    """

    def monitor(params: PyTree, extra: PyTree) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in monitors:
            for name, number in one(params, extra).items():
                if name in found:
                    raise ValueError(f"two monitors return {name!r}; rename one.")
                found[name] = number
        return found

    return monitor


def accuracies(
    model: Model,
    threat: ThreatModel,
    examples: Examples,
    attack_fn: AttackFn | None = None,
    *,
    prefix: str = "",
    batch_size: int = 128,
) -> Monitor:
    """`clean_accuracy` and `robust_accuracy` on some examples, BatchNorm in mode eval.

    Robust: correct, clean and at the point that the attack returns. The attack's noise
    is the same every time.

    Args:
      model, threat: what is trained, against what.
      examples: `(x, y)`, a few hundred.
      attack_fn: None: ten steps of PGD.
      prefix: before both names, such as "train_".
      batch_size: rows at once.
    """
    attack_fn = pgd(10) if attack_fn is None else attack_fn
    check_attack_fn(attack_fn)

    def rows(problem: Problem, clean: Array, y: Array) -> dict[str, Array]:
        x_adv = attack_fn(jax.random.key(0), problem).x_adv
        _, logits = problem.score(x_adv, None)
        right = predictions(clean) == y
        return {
            "clean_accuracy": right,
            "robust_accuracy": right & (predictions(logits) == y),
        }

    return _over_rows(model, threat, examples, rows, prefix, batch_size)


def overfitting(
    model: Model,
    threat: ThreatModel,
    train: Examples,
    held_out: Examples,
    attack_fn: AttackFn | None = None,
    *,
    batch_size: int = 128,
) -> Monitor:
    """`accuracies` on both, and `robust_gap`: training minus held-out robust accuracy.

    Robust overfitting shows as a gap that grows while the held-out accuracy falls
    (Rice et al. 2020, arXiv:2002.11569).
    """
    options: Any = {"attack_fn": attack_fn, "batch_size": batch_size}
    both = together(
        accuracies(model, threat, held_out, **options),
        accuracies(model, threat, train, prefix="train_", **options),
    )

    def monitor(params: PyTree, extra: PyTree) -> dict[str, float]:
        found = dict(both(params, extra))
        gap = found["train_robust_accuracy"] - found["robust_accuracy"]
        return {**found, "robust_gap": gap}

    return monitor


def catastrophic_overfitting(
    model: Model,
    threat: ThreatModel,
    train: Examples,
    action: Literal["warn", "stop", "restore"] = "warn",
    *,
    gap: float = 0.2,
    attack_fn: AttackFn | None = None,
    batch_size: int = 128,
) -> Monitor:
    """Whether FGSM's accuracy on training points exceeds PGD's by more than `gap`.

    A single-step method that overfits catastrophically resists FGSM and not PGD: the
    two accuracies part within an epoch (Wong et al. 2020, arXiv:2001.03994). FGSM's
    counts points that clean are wrong: above the clean accuracy, its perturbation tells
    the label (label leaking, Kurakin et al. 2016, arXiv:1611.01236).

    Both attacks are made with BatchNorm in mode eval and, where the model keeps running
    statistics, in mode batch too, as most single-step methods attack: a net may resist
    FGSM only there, and be broken by it in mode eval.

    Args:
      model, threat: what is trained, against what.
      train: `(x, y)`, a few hundred of the *training* examples.
      action: "warn"; "stop": raise `CatastrophicOverfitting` (the checkpoint before is
        kept); "restore": end the run, whose result is the best checkpoint so far.
      gap: of the accuracies.
      attack_fn: the stronger attack; None: ten steps of PGD.
      batch_size: rows at once; in mode batch exactly so many (some repeat), a multiple
        of the net's `batch_groups`.

    Returns:
      A monitor with `train_fgsm_accuracy`, `train_pgd_accuracy`, the same in mode batch
      as `bn_batch_fgsm_accuracy` and `bn_batch_pgd_accuracy` (where there are running
      statistics), `collapsed` (0 or 1) and, under "restore", `stop`, which `fit` obeys.

    Raises:
      ValueError: action is none of the three.
    """
    if action not in ("warn", "stop", "restore"):
        raise ValueError(f'action is {action!r}; give "warn", "stop" or "restore".')
    strong = pgd(10) if attack_fn is None else attack_fn
    check_attack_fn(strong)
    # As in training: where the step leads, even if that is no worse than x.
    step = pgd(1, 1.0, random_start=False, keep=last)

    def rows(problem: Problem, clean: Array, y: Array) -> dict[str, Array]:
        key = jax.random.key(0)  # of the attacks, and of dropout in mode batch

        def right(attack: AttackFn) -> Array:
            x_adv = attack(key, problem).x_adv
            return predictions(problem.score(x_adv, key)[1]) == y

        return {
            "fgsm_accuracy": right(step),
            "pgd_accuracy": (predictions(clean) == y) & right(strong),
        }

    modes = {
        prefix: _over_rows(model, threat, train, rows, prefix, batch_size, train=mode)
        for prefix, mode in (("train_", False), ("bn_batch_", True))
    }

    def monitor(params: PyTree, extra: PyTree) -> dict[str, float]:
        found: dict[str, float] = {}
        collapsed = ""
        for prefix, measure in modes.items():
            if prefix == "bn_batch_" and not jax.tree.leaves(extra):
                continue  # nothing that the two modes could differ in but dropout
            found |= measure(params, extra)
            weak, robust = (found[f"{prefix}{n}_accuracy"] for n in ("fgsm", "pgd"))
            if weak - robust > gap and not collapsed:
                where = "" if prefix == "train_" else ", BatchNorm in mode batch,"
                collapsed = (
                    f"catastrophic overfitting: on training points{where} FGSM leaves "
                    f"an accuracy of {weak:.3f}, PGD {robust:.3f}. Take a smaller "
                    "epsilon or step, nfgsm, gradalign, or an attack of more steps"
                )
                collapsed += ", or bn_mode='eval'." if where else "."
        found["collapsed"] = float(bool(collapsed))
        if action == "restore":
            found["stop"] = found["collapsed"]
        if collapsed and action == "stop":
            raise CatastrophicOverfitting(collapsed)
        if collapsed:
            warnings.warn(collapsed, RuntimeWarning, stacklevel=2)
        return found

    return monitor


def smoothness(
    model: Model, threat: ThreatModel, examples: Examples, *, batch_size: int = 128
) -> Monitor:
    """How steep and how straight the loss is around examples.

    `input_gradient_norm`: mean `||g(x)||_2`, `g = grad_x L`.
    `nonlinearity`: mean `|L(x + d) - L(x) - <d, g(x)>|`, d uniform in the ball and box
    (Qin et al. 2019, arXiv:1907.02610, at a random point); 0 is straight.
    `alignment`: mean `cos(g(x), g(x + d))` (arXiv:2007.02617); it falls before
    catastrophic overfitting. Examples with a zero gradient count as 1.
    """

    def rows(problem: Problem, clean: Array, y: Array) -> dict[str, Array]:
        keys = example_keys(jax.random.key(0), problem.index)
        delta = threats.random_start(threat, keys, problem.x)
        near = threats.apply(threat, problem.x, delta)
        loss, _, slope = score_and_grad(problem, problem.x, None)
        loss_near, _, slope_near = score_and_grad(problem, near, None)
        dot = jax.vmap(lambda a, b: jnp.sum(a * b))
        aligned, angle = jax.vmap(cosine)(slope, slope_near)
        rest = loss_near - loss - dot(near - problem.x, slope)
        return {
            "input_gradient_norm": jnp.sqrt(dot(slope, slope)),
            "nonlinearity": jnp.abs(rest),
            "alignment": jnp.where(angle, aligned, 1),
        }

    return _over_rows(model, threat, examples, rows, "", batch_size)


def with_norms(method: Method) -> Method:
    """The method, with metrics `weight_norm` and `gradient_norm` (both L2, over all).

    They stand in every training row, and a gradient that is not finite stops the run
    with their names.
    """

    def grads(params, extra, carry, batch, step, key):
        found, aux = method.grads(params, extra, carry, batch, step, key)
        one = jnp.ones(())
        norms = {
            "weight_norm": Mean(_global_norm(params), one),
            "gradient_norm": Mean(_global_norm(found), one),
        }
        return found, aux._replace(metrics={**aux.metrics, **norms})

    return method._replace(grads=grads, stages=None)


def _global_norm(tree: PyTree) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _over_rows(
    model: Model,
    threat: ThreatModel,
    examples: Examples,
    rows: Callable[[Problem, Array, Array], Mapping[str, Array]],
    prefix: str,
    batch_size: int,
    *,
    train: bool = False,
) -> Monitor:
    """Means of what `rows` says of each example; one compiled program.

    train: BatchNorm in mode batch (and dropout on, by a fixed key).
    """
    require_model(model)
    x, y = (np.asarray(part) for part in examples)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"examples have {len(x)} inputs and {len(y)} labels.")
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"examples are {x.dtype}; give floats in the model's box.")
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"labels are {y.dtype}; give integers.")
    low, high = np.asarray(threat.lower), np.asarray(threat.upper)
    if not ((x >= low - 1e-6) & (x <= high + 1e-6)).all():
        raise ValueError(
            f"examples lie in [{x.min():g}, {x.max():g}], outside of the threat's box, "
            f"[{low.min():g}, {high.max():g}]: scale them as the model wants them."
        )
    # In mode batch whole batches, whose rows repeat: ghost BatchNorm divides them.
    size = batch_size if train else min(batch_size, len(x))

    @functools.partial(
        jax.jit, compiler_options=convolution_options() | quick_options(1)
    )
    def batch(weights: tuple[PyTree, PyTree], x: Array, y: Array, index: Array):
        f = logits_fn(model, *weights, train=train)
        problem = untargeted(f, x, y, threat, cross_entropy, index=index)
        return rows(problem, f(x, jax.random.key(0) if train else None), y)

    def monitor(params: PyTree, extra: PyTree) -> dict[str, float]:
        parts = []
        for start in range(0, len(x), size):
            index = np.arange(start, start + size) % len(x)  # the last wraps around
            found = batch((params, extra), x[index], y[index].astype(np.int32), index)
            kept = min(size, len(x) - start)
            parts.append({n: np.asarray(v)[:kept] for n, v in found.items()})
        return {
            prefix + name: float(np.concatenate([part[name] for part in parts]).mean())
            for name in parts[0]
        }

    return monitor
