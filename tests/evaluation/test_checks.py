"""Bad inputs raise by name; bad models are flagged and the evaluation goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax.evaluation import checks

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
