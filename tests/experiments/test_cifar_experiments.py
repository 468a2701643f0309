"""The experiments of training methods on CIFAR-10: flags, published settings, runs."""

import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from experiments import (
    awp_cifar,
    common,
    evaluate,
    fast_cifar,
    free_cifar,
    generated_data_cifar,
    gradalign_cifar,
    hat_cifar,
    imagenet_fast,
    mart_cifar,
    multinorm_cifar,
    nfgsm_cifar,
    recipe,
    trades_cifar,
    watching,
)
from experiments.machine import Machine
from robustjax import models
from robustjax.types import Batch
from tests.experiments.test_experiments import write_images

MODULES = [
    *(fast_cifar, nfgsm_cifar, gradalign_cifar, free_cifar),
    *(trades_cifar, mart_cifar, awp_cifar, hat_cifar),
    *(multinorm_cifar, generated_data_cifar),
]
SINGLE_STEP = [fast_cifar, nfgsm_cifar, gradalign_cifar, free_cifar]
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
    "machine": Machine(num_devices=1),
}
NUM_TRAIN = 50_000 - 1_000


def named(modules):
    return [pytest.param(m, id=m.__name__.split(".")[1]) for m in modules]


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


def names_of(config):
    """The fields of a config and of what it contains."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inside = dataclasses.is_dataclass(value)
        yield from names_of(value) if inside else [field.name]


def read(path):
    return json.loads(path.read_text())


def rates(module, steps, preset="paper", repeats=1, num_train=NUM_TRAIN):
    """A preset's learning rates at fractions of its training, and its length."""
    given = module.PRESETS[preset].recipe
    length, per_epoch = recipe.length(given, num_train)
    rate = recipe.schedule(given, length * repeats, per_epoch * repeats)
    return [float(rate(round(step * length * repeats))) for step in steps]


