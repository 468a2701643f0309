"""The experiments run, resume, write what they promise and refuse what is wrong."""

import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from experiments import (
    common,
    evaluate,
    free_cifar,
    generated_data_cifar,
    imagenet_fast,
    machine,
    madry_cifar,
    madry_mnist,
    quickstart,
)
from robustjax import data, models, plots
from robustjax.methods.standard import standard
from robustjax.training.loop import fit
from robustjax.training.optimizers import sgd

EXPERIMENTS = [
    (quickstart, quickstart.Config()),
    (madry_cifar, madry_cifar.PRESETS),
    (madry_mnist, madry_mnist.PRESETS),
    (evaluate, evaluate.Config()),
]
TINY = {"num_steps": 3, "batch_size": 16}
TINY |= {f"num_{images}": 20 for images in ("validation", "attacked", "monitored")}
KINDS = ("train", "validate")


def write_images(folder, name, shape, num_train=100, num_test=12):
    """Random images whose mean tells the class: enough to run, nothing to learn."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", num_train), ("test", num_test)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"y_{split}"] = np.arange(count, dtype=np.uint8) % 10
    np.savez(folder / f"{name}.npz", **arrays)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(("module", "default"), EXPERIMENTS, ids=lambda v: str(v)[:40])
def test_help_names_every_field_and_the_command(module, default, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse(default, module.__doc__, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m {module.__name__} " in text
    fields = dataclasses.fields(module.Config)
    if any(field.name == "machine" for field in fields):  # its flags are flat
        fields += dataclasses.fields(machine.Machine)
    for field in fields:
        assert "--" + field.name.replace("_", "-") in text or field.name == "machine"


@pytest.mark.parametrize(("module", "default"), EXPERIMENTS, ids=lambda v: str(v)[:40])
def test_misspelt_flag_is_an_error_with_a_hint(module, default, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse(default, module.__doc__, ["--num-tests", "3"])
    assert stop.value.code != 0
    text = capsys.readouterr().err
    assert "--num-tests" in text
    assert "--num-test " in text


def test_preset_sets_defaults_and_flags_override_them():
    parse = madry_cifar.PRESETS, madry_cifar.__doc__
    assert common.parse(*parse, []) == madry_cifar.Config()
    config = common.parse(*parse, ["--preset", "code", "--seed", "3"])
    assert config.preset == "code"
    assert (config.attack_steps, config.num_steps, config.seed) == (10, 80_000, 3)
    assert common.parse(*parse, ["--preset=paper"]).attack_steps == 7
    with pytest.raises(SystemExit):
        common.parse(*parse, ["--preset", "papr"])


def test_what_measures_or_tells_a_path_may_change_on_resume():
    for config, changes in (
        (imagenet_fast.Config(), {"test_batch_size": 10}),
        (generated_data_cifar.Config(), {"generated": "moved.npz"}),
    ):
        changed = dataclasses.replace(config, **changes)
        assert changed != config
        assert common.training_part(changed) == common.training_part(config)


@pytest.mark.parametrize("module", [madry_cifar, madry_mnist, free_cifar])
def test_epochs_that_would_change_nothing_are_refused(module):
    parse = module.PRESETS, module.__doc__
    paper = ["--preset", "paper"]
    preset = getattr(module.PRESETS["paper"], "recipe", module.PRESETS["paper"])
    for flag in (["--num-epochs", "2"], ["--num-epochs=2"], ["--num_epochs", "2"]):
        with pytest.raises(SystemExit, match=f"{preset.num_steps:,} steps"):
            common.parse(*parse, [*paper, *flag])
    config = common.parse(*parse, [*paper, "--num-epochs", "2", "--num-steps", "None"])
    config = getattr(config, "recipe", config)
    assert (config.num_epochs, config.num_steps) == (2, None)
    common.parse(*parse, ["--num-epochs", "2"])  # this preset counts epochs


@pytest.mark.parametrize(("module", "default"), EXPERIMENTS, ids=lambda v: str(v)[:40])
def test_configs_are_frozen_and_hold_plain_values_only(module, default):
    config = module.Config()
    plain = (int, float, str, type(None))
    for name, value in dataclasses.asdict(config).items():
        if name == "machine":
            value = value.values()
        assert isinstance(value, plain) or all(isinstance(v, plain) for v in value)
        assert name in typing.get_type_hints(module.Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.out = "elsewhere"


def test_paper_presets_are_the_published_rows():
    paper, code = madry_cifar.PRESETS["paper"], madry_cifar.PRESETS["code"]
    for config, steps in ((paper, 7), (code, 10)):
        assert config.attack_steps == steps
        assert config.attack_step_size * 8 == 2  # of 255
        assert (config.num_steps, config.batch_size) == (80_000, 128)
        assert (config.weight_decay, config.decay) == (2e-4, "kernels")
        rate = common.learning_rate(config.schedule, config.learning_rate, 80_000)
        got = [float(rate(step)) for step in (0, 39_999, 40_000, 60_000)]
        np.testing.assert_allclose(got, [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
    mnist = madry_mnist.PRESETS["paper"]
    assert (mnist.attack_steps, mnist.num_steps, mnist.batch_size) == (40, 100_000, 50)
    assert mnist.attack_step_size * 0.3 == pytest.approx(0.01)
    assert mnist.learning_rate == 1e-4


def test_quickstart_writes_its_results_and_pictures(tmp_path, capsys):
    config = quickstart.Config(
        out=str(tmp_path),
        num_epochs=1,
        attack_steps=1,
        test_steps=2,
        num_restarts=1,
        num_test=20,
    )
    results = quickstart.main(config)
    written = read(tmp_path / "results.json")
    for net in ("standard", "madry"):
        assert set(written[net]["robust_accuracy"]) == {"Linf", "L2", "L1"}
        assert written[net] == results[net]
        for value in written[net]["robust_accuracy"].values():
            assert 0 <= value <= written[net]["clean_accuracy"] <= 1
    curves = ("standard/curves", "madry/curves")
    for name in ("accuracy", "examples", "quickstart", *curves):
        head = (tmp_path / f"{name}.png").read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "random noise" in printed and "PGD" in printed

    # evaluate reads the run.
    report = evaluate.main(
        evaluate.Config(
            run=str(tmp_path / "madry"),
            norms=("Linf", "L0"),
            attacks=("FGSM", "PGD"),
            num_steps=2,
            num_test=20,
            batch_size=20,
            checks="none",
        )
    )
    assert set(report["threats"]) == {"Linf", "L0"}
    assert report["clean_accuracy"] == pytest.approx(results["madry"]["clean_accuracy"])
    with np.load(tmp_path / "madry" / "evaluation" / "examples.npz") as arrays:
        assert arrays["L0/x_adv"].shape == (20, 8, 8, 1)
        robust = arrays["Linf/robust"].mean()
    assert robust == pytest.approx(report["threats"]["Linf"]["robust_accuracy"])


@pytest.mark.usefixtures("without_doctor")
def test_madry_cifar_trains_reports_and_refuses_another_run(tmp_path, capsys):
    write_images(tmp_path, "cifar10", (32, 32, 3))
    out = tmp_path / "run"
    config = madry_cifar.Config(
        out=str(out),
        data_dir=str(tmp_path),
        model="wide_resnet",
        depth=10,
        width=1,
        num_test=12,
        **TINY,
    )
    results = madry_cifar.main(config)
    written = read(out / "results.json")
    assert set(written["accuracy"]) == {"FGSM", "PGD-20"}
    assert written["accuracy"] == results["accuracy"]
    assert written["epsilon"] == pytest.approx(8 / 255)
    assert "80 learned from, 20 held out" in written["data"]
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    train, seen = ({n for row in rows if row["kind"] == k for n in row} for k in KINDS)
    assert {"weight_norm", "gradient_norm"} <= train
    # Its attack has one step: that collapses, too.
    assert {"collapsed", "robust_gap", "alignment", "input_gradient_norm"} <= seen
    with pytest.raises(ValueError, match="weight_decay"):
        madry_cifar.main(dataclasses.replace(config, weight_decay=0.5))
    capsys.readouterr()


@pytest.mark.slow  # as madry_cifar, whose run stands above
@pytest.mark.quick
@pytest.mark.usefixtures("without_doctor")
def test_madry_mnist_trains_reports_and_takes_a_run_up_again(
    tmp_path, capsys, monkeypatch
):
    write_images(tmp_path, "fashion_mnist", (28, 28, 1))
    config = madry_mnist.Config(
        dataset="fashion_mnist",
        out=str(tmp_path / "run"),
        data_dir=str(tmp_path),
        num_test=12,
        **TINY,
    )
    results = madry_mnist.main(config)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["epsilon"] == pytest.approx(0.1)
    assert set(results["accuracy"]) == {"FGSM", "PGD-40"}
    assert results["robust_accuracy"] <= results["clean_accuracy"]
    # A finished run only measures again: the same weights.
    monkeypatch.setattr(common, "measure", lambda *given, **more: given[2].metrics)
    assert madry_mnist.main(config) == results["checkpoint"]
    assert len(read(tmp_path / "run" / "provenance.json")["starts"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("module", [madry_cifar, madry_mnist])
def test_missing_data_says_what_helps(module, tmp_path):
    config = module.Config(data_dir=str(tmp_path), out=str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        module.main(config)


def test_evaluate_refuses_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="--run"):
        evaluate.main(evaluate.Config(run=str(tmp_path)))


def test_evaluate_reads_a_training_of_ones_own(tmp_path, monkeypatch):
    """Flags say what the run's folder does not; without them a message does."""
    (tmp_path / "mynets.py").write_text(
        "from robustjax import models\n"
        "def build():\n"
        "    return models.small_cnn(mean=(0.5,), std=(0.25,))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mynets  # pyright: ignore[reportMissingImports]

    digits = data.load("digits")
    train = data.resident(digits.x_train[:64], digits.y_train[:64], digits.max_value)
    model, out = mynets.build(), tmp_path / "run"
    trained = fit(
        *(jax.random.key(0), model, standard(model), sgd(0.1), train),
        batch_size=16,
        num_steps=4,
        out=out,
        log=False,
    )
    asked = {"run": str(out), "attacks": ("noise",), "num_steps": 1}
    asked |= {"norms": ("Linf",), "num_test": 20, "checks": "none"}
    for given, message in (
        ({}, "model None.*--net MODULE:FUNCTION"),
        ({"dataset": "digits"}, "any other both"),
        ({"net": "mynets:build"}, "--dataset must say"),
        ({"net": "mynets", "dataset": "digits"}, "net is 'mynets': .*MODULE:FUNC"),
        ({"net": "no.nets:build", "dataset": "digits"}, "No module named 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(evaluate.Config(**asked, **given))
    f, _, said = evaluate.load_run(out, net="mynets:build", dataset="digits")
    x = digits.x_test[:20] / np.float32(16)
    expected = models.logits_fn(model, trained.params, trained.extra)(x)
    np.testing.assert_array_equal(f(x), expected)
    assert said["net"] == "mynets:build"
    found = evaluate.main(
        evaluate.Config(**asked, net="mynets:build", dataset="digits")
    )
    right = np.asarray(expected).argmax(-1) == digits.y_test[:20]
    assert found["clean_accuracy"] == pytest.approx(float(right.mean()))


def test_train_steps_are_those_that_the_config_says():
    rate = common.learning_rate("one_cycle", 0.2, 100)
    assert float(rate(40)) == pytest.approx(0.2)
    assert float(rate(100)) == pytest.approx(0.0)
    assert float(common.learning_rate("constant", 0.1, 100)(70)) == pytest.approx(0.1)


def test_pictures_show_color_images_and_several_groups(tmp_path):
    rng = np.random.default_rng(0)
    examples = []
    for title in ("Linf 0.1", "L2 1"):
        x = rng.random((4, 4, 3))
        x_adv = {"one": np.clip(x + 0.1, 0, 1), "two": x}
        answer = {"one": "cat", "two": "dog"}
        examples.append(plots.Attacked(x, "dog", x_adv, answer, title))
    figure = plots.draw_examples(examples)
    images = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(images) == 2 * 5
    np.testing.assert_allclose(images[0], examples[0].x, atol=1e-6)
    np.testing.assert_allclose(images[3], np.full((4, 4, 3), 0.5))  # "two": no change
    plots.save(figure, tmp_path / "examples.png")
    assert (tmp_path / "examples.png").stat().st_size > 1000


def test_curves_have_a_panel_per_threat_and_a_line_per_net():
    curve = plots.Curve([0.0, 0.1], [1.0, 0.4])
    curves = {"Linf": {"a": curve, "b": curve}, "L2": {"a": curve}}
    figure = plots.draw_curves(curves, {"L2": 0.1})
    linf, l2 = figure.axes
    assert [list(line.get_ydata()) for line in linf.get_lines()] == [[1.0, 0.4]] * 2
    assert linf.get_xlabel().startswith("Linf")
    assert len(l2.get_lines()) == 2  # the mark and the one net


def test_attack_all_agrees_with_one_threat_at_a_time():
    w = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    x = jnp.array([[0.6, 0.5], [0.9, 0.1], [0.1, 0.9]])
    y = jnp.array([0, 0, 0])

    def f(x):
        return x @ w

    threats = [rj.linf(0.1), rj.l2(0.1)]
    attack_fn = rj.pgd(5)
    net = jax.tree_util.Partial(f)
    robust, x_adv = quickstart.attack_all(attack_fn, net, x, y, rj.stack(threats))
    assert robust.shape == (2, 3)
    assert x_adv.shape == (2, 3, 2)
    for row, threat in zip(robust, threats, strict=True):
        alone = ~rj.attack(f, x, y, threat, attack_fn).success
        assert row.tolist() == alone.tolist()
    assert robust[0].tolist() == [False, True, False]
