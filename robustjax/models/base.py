"""A model is a pair of pure functions; an attack sees only its logits.

Nothing outside this room knows a neural network library: `from_linen` and `from_nnx`
make a `Model` of a Flax module, a plain pair of functions is one already, and
docs/models.md shows Equinox and Haiku in five lines each.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
from flax import linen as nn
from flax import nnx

from robustjax.types import Array, Key, LogitsFn, PyTree


class Init(Protocol):
    """`(key, x) -> (params, extra)`: fresh weights for inputs shaped like `x`."""

    def __call__(self, key: Key, x: Array) -> tuple[PyTree, PyTree]: ...


class Apply(Protocol):
    """`(params, extra, x) -> (logits, extra)`: the forward pass."""

    def __call__(
        self,
        params: PyTree,
        extra: PyTree,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]: ...


class Model(NamedTuple):
    """Two pure functions.

    init:  `(key, x) -> (params, extra)`; `extra` is `{}` or what is not trained by
           gradients, such as BatchNorm's running statistics.
    apply: `(params, extra, x, *, train=False, key=None) -> (logits [B, K], extra)`;
           with `train` batch statistics are used and the returned `extra` is updated.

    Make `apply` once and keep it: `jax.jit` knows a model by it (by `==` and `hash`).

    >>> import jax.numpy as jnp
    >>> def init(key, x):
    ...     return {"w": jnp.zeros((x.shape[-1], 3))}, {}
    >>> def apply(params, extra, x, *, train=False, key=None):
    ...     return x @ params["w"], extra
    >>> model = Model(init, apply)
    >>> params, extra = model.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> logits_fn(model, params, extra)(jnp.ones((2, 4))).shape
    (2, 3)
    """

    init: Init
    apply: Apply


@dataclass(frozen=True)
class _Logits:
    """What `logits_fn` binds weights to; equal for equal models: the cache hits."""

    apply: Apply
    train: bool

    def __call__(
        self, params: PyTree, extra: PyTree, x: Array, key: Key | None = None
    ) -> Array:
        return self.apply(params, extra, x, train=self.train, key=key)[0]


def logits_fn(
    model: Model, params: PyTree, extra: PyTree, *, train: bool = False
) -> LogitsFn:
    """The model with its weights, as attacks and runners take it.

    The result is a `jax.tree_util.Partial`: a pytree whose leaves are the weights.
    Passed to a jitted function as an argument, two checkpoints of one model share one
    trace and one compiled program.

    Args:
        model: the pair of functions.
        params: weights, as `model.init` returns them.
        extra: the rest of the state.
        train: False: BatchNorm uses its running statistics (mode `eval`). True: it uses
            those of the batch, and the updates are dropped (mode `batch`).

    Returns:
        `(x [B, ...], key=None) -> logits [B, K]`.

    >>> import jax.numpy as jnp
    >>> from robustjax.models.mlp import mlp
    >>> model = mlp(features=(8,), num_classes=3)
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> f = logits_fn(model, params, extra)
    >>> jax.jit(lambda f, x: f(x))(f, jnp.zeros((2, 4))).shape
    (2, 3)
    """
    return jax.tree_util.Partial(_Logits(model.apply, train), params, extra)


@dataclass(frozen=True)
class _LinenInit:
    module: nn.Module

    def __call__(self, key: Key, x: Array) -> tuple[PyTree, PyTree]:
        key_params, key_dropout = jax.random.split(key)
        variables = self.module.init(
            {"params": key_params, "dropout": key_dropout},
            x,
            **_train_flag(self.module, False),
        )
        extra = {name: value for name, value in variables.items() if name != "params"}
        return variables.get("params", {}), extra


@dataclass(frozen=True)
class _LinenApply:
    module: nn.Module

    def __call__(
        self,
        params: PyTree,
        extra: PyTree,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        flag = _train_flag(self.module, train)
        rngs = None if key is None else {"dropout": key}
        apply: Any = self.module.apply  # what it returns depends on `mutable`
        variables = {"params": params, **extra}
        if not (train and extra):
            return apply(variables, x, rngs=rngs, **flag), extra
        logits, updated = apply(variables, x, rngs=rngs, mutable=list(extra), **flag)
        return logits, {**extra, **updated}


def _train_flag(module: nn.Module, train: bool) -> dict[str, Any]:
    """How this module wants to be told that it is training."""
    names = inspect.signature(type(module).__call__).parameters
    if "train" in names:
        return {"train": train}
    for name in ("deterministic", "use_running_average"):
        if name in names:
            return {name: not train}
    return {}


def require_model(model: Any) -> None:
    """Raise TypeError, with the way out, where this is no `Model`.

    >>> require_model(nn.Dense(3))
    Traceback (most recent call last):
    ...
    TypeError: model is a Flax Linen module, Dense: pass from_linen(module).
    """
    if isinstance(model, Model):
        return
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        raise TypeError(
            f"model is a Flax Linen module, {kind}: pass from_linen(module)."
        )
    if isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a Flax NNX module, {kind}: pass from_nnx(lambda rngs: ...), "
            "which builds it."
        )
    if callable(model):
        name = getattr(model, "__name__", kind)
        raise TypeError(
            f"model is {name}, which is no Model: call it if it makes one, or pass "
            "Model(init, apply) of two functions (docs/models.md)."
        )
    raise TypeError(
        f"model is of type {kind}: pass a Model, such as those of robustjax.models, "
        "from_linen(module) or Model(init, apply)."
    )


def from_linen(module: nn.Module) -> Model:
    """A `Model` of a Flax Linen module.

    `module.__call__(x)` may take `train` (or `deterministic`, `use_running_average`,
    which mean `not train`); a key given to `apply` becomes the stream "dropout".
    Modules that are equal give models that are equal: no retracing.

    Args:
        module: a Linen module whose call returns logits `[B, K]`.

    Returns:
        The model; `extra` holds every collection but "params".

    >>> import jax.numpy as jnp
    >>> model = from_linen(nn.Dense(3))
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> model.apply(params, extra, jnp.zeros((2, 4)))[0].shape
    (2, 3)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"from_linen takes a flax.linen.Module, not {type(module).__name__}; "
            "for flax.nnx use from_nnx, for plain functions Model(init, apply)."
        )
    return Model(_LinenInit(module), _LinenApply(module))


