"""The experiments of training methods on CIFAR-10: flags, published settings, runs."""

import dataclasses
import json
import typing

import numpy as np
import pytest

from experiments import (
    common,
    evaluate,
    fast_cifar,
    nfgsm_cifar,
    recipe,
    trades_cifar,
)
from tests.experiments.test_experiments import quick_compilation, write_images

__all__ = ["quick_compilation"]

MODULES = [fast_cifar, nfgsm_cifar, trades_cifar]
SINGLE_STEP = [fast_cifar, nfgsm_cifar]
TINY = {
    "model": "wide_resnet",
    "depth": 10,
    "width": 1,
    "num_steps": 3,
    "batch_size": 16,
    "num_validation": 20,
    "num_attacked": 20,
    "num_monitored": 20,
    "num_test": 12,
}
NUM_TRAIN = 50_000 - 1_000


def every(values, slow_but=()):
    """Parameters by the module's name, slow unless named."""
    return [
        pytest.param(
            module,
            id=module.__name__.split(".")[1],
            marks=[] if module in slow_but else pytest.mark.slow,
        )
        for module in values
    ]


def named(modules):
    return every(modules, modules)


def tiny(module, folder, preset="small", **changes):
    """A config whose run takes seconds, on images that `write_images` wrote."""
    config = module.PRESETS[preset]
    small = dataclasses.replace(
        config.recipe, out=str(folder / "run"), data_dir=str(folder), **TINY
    )
    ours = {n: v for n, v in changes.items() if hasattr(config, n)}
    rest = {n: v for n, v in changes.items() if n not in ours}
    return dataclasses.replace(
        config, recipe=dataclasses.replace(small, **rest), **ours
    )


def read(path):
    return json.loads(path.read_text())


def rates(module, steps, preset="paper", repeats=1, num_train=NUM_TRAIN):
    """A preset's learning rates at fractions of its training, and its length."""
    given = module.PRESETS[preset].recipe
    length, per_epoch = recipe.length(given, num_train)
    rate = recipe.schedule(given, length * repeats, per_epoch * repeats)
    return [float(rate(round(step * length * repeats))) for step in steps]


