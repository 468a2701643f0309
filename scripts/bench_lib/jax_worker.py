"""The programs of JAX: robustjax's and the bare ones they are compared with."""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from worker import Prepared, serve

import robustjax as rj
from robustjax.methods.madry import madry
from robustjax.models.base import Model, logits_fn
from robustjax.models.compiling import convolution_options
from robustjax.models.madry_mnist import madry_mnist, small_cnn
from robustjax.models.mlp import mlp
from robustjax.models.resnet import preact_resnet18
from robustjax.threats import standard_threat
from robustjax.training.state import create_state
from robustjax.training.step import make_train_step

OPTIONS = json.loads(sys.argv[1])

NETS: dict[str, tuple[Callable[..., Model], tuple[int, ...], str]] = {
    "mlp": (lambda **_: mlp((64,)), (8, 8, 1), "mnist"),
    "small_cnn": (small_cnn, (8, 8, 1), "mnist"),
    "madry_mnist": (madry_mnist, (28, 28, 1), "mnist"),
    "preact_resnet18_w16": (
        functools.partial(preact_resnet18, width=16),
        (32, 32, 3),
        "cifar10",
    ),
}
STEP = 0.25  # of epsilon


def prepared(
    fn: Callable[..., Any], args: tuple[Any, ...], per: int = 1, carry: bool = False
) -> Prepared:
    """`carry`: the first result is the next call's first argument, which is donated."""
    clocks = time.perf_counter, time.process_time
    start = [clock() for clock in clocks]
    options = convolution_options() if OPTIONS.get("onednn") else None
    donated = (0,) if carry else ()
    lowered = jax.jit(fn, donate_argnums=donated, compiler_options=options).lower(*args)
    middle = [clock() for clock in clocks]
    compiled = lowered.compile()
    end = [clock() for clock in clocks]
    memory = compiled.memory_analysis()
    report = {
        "lower_s": round(middle[0] - start[0], 2),
        "lower_cpu_s": round(middle[1] - start[1], 2),
        "compile_s": round(end[0] - middle[0], 2),
        "compile_cpu_s": round(end[1] - middle[1], 2),
        "temporaries_mb": memory and round(memory.temp_size_in_bytes / 1e6, 1),
    }
    held = list(args)

    def call() -> None:
        result = jax.block_until_ready(compiled(*held))
        if carry:
            held[0] = result[0]

    return Prepared(call, per, report)


def cross_entropy(model: Model, params, extra, x, y):
    logits = model.apply(params, extra, x)[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()


def bare_step(model: Model, params, extra, x, y):
    """What one gradient step costs with nothing around it: no ball and no box."""
    return x + 0.01 * jnp.sign(jax.grad(cross_entropy, 3)(model, params, extra, x, y))


def bare_loop(model: Model, num_steps: int, params, extra, x, y):
    def body(x, _):
        return bare_step(model, params, extra, x, y), None

    return jax.lax.scan(body, x, length=num_steps)[0]


def direction(threat: rj.ThreatModel) -> optax.GradientTransformation:
    return optax.chain(rj.sparse_steepest(threat.norm), optax.scale(STEP))


def our_step(model: Model, params, extra, x, y, delta, threat, key):
    problem = rj.untargeted(logits_fn(model, params, extra), x, y, threat)
    move = direction(threat)
    state = rj.GradientState(delta, move.init(delta))
    return rj.attack_step(key, state, problem, move)


def our_loop(model: Model, num_steps: int, params, extra, x, y, delta, threat, key):
    problem = rj.untargeted(logits_fn(model, params, extra), x, y, threat)
    move = direction(threat)

    def body(state, t):
        key_step = jax.random.fold_in(key, t)
        return rj.attack_step(key_step, state, problem, move)[0], None

    state = rj.GradientState(delta, move.init(delta))
    return jax.lax.scan(body, state, jnp.arange(num_steps))[0].delta


def our_attack(model: Model, attack_fn, params, extra, x, y, threat, key):
    problem = rj.untargeted(logits_fn(model, params, extra), x, y, threat)
    return attack_fn(key, problem)


def bare_training(model: Model, num_steps: int, params, extra, x, y):
    """K input gradients and one parameter gradient, and nothing else."""
    x_adv = bare_loop(model, num_steps, params, extra, x, y)

    def loss(params):
        logits, updated = model.apply(params, extra, x_adv, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), updated

    return jax.grad(loss, has_aux=True)(params)


def double_backward(model: Model, num_steps: int, params, extra, x, y):
    """Descent on cross-entropy + ||its input gradient||^2, in a scan."""

    def loss(params):
        value, grad = jax.value_and_grad(cross_entropy, 3)(model, params, extra, x, y)
        return value / len(y) + jnp.sum(jnp.square(grad.reshape(-1)))

    def body(params, _):
        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), None

    return jax.lax.scan(body, params, length=num_steps)[0]


