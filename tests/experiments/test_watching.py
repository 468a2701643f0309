"""What experiments watch, on a linear model whose accuracies are known."""

import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from experiments import watching
from robustjax import plots
from robustjax.models.base import Model
from robustjax.training.loop import FitResult

PARAMS = jnp.array([[1.0, -1.0]])


def apply(params, extra, x, *, train=False, key=None):
    return (x.reshape(len(x), 1) - 0.5) @ params, extra


MODEL = Model(lambda key, x: (PARAMS, {}), apply)


def examples(distance, count=8):
    """All of class 0, at a distance from the boundary."""
    x = np.full((count, 1, 1, 1), 0.5 + distance, np.float32)
    return x, np.zeros(count, np.int32)


def watched(threat=None, **options):
    far, near = examples(0.2), examples(0.05)
    return watching.watch(
        *(MODEL, rj.linf(0.1) if threat is None else threat, near, far),
        **{"num_attacked": 8, "num_monitored": 4} | options,
    )(PARAMS, {})


def test_both_sides_are_measured_and_their_gap():
    found = watched()
    assert found["clean_accuracy"] == found["train_clean_accuracy"] == 1
    assert found["robust_accuracy"] == 0 and found["train_robust_accuracy"] == 1
    assert found["robust_gap"] == 1 and found["input_gradient_norm"] > 0
    assert "collapsed" not in found


def test_a_single_step_method_is_watched_for_collapse():
    found = watched(on_collapse="restore")
    assert found["train_fgsm_accuracy"] == found["train_pgd_accuracy"] == 1
    assert found["robust_gap"] == 1 and found["collapsed"] == found["stop"] == 0
    assert "train_robust_accuracy" not in found  # the same images, the same attack
    few = watched(on_collapse="warn", everything=False)
    assert set(few) == {
        *("clean_accuracy", "robust_accuracy", "collapsed"),
        *("train_fgsm_accuracy", "train_pgd_accuracy"),
    }


def test_nothing_to_watch_is_refused_at_once():
    for name in ("num_attacked", "num_monitored"):
        with pytest.raises(ValueError, match=f"{name} is 0; give 1 or more"):
            watched(**{name: 0})
    with pytest.raises(ValueError, match=r"0 held-out and 8 .*num_validation"):
        watching.watch(
            *(MODEL, rj.linf(0.1), examples(0.1, 0), examples(0.1)),
            **{"num_attacked": 8, "num_monitored": 4},
        )


def test_of_several_threats_robust_is_who_withstands_every_one():
    threats = {"small": rj.linf(0.01), "large": rj.linf(0.1)}
    found = watched(threats)
    assert found["robust_accuracy"] == 0 and found["robust_gap"] == 1
    assert watched({"small": rj.linf(0.01)})["robust_accuracy"] == 1


@pytest.mark.parametrize("installed", [True, False])
def test_curves_are_kept_and_events_where_tensorboard_is(
    tmp_path, monkeypatch, installed
):
    def events(folder):
        if not installed:
            raise ImportError("the package tensorboard is not installed")
        (folder / "events").touch()

    monkeypatch.setattr(watching, "to_tensorboard", events)
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(path))
    rows = [{"kind": "train", "step": t, "loss": 1.0} for t in (1, 2)]
    watching.keep_curves(tmp_path, FitResult(None, None, None, {}, rows))
    assert drawn == [tmp_path / "curves.png"]
    assert (tmp_path / "events").exists() == installed