@pytest.mark.parametrize("module", named([*MODULES, imagenet_fast]))
def test_flags_are_flat_and_a_misspelt_one_is_an_error(module, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse(module.PRESETS, module.__doc__, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m {module.__name__} " in text
    for name in names_of(module.Config()):
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
    late = [(74 * 382 - 1) / (76 * 382), 74 / 76, 1]  # epochs count from 1
    np.testing.assert_allclose(rates(trades_cifar, late), [0.1, 0.01, 0.01], rtol=1e-5)

    mart, wide = mart_cifar.PRESETS["paper"], mart_cifar.PRESETS["wide"]
    for config, beta, decay, epochs in ((mart, 5, 3.5e-3, 120), (wide, 6, 7e-4, 90)):
        assert (config.beta, config.recipe.weight_decay) == (beta, decay)
        assert config.recipe.num_epochs == epochs
        assert config.attack_step_size * float(config.recipe.epsilon) == 0.007
    late = [0, 74 / 120, 89 / 120, 99 / 120]
    steps = [1e-2, 1e-3, 1e-4, 1e-5]
    np.testing.assert_allclose(rates(mart_cifar, late), steps, rtol=1e-5)
    late = rates(mart_cifar, [0, 74 / 90, 89 / 90], "wide")
    np.testing.assert_allclose(late, [0.1, 0.01, 0.001], rtol=1e-5)

    halves = [0.499, 0.5, 0.75], [(99 * 382 - 1) / (200 * 382), 99 / 200, 149 / 200]
    for name, on, warmup, late in (
        ("paper", "madry", 0, halves[0]),
        ("trades", "trades", 9, halves[1]),
    ):
        config = awp_cifar.PRESETS[name]
        assert (config.on, config.num_warmup, config.gamma) == (on, warmup, None)
        assert (config.attack_steps, config.attack_step_size * 8) == (10, 2)
        assert (config.recipe.num_epochs, config.recipe.weight_decay) == (200, 5e-4)
        found = rates(awp_cifar, late, name)
        np.testing.assert_allclose(found, [0.1, 0.01, 0.001], rtol=1e-5)
    assert awp_cifar.GAMMA == {"madry": 0.01, "trades": 0.005}

    free = free_cifar.PRESETS["paper"]
    assert (free.repeats, free.recipe.num_steps, free.step_size) == (8, 10_000, 1)
    updates = [39_999 / 80_000, 0.5, 0.75]
    found = rates(free_cifar, updates, repeats=8)
    np.testing.assert_allclose(found, [0.1, 0.01, 0.001], rtol=1e-5)

    aligned = gradalign_cifar.PRESETS["paper"]
    assert (aligned.strength, aligned.step_size) == (0.2, 1.25)
    found = rates(gradalign_cifar, [0, 0.2, 0.4, 0.7, 1])
    np.testing.assert_allclose(found, [0, 0.15, 0.3, 0.15, 0], atol=2e-4)

    hat = hat_cifar.PRESETS["paper"]
    assert (hat.beta, hat.gamma, hat.reach, hat.helper_epochs) == (2.5, 0.5, 2, 50)
    assert (hat.attack_steps, hat.attack_step_size * 8) == (10, 2)
    assert hat.recipe.nesterov
    found = rates(hat_cifar, [0, 0.25, 0.625, 1])
    np.testing.assert_allclose(found, [0.0084, 0.21, 0.105, 0], atol=1e-4)

    union = multinorm_cifar.PRESETS["paper"]
    sizes = np.multiply(union.step_sizes, (0.03, 0.3, 12))
    np.testing.assert_allclose(sizes, [0.003, 0.05, 1])
    assert (union.recipe.epsilon, union.trained_l2) == ("0.03", "0.3")
    assert (union.attack_steps, union.recipe.num_epochs) == (50, 50)
    found = rates(multinorm_cifar, [0, 0.2, 0.4, 0.6, 0.8, 0.9])
    expected = [0, 0.05, 0.1, 0.0525, 0.005, 0.0025]
    np.testing.assert_allclose(found, expected, rtol=1e-3)

    generated = generated_data_cifar.PRESETS["paper"]
    assert (generated.fraction, generated.smoothing, generated.beta) == (0.7, 0.1, 5)
    assert (generated.recipe.batch_size, generated.recipe.ema_decay) == (512, 0.995)
    assert (generated.recipe.depth, generated.recipe.width) == (28, 10)
    assert generated.recipe.num_epochs == 400
    found = rates(generated_data_cifar, [0, 0.025, 1])
    np.testing.assert_allclose(found, [0.008, 0.2, 0], atol=1e-5)
    assert generated.recipe.bn_momentum == 0.99


@pytest.mark.parametrize(
    ("module", "at", "expected"),
    [
        (fast_cifar, (0, 0.25, 0.5, 1), (0.9, 0.85, 0.8, 0.9)),
        (nfgsm_cifar, (0, 0.25, 0.5, 1), (0.9, 0.85, 0.8, 0.9)),
        (hat_cifar, (0, 0.125, 0.25, 0.625, 1), (0.95, 0.9, 0.85, 0.9, 0.95)),
        (generated_data_cifar, (0, 0.025, 1), (0.95, 0.85, 0.95)),
    ],
)
def test_momentum_moves_against_the_rate_as_pytorchs_cycles(module, at, expected):
    """The defaults of CyclicLR and OneCycleLR, which the authors' codes take."""
    given, steps = module.PRESETS["paper"].recipe, 1000
    rate = recipe.schedule(given, steps, 10)
    momentum = recipe.momentum(given, steps, rate)
    found = [float(momentum(part * steps)) for part in at]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_two_momenta_need_a_cycle():
    given = recipe.Recipe("x", momentum=(0.9, 0.8), schedule="cosine")
    with pytest.raises(ValueError, match=r"momentum is \(0.9, 0.8\) .*'cosine'; give"):
        recipe.momentum(given, 10, lambda step: 0.1)
    assert recipe.momentum(recipe.Recipe("x"), 10, lambda step: 0.1) == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": (1, 2)}, r"boundaries is \(1, 2\), .*'one_cycle' does not use"),
        (
            {"values": (1.0,), "schedule": "piecewise"},
            r"values is \(1.0,\), .* or --schedule linear",
        ),
        (
            {"model": "resnet18", "activation": "silu"},
            "activation is 'silu', but resnet18 has ReLU",
        ),
        ({"num_steps": 0}, "num_steps is 0; give 1 or more"),
        ({"num_epochs": 0}, "num_epochs is 0; give 1 or more"),
    ],
)
def test_flags_that_would_change_nothing_or_train_nothing_are_refused(changes, message):
    given = recipe.Recipe("x", **changes)
    with pytest.raises(ValueError, match=message):
        recipe.check_used(given)
        recipe.length(given, 1000)


def test_every_preset_uses_its_flags():
    for module in MODULES:
        for config in module.PRESETS.values():
            recipe.check_used(config.recipe)


