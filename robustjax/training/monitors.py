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
from robustjax.attacks.base import AttackFn, check_attack_fn
from robustjax.attacks.pgd import fgsm, pgd
from robustjax.gradients import score_and_grad
from robustjax.losses import cross_entropy
from robustjax.methods.base import Method
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
    two accuracies part within an epoch (Wong et al. 2020, arXiv:2001.03994). BatchNorm
    is in mode eval: a net that FGSM breaks there too is not reported, whatever it
    reaches in training with the statistics of the batch.

    Args:
      model, threat: what is trained, against what.
      train: `(x, y)`, a few hundred of the *training* examples.
      action: "warn"; "stop": raise `CatastrophicOverfitting` (the checkpoint before is
        kept); "restore": end the run, whose result is the best checkpoint so far.
      gap: of the accuracies.
      attack_fn: the stronger attack; None: ten steps of PGD.
      batch_size: rows at once.

    Returns:
      A monitor with `train_fgsm_accuracy`, `train_pgd_accuracy`, `collapsed` (0 or 1)
      and, under "restore", `stop`, which `fit` obeys.

    Raises:
      ValueError: action is none of the three.
    """
    if action not in ("warn", "stop", "restore"):
        raise ValueError(f'action is {action!r}; give "warn", "stop" or "restore".')
    strong = pgd(10) if attack_fn is None else attack_fn
    check_attack_fn(strong)

    def rows(problem: Problem, clean: Array, y: Array) -> dict[str, Array]:
        found = {}
        for name, attack in (("fgsm", fgsm()), ("pgd", strong)):
            x_adv = attack(jax.random.key(0), problem).x_adv
            broken = predictions(problem.score(x_adv, None)[1]) != y
            found[f"{name}_accuracy"] = (predictions(clean) == y) & ~broken
        return found

    measure = _over_rows(model, threat, train, rows, "train_", batch_size)

    def monitor(params: PyTree, extra: PyTree) -> dict[str, float]:
        found = dict(measure(params, extra))
        weak, robust = found["train_fgsm_accuracy"], found["train_pgd_accuracy"]
        collapsed = weak - robust > gap
        found["collapsed"] = float(collapsed)
        if action == "restore":
            found["stop"] = float(collapsed)
        if collapsed:
            message = (
                f"catastrophic overfitting: on training points FGSM leaves an accuracy "
                f"of {weak:.3f}, PGD {robust:.3f}. Take a smaller epsilon or step, "
                "nfgsm, gradalign, or an attack of more steps."
            )
            if action == "stop":
                raise CatastrophicOverfitting(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
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
        norm, norm_near = (jnp.sqrt(dot(s, s)) for s in (slope, slope_near))
        both = norm * norm_near
        cosine = dot(slope, slope_near) / jnp.where(both > 0, both, 1)
        rest = loss_near - loss - dot(near - problem.x, slope)
        return {
            "input_gradient_norm": norm,
            "nonlinearity": jnp.abs(rest),
            "alignment": jnp.where(both > 0, cosine, 1),
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
) -> Monitor:
    """Means of what `rows` says of each example; one compiled program."""
    require_model(model)
    x, y = (np.asarray(part) for part in examples)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"examples have {len(x)} inputs and {len(y)} labels.")
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"examples are {x.dtype}; give floats in the model's box.")
    size = min(batch_size, len(x))

    @functools.partial(
        jax.jit, compiler_options=convolution_options() | quick_options(1)
    )
    def batch(weights: tuple[PyTree, PyTree], x: Array, y: Array, index: Array):
        f = logits_fn(model, *weights)
        problem = untargeted(f, x, y, threat, cross_entropy, index=index)
        return rows(problem, f(x), y)

    def monitor(params: PyTree, extra: PyTree) -> dict[str, float]:
        parts = []
        for start in range(0, len(x), size):
            index = np.arange(start, start + size) % len(x)  # the last one wraps around
            found = batch((params, extra), x[index], y[index].astype(np.int32), index)
            kept = min(size, len(x) - start)
            parts.append({n: np.asarray(v)[:kept] for n, v in found.items()})
        return {
            prefix + name: float(np.concatenate([part[name] for part in parts]).mean())
            for name in parts[0]
        }

    return monitor