def programs(net: str) -> dict[str, Callable[[], Prepared]]:
    make, shape, dataset = NETS[net]
    model = make()
    steps, inner = OPTIONS["steps"], OPTIONS["inner_steps"]
    batch, train_batch = OPTIONS["batch"], OPTIONS["train_batch"]
    small = OPTIONS["double_batch"]
    key = jax.random.key(0)
    keys = jax.random.split(key, 4)
    x = jax.random.uniform(keys[0], (max(batch, train_batch, small), *shape))
    y = jax.random.randint(keys[1], x.shape[:1], 0, 10)
    params, extra = model.init(keys[2], x[:1])
    norms = {name: standard_threat(dataset, name) for name in ("linf", "l2", "l1")}

    def data(rows: int):
        return params, extra, x[:rows], y[:rows]

    def of(fn, *args, per: int = 1):
        return functools.partial(prepared, fn, args, per)

    def bind(fn, *static):
        return functools.partial(fn, model, *static)

    def double(convolution: str):
        plain = functools.partial(
            double_backward, make(convolution=convolution), OPTIONS["double_steps"]
        )
        return of(plain, *data(small), per=OPTIONS["double_steps"])

    def train(threat: rj.ThreatModel):
        def prepare() -> Prepared:
            method = madry(model, threat, rj.pgd(inner, STEP, keep=rj.last))
            tx = optax.sgd(0.1, momentum=0.9)
            examples = rj.Batch(*data(train_batch)[2:])
            state = create_state(key, model, method, tx, examples)
            step = make_train_step(method, tx)
            return prepared(step, (state, examples), carry=True)

        return prepare

    start = jnp.zeros_like(x[:batch])
    table = {
        "step/bare": of(bind(bare_step), *data(batch)),
        "loop/bare": of(bind(bare_loop, steps), *data(batch), per=steps),
        "train/bare": of(bind(bare_training, inner), *data(train_batch)),
        "double/canonical": double("canonical"),
        "double/plain": double("plain"),
    }
    for name, threat in norms.items():
        args = (*data(batch), start, threat, key)
        table[f"step/{name}"] = of(bind(our_step), *args)
        table[f"loop/{name}"] = of(bind(our_loop, steps), *args, per=steps)
        table[f"train/{name}"] = train(threat)
    worst = bind(our_attack, rj.pgd(steps, STEP))
    table["run/linf"] = of(worst, *data(batch), norms["linf"], key, per=steps)
    for how in ("vmap", "map", "loop"):
        attack_fn = rj.over_threats(rj.pgd(steps, STEP), list(norms.values()), how)
        args = (*data(batch), norms["linf"], key)
        table[f"norms/{how}"] = of(bind(our_attack, attack_fn), *args, per=steps)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {f"{net}/{name}": fn for name, fn in table.items()} | {
        f"{net}/parameters": functools.partial(
            Prepared, lambda: None, 1, {"parameters": count}
        )
    }


if __name__ == "__main__":
    table: dict[str, Callable[[], Prepared]] = {}
    for net in OPTIONS["nets"]:
        table |= programs(net)
    serve(
        table,
        {
            "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
            "device": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
        },
    )
