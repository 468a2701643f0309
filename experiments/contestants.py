"""The rows of `compare_methods`: how each method is built, what an update costs.

Strengths are the authors', relative to epsilon: their ratio of step size to epsilon,
their weights of penalties; but HAT and AWP on TRADES attack by TRADES' steps of 0.226
epsilon, where their authors' are 0.25, and those with several norms by 2.5 epsilon /
number of steps, MSD's in their authors' ratio of MNIST on every data set. Costs are
those of docs/methods.md: gradients (a forward and a backward pass of one image) per
image and update. Passes without a backward one are not counted: MSD makes three for
each of its steps.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import robustjax as rj
from robustjax.attacks.apgd import apgd_training
from robustjax.attacks.base import AttackFn
from robustjax.methods.awp import awp
from robustjax.methods.base import Method
from robustjax.methods.curriculum import (
    cat_step_size,
    curriculum,
    growing,
    in_turn,
    ramp,
    variable_pgd,
)
from robustjax.methods.eat import eat
from robustjax.methods.fast import fast
from robustjax.methods.free import free
from robustjax.methods.generated import with_stream
from robustjax.methods.gradalign import gradalign
from robustjax.methods.gradient_penalty import gradient_penalty
from robustjax.methods.hat import hat
from robustjax.methods.logit_pairing import (
    adversarial_logit_pairing,
    clean_logit_pairing,
)
from robustjax.methods.madry import cifar_code, cifar_paper, madry
from robustjax.methods.mart import mart
from robustjax.methods.msd import msd
from robustjax.methods.multinorm import average, maximum
from robustjax.methods.nfgsm import nfgsm
from robustjax.methods.standard import standard
from robustjax.methods.trades import trades
from robustjax.models import Model
from robustjax.training.step import Decay, averaged_from, ramped

STEPS = 7  # of PGD against several norms, and of the curricula
FREE = 8  # updates per batch


class Setting(NamedTuple):
    """What a method is built from.

    model, threats: the net, and its threat model under "Linf", "L2" and "L1".
    num_updates:    how many the training makes.
    half_diagonal:  L2 size of the Linf ball's corner, over epsilon, halved.
    helper:         the logits of the net that the row asks for.
    """

    model: Model
    threats: Mapping[str, rj.ThreatModel]
    num_updates: int
    half_diagonal: float
    helper: rj.LogitsFn | None = None

    @property
    def linf(self) -> rj.ThreatModel:
        """The threat of all rows but the multi-norm ones."""
        return self.threats["Linf"]

    @property
    def epsilon(self) -> float:
        """Its budget."""
        return float(self.linf.epsilon)


class Contestant(NamedTuple):
    """A row.

    build:     the method.
    gradients: per image and update; the mean, where they vary.
    expect:    what the literature leads one to expect, and where.
    multiple:  updates come in groups of so many: Free's replays, CAT's stages.
    helper:    the row whose net of the same run it needs.
    half:      it sees the labels of the first half of the training images only;
    stream:    and the other half, labeled by the helper, as half of every batch.
    ema_decay: whether averaged weights are used, and which average.
    union:     judged under Linf, L2, L1 and their union; the row is of that group.
    version:   one more whenever what the row trains changes: nets of another version
               are trained anew and not mistaken for this one's.
    """

    build: Callable[[Setting], Method]
    gradients: float
    expect: str
    multiple: int = 1
    helper: str | None = None
    half: bool = False
    stream: bool = False
    ema_decay: Callable[[Setting], Decay] | None = None
    union: bool = False
    version: int = 1


def pgd(num_steps: int = STEPS) -> AttackFn:
    """The usual steps of 2.5 epsilon / number of steps; the last point."""
    return rj.pgd(num_steps, keep=rj.last)


def inner(norm: str) -> AttackFn:
    """PGD; under L1 APGD, as E-AT's authors: with seven steps of PGD, each on few
    coordinates, a net learned nothing that holds (docs/results.md)."""
    return apgd_training(STEPS) if norm == "L1" else pgd()


def madry_under(norm: str) -> Callable[[Setting], Method]:
    """PGD training against one norm."""
    return lambda s: madry(s.model, s.threats[norm], inner(norm))


def three(s: Setting) -> list[rj.ThreatModel]:
    """Linf, L2, L1."""
    return list(s.threats.values())


def each(s: Setting) -> list[AttackFn]:
    """The attack under each of them."""
    return [inner(norm) for norm in s.threats]


def plain(s: Setting) -> Method:
    """The yardstick: the paper's PGD-7."""
    return madry(s.model, s.linf, cifar_paper())


