"""Monitors against what is known of linear models, and in a run that collapses."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.data.sources import load
from robustjax.methods.awp import awp
from robustjax.methods.base import Aux, from_loss
from robustjax.methods.madry import madry
from robustjax.metrics import mean_of
from robustjax.models.base import Model
from robustjax.threats import linf
from robustjax.training import monitors
from robustjax.training.weights import load_weights

EPSILON = 0.1


def linear(params, extra, x, *, train=False, key=None):
    return x.reshape(x.shape[0], -1) @ params["w"], extra


def masked(params, extra, x, *, train=False, key=None):
    """Below a threshold on the first pixel the loss is flat for FGSM at x, and a cliff
    elsewhere: the gradient at x points the wrong way."""
    z = params["good"] * jnp.where(x[:, :1] > 0.5, 1.0, -1.0)
    # A lure: at x the slope of the loss leads up in the first pixel, away from the
    # cliff below 0.5.
    z = z - 0.5 * params["lure"] * jnp.sin(80.0 * (x[:, :1] - 0.54))
    return jnp.concatenate([z, -z], axis=1), extra


def two_faced(params, extra, x, *, train=False, key=None):
    """`masked` by the batch's statistics; by the running ones FGSM is enough."""
    if train:
        return masked(params, extra, x)
    z = 40.0 * (x[:, :1] - 0.53)
    return jnp.concatenate([z, -z], axis=1), extra


LINEAR = Model(lambda key, x: ({}, {}), linear)
MASKED = Model(lambda key, x: ({}, {}), masked)


def lines():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.3, 0.7, (50, 6)).astype(np.float32)
    weights = rng.normal(size=(6, 2)).astype(np.float32)
    return {"w": jnp.asarray(weights)}, x, (x @ weights).argmax(1)


def test_accuracies_of_a_linear_model_are_known():
    params, x, y = lines()
    y = np.where(np.arange(50) < 5, 1 - y, y)  # five wrong labels
    gap = np.array(params["w"][:, 0] - params["w"][:, 1])
    margins = np.where(y == 0, 1, -1) * (x @ gap)
    robust = (margins > EPSILON * np.abs(gap).sum()).mean()
    assert 0.1 < robust < 0.8
    monitor = monitors.accuracies(
        LINEAR, linf(EPSILON), (x, y), batch_size=16, prefix="train_"
    )
    found = monitor(params, {})
    assert found == pytest.approx(
        {"train_clean_accuracy": 0.9, "train_robust_accuracy": robust}
    )


def test_overfitting_is_the_difference():
    params, x, y = lines()
    train, held_out = (x[:30], y[:30]), (x[30:], 1 - y[30:])
    found = monitors.overfitting(LINEAR, linf(0.01), train, held_out)(params, {})
    assert found["robust_accuracy"] == 0 and found["train_robust_accuracy"] > 0.8
    assert found["robust_gap"] == found["train_robust_accuracy"]


def test_smoothness():
    """Logits that are linear, and a loss that is nearly so where it is large."""
    params, x, y = lines()
    wrong = 1 - y
    steep = {"w": 30 * params["w"]}
    found = monitors.smoothness(LINEAR, linf(0.001), (x, wrong))(steep, {})
    gap = np.linalg.norm(np.asarray(steep["w"][:, 0] - steep["w"][:, 1]))
    assert found["input_gradient_norm"] == pytest.approx(gap, rel=0.05)
    assert 0 <= found["nonlinearity"] < 0.01 and found["alignment"] > 0.999
    wavy = {"good": jnp.array(1.0), "lure": jnp.array(1.0)}
    points = np.full((8, 1), 0.54, np.float32), np.zeros(8, int)
    other = monitors.smoothness(MASKED, linf(EPSILON), points)(wavy, {})
    assert other["nonlinearity"] > 0.1 and other["alignment"] < 0.9
    flat = monitors.smoothness(LINEAR, linf(0.1), (x, y))({"w": jnp.zeros((6, 2))}, {})
    assert flat["alignment"] == 1 and flat["input_gradient_norm"] == 0
    # A confident net's gradients, 1e-26 here, have squares that are 0 in float32.
    sure = {"good": jnp.array(30.0), "lure": jnp.array(1.0)}
    assert monitors.smoothness(MASKED, linf(0.04), points)(sure, {})["alignment"] < 0.9