@pytest.mark.parametrize("module", named(MODULES))
def test_flags_are_flat_and_a_misspelt_one_is_an_error(module, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse(module.PRESETS, module.__doc__, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m {module.__name__} " in text
    fields = [f.name for f in dataclasses.fields(module.Config) if f.name != "recipe"]
    for name in [*fields, *(f.name for f in dataclasses.fields(recipe.Recipe))]:
        flag = "--" + name.replace("_", "-")
        assert flag in text or flag.replace("--", "--no-") in text
    with pytest.raises(SystemExit) as stop:
        common.parse(module.PRESETS, module.__doc__, ["--num-tests", "3"])
    assert stop.value.code != 0
    assert "--num-test " in capsys.readouterr().err


@pytest.mark.parametrize("module", named(MODULES))
def test_flags_override_a_preset_whose_config_is_frozen_and_plain(module):
    assert list(module.PRESETS)[0] == "small"
    assert {"small", "paper"} <= set(module.PRESETS)
    assert module.PRESETS["small"] == module.Config()
    outs = {config.recipe.out for config in module.PRESETS.values()}
    assert len(outs) == len(module.PRESETS)
    arguments = ["--preset", "paper", "--seed", "3", "--no-monitors"]
    config = common.parse(module.PRESETS, module.__doc__, arguments)
    expected = module.PRESETS["paper"]
    changed = dataclasses.replace(expected.recipe, seed=3, monitors=False)
    assert config == dataclasses.replace(expected, recipe=changed)
    for name, preset in module.PRESETS.items():
        assert preset.preset == name
        fields = {**dataclasses.asdict(preset), **dataclasses.asdict(preset.recipe)}
        del fields["recipe"]
        for value in fields.values():
            assert json.loads(json.dumps(value)) == (
                list(value) if isinstance(value, tuple) else value
            )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.recipe.out = "elsewhere"
    assert "recipe" in typing.get_type_hints(module.Config)


def test_paper_presets_are_the_published_settings():
    fast = fast_cifar.PRESETS["paper"]
    assert fast.step_size * 8 == 10  # of 255
    assert (fast.recipe.num_epochs, fast.recipe.batch_size) == (15, 128)
    assert fast.recipe.weight_decay == 5e-4
    ramp = [0, 0.1, 0.2, 0.1, 0]
    quarters = (0, 0.25, 0.5, 0.75, 1)
    np.testing.assert_allclose(rates(fast_cifar, quarters), ramp, atol=2e-4)
    collapse = fast_cifar.PRESETS["collapse"].recipe
    assert collapse.epsilon == "16/255"

    noisy = nfgsm_cifar.PRESETS["paper"]
    assert (noisy.noise, noisy.step_size, noisy.recipe.num_epochs) == (2, 1, 30)
    np.testing.assert_allclose(rates(nfgsm_cifar, quarters), ramp, atol=2e-4)

    trades = trades_cifar.PRESETS["paper"]
    assert (trades.beta, trades.attack_steps) == (6, 10)
    assert trades.attack_step_size * float(trades.recipe.epsilon) == 0.007
    assert (trades.recipe.depth, trades.recipe.width) == (34, 10)
    assert trades.recipe.weight_decay == 2e-4
    late = [(75 * 382 - 1) / (76 * 382), 75 / 76, 1]
    np.testing.assert_allclose(rates(trades_cifar, late), [0.1, 0.01, 0.01], rtol=1e-5)


def test_lengths_and_schedules_follow_the_recipe():
    given = recipe.Recipe("x", num_epochs=4, batch_size=10, learning_rate=1.0)
    assert recipe.length(given, 105) == (40, 10)
    assert recipe.length(dataclasses.replace(given, num_steps=7), 105) == (7, 10)

    def at(steps, **changes):
        rate = recipe.schedule(dataclasses.replace(given, **changes), 40, 10)
        return [float(rate(step)) for step in steps]

    np.testing.assert_allclose(at([0, 8, 16, 28]), [0, 0.5, 1, 0.5], atol=1e-6)
    np.testing.assert_allclose(
        at([19, 20, 30], schedule="piecewise"), [1, 0.1, 0.01], rtol=1e-5
    )
    np.testing.assert_allclose(
        at([9, 10, 39], schedule="piecewise", boundaries=(1,)), [1, 0.1, 0.1]
    )
    np.testing.assert_allclose(
        at([2, 4, 22, 40], schedule="cosine", warmup=0.1), [0.5, 1, 0.5, 0], atol=1e-6
    )
    line = {"schedule": "linear", "boundaries": (0, 1, 4), "values": (0, 1, 0.1)}
    np.testing.assert_allclose(at([5, 10, 40], **line), [0.5, 1, 0.1], rtol=1e-6)


@pytest.fixture
def cheap_validation(monkeypatch):
    """`validator` has its test with madry_cifar; it compiles for seconds."""
    said = {"clean_accuracy": 0.5, "robust_accuracy": 0.25}
    monkeypatch.setattr(common, "validator", lambda *given: lambda *weights: said)


@pytest.mark.usefixtures("quick_compilation", "cheap_validation")
def test_a_single_step_run_is_watched_and_refuses_another(
    tmp_path, capsys, monkeypatch
):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    monkeypatch.setattr(common, "measure", lambda *given, more: more)
    config = tiny(fast_cifar, tmp_path)
    results = fast_cifar.main(config)
    last = results["last"]
    assert last["step"] == 3
    assert results["collapsed_after"] == (3 if last["collapsed"] else None)
    gap = last["train_pgd_accuracy"] - last["robust_accuracy"]
    assert last["robust_gap"] == pytest.approx(gap)
    assert last["input_gradient_norm"] > 0
    row = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(row)["gradient_norm"] > 0
    other = dataclasses.replace(config, step_size=1.0)
    with pytest.raises(ValueError, match="step_size"):
        fast_cifar.main(other)
    capsys.readouterr()


@pytest.mark.usefixtures("quick_compilation", "cheap_validation")
@pytest.mark.parametrize("module", every(MODULES, [trades_cifar]))
def test_runs_are_measured_and_read_by_evaluate(module, tmp_path, capsys):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    results = module.main(tiny(module, tmp_path, monitors=False))
    written = read(tmp_path / "run" / "results.json")
    assert written["accuracy"] == results["accuracy"]
    assert set(written["accuracy"]) == {"FGSM", "PGD-20"}
    assert 0 <= written["robust_accuracy"] <= written["clean_accuracy"] <= 1
    assert written["config"]["recipe"]["batch_size"] == 16
    assert written["last"]["step"] == 3
    assert ("collapsed" in written["last"]) == (module in SINGLE_STEP)
    _, dataset, trained = evaluate.load_run(tmp_path / "run")
    assert (dataset, trained["depth"], trained["width"]) == ("cifar10", 10, 1)
    capsys.readouterr()


def test_the_first_collapse_and_the_last_epoch_are_reported():
    rows = [{"kind": "train", "step": 5}]
    assert recipe.ending(rows) == {"last": None, "collapsed_after": None}
    rows += [
        {"kind": "validate", "step": 10 * i, "collapsed": float(i > 2)}
        for i in range(1, 5)
    ]
    assert recipe.ending(rows) == {"last": rows[-1], "collapsed_after": 30}
