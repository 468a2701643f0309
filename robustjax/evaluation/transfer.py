"""Transfer: adversarial examples made on one model, judged on others.

`transfer_matrix` makes each attack's examples once for each source and shows them to
all targets; the `TransferMatrix` counts them, with intervals, and compares two attacks
on the same images.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.base import AttackFn
from robustjax.evaluation import checks
from robustjax.evaluation.attack import attack
from robustjax.evaluation.intervals import wilson
from robustjax.evaluation.prepare import answers, of_rows, prepare_model
from robustjax.losses import cross_entropy
from robustjax.threats import ThreatModel, is_feasible
from robustjax.types import Array, Key, LossFn


class Difference(NamedTuple):
    """One attack's mean rate minus another's, and where the truth lies."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class TransferMatrix:
    """What `transfer_matrix` found; A attacks, S sources, T targets, N examples.

    attacks, sources, targets: their names.
    index:   `[N]`, which example each column of the two below is.
    correct: `[T, N]` bool, whether the target is right without an attack.
    wrong:   `[A, S, T, N]` bool, whether it is wrong on the attacked example.
    refused: `[A, S]`, points outside of ball or box; the clean example stands for them.

    A target's examples are those that it classifies correctly without an attack: what
    it gets wrong anyway is no success of the attacker's. `error` counts all N.
    """

    attacks: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    index: np.ndarray
    correct: np.ndarray
    wrong: np.ndarray
    refused: np.ndarray

    @property
    def clean_error(self) -> np.ndarray:
        """`[T]`, share of all N that the target gets wrong without an attack."""
        return 1 - self.correct.mean(-1)

    @property
    def error(self) -> np.ndarray:
        """`[A, S, T]`, share of all N that the target gets wrong under attack."""
        return self.wrong.mean(-1)

    @property
    def fooled(self) -> np.ndarray:
        """`[A, S, T]`, how many of `total` the target gets wrong under attack."""
        return (self.wrong & self.correct).sum(-1)

    @property
    def total(self) -> np.ndarray:
        """`[T]`, how many the target classifies correctly without an attack."""
        return self.correct.sum(-1)

    @property
    def rate(self) -> np.ndarray:
        """`[A, S, T]`, `fooled / total`: the transfer rate; NaN where total is 0."""
        total = self.total.astype(float)
        return self.fooled / np.where(total > 0, total, np.nan)

    def intervals(self, confidence: float = 0.95) -> np.ndarray:
        """`[A, S, T, 2]`, Wilson's intervals of `rate`; [0, 1] where total is 0."""
        found = np.zeros((*self.fooled.shape, 2))
        for place in np.ndindex(self.fooled.shape):
            total = int(self.total[place[-1]])
            found[place] = (
                wilson(int(self.fooled[place]), total, confidence) if total else (0, 1)
            )
        return found

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, target) of different names: the transfers, as places in the matrix.

        Equal names mean the same model, attacked through its own gradient. A target
        that classifies nothing correctly has no pairs.
        """
        return tuple(
            (s, t)
            for s, source in enumerate(self.sources)
            for t, target in enumerate(self.targets)
            if source != target and self.total[t]
        )

    def mean_rate(self, attack: str, confidence: float = 0.95) -> Difference:
        """Mean of `rate` over `pairs()`, with an interval: see `difference`."""
        return self._mean(self.wrong[self._place(attack)].astype(float), confidence)

    def difference(
        self, attack: str, other: str, confidence: float = 0.95
    ) -> Difference:
        """Mean over `pairs()` of the attack's rate minus the other's, paired by image.

        Both attacks met the same images, so the interval is that of a mean of
        differences (McNemar's, for one pair): value +- z * sd(u) / sqrt(N), with
        `u_n` = mean over pairs of `c_tn (d_stn - r_st) / mean_n c_tn`, where d is -1, 0
        or 1, r the pair's rate of them and c = `correct` (the linearized ratio). All
        pairs share their images, and `u` sums over the pairs of one image first, so
        that counts too. It is the uncertainty of the images; the models are as given.

        Returns:
          `Difference(value, low, high)`. Normal approximation: for N of some hundreds;
          no width where the attacks never differ.
        """
        mine, theirs = (self.wrong[self._place(name)] for name in (attack, other))
        return self._mean(mine.astype(float) - theirs.astype(float), confidence)

    def _mean(self, d: np.ndarray, confidence: float) -> Difference:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence}: pass a number inside (0, 1).")
        pairs, (targets, count) = self.pairs(), self.correct.shape
        if not pairs:
            raise ValueError(
                f"there is no transfer among sources {self.sources} and {targets} "
                "targets: pass models of different names that are right somewhere."
            )
        rates, influence = [], np.zeros(count)
        for s, t in pairs:
            c = self.correct[t]
            rate = float((d[s, t] * c).sum() / c.sum())
            rates.append(rate)
            influence += c * (d[s, t] - rate) / c.mean() / len(pairs)
        value = float(np.mean(rates))
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        spread = float(influence.std(ddof=1)) if count > 1 else math.inf
        half = z * spread / math.sqrt(count)
        return Difference(value, value - half, value + half)

    def _place(self, attack: str) -> int:
        if attack not in self.attacks:
            raise ValueError(
                f"attack {attack!r} is not in the matrix: {', '.join(self.attacks)}."
            )
        return self.attacks.index(attack)

    def __str__(self) -> str:
        """A table for each attack: rows sources, columns targets, rates in percent."""
        width = max(map(len, (*self.sources, "source")))
        columns = [max(len(target), 6) for target in self.targets]
        lines = []
        for a, name in enumerate(self.attacks):
            head = [t.rjust(w) for t, w in zip(self.targets, columns, strict=True)]
            lines += [f"{name}: % fooled of those that the target has right"]
            lines += ["  ".join(["source".ljust(width), *head])]
            for s, source in enumerate(self.sources):
                cells = [
                    f"{100 * r:.1f}".rjust(w)
                    for r, w in zip(self.rate[a, s], columns, strict=True)
                ]
                lines += ["  ".join([source.ljust(width), *cells])]
        return "\n".join(lines)


def transfer_matrix(
    sources: Mapping[str, Callable[..., Array]],
    targets: Mapping[str, Callable[..., Array]] | None,
    attacks: Mapping[str, AttackFn],
    x: Any,
    y: Any,
    threat: ThreatModel,
    *,
    loss: LossFn = cross_entropy,
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
) -> TransferMatrix:
    """Attack each source once by each attack, and judge the points on every target.

    rate[a, s, t] = share of x_adv = attack_a(source_s) that target t gets wrong, among
    the examples that t classifies correctly without an attack. A target is judged by a
    fresh forward pass at matmul precision `highest`; a NaN logit is wrong. Points
    outside of ball or box (`is_feasible`) are replaced by the clean example, counted,
    and a `ModelWarning` names the attack.

    Every attack on every source draws from the same key, by `index`: so no result
    depends on the order of models, attacks or examples, nor on what else is in the
    matrix. An attack compiles once for all sources of one make (`attack`).

    Args:
      sources: name -> logits function, as `attack` takes it.
      targets: likewise; None: the sources. A target that is a source too has its name.
      attacks: name -> attack. For transfer the papers take the last iterate, so
        `momentum(10, keep=last)`; `worst` takes the one that is worst for the source.
      x, y, threat: `[N, ...]`, `[N]`, and the threat model, as `attack` takes them.
      loss, key, batch_size, index: see `attack`. No index twice.

    Raises:
      TypeError, ValueError: for bad inputs; see `robustjax.evaluation.checks`.

    Source: Papernot et al., arXiv 1605.07277; matrices as in Dong et al., arXiv
    1710.06081.

    >>> import jax.numpy as jnp, robustjax as rj
    >>> w = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> models = {"steep": lambda x: x @ w, "flat": lambda x: x @ w / 9 + 0.02 * x}
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> found = transfer_matrix(models, None, {"FGSM": rj.fgsm()}, x, y, rj.linf(0.1))
    >>> found.rate[0].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    named = {"sources": sources, "attacks": attacks}
    named["targets"] = targets = sources if targets is None else targets
    for argument, given in named.items():
        if not isinstance(given, Mapping) or not given:
            raise TypeError(
                f"{argument} is {type(given).__name__} {given!r:.60}: pass a dict of "
                "names, with at least one entry."
            )
    for attack_fn in attacks.values():
        checks.check_attack_fn(attack_fn)
    x, y, index = checks.check_inputs(x, y, threat, index, batch_size)
    checks.check_unique(index)
    key_attack, key_judge = jax.random.split(checks.check_key(key))
    # In the order of the index: batches, and so the last bits, are then the same
    # whatever order the examples came in.
    order = np.argsort(index, kind="stable")
    back = np.argsort(order, kind="stable")
    x, y, index = x[order], y[order], index[order]
    threat = of_rows(threat, order)
    judges = {
        name: prepare_model(f, x, y, batch_size)[0] for name, f in targets.items()
    }

    def right(x_adv: np.ndarray) -> np.ndarray:
        found = [
            answers(judge, x_adv, key_judge, batch_size) for judge in judges.values()
        ]
        return np.stack(found) == y

    correct = right(x)
    shape = (len(attacks), len(sources))
    wrong = np.zeros((*shape, len(targets), len(x)), bool)
    refused = np.zeros(shape, int)
    for a, (name, attack_fn) in enumerate(attacks.items()):
        for s, (source, f) in enumerate(sources.items()):
            result = attack(
                *(f, x, y, threat, attack_fn),
                loss=loss,
                key=key_attack,
                batch_size=batch_size,
                index=index,
            )
            inside = np.asarray(is_feasible(threat, jnp.asarray(x), result.x_adv))
            refused[a, s] = (~inside).sum()
            if refused[a, s]:
                warnings.warn(
                    f"{name} on {source}: {refused[a, s]} of {len(x)} points lie "
                    "outside ball or box and were replaced by the clean example: the "
                    "attack is weaker than it could be.",
                    checks.ModelWarning,
                    stacklevel=2,
                )
            rows = inside.reshape(-1, *[1] * (x.ndim - 1))
            wrong[a, s] = ~right(np.where(rows, np.asarray(result.x_adv), x))
    names = tuple(attacks), tuple(sources), tuple(targets)
    arrays = index[back], correct[:, back], wrong[..., back]
    return TransferMatrix(*names, *arrays, refused)