def collapsed_params():
    return {"good": jnp.array(1.0), "lure": jnp.array(1.0)}


def points():
    x = np.full((20, 1), 0.54, np.float32)
    return x, np.zeros(20, int)


@pytest.mark.parametrize("action", ["warn", "stop", "restore"])
def test_a_lured_attack_is_reported(action):
    """FGSM is led away from the cliff that PGD from a random start falls down."""
    monitor = monitors.catastrophic_overfitting(MASKED, linf(EPSILON), points(), action)
    if action == "stop":
        with pytest.raises(
            monitors.CatastrophicOverfitting, match="accuracy of 1.000, PGD 0"
        ):
            monitor(collapsed_params(), {})
        return
    with pytest.warns(RuntimeWarning, match="FGSM leaves an accuracy of 1.000"):
        found = monitor(collapsed_params(), {})
    assert found["train_fgsm_accuracy"] == 1 and found["train_pgd_accuracy"] < 0.8
    assert found["collapsed"] == 1 and found.get("stop", 1) == 1


def test_a_sound_model_is_not():
    params, x, y = lines()
    monitor = monitors.catastrophic_overfitting(LINEAR, linf(0.05), (x, y), "stop")
    found = monitor(params, {})  # a linear model: FGSM is the worst case
    assert found["train_fgsm_accuracy"] == found["train_pgd_accuracy"]
    assert found["collapsed"] == 0
    with pytest.raises(ValueError, match="action is 'halt'"):
        monitors.catastrophic_overfitting(LINEAR, linf(0.1), (x, y), "halt")  # type: ignore[arg-type]


def test_a_lure_in_mode_batch_is_reported():
    """FGSM breaks the net in mode eval, as PGD does: only mode batch tells."""
    model = Model(lambda key, x: ({}, {}), two_faced)
    monitor = monitors.catastrophic_overfitting(model, linf(EPSILON), points())
    with pytest.warns(RuntimeWarning, match="BatchNorm in mode batch, FGSM .* 1.000"):
        found = monitor(collapsed_params(), {"mean": jnp.zeros(())})
    assert found["train_fgsm_accuracy"] == found["train_pgd_accuracy"] == 0
    assert found["bn_batch_fgsm_accuracy"] == 1 and found["collapsed"] == 1
    assert monitor(collapsed_params(), {})["collapsed"] == 0  # no statistics: one mode


def test_ghost_batchnorm_divides_the_rows():
    """20 points fill no batch of 8 groups; in mode batch they repeat until one is."""

    def grouped(params, extra, x, *, train=False, key=None):
        groups = x.reshape(8, -1) if train else x
        logits = jnp.concatenate([x, 1 - x], axis=1)
        return logits + 0.0 * groups.mean(), extra

    model = Model(lambda key, x: ({}, {}), grouped)
    monitor = monitors.catastrophic_overfitting(model, linf(0.01), points())
    found = monitor({}, {"mean": jnp.zeros(())})
    assert found["bn_batch_pgd_accuracy"] == found["train_pgd_accuracy"] == 1


def test_labels_that_an_attack_tells_are_reported():
    """Clean every point is wrong, FGSM's are right: above the clean accuracy."""
    x, y = points()

    def tells(params, extra, x, *, train=False, key=None):
        z = 40.0 * jnp.abs(x[:, :1] - 0.54) - 2.0 - (x[:, :1] - 0.54)
        return jnp.concatenate([z, -z], axis=1), extra

    model = Model(lambda key, x: ({}, {}), tells)
    monitor = monitors.catastrophic_overfitting(model, linf(EPSILON), (x, y))
    with pytest.warns(RuntimeWarning, match="FGSM leaves an accuracy of 1.000"):
        found = monitor({}, {})
    assert found["train_pgd_accuracy"] == 0


