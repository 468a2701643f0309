"""robustjax: compiled attacks, adversarial training and honest evaluation in JAX.


>>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
>>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
>>> rj.attack(logits_fn, x, y, rj.linf(0.1)).success.tolist()
[True, False]
"""

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
from robustjax.attacks.gradient import (
    GradientState,
    attack_step,
    gradient_ascent,
    normalize_l1,
    sparse_steepest,
    steepest,
)
from robustjax.attacks.noise import noise
from robustjax.attacks.pgd import adam, fgsm, momentum, pgd
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
)
from robustjax.types import Batch, LogitsFn