def under(schedule: Callable[[Setting], Callable]) -> Callable[[Setting], Method]:
    """PGD training against the threat of each step."""

    def build(s: Setting) -> Method:
        at = schedule(s)
        return curriculum(lambda step: madry(s.model, at(step), cifar_paper()))

    return build


def l2_first(s: Setting) -> Callable:
    """L2 of half the corner's size in the first half, then Linf."""
    return in_turn(
        [rj.l2(s.epsilon * s.half_diagonal), s.linf], [max(1, s.num_updates // 2)]
    )


def cat(s: Setting) -> Method:
    """0, 1, ..., 7 attack steps, row by row fewer, of sizes that are drawn."""
    steps = growing(0, STEPS, s.num_updates)

    def build(step):
        attack_fn = variable_pgd(steps(step), cat_step_size, mixed=True)
        return madry(s.model, s.linf, attack_fn)

    return curriculum(build)


def under_steepest(s: Setting) -> Method:
    """MSD. Its moves are as 1 : 1.5 : 3 in units of epsilon, as by default in its
    authors' code for MNIST (0.01 of 0.3, 0.1 of 2, 1 of 10). Under L1 12 of
    Fashion-MNIST's pixels move, theirs 5 to 20. Moves of one size seldom ended in the
    L1 ball (docs/results.md)."""
    one = 2.5 / STEPS
    sizes = [one, 1.5 * one, 3 * one]
    return msd(s.model, three(s), num_steps=STEPS, step_sizes=sizes, density=12.5 / 784)


CONTESTANTS: dict[str, Contestant] = {
    "standard": Contestant(
        lambda s: standard(s.model), 1, "highest clean, robust near 0 (1706.06083)"
    ),
    "madry": Contestant(plain, 8, "the yardstick (1706.06083)"),
    "madry_pgd2": Contestant(
        lambda s: madry(s.model, s.linf, rj.pgd(2, 0.75, keep=rj.last)),
        *(3, "more updates with a weaker attack: as good as madry (2001.03994)"),
    ),
    "trades": Contestant(
        lambda s: trades(s.model, s.linf), 12, "robust above madry (1901.08573)"
    ),
    "mart": Contestant(
        lambda s: mart(s.model, s.linf, beta=5.0),
        *(12, "robust above trades, clean below (Wang et al., ICLR 2020)"),
    ),
    "awp_madry": Contestant(
        # From the start on, gradients clipped, it left Madry's net near chance.
        lambda s: awp(plain(s), gamma=0.01, warmup=s.num_updates // 5),
        *(9, "above madry where robust overfitting sets in (2004.05884)"),
    ),
    "awp_trades": Contestant(
        lambda s: awp(trades(s.model, s.linf), gamma=0.005, warmup=s.num_updates // 5),
        *(14, "above trades where robust overfitting sets in (2004.05884)"),
        version=2,  # 1: from the start on
    ),
    "hat": Contestant(
        lambda s: hat(s.model, s.linf, _helper(s)),
        *(13, "clean above trades at equal robust (Rade et al., ICLR 2022)"),
        helper="standard",
    ),
    "free": Contestant(
        lambda s: free(s.model, s.linf, repeats=FREE),
        *(1, "near madry at the cost of standard (1904.12843)"),
        multiple=FREE,
        version=2,  # 1 derived through the box
    ),
    "fast": Contestant(
        # In the authors' mode, batch, two of three nets of CIFAR-10 collapsed, of nfgsm
        # one (docs/results.md).
        lambda s: fast(s.model, s.linf, bn_mode="eval"),
        *(2, "near madry at a quarter of its cost; may collapse (2001.03994)"),
        version=2,  # 1: mode batch
    ),
    "nfgsm": Contestant(
        lambda s: nfgsm(s.model, s.linf, bn_mode="eval"),  # as fast
        *(2, "near madry at a quarter of its cost, no collapse (2202.01181)"),
        version=2,  # 1: mode batch
    ),
    "gradalign": Contestant(
        # 0.2: theirs at 8/255. In their mode, batch, PreActResNet-18 learns to read the
        # label off FGSM's perturbation here (docs/results.md).
        lambda s: gradalign(s.model, s.linf, bn_mode="eval"),
        *(4, "near madry at half its cost, no collapse (2007.02617)"),
        version=2,  # 1: mode batch
    ),
    "alp": Contestant(
        lambda s: adversarial_logit_pairing(s.model, s.linf, cifar_code()),
        *(12, "claimed above madry (1803.06373); broken on ImageNet (1807.10272)"),
    ),
    "clp": Contestant(
        lambda s: clean_logit_pairing(s.model, noise=s.epsilon * 0.5 / 0.3),
        *(1, "fools gradient attacks only (1810.12042)"),
    ),
    "gradient_penalty": Contestant(
        lambda s: gradient_penalty(s.model, s.linf),
        *(3, "above standard, below madry at large epsilon (1802.01421)"),
        version=2,  # 1: the penalty with running statistics
    ),
    "l2_first": Contestant(under(l2_first), 8, "open: no such comparison known"),
    "epsilon_ramp": Contestant(
        under(lambda s: ramp(s.linf, max(1, s.num_updates // 2))),
        *(8, "as madry; certified training needs it (1810.12715)"),
    ),
    "cat": Contestant(
        *(cat, (STEPS + 2) / 2, "above madry (1805.04807)"),
        multiple=STEPS + 1,
        version=2,  # 1: steps of a quarter of epsilon
    ),
    "ema": Contestant(
        plain,
        *(8, "above madry in long trainings (2010.03593)"),
        ema_decay=lambda s: ramped(0.995),
    ),
    "swa": Contestant(
        plain,
        *(8, "above madry in long trainings (Chen et al., ICLR 2021)"),
        ema_decay=lambda s: averaged_from(s.num_updates * 3 // 4),
    ),
    "standard_half": Contestant(
        lambda s: standard(s.model), 1, "below standard in clean", half=True
    ),
    "madry_half": Contestant(plain, 8, "below madry (1804.11285)", half=True),
    "madry_pseudo": Contestant(
        lambda s: with_stream(plain(s)),
        *(8, "between madry_half and madry (1905.13736)"),
        helper="standard_half",
        half=True,
        stream=True,
    ),
    "madry_linf": Contestant(
        madry_under("Linf"), STEPS + 1, "weak under L1 (1904.13000)", union=True
    ),
    "madry_l2": Contestant(
        madry_under("L2"), STEPS + 1, "weak under Linf (1904.13000)", union=True
    ),
    "madry_l1": Contestant(
        *(madry_under("L1"), STEPS + 1, "weak under Linf (1904.13000)"),
        union=True,
        version=2,  # 1: an attack from a random start, successes kept
    ),
    "average": Contestant(
        lambda s: average(s.model, three(s), each(s)),
        *(3 * (STEPS + 1), "union above single norms (1904.13000)"),
        union=True,
        version=2,  # as of madry_l1
    ),
    "maximum": Contestant(
        lambda s: maximum(s.model, three(s), each(s)),
        *(3 * STEPS + 1, "union above single norms (1904.13000)"),
        union=True,
        version=2,  # as of madry_l1
    ),
    "msd": Contestant(
        under_steepest,
        *(STEPS + 1, "union above average and maximum (1909.04068)"),
        union=True,
        version=3,  # 1: density 0.004; 2: 0.02; both: moves of one size
    ),
    "eat": Contestant(
        lambda s: eat(s.model, [s.threats["Linf"], s.threats["L1"]]),
        *(11, "union near msd at a third of the cost (2105.12508)"),
        union=True,
        version=2,  # as of madry_l1
    ),
}
MULTINORM = tuple(name for name, one in CONTESTANTS.items() if one.union)
SINGLE = tuple(name for name in MULTINORM if name.startswith("madry"))


def chosen(names: tuple[str, ...]) -> list[str]:
    """The rows asked for, in the table's order; "multinorm" is a group, () are all.

    >>> chosen(("nfgsm", "standard"))
    ['standard', 'nfgsm']
    """
    wanted = {
        n for name in names for n in (MULTINORM if name == "multinorm" else [name])
    }
    for name in wanted - set(CONTESTANTS):
        raise ValueError(
            f"methods has {name!r}; choose among multinorm, {', '.join(CONTESTANTS)}."
        )
    return [name for name in CONTESTANTS if not names or name in wanted]


def _helper(s: Setting) -> rj.LogitsFn:
    assert s.helper is not None  # the row names one
    return s.helper
