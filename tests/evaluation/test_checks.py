"""Bad inputs raise by name; bad models are flagged and the evaluation goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax.certify.bracket import bracket
from robustjax.evaluation import checks
from robustjax.evaluation.curves import minimal_norm_curve, sweep_curve

X = np.random.default_rng(0).uniform(size=(8, 5)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def linear(x):
    return x @ jnp.asarray(W)


Y = np.asarray(linear(X)).argmax(1)
THREAT = rj.linf(0.1)


def _with(value, position=(2, 1)):
    x = X.copy()
    x[position] = value
    return x


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": _with(np.nan)}, ValueError, r"x holds NaN .* first in example 2"),
        ({"x": _with(np.inf)}, ValueError, "x holds NaN or infinite values in 1 of 8"),
        ({"x": np.floor(255 * X)}, ValueError, "divide by 255"),
        ({"x": (255 * X).astype(np.uint8)}, ValueError, "divide by 255"),
        ({"x": X * 4 - 2}, ValueError, "outside the box .* normalization"),
        ({"x": X[0]}, ValueError, r"for one example x\[None\]"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "there is no example"),
        ({"x": np.array([["a"]])}, TypeError, "x has dtype"),
        ({"y": Y.astype(float)}, TypeError, "labels are integers"),
        ({"y": np.eye(3)[Y]}, ValueError, r"y.argmax\(axis=-1\)"),
        ({"y": Y[:5]}, ValueError, "x has 8 examples"),
        (
            {"y": np.arange(8) % 4},
            ValueError,
            "y holds label 3, but the model has 3 classes",
        ),
        ({"y": np.arange(8) % 4 - 1}, ValueError, "y holds -1"),
        ({"threat": 0.1}, TypeError, "threat=0.1 is no ThreatModel"),
        ({"threat": rj.ThreatModel(rj.Linf(), -0.1)}, ValueError, "epsilon=-0.1"),
        ({"threat": rj.ThreatModel(rj.Linf(), np.nan)}, ValueError, "epsilon=nan"),
        ({"threat": rj.linf(np.ones(3))}, ValueError, r"epsilon has shape \(3,\)"),
        ({"threat": rj.ThreatModel(rj.L2(), 1, 2, 1)}, ValueError, "box .* is empty"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"index": np.arange(3)}, ValueError, r"index has shape \(3,\)"),
        ({"key": 7}, TypeError, r"pass jax.random.key\(7\)"),
        ({"logits_fn": lambda x: x[:, 0]}, ValueError, r"returned shape \(8,\)"),
        ({"logits_fn": lambda x: x[:, :1]}, ValueError, "returned 1 column"),
        ({"logits_fn": "net"}, TypeError, "logits_fn is a str"),
    ],
)
def test_bad_inputs(changes, error, message):
    arguments = {"logits_fn": linear, "x": X, "y": Y, "threat": THREAT} | changes
    with pytest.raises(error, match=message):
        rj.attack(**arguments)
    with pytest.raises(error, match=message):
        rj.evaluate(**arguments, progress=False)


def _ones(*shape):
    return np.ones(shape, np.float32)


CHW = np.full((4, 3, 8, 8), 0.5, np.float32)


@pytest.mark.parametrize(
    ("x", "box", "message"),
    [
        (X, {"upper": _ones(8, 5)}, r"upper has shape \(8, 5\), .* x \(5,\).*batch"),
        (X, {"upper": _ones(1, 5)}, r"upper has shape \(1, 5\), and one example"),
        (X, {"upper": _ones(3)}, r"upper has shape \(3,\).* array of shape \(5,\)"),
        (X, {"lower": 0 * _ones(3)}, r"threat.lower has shape \(3,\)"),
        (CHW, {"upper": _ones(3)}, r"x \(3, 8, 8\).* for CHW images \[C, 1, 1\]"),
        (CHW, {"lower": 0 * _ones(3)}, r"lower has shape \(3,\).* \[C, 1, 1\]"),
    ],
)
def test_a_box_that_does_not_fit_an_example(x, box, message):
    y, threat = Y[: len(x)], rj.linf(0.1, **box)

    def pooled(x):  # nothing is asked of it
        return linear(x[:, 0, 0, :5] if x.ndim == 4 else x)

    calls = (
        lambda: rj.attack(pooled, x, y, threat),
        lambda: rj.evaluate(pooled, x, y, threat, progress=False),
        lambda: minimal_norm_curve(pooled, x, y, threat),
        lambda: sweep_curve(pooled, x, y, threat, [0.1]),
        lambda: bracket(pooled, x, y, threat),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_boxes_that_fit_an_example():
    for shape in ((), (5,), (1,)):
        checks.check_inputs(X, Y, rj.linf(0.1, upper=np.ones(shape)))
    for shape in ((3, 1, 1), (3, 8, 8), (1, 1, 1), (8,), ()):
        checks.check_inputs(CHW, Y[:4], rj.linf(0.1, upper=np.ones(shape)))
    checks.check_inputs(CHW.transpose(0, 2, 3, 1), Y[:4], rj.linf(0.1, upper=_ones(3)))


def test_epsilon_and_norm_are_checked_when_a_threat_is_built():
    with pytest.raises(ValueError, match="epsilon"):
        rj.linf(-0.1)
    with pytest.raises(ValueError, match="L3"):
        rj.threat("L3", 0.1)


def test_a_budget_wider_than_the_box_is_doubted():
    per_example = np.full(8, 0.1)
    per_example[3] = 2
    for threat, shown in ((rj.linf(8), "8"), (rj.linf(per_example), "2")):
        message = f"epsilon={shown} under Linf is wider .* \\[0, 1\\].*{shown}/255"
        with pytest.warns(UserWarning, match=message):
            rj.attack(linear, X, Y, threat)
        with pytest.warns(UserWarning, match=message):
            checks.check_inputs(X, Y, threat)  # what evaluate calls
    # Warnings are errors here: none of these is doubted.
    for threat in (
        rj.linf(np.inf),
        rj.linf(1.0),
        rj.linf(8, lower=0, upper=255),
        rj.linf(0.5, lower=(0.0, 0, 0, 0, 0), upper=(0.4, 1, 1, 1, 1)),
        rj.l2(8),
        rj.l1(12),
        rj.l0(3),
    ):
        checks.check_inputs(np.clip(X, 0, 0.4), Y, threat)


def test_flags_are_loud():
    with pytest.warns(rj.ModelWarning, match="before softmax"):
        rj.evaluate(
            lambda x: jax.nn.softmax(linear(x)),
            *(X, Y, THREAT),
            suite=("apgd-ce",),
            progress=False,
        )
