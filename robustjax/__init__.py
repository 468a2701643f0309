"""robustjax: compiled attacks, adversarial training and honest evaluation in JAX.

>>> import jax.numpy as jnp, robustjax as rj
>>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
>>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
>>> rj.attack(logits_fn, x, y, rj.linf(0.1)).success.tolist()
[True, False]
"""

from robustjax.attacks.apgd import apgd, apgd_targeted
from robustjax.attacks.base import (
    Attack,
    AttackFn,
    Info,
    Result,
    last,
    multi_target,
    over_threats,
    restarts,
    run,
    sequence,
    smallest,
    worst,
)
from robustjax.attacks.fab import fab
from robustjax.attacks.gradient import (
    GradientState,
    attack_step,
    gradient_ascent,
    normalize_l1,
    sparse_steepest,
    steepest,
)
from robustjax.attacks.input_transforms import (
    input_diversity,
    translation_invariant,
)
from robustjax.attacks.noise import noise
from robustjax.attacks.pgd import adam, fgsm, momentum, pgd
from robustjax.attacks.square import square
from robustjax.certify.bracket import Bracket, CrossingError, bracket
from robustjax.certify.radius import certified_radius
from robustjax.certify.trace import trace
from robustjax.evaluation.attack import attack
from robustjax.evaluation.checks import ModelWarning
from robustjax.evaluation.curves import Curve, minimal_norm_curve, sweep_curve
from robustjax.evaluation.report import Report, ThreatReport
from robustjax.evaluation.runner import evaluate
from robustjax.evaluation.transfer import TransferMatrix, transfer_matrix
from robustjax.gradients import bpda, eot, score_and_grad
from robustjax.norms import L0, L1, L2, AnyOf, Linf, Norm
from robustjax.problems import (
    Problem,
    example_keys,
    maximize,
    never,
    predictions,
    targeted,
    untargeted,
)
from robustjax.threats import (
    ThreatModel,
    is_feasible,
    l0,
    l1,
    l2,
    linf,
    project,
    project_sequential,
    stack,
    threat,
)
from robustjax.types import Batch, LogitsFn

__all__ = [
    "adam",
    "apgd",
    "apgd_targeted",
    "AnyOf",
    "Attack",
    "attack",
    "attack_step",
    "AttackFn",
    "Batch",
    "bpda",
    "Bracket",
    "bracket",
    "certified_radius",
    "CrossingError",
    "Curve",
    "eot",
    "evaluate",
    "example_keys",
    "fab",
    "fgsm",
    "gradient_ascent",
    "GradientState",
    "Info",
    "input_diversity",
    "is_feasible",
    "l0",
    "L0",
    "l1",
    "L1",
    "L2",
    "l2",
    "last",
    "linf",
    "Linf",
    "LogitsFn",
    "maximize",
    "minimal_norm_curve",
    "ModelWarning",
    "momentum",
    "multi_target",
    "never",
    "noise",
    "Norm",
    "normalize_l1",
    "over_threats",
    "pgd",
    "predictions",
    "Problem",
    "project",
    "project_sequential",
    "Report",
    "restarts",
    "Result",
    "run",
    "score_and_grad",
    "sequence",
    "smallest",
    "square",
    "sparse_steepest",
    "stack",
    "steepest",
    "sweep_curve",
    "targeted",
    "threat",
    "ThreatModel",
    "ThreatReport",
    "trace",
    "transfer_matrix",
    "TransferMatrix",
    "translation_invariant",
    "untargeted",
    "worst",
]