@pytest.mark.parametrize("collapsed", [0.0, 0.9])
@pytest.mark.parametrize("folder", [False, True])
def test_a_run_that_is_stopped_gives_the_best(train, tmp_path, folder, collapsed):
    """Robust accuracy 0.5, 0.6, then a collapse, which may look better than both: the
    weights of step 8 come back."""

    def validate(params, extra):
        step = int(extra["passes"])
        stop = float(step == 12)
        return {"robust_accuracy": collapsed if stop else 0.4 + step / 40, "stop": stop}

    out = tmp_path / "run" if folder else None
    found = train(validate=validate, num_steps=40, out=out)
    assert found.metrics["step"] == 8 and int(found.extra["passes"]) == 8
    assert int(found.state.step) == 12
    if folder:  # again: from step 8 to the same end
        again = train(validate=validate, num_steps=40, out=out)
        assert again.metrics == found.metrics
        np.testing.assert_array_equal(again.params["kernel"], found.params["kernel"])
        loaded, _ = load_weights(out, (found.params, found.extra))
        np.testing.assert_array_equal(loaded["kernel"], found.params["kernel"])


@pytest.mark.parametrize("stop_at", [4, 8])
def test_a_run_stopped_at_its_first_look_keeps_it_and_says_so(stop_at, train, tmp_path):
    def validate(params, extra):
        stop = float(int(extra["passes"]) == stop_at)
        return {"robust_accuracy": 1.0 - 0.5 * stop, "stop": stop}

    log = io.StringIO()
    found = train(validate=validate, num_steps=12, out=tmp_path / "run", log=log)
    assert found.metrics["step"] == 4 and int(found.extra["passes"]) == 4
    assert ("the result is this step" in log.getvalue()) == (stop_at == 4)


def test_norms_stand_in_the_rows(train, model, data):
    method = monitors.with_norms(madry(model, linf(0.1)))
    found = train(method=method, num_steps=4, log_every=1)
    rows = [row for row in found.history if row["kind"] == "train"]
    assert all(row["weight_norm"] > 0 and row["gradient_norm"] > 0 for row in rows)
    inner = from_loss(lambda p, e, c, b, s, k: (3.0 * p[0] + 4.0 * p[1], Aux(e, c, {})))
    args = (jnp.array([6.0, 8.0]), {}, (), None, 0, jax.random.key(0))
    _, aux = monitors.with_norms(inner).grads(*args)
    norms = {name: float(mean.total) for name, mean in aux.metrics.items()}
    assert norms == pytest.approx({"weight_norm": 10, "gradient_norm": 5})
    assert monitors.with_norms(awp(method)).stages is None


def test_a_gradient_that_is_not_finite_is_named(train, model):
    def loss(params, extra, carry, batch, step, key):
        # The loss is finite, its gradient is not: the root of 0.
        total = jnp.sqrt(jnp.sum(0.0 * params["bias"] ** 2))
        return total, Aux(extra, carry, {"loss": mean_of(batch.x.sum((1, 2, 3)))})

    method = monitors.with_norms(from_loss(loss))
    with pytest.raises(FloatingPointError, match="metrics/gradient_norm"):
        train(method=method, num_steps=4)


def test_examples_are_checked():
    params, x, y = lines()
    with pytest.raises(TypeError, match="uint8; give floats"):
        monitors.accuracies(LINEAR, linf(0.1), (x.astype(np.uint8), y))
    with pytest.raises(TypeError, match="labels are float32; give integers"):
        monitors.smoothness(LINEAR, linf(0.1), (x, y.astype(np.float32)))
    with pytest.raises(ValueError, match=r"outside of the threat's box, \[0, 1\]"):
        monitors.smoothness(LINEAR, linf(0.1), (16 * x, y))
    with pytest.raises(ValueError, match="50 inputs and 3 labels"):
        monitors.accuracies(LINEAR, linf(0.1), (x, y[:3]))
    both = monitors.together(*[lambda p, e: {"a": 1.0}] * 2)
    with pytest.raises(ValueError, match="two monitors return 'a'"):
        both({}, {})


def test_monitors_join_in_a_run(train, model, data):
    digits = load("digits")
    x = digits.x_train[:32].astype(np.float32) / digits.max_value
    examples = (x, digits.y_train[:32])
    threat = linf(0.05)
    found = train(
        method=madry(model, threat),
        validate=monitors.together(
            monitors.overfitting(model, threat, examples, examples),
            monitors.smoothness(model, threat, examples),
            monitors.catastrophic_overfitting(model, threat, examples, "restore"),
        ),
    )
    names = {"clean_accuracy", "robust_gap", "nonlinearity", "collapsed", "stop"}
    assert names <= set(found.metrics) and found.metrics["robust_gap"] == 0
