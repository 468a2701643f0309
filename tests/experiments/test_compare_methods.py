"""experiments.compare_methods: budgets, the table's arithmetic, a tiny run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from experiments import compare_methods as experiment
from experiments import comparison, contestants
from experiments.contestants import CONTESTANTS, MULTINORM, Setting, chosen
from robustjax.models import Model
from robustjax.training import monitors
from robustjax.types import Batch
from tests.experiments import schema

TINY = {"num_train": 32, "num_test": 8, "num_monitored": 4, "batch_size": 16}


@pytest.fixture
def quick_evaluation(monkeypatch):
    """APGD alone, in place of the fast suite, whose programs take 6 s to compile."""

    def quickly(*arguments, suite, **options):
        assert suite == "fast"
        return evaluate(*arguments, suite=("apgd-ce",), checks="none", **options)

    evaluate = rj.evaluate
    monkeypatch.setattr(rj, "evaluate", quickly)


def tiny(tmp_path, **more):
    return experiment.Config(out=str(tmp_path), **{**TINY, **more})


def test_every_method_spends_the_budget_up_to_one_update(tmp_path):
    config = tiny(tmp_path, num_train=1000, gradients_per_image=37)
    task = experiment.prepare(config)
    assert task.budget == 37_000
    for name, one in CONTESTANTS.items():
        updates = experiment.updates(name, task)
        left = 37_000 - updates * one.gradients * 16
        assert 0 <= left < one.gradients * 16 * one.multiple, name
        assert updates % one.multiple == 0
    assert experiment.updates("madry", task) == 37_000 // (8 * 16)
    poor = task._replace(budget=100.0)
    with pytest.raises(
        ValueError, match=r"but madry takes 128 at once; give 1.28 times"
    ):
        experiment.updates("madry", poor)


def test_what_versions_changed_is_in_the_rows(monkeypatch):
    settings = {}
    for name in ("fast", "nfgsm", "msd"):
        monkeypatch.setattr(
            contestants, name, lambda *a, name=name, **k: settings.update({name: k})
        )
        threats = {n: rj.threat(n, 1.0) for n in ("Linf", "L2", "L1")}
        CONTESTANTS[name].build(Setting(Model(None, None), threats, 8, 1.0))
    assert settings["fast"] == settings["nfgsm"] == {"bn_mode": "eval"}
    msd = settings["msd"]
    assert msd["num_steps"] == 7 and round(msd["density"] * 784) == 12
    np.testing.assert_allclose(np.array(msd["step_sizes"]) * 7, [2.5, 3.75, 7.5])


def test_flags_that_make_no_sense_are_refused(tmp_path):
    for changes, message in (
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"num_seen": 0}, "num_seen is 0; give 1 or more"),
        ({"num_test": -3}, "num_test is -3; give 1 or more"),
        ({"num_train": 0}, "num_train is 0; give 1 or more"),
        ({"clip_norm": float("nan")}, "clip_norm is nan; give more than 0"),
        ({"gradients_per_image": float("inf")}, "gradients_per_image is inf"),
        ({"seeds": (1, 0, 1)}, r"seeds is \(1, 0, 1\); give each once"),
    ):
        with pytest.raises(ValueError, match=message):
            experiment.main(tiny(tmp_path, **changes))


def test_names_are_checked_and_groups_expand():
    assert chosen(()) == list(CONTESTANTS)
    assert chosen(("multinorm", "madry")) == ["madry", *MULTINORM]
    with pytest.raises(
        ValueError, match="methods has 'pgd'; choose among multinorm, st"
    ):
        chosen(("pgd",))


def run(clean, robust, seed=0):
    """What one training and its judgment leave."""
    numbers = dict.fromkeys(
        ("updates", "gradients", "group", "epochs", "collapsed", "seconds"), 1.0
    )
    right = {"clean": np.array(clean, bool), "Linf": np.array(robust, bool)}
    return {**numbers, "seed": seed, "cpu_seconds": 2.0, "flags": [], "right": right}


def test_a_summary_is_that_of_the_seeds():
    rows = {
        "madry": [run([1, 1, 1, 0], [1, 0, 0, 0]), run([1, 1, 1, 1], [1, 1, 0, 0], 1)],
        "trades": [run([1, 1, 0, 0], [1, 1, 0, 0]), run([1, 1, 1, 0], [1, 1, 1, 1], 1)],
    }
    found = comparison.summarize("trades", rows)
    assert found["accuracy"] == {"clean": 0.625, "Linf": 0.75}
    assert found["per_seed"]["Linf"].tolist() == [0.5, 1.0]
    each = np.array([0, 0.5, 0.5, 0.5])  # the images' mean differences over the seeds
    assert found["minus_yardstick"] == each.mean()
    images = 1.96 * each.std(ddof=1) / 2
    seeds = 12.706 * np.std([0.25, 0.5], ddof=1) / 2**0.5  # the quantile for one of two
    half = pytest.approx(np.hypot(images, seeds), rel=1e-4)
    assert found["half_interval"] == half
    alone = comparison.summarize("trades", {**rows, "madry": rows["madry"][:1]})
    assert alone["minus_yardstick"] == 0.25  # what both were trained with: seed 0
    other = 1.96 * np.array([0, 1, 0, 0]).std(ddof=1) / 2
    assert alone["half_interval"] == pytest.approx(other)
    assert "minus_yardstick" not in comparison.summarize("madry", rows)
    claims = comparison.claims_of({"trades": found | {"gradients": 9, "group": 4}}, 12)
    assert claims["equal_budget"].value == 0.75 and claims["equal_budget"].holds
    claims = comparison.claims_of({"trades": found | {"gradients": 8, "group": 4}}, 12)
    assert not claims["equal_budget"].holds


def test_each_number_stands_by_its_own_point():
    """And what crowds near the best row has a panel of its own."""
    names = [name for name, one in CONTESTANTS.items() if not one.union]
    rng = np.random.default_rng(0)
    summary = {}
    for name in names:
        robust = 0.01 if name in ("standard", "clp") else 0.6 + 0.05 * rng.random()
        clean = 0.8 + 0.05 * rng.random()
        seeds = {"clean": np.array([clean]), "Linf": np.array([robust])}
        summary[name] = {"robust": robust, "per_seed": seeds}
    figure = comparison.draw(summary)
    whole, near = figure.axes
    assert {text.get_text() for text in whole.texts} >= {"1", "14"}
    figure.draw_without_rendering()
    numbers = {text.get_text(): text for text in near.texts if text.get_text()}
    assert len(numbers) == len(names) - 2
    points = {
        str(names.index(name) + 1): near.transData.transform(
            (one["per_seed"]["clean"][0], one["per_seed"]["Linf"][0])
        )
        for name, one in summary.items()
        if one["robust"] > 0.5
    }
    for number, text in numbers.items():
        box = text.get_window_extent()
        spot = np.array([box.x0 + box.width / 2, box.y0 + box.height / 2])
        away = {n: np.hypot(*(spot - point)) for n, point in points.items()}
        assert min(away, key=lambda n: away[n]) == number


def test_a_training_that_diverges_is_a_result(tmp_path, monkeypatch):
    def train(task, name, seed, fitted):
        if name == "fast":
            raise FloatingPointError("loss became NaN")
        return None, run([1, 1], [1, 0])

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "judge", lambda *rest: {})
    config = tiny(tmp_path, methods=("madry", "fast"), gradients_per_image=20)
    experiment.main(config)
    found = schema.check(tmp_path)["measurements"]
    assert list(found["methods"]) == ["madry"]
    assert found["failed"] == {"fast, seed 0": "loss became NaN"}
    text = (tmp_path / "table.md").read_text()
    assert "No end: fast, seed 0: loss became NaN" in text
    with pytest.raises(FloatingPointError, match="no training came to its end"):
        experiment.main(tiny(tmp_path, methods=("fast",), gradients_per_image=20))


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_tiny_run_writes_everything_and_computes_nothing_twice(tmp_path, monkeypatch):
    # What is watched has tests of its own; the slow test below watches in earnest.
    watched = {
        "overfitting": {"robust_accuracy": 0.5},
        "catastrophic_overfitting": {"collapsed": 0.0},
        "smoothness": {},
    }
    for name, numbers in watched.items():
        monitor = lambda params, extra, numbers=numbers: numbers  # noqa: E731
        monkeypatch.setattr(monitors, name, lambda *rest, m=monitor: m)
    config = tiny(tmp_path, methods=("standard", "fast"), gradients_per_image=8)
    experiment.main(config)
    first = schema.check(tmp_path)["measurements"]["methods"]
    assert list(first) == ["standard", "fast"]
    for one in first.values():
        assert one["gradients"] == 256 and one["cpu_seconds"] > 0
        assert 0 <= one["accuracy"]["Linf"] <= one["accuracy"]["clean"] <= 1
    curves = tmp_path / "nets" / f"{experiment.versioned('fast')}_0" / "curves.png"
    assert curves.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "table.md").read_text()
    assert "| fast" in text and "(2001.03994) |" in text
    monkeypatch.setattr(rj, "evaluate", None)  # a call would fail
    # As another version would compile it: what is finished stays.
    other = {"compiler_options": {"xla_cpu_enable_fast_math": False}}
    monkeypatch.setattr(experiment.machine, "step_options", lambda: other)
    experiment.main(config)
    again = schema.check(tmp_path)["measurements"]["methods"]
    assert again == first


COUNTS = []


@jax.custom_vjp
def counted(logits):
    """The identity; its backward pass notes how many rows went through it."""
    return logits


def count_rows(_, slope):
    jax.debug.callback(lambda slope: COUNTS.append(len(slope)), slope)
    return (slope,)


counted.defvjp(lambda logits: (logits, None), count_rows)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("name", CONTESTANTS)
def test_an_update_costs_what_the_table_says(name):
    """Backward passes, counted as they run, in a linear model."""

    def apply(params, extra, x, *, train=False, key=None):
        return counted(x.reshape(len(x), -1) @ params), extra

    model = Model(lambda key, x: (jnp.ones((16, 3)), {}), apply)
    threats = {"Linf": rj.linf(0.1), "L2": rj.l2(0.3), "L1": rj.l1(1.0)}
    one = CONTESTANTS[name]
    setting = Setting(model, threats, 8, 2.0, lambda x: x.reshape(len(x), -1)[:, :3])
    method = one.build(setting)
    rng = np.random.default_rng(0)

    def batch(rows, streams=None):
        x = jnp.asarray(rng.uniform(size=(rows, 4, 4, 1)), jnp.float32)
        return Batch(x, jnp.arange(rows) % 3, jnp.arange(rows), None, streams)

    rows = batch(2, {"generated": batch(2)}) if one.stream else batch(4)
    params = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    carry = method.init(params, rows)
    grads = jax.jit(method.grads)
    steps = range(one.multiple if method.repeats == 1 else 1)
    COUNTS.clear()
    for step in steps:
        grads(params, {}, carry, rows, jnp.int32(step), jax.random.key(step))
    jax.effects_barrier()
    # JAX differentiates a gradient's own code, so its derivative is not counted here.
    twice = 1 if name in ("gradalign", "gradient_penalty") else 0
    assert sum(COUNTS) / 4 / len(steps) == one.gradients - twice


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_every_method_runs(tmp_path):
    experiment.main(tiny(tmp_path, num_train=128, gradients_per_image=40))
    results = schema.check(tmp_path)
    found = results["measurements"]["methods"]
    assert list(found) == list(CONTESTANTS)
    assert results["claims"]["equal_budget"]["holds"]
    for name in MULTINORM:
        accuracy = found[name]["accuracy"]
        assert accuracy["union"] <= min(accuracy[n] for n in ("Linf", "L2", "L1"))