def test_a_suite_goes_on_from_its_ledger(tmp_path, monkeypatch):
    """One for each question: checkpoint, number of images, devices."""
    asked = []

    class Report:
        def summary(self):
            return {}

    monkeypatch.setattr(
        recipe.rj,
        "evaluate",
        lambda *of, **how: asked.append(how["resume"]) or Report(),
    )
    monkeypatch.setattr(recipe.models, "logits_fn", lambda *of: None)
    ready = recipe.Prepared(
        *(None, common.Splits(None, (), (None, np.zeros(7)), 10, "")), *(None, None)
    )
    trained = recipe.FitResult(None, {}, {}, {"step": 3}, [])
    for suite, devices in ((None, 1), ("fast", 1), ("standard", 4)):
        given = recipe.Recipe(
            str(tmp_path), suite=suite, machine=Machine(num_devices=devices)
        )
        recipe.by_suite(given, ready, trained, None)
    assert all(path.parent == tmp_path / "ledger" for path in asked)
    assert [path.name.split("_code_")[0] for path in asked] == [
        "fast_step_3_images_7_devices_1",
        "standard_step_3_images_7_devices_4",
    ]
    monkeypatch.setattr(recipe, "code_digest", lambda: "of another revision")
    recipe.by_suite(given, ready, trained, None)
    assert asked[-1].name != asked[-2].name


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

    def validator(model, examples, threat, count, mesh=None, prefix=""):
        said = {f"{prefix}clean_accuracy": 0.5, f"{prefix}robust_accuracy": 0.25}
        return lambda *weights: said

    monkeypatch.setattr(watching, "validator", validator)


@pytest.mark.slow  # madry_cifar's attack has one step, too, and its test runs always
@pytest.mark.usefixtures("cheap_validation")
def test_a_single_step_run_is_watched_and_refuses_another(
    tmp_path, capsys, monkeypatch
):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    monkeypatch.setattr(common, "measure", lambda *given, more, **rest: more)
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


@pytest.mark.usefixtures("cheap_validation")
def test_a_run_is_measured_and_read_by_evaluate(tmp_path, capsys):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    results = trades_cifar.main(tiny(trades_cifar, tmp_path, monitors=False))
    written = read(tmp_path / "run" / "results.json")
    assert written["accuracy"] == results["accuracy"]
    assert set(written["accuracy"]) == {"FGSM", "PGD-20"}
    assert 0 <= written["robust_accuracy"] <= written["clean_accuracy"] <= 1
    assert written["config"]["recipe"]["batch_size"] == 16
    assert written["last"]["step"] == 3
    assert "collapsed" not in written["last"]
    _, dataset, trained = evaluate.load_run(tmp_path / "run")
    assert (dataset, trained["depth"], trained["width"]) == ("cifar10", 10, 1)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.usefixtures("cheap_validation")
@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (nfgsm_cifar, {}),
        (gradalign_cifar, {}),
        (free_cifar, {"repeats": 2}),
        (mart_cifar, {}),
        (awp_cifar, {"num_warmup": 1}),
        (awp_cifar, {"on": "trades"}),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_every_method_is_trained(module, changes, tmp_path, capsys, monkeypatch):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    monkeypatch.setattr(common, "measure", lambda *given, more, **rest: (given, more))
    config = tiny(module, tmp_path, monitors=False, **changes)
    given, more = module.main(config)
    assert more["config"] == config
    assert ("collapsed" in more["last"]) == (module in SINGLE_STEP)
    before, _ = given[1].init(jax.random.key(0), np.zeros((1, 32, 32, 3)))
    trained = given[2]
    assert jax.tree.structure(trained.params) == jax.tree.structure(before)
    assert len([r for r in trained.history if r["kind"] == "train"]) == 1
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.quick
def test_several_norms_are_measured_with_their_union(tmp_path, capsys):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    results = multinorm_cifar.main(tiny(multinorm_cifar, tmp_path, attack_steps=1))
    assert set(results["threats"]) == {"Linf", "L2", "L1"}
    each = [found["robust_accuracy"] for found in results["threats"].values()]
    assert results["robust_accuracy"] <= min(each)
    assert results["last"]["input_gradient_norm"] > 0
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    evaluate.load_run(tmp_path / "run")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("preset", "metrics"),
    [
        ("small", {"loss", "accuracy"}),
        ("average", {"accuracy_0", "accuracy_1", "accuracy_2"}),
        ("maximum", {"loss", "accuracy"}),
        ("eat", {"share_0", "share_1"}),
        ("paper", {"loss", "accuracy"}),
    ],
)
def test_the_methods_for_several_norms_are_built(preset, metrics):
    def linear(params, x):
        return x.reshape(len(x), -1)[:, :4] @ params

    model = models.Model(
        lambda key, x: (jnp.ones((4, 3)), {}),
        lambda params, extra, x, *, train=False, key=None: (linear(params, x), extra),
    )
    config = multinorm_cifar.PRESETS[preset]
    method = multinorm_cifar.build(config, model)
    batch = Batch(jnp.full((2, 4, 4, 3), 0.5), jnp.array([0, 1]), jnp.arange(2))
    carry = method.init(jnp.ones((4, 3)), batch)
    grads, aux = jax.eval_shape(
        *(method.grads, jnp.ones((4, 3)), {}, carry, batch, jnp.int32(0)),
        jax.random.key(0),
    )
    assert grads.shape == (4, 3)
    assert metrics <= set(aux.metrics)