@dataclass(frozen=True)
class _NnxInit:
    make: Callable[[nnx.Rngs], Any]

    def __call__(self, key: Key, x: Array) -> tuple[PyTree, PyTree]:
        del x  # NNX modules state their input sizes themselves
        _, params, extra = nnx.split(self.make(nnx.Rngs(key)), nnx.Param, ...)
        return params, extra


@dataclass(frozen=True)
class _NnxApply:
    graph: Any  # nnx.GraphDef: hashable, and equal for equal architectures

    def __call__(
        self,
        params: PyTree,
        extra: PyTree,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        # copy=True: Variables shared with the caller cannot be mutated under jax.grad.
        module = nnx.merge(self.graph, params, extra, copy=True)
        if train:
            module.train()
        else:
            module.eval()
        if key is not None:
            nnx.reseed(module, default=key, dropout=key)
        logits = module(x)
        return logits, nnx.split(module, nnx.Param, ...)[2] if train else extra


def from_nnx(make: Callable[[nnx.Rngs], Any]) -> Model:
    """A `Model` of a Flax NNX module.

    Args:
        make: `nnx.Rngs -> module`; the module is called as `module(x)` and returns
            logits `[B, K]`. It must build the same architecture for every `Rngs`.

    Returns:
        The model; `params` holds the `nnx.Param`s, `extra` everything else. A key given
        to `apply` reseeds the streams "default" and "dropout".

    >>> import jax.numpy as jnp
    >>> model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> model.apply(params, extra, jnp.zeros((2, 4)))[0].shape
    (2, 3)
    """
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph = nnx.split(abstract, nnx.Param, ...)[0]
    return Model(_NnxInit(make), _NnxApply(graph))
