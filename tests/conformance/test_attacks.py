"""Every attack against the same table: a new attack adds a row.

Gradient attacks must reach the linear oracles' worst case; the others have tolerances
of their own. Checks share compiled programs (`testing._attack`): the suite's time is
compile time.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import robustjax as rj
from robustjax import testing
from robustjax.attacks.apgd import apgd
from robustjax.attacks.fab import fab
from robustjax.attacks.square import square


class Row(NamedTuple):
    """An attack, its norms, and how far from the worst case it may stay (0 to 1)."""

    attack_fn: rj.AttackFn
    norms: tuple[str, ...]
    tolerance: float = 1e-4


def _large_steps(norm):
    # L0 has no scale: a step far beyond the box lets the projection choose the best
    # coordinates, which is the exact worst case of a linear model.
    return optax.chain(rj.normalize_l1(), optax.scale(1e3))


def _under_any_of(key, problem):
    over = rj.over_threats(rj.pgd(60, 0.5), [problem.threat], "vmap")
    return jax.tree.map(lambda leaf: leaf[0], over(key, problem))


PGD = rj.pgd(60, 0.5)
# fmt: off
ROWS = {
    "fgsm": Row(rj.fgsm(), ("Linf",)),
    "fgsm, far L2": Row(rj.fgsm(1e3), ("L2",)),
    "pgd": Row(PGD, ("Linf", "L2")),
    "pgd, one coordinate": Row(rj.pgd(100, 0.5, density=0.0), ("L1",)),
    "pgd, L0 by default": Row(rj.pgd(40), ("L0",), 0.2),
    "pgd, L0": Row(rj.run(rj.gradient_ascent(_large_steps, False), 5), ("L0",)),
    "restarts": Row(rj.pgd(40, 0.5, num_restarts=2), ("L2",)),
    # Where a coordinate meets a face of the box the last iterates swing a little.
    "pgd, last": Row(rj.pgd(60, 0.5, keep=rj.last), ("L2",), 0.02),
    "momentum": Row(rj.momentum(100, 0.5), ("Linf", "L2")),
    # Momentum goes on pushing a coordinate that has reached the box.
    "momentum, L1": Row(rj.momentum(100, 0.5), ("L1",), 2e-3),
    "adam": Row(rj.adam(40, 0.5), ("Linf",)),
    # Adam divides by each coordinate's own size: near L2's optimum it still turns.
    "adam, L2": Row(rj.adam(100, 0.5), ("L2",), 0.25),
    "multi_target": Row(rj.multi_target(PGD, 3), ("L2",)),
    "sequence": Row(rj.sequence(rj.fgsm(), PGD, hand_over=True), ("L2",)),
    "under AnyOf": Row(_under_any_of, ("L2",)),
    # Noise finds a direction, not the worst one: of 64 samples in 12 dimensions.
    "noise, uniform": Row(rj.noise("uniform", 64), ("Linf", "L2", "L1", "L0"), 0.95),
    "noise, sign": Row(rj.noise("sign", 64), ("Linf", "L2", "L1", "L0"), 0.95),
    "noise, gaussian": Row(rj.noise("gaussian", 64), ("L2", "L0"), 0.95),
    "apgd": Row(apgd(100, reference=False), ("Linf", "L2")),
    # Ball, then box: where the box is active that is not the nearest point.
    "apgd, reference": Row(apgd(100), ("L2",), 0.01),
    # Measured 5e-4 on four seeds; without the wide phases 0.
    "apgd, L1": Row(apgd(100, reference=False), ("L1",), 2e-3),
    "square": Row(square(100, rescale=True), ("Linf",)),
    # Random search: of 100 queries under L2 and L1 the last ones still gain.
    "square, bumps": Row(square(100, rescale=True), ("L2", "L1"), 0.35),
    # FAB stops at the boundary, it does not look for the least margin in the ball: its
    # distances are checked in tests/attacks/test_fab.py.
    "fab": Row(fab(30), ("Linf", "L2", "L1"), 1.0),
    "fab, untargeted": Row(fab(10, targeted=False, num_restarts=2), ("L2",), 1.0),
    # scripts/new_attack adds rows above this line.
}
# fmt: on
CASES = [(name, norm) for name, row in ROWS.items() for norm in row.norms]
cases = pytest.mark.parametrize(("name", "norm"), CASES)
# Where the norm decides little: one for each attack, the others behind the marker.
first_norms = pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(
            name, norm, marks=() if norm == ROWS[name].norms[0] else pytest.mark.slow
        )
        for name, norm in CASES
    ],
)
KINDS = ("pgd", "momentum", "adam", "multi_target", "noise, uniform", "apgd")


@cases
def test_reaches_the_exact_worst_case(name, norm):
    row = ROWS[name]
    for box_active in (False, True):
        oracle = testing.linear_oracle(norm, box_active=box_active)
        testing.check_optimal(row.attack_fn, oracle, row.tolerance)
        testing.check_feasible(row.attack_fn, oracle)


@first_norms
def test_rows_are_independent(name, norm):
    oracle = testing.linear_oracle(norm, box_active=True)
    testing.check_independent(ROWS[name].attack_fn, oracle)


@cases
def test_no_budget_and_a_huge_one(name, norm):
    oracle = testing.linear_oracle(norm, box_active=True)
    for epsilon in (0.0, 1e6):
        threat = rj.threat(norm, epsilon)
        result = testing._run(ROWS[name].attack_fn, oracle._replace(threat=threat))
        assert bool(rj.is_feasible(threat, oracle.x, result.x_adv).all())
        if epsilon == 0:
            np.testing.assert_array_equal(result.x_adv, oracle.x)


@first_norms
def test_bad_models_give_no_bad_points(name, norm):
    testing.check_bad_models(ROWS[name].attack_fn, norm)


@pytest.mark.parametrize(
    ("shape", "batch_size"), [((1,), 3), ((7,), 1), ((3, 5), 8), ((4, 3, 2), 3)]
)
def test_any_shape_and_batch(shape, batch_size):
    for norm in ("Linf", "L2"):
        oracle = testing.linear_oracle(
            norm, shape=shape, batch_size=batch_size, box_active=True
        )
        testing.check_optimal(PGD, oracle)


@pytest.mark.parametrize("name", KINDS)
def test_one_trace_for_other_keys_labels_budgets_and_inputs(name):
    row = ROWS[name]
    oracle = testing.linear_oracle(row.norms[0])
    make = type(oracle.threat.norm)

    traces = []

    @jax.jit
    def go(key, x, y, epsilon):
        traces.append(None)
        threat = rj.ThreatModel(make(), epsilon)
        return row.attack_fn(key, rj.untargeted(oracle.logits_fn, x, y, threat))

    for seed, epsilon in enumerate((0.1, 0.2, 0.3)):
        x, y = oracle.x + seed, (oracle.y + seed) % 2
        go(jax.random.key(seed), x, y, jnp.float32(epsilon))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["pgd", "noise, uniform"])
def test_jit_equals_no_jit(name):
    row = ROWS[name]
    oracle = testing.linear_oracle(row.norms[0], box_active=True)
    compiled = testing._run(row.attack_fn, oracle)
    with jax.disable_jit(False):
        problem = rj.untargeted(
            oracle.logits_fn, oracle.x, oracle.y, oracle.threat, rj.losses.margin_loss
        )
        plain = row.attack_fn(jax.random.key(0), problem)
    chex.assert_trees_all_close(plain, compiled, atol=1e-4)
    chex.assert_type([plain.x_adv, plain.size, plain.score], jnp.float32)


@first_norms
def test_four_devices_equal_one_and_never_talk(name, norm):
    """Bit-equal at the same rows per device, without a collective."""
    row = ROWS[name]
    oracle = testing.linear_oracle(norm, batch_size=16, box_active=True)
    mesh = jax.make_mesh(
        (4,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:4],
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))

    # Model and threat are data, as they are below: folded in as constants they make
    # another program, whose last bits may differ (fgsm far off under JAX 0.10).
    @functools.partial(jax.jit, out_shardings=rows)
    def spread(model, x, y, index):
        logits_fn, threat = model
        problem = rj.untargeted(
            logits_fn, x, y, threat, rj.losses.margin_loss, index=index
        )
        return row.attack_fn(jax.random.key(0), problem)

    model = (oracle.logits_fn, oracle.threat)
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    data = (oracle.x, oracle.y, jnp.arange(16, dtype=jnp.int32))
    data = jax.device_put(data, rows)
    program = spread.lower(model, *data).compile()
    words = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [word for word in words if word in program.as_text()]
    together = program(model, *data)
    for i in range(0, 16, 4):
        piece = oracle._replace(x=oracle.x[i : i + 4], y=oracle.y[i : i + 4])
        one = testing._run(row.attack_fn, piece, index=np.arange(i, i + 4))
        np.testing.assert_array_equal(one.x_adv, together.x_adv[i : i + 4])
        np.testing.assert_array_equal(one.success, together.success[i : i + 4])


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_model_with_float32_attack(name):
    row = ROWS[name]
    oracle = testing.linear_oracle(row.norms[0], box_active=True)

    def half(x):
        return oracle.logits_fn(x.astype(jnp.bfloat16)).astype(jnp.bfloat16)

    half = jax.tree_util.Partial(half)
    result = testing._run(row.attack_fn, oracle._replace(logits_fn=half))
    chex.assert_type([result.x_adv, result.size, result.score], jnp.float32)
    assert bool(rj.is_feasible(oracle.threat, oracle.x, result.x_adv).all())


@pytest.mark.parametrize("name", KINDS)
def test_accepts_eot(name):
    """Under EOT a noisy linear model is attacked nearly as well as the plain one."""
    row = ROWS[name]
    oracle = testing.linear_oracle(row.norms[0], box_active=True)

    def go(key):
        def noisy(x, key):
            noise = 0.1 * jax.random.normal(key, (x.shape[0], 2))
            return oracle.logits_fn(x) + noise

        problem = rj.untargeted(noisy, oracle.x, oracle.y, oracle.threat)
        return row.attack_fn(key, rj.eot(problem, 3))

    result = jax.jit(go)(jax.random.key(0))
    margin = rj.losses.margin(oracle.logits_fn(result.x_adv), oracle.y)
    fall = oracle.clean_margin - np.asarray(margin)
    assert (fall > 0.01 * (oracle.clean_margin - oracle.worst_margin)).all()


@pytest.mark.parametrize("name", ["pgd", "momentum"])
def test_vmap_and_map_over_stacked_threats_equal_a_loop(name):
    attack_fn = ROWS[name].attack_fn
    oracle = testing.linear_oracle("Linf", box_active=True)
    threats = [rj.linf(0.1), rj.l2(0.4), rj.l1(0.8), rj.l0(2)]
    problem = rj.untargeted(oracle.logits_fn, oracle.x, oracle.y, oracle.threat)
    results = {}
    for how in ("vmap", "map", "loop"):
        over = rj.over_threats(attack_fn, threats, how)
        go = jax.jit(lambda key, over=over: over(key, problem))
        results[how] = go(jax.random.key(0))
    for how in ("vmap", "map"):
        # At a tie of L1 or L0 rounding may choose another, equally good coordinate.
        chex.assert_trees_all_close(
            results[how].score, results["loop"].score, atol=1e-4
        )
        chex.assert_trees_all_close(
            results[how].x_adv[:2], results["loop"].x_adv[:2], atol=1e-4
        )