@pytest.mark.parametrize("name", ["average", "maximum"])
@pytest.mark.parametrize("sizes", [(), (0.5, 0.5, 0.5)])
def test_several_norms_are_learned_by_apgd_under_l1(name, sizes, monkeypatch):
    calls = []
    monkeypatch.setattr(multinorm_cifar, "apgd_training", lambda n: f"APGD-{n}")
    monkeypatch.setattr(multinorm_cifar, name, lambda *a, **k: calls.append(a))
    config = dataclasses.replace(multinorm_cifar.PRESETS[name], step_sizes=sizes)
    multinorm_cifar.build(config, None)
    [(_, threats, attacks)] = calls
    by_apgd = [t.norm for t, a in zip(threats, attacks, strict=True) if a == "APGD-3"]
    assert by_apgd == ([] if sizes else [rj.l1(12).norm])


def test_step_sizes_are_one_for_each_norm():
    config = dataclasses.replace(multinorm_cifar.Config(), step_sizes=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"step_sizes=\(0.1, 0.2\)"):
        multinorm_cifar.build(config, None)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.usefixtures("cheap_validation")
@pytest.mark.parametrize("source", ["self", "file"])
def test_generated_images_join_every_batch(source, tmp_path, capsys, monkeypatch):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    monkeypatch.setattr(common, "measure", lambda *given, more, **rest: more)
    path = source
    if source == "file":
        path = str(tmp_path / "generated.npz")
        image = np.zeros((40, 32, 32, 3), np.uint8)
        np.savez(path, image=image, label=np.arange(40) % 10)
    changes = {"generated": path, "num_held_back": 30, "monitors": False}
    changes["teacher_epochs"] = 1
    config = tiny(generated_data_cifar, tmp_path, **changes)
    more = generated_data_cifar.main(config)
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    if source == "self":
        assert 0 <= more["labels_right"] <= 1
        assert (tmp_path / "run" / "teacher" / "config.json").exists()
        (tmp_path / "run" / "teacher").rename(tmp_path / "run" / "earlier")
        config = dataclasses.replace(config, num_held_back=20)
    else:
        np.savez(path, image=image + 1, label=np.arange(40) % 10)
    with pytest.raises(ValueError, match=r"data\."):  # other images: another run
        generated_data_cifar.main(config)
    capsys.readouterr()


def test_absent_or_foreign_generated_images_are_refused(tmp_path):
    config = generated_data_cifar.Config()
    with pytest.raises(FileNotFoundError, match="--generated self"):
        generated_data_cifar.main(config)
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="must hold image and label"):
        generated_data_cifar.read(str(path))
    np.savez(path, image=np.zeros((3, 8, 8, 3)), label=np.zeros(3))
    with pytest.raises(ValueError, match="not uint8 32x32x3"):
        generated_data_cifar.read(str(path))
    image = np.full((3, 32, 32, 3), 200, np.uint8)
    np.savez(path, image=image, label=np.array([1, 2, 77]))
    with pytest.raises(ValueError, match="label goes to 77"):
        generated_data_cifar.read(str(path))


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (generated_data_cifar, {"machine": Machine(4)}, "batch_size 5 cannot"),
        (generated_data_cifar, {"attack_steps": 0}, "num_steps"),
        (generated_data_cifar, {"smoothing": 1.0}, "smoothing"),
        (hat_cifar, {"attack_steps": 0}, "num_steps"),
        (hat_cifar, {"num_attacked": 0}, "num_attacked is 0"),
    ],
)
def test_mistakes_raise_before_the_helper_is_trained(
    module, changes, message, tmp_path, capsys
):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    if module is generated_data_cifar:
        mixed = {"generated": "self", "fraction": 0.5, "batch_size": 10}
        changes = {"num_held_back": 30, **mixed, **changes}
    config = tiny(module, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        module.main(config)
    assert not (tmp_path / "run").exists()
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.usefixtures("cheap_validation")
def test_the_helper_is_trained_once(tmp_path, capsys, monkeypatch):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    monkeypatch.setattr(common, "measure", lambda *given, more, **rest: more)
    config = tiny(hat_cifar, tmp_path, monitors=False, helper_epochs=1)
    hat_cifar.main(config)
    helper = tmp_path / "run" / "helper"
    rows = (helper / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="gamma"):
        hat_cifar.main(dataclasses.replace(config, gamma=0.25))
    assert (helper / "metrics.jsonl").read_text() == rows
    assert len(read(helper / "provenance.json")["starts"]) == 2
    capsys.readouterr()


def test_the_first_collapse_and_the_last_epoch_are_reported():
    rows = [{"kind": "train", "step": 5}]
    assert recipe.ending(rows) == {"last": None, "collapsed_after": None}
    rows += [
        {"kind": "validate", "step": 10 * i, "collapsed": float(i > 2)}
        for i in range(1, 5)
    ]
    assert recipe.ending(rows) == {"last": rows[-1], "collapsed_after": 30}
