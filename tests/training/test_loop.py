import dataclasses
import io
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.data.resident import batch_at, resident, take, to_float
from robustjax.methods.base import Aux, from_loss
from robustjax.methods.free import free
from robustjax.methods.generated import with_stream
from robustjax.methods.hat import hat
from robustjax.methods.madry import madry, one_step
from robustjax.methods.standard import standard
from robustjax.metrics import mean_of
from robustjax.models.base import Model, logits_fn
from robustjax.parallel import data_mesh, put_global, replicated
from robustjax.threats import linf
from robustjax.training import checkpoint, dispatch
from robustjax.training.optimizers import sgd
from robustjax.training.step import ramped
from robustjax.training.weights import load_weights
from robustjax.types import Batch

ROOT = Path(__file__).parents[2]


def same(first, second) -> bool:
    def numbers(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    pairs = zip(*(jax.tree.leaves(tree) for tree in (first, second)), strict=True)
    return all(np.array_equal(numbers(a), numbers(b)) for a, b in pairs)


def timeless(history):
    times = ("seconds", "images_per_second")
    return [{n: v for n, v in row.items() if n not in times} for row in history]


def rising_then_falling(params, extra):
    """Best at step 8 of 4, 8, 12: `passes` counts the steps."""
    passes = float(extra["passes"])
    return {"robust_accuracy": 1 - abs(passes - 8) / 10, "clean_accuracy": 0.5}


def go_back(out: Path, step: int) -> None:
    """What a kill right after the checkpoint of `step` leaves: later rows, no more."""
    for later in checkpoint.steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(checkpoint.path_of(out / "checkpoints", later))


def test_it_learns_and_the_best_is_kept(train, tmp_path):
    out = tmp_path / "run"
    result = train(validate=rising_then_falling, out=out, num_steps=16)
    losses = [row["loss"] for row in result.history if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert result.metrics == {
        "step": 8,
        "robust_accuracy": 1.0,
        "clean_accuracy": 0.5,
    }
    assert float(result.extra["passes"]) == 8 and int(result.state.step) == 16
    assert checkpoint.steps(out / "checkpoints") == [8, 12, 16]
    best = load_weights(out, (result.params, result.extra))
    assert same(best, (result.params, result.extra))
    last = load_weights(out, (result.params, result.extra), "last")
    assert same(last, (result.state.params, result.state.extra))
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history


def test_without_a_folder_the_best_is_kept_too(train, tmp_path):
    with_folder = train(validate=rising_then_falling, out=tmp_path / "run")
    without = train(validate=rising_then_falling)
    assert same(with_folder.params, without.params)
    assert with_folder.metrics == without.metrics


@pytest.mark.parametrize("per_dispatch", [1, 3])
def test_resumed_is_as_unbroken(train, model, tmp_path, per_dispatch):
    settings = {
        "method": madry(model, linf(0.1), one_step()),
        "validate": rising_then_falling,
        "ema_decay": 0.9,
        "augment": lambda key, x, index: x + jax.random.bernoulli(key, shape=x.shape),
        "steps_per_dispatch": per_dispatch,
        "log_every": 2,
    }
    unbroken = train(out=tmp_path / "unbroken", **settings)
    out = tmp_path / "killed"
    shutil.copytree(tmp_path / "unbroken", out)
    go_back(out, 8)
    resumed = train(out=out, **settings)
    assert same(unbroken.state, resumed.state)
    assert same(unbroken.params, resumed.params)
    assert unbroken.metrics == resumed.metrics
    assert timeless(unbroken.history) == timeless(resumed.history)
    starts = json.loads((out / "provenance.json").read_text())["starts"]
    assert [start["at_step"] for start in starts] == [0, 8]


@pytest.mark.parametrize(
    "at",
    [
        8,
        *(
            pytest.param(n, marks=(pytest.mark.slow, pytest.mark.quick))
            for n in (4, 12)
        ),
    ],
)
def test_what_was_learned_is_kept_where_validate_raises(train, tmp_path, at):
    asked = []

    def mistaken(params, extra):
        asked.append(float(extra["passes"]))
        if asked[-1] == at:
            raise KeyError("a mistake")
        return rising_then_falling(params, extra)

    unbroken = train(out=tmp_path / "unbroken", validate=rising_then_falling)
    out = tmp_path / "run"
    for _ in range(2):  # the same mistake again
        with pytest.raises(KeyError, match="a mistake") as error:
            train(out=out, validate=mistaken)
        assert f"The checkpoint of step {at} is in" in error.value.__notes__[0]
        assert checkpoint.steps(out / "checkpoints")[-1] == at
    with pytest.raises(ValueError, match=r"without the best_metric") as error:
        train(out=out, validate=lambda params, extra: {"accuracy": 1.0})
    assert asked == [*range(4, at + 1, 4), at]
    resumed = train(out=out, validate=rising_then_falling)
    assert same(unbroken.state, resumed.state) and same(unbroken.params, resumed.params)
    assert unbroken.metrics == resumed.metrics
    assert timeless(unbroken.history) == timeless(resumed.history)
    folders = (tmp_path / "unbroken" / "checkpoints", out / "checkpoints")
    assert checkpoint.steps(folders[1]) == checkpoint.steps(folders[0])


def test_a_stop_after_a_mistake_is_noted_once(train, tmp_path):
    def mistaken(params, extra):
        if float(extra["passes"]) == 12:
            raise KeyError("a mistake")
        return rising_then_falling(params, extra)

    def stopping(params, extra):
        return {**rising_then_falling(params, extra), "stop": 1.0}

    out = tmp_path / "run"
    with pytest.raises(KeyError):
        train(out=out, validate=mistaken)
    for _ in range(2):
        rows = train(out=out, validate=stopping).history
        kinds = [row["kind"] for row in rows if row["step"] == 12]
        assert kinds == ["train", "validate"]
    written = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in written] == rows


def test_how_steps_are_dispatched_does_not_matter(train):
    one, many = (train(steps_per_dispatch=n).state.params for n in (1, 5))
    for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_finished_run_is_only_read(train, tmp_path):
    def never(params, extra):
        raise AssertionError("nothing is left to validate")

    first = train(out=tmp_path / "run", validate=rising_then_falling)
    again = train(out=tmp_path / "run", validate=never)
    assert same(first.params, again.params) and first.metrics == again.metrics


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.5
    inner: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": Config(rate=0.1)}, r"config.rate = 0.5, now it is 0.1"),
        (
            {"config": Config(inner=(1, 3))},
            r"config.inner = \[1, 2\], now it is \[1, 3\]",
        ),
        ({"config": None}, "config.rate = 0.5, now it is 'not set'"),
        ({"batch_size": 32}, "batch_size = 16, now it is 32"),
        ({"num_steps": 16}, "num_steps = 12, now it is 16"),
        ({"key": jax.random.key(1)}, r"key = \[0, 0\], now it is \[0, 1\]"),
        ({"ema_decay": 0.9}, "ema_decay = False, now it is 0.9"),
        ({"ema_decay": ramped(0.9)}, r"ema_decay = False, now it is \{'0': 0.1"),
        (
            {"compiler_options": {"xla_cpu_enable_fast_math": True}},
            "without compiler_options.xla_cpu_enable_fast_math, now it is True.* out",
        ),
    ],
)
def test_a_changed_setting_is_named(train, finished, changes, message):
    with pytest.raises(ValueError, match=f"{message}.*another folder"):
        train(out=finished, **{"config": Config(), **changes})
    assert checkpoint.steps(finished / "checkpoints") == [8, 12]


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(out=out, config=Config())
    return out


def test_other_data_and_another_optimizer_are_named(train, finished, data):
    settings = {"out": finished, "config": Config()}
    with pytest.raises(ValueError, match="data.crc32"):
        train(data=data._replace(y=data.y[::-1]), **settings)
    with pytest.raises(ValueError, match=r"step_00000012 does not fit.*opt_state"):
        train(tx=sgd(0.5, momentum=0.0), **settings)


def test_options_and_averages_of_a_run_are_remembered(train, tmp_path):
    """Both move the result, and neither is part of `config`."""
    options = {"xla_cpu_enable_fast_math": False}
    same = {"ema_decay": ramped(0.9), "compiler_options": options, "num_steps": 4}
    train(out=tmp_path, **same)
    train(out=tmp_path, **{**same, "ema_decay": ramped(0.9)})  # another object
    for changes, message in (
        ({"ema_decay": ramped(0.2)}, "ema_decay.2 = 0.25, now it is 0.2"),
        (
            {"ema_decay": None},
            r"ema_decay = \{'0': 0.1.*, now it is False",
        ),
        (
            {"compiler_options": None},
            "compiler_options.xla_cpu_enable_fast_math = False, now it is 'not set'",
        ),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}.*another folder"):
            train(out=tmp_path, **{**same, **changes})


def brighter(key, x, index):
    return x + jnp.ones((), x.dtype)


def halved(key, batch):
    return batch._replace(x=batch.x / 2)


def test_without_a_config_what_the_steps_compute_is_compared(train, model, tmp_path):
    """Another run's result must not be taken for this one's."""
    weights = model.init(jax.random.key(1), jnp.zeros((1, 64)))

    def other_init(key, x):
        return jax.tree.map(jnp.zeros_like, model.init(key, x))

    out = tmp_path / "run"
    first = train(out=out, steps_per_dispatch=3)
    again = train(out=out, mesh=data_mesh(), tx=sgd(0.5))  # other objects, more devices
    assert same(first.params, again.params)
    for changes in (
        {"tx": sgd(0.25)},
        {"method": madry(model, linf(0.1), one_step())},
        {"model": model._replace(init=other_init)},
        {"augment": brighter},
        {"mix": halved},
        {"start": weights},
    ):
        with pytest.raises(ValueError, match=r"another model, method, tx.*config=\{\}"):
            train(out=out, **changes)
    started = tmp_path / "started"
    train(out=started, start=weights)
    train(out=started, start=jax.tree.map(jnp.copy, weights))
    with pytest.raises(ValueError, match="or start"):
        train(out=started, start=jax.tree.map(jnp.ones_like, weights))


def test_under_other_versions_programs_are_not_compared(train, model, tmp_path):
    weights = model.init(jax.random.key(1), jnp.zeros((1, 64)))
    train(out=tmp_path, start=weights)
    for path in tmp_path.glob("checkpoints/*/meta.json"):
        meta = json.loads(path.read_text())
        meta["remembered"]["settings"]["program"]["versions"]["optax"] = "another"
        path.write_text(json.dumps(meta))
    train(out=tmp_path, start=weights, tx=sgd(0.25))
    with pytest.raises(ValueError, match="or start"):
        train(out=tmp_path, start=jax.tree.map(jnp.ones_like, weights))


def test_a_teacher_may_lie_on_other_devices(train, model, tmp_path):
    """HAT's helper is a constant of the step, from a training on a mesh or not."""
    teacher = model.init(jax.random.key(3), jnp.zeros((1, 64)))

    def hat_by(weights, devices=None):
        if devices is not None:
            weights = put_global(weights, replicated(devices))
        f = logits_fn(model, *weights)
        method = hat(model, linf(0.1), f, one_step())
        return train(out=tmp_path, method=method, mesh=devices)

    first = hat_by(teacher)
    for devices in (data_mesh(jax.devices()[:2]), data_mesh()):
        assert same(first.params, hat_by(teacher, devices).params)
    with pytest.raises(ValueError, match="another model, method"):
        hat_by(jax.tree.map(lambda leaf: leaf + 1, teacher))


def test_a_start_with_keys_among_its_statistics(train, model, tmp_path):
    """As dropout of NNX has."""

    def init(key, x):
        return model.init(key, x)[0], {"passes": jnp.zeros(()), "rng": key}

    def apply(params, extra, x, *, train=False, key=None):
        logits, _ = model.apply(params, {"passes": extra["passes"]}, x, train=train)
        return logits, extra

    keyed = Model(init, apply)
    start = init(jax.random.key(1), jnp.zeros((1, 64)))
    train(model=keyed, method=standard(keyed), start=start, out=tmp_path)
    other = start[0], {**start[1], "rng": jax.random.key(2)}
    with pytest.raises(ValueError, match="or start"):
        train(model=keyed, method=standard(keyed), start=other, out=tmp_path)


def test_what_is_written_beside(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config == {"rate": 0.5, "inner": [1, 2]}
    assert json.loads((finished / "provenance.json").read_text())["starts"]
    for path in ("config.json", "provenance.json", "metrics.jsonl"):
        assert str(finished.parent) not in (finished / path).read_text()


def test_a_loss_that_is_not_finite_stops_and_is_named(train, model, tmp_path):
    def apply(params, extra, x, *, train=False, key=None):
        logits, extra = model.apply(params, extra, x, train=train)
        return logits / (extra["passes"] != 7), extra

    broken = Model(model.init, apply)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"metrics/loss.* in step 6;.*clip"):
        train(model=broken, method=standard(broken), out=out, steps_per_dispatch=4)
    assert checkpoint.steps(out / "checkpoints") == [4]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 64)))
    params, _ = load_weights(out, shapes)
    assert np.isfinite(params["kernel"]).all()


def test_four_devices_are_one(train, model):
    method = madry(model, linf(0.1), one_step())
    settings = {"method": method, "steps_per_dispatch": 4, "tx": sgd(0.1)}
    one, four = (train(mesh=mesh, **settings) for mesh in (None, data_mesh()))
    for a, b in zip(*(jax.tree.leaves(r.params) for r in (one, four)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(jax.tree.leaves(four.params)[0].devices()) == 4
    with pytest.raises(ValueError, match="batch_size 18 .* 4 devices"):
        train(mesh=data_mesh(), batch_size=18)


def test_trainings_of_one_shape_share_the_program_of_their_order(train, monkeypatch):
    """Whatever their keys: it is traced once."""
    traced, indices = [], dispatch.batch_indices
    monkeypatch.setattr(
        dispatch,
        "batch_indices",
        lambda *of: traced.append(of[2:]) or indices(*of),
    )
    for seed in (1, 2):
        train(key=jax.random.key(seed), batch_size=13, num_steps=2)
    assert [batch_size for *_, batch_size in traced] == [13]


def test_batches_from_the_host(train, data):
    """A function of the step that gives what the resident set gives: same weights."""
    _, data_key = jax.random.split(jax.random.key(0))
    order_key = jax.random.split(data_key, 3)[0]
    resident = train()
    batch = jax.jit(lambda step: batch_at(data, order_key, step, 16))
    streamed = train(data=lambda step: batch(np.int32(step)))
    for a, b in zip(
        *(jax.tree.leaves(r.params) for r in (resident, streamed)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batches_of_bytes_are_refused(train, data):
    """Attacks would clip pixels of 0 to 255 to the box [0, 1]."""

    def bytes_at(step):
        return take(data, np.arange(16) + step)

    with pytest.raises(TypeError, match=r"x of uint8.*Scale it in `mix`"):
        train(data=bytes_at)

    def scaled(key, batch):
        return batch._replace(x=to_float(batch.x, 16))

    assert int(train(data=bytes_at, mix=scaled).state.step) == 12


def test_mixed_batches_with_soft_labels(train):
    def mix(key, batch: Batch) -> Batch:
        soft = jax.nn.one_hot(batch.y, 10)
        return batch._replace(
            x=(batch.x + batch.x[::-1]) / 2, y=(soft + soft[::-1]) / 2
        )

    losses = [row["loss"] for row in train(mix=mix, checkpoint_every=6).history]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_going_on_from_given_weights_leaves_them_usable(train, model):
    start = model.init(jax.random.key(9), jnp.zeros((1, 64)))
    before = np.asarray(start[0]["kernel"])
    result = train(start=start, ema_decay=0.5, num_steps=1, checkpoint_every=1)
    np.testing.assert_array_equal(start[0]["kernel"], before)
    assert not np.array_equal(result.state.params["kernel"], before)
    assert np.abs(result.state.params["kernel"] - before).max() < 1


def test_the_live_line(train):
    stream = io.StringIO()
    train(log=stream, validate=rising_then_falling)
    text = stream.getvalue()
    assert "compiled in" in text and "best so far" in text
    assert "step 8  validation: robust_accuracy 1.0000" in text
    last = text.splitlines()[-1]
    for part in ("step 12/12", "epoch 3.00", "loss", "accuracy", "images/s", "ETA"):
        assert part in last


def five_rows(step):
    return Batch(jnp.zeros((5, 4)), jnp.zeros(5, jnp.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 1}, "num_steps is 12 and num_epochs 1; give one"),
        ({"num_steps": 0}, "num_steps is 0; give 1 or more"),
        ({"num_steps": None, "num_epochs": 0}, "num_epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 65}, "batch_size is 65 with 64 examples"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch is 0"),
        (
            {"data": lambda step: None, "steps_per_dispatch": 2},
            "steps_per_dispatch is 2",
        ),
        ({"validate": lambda p, e: {"accuracy": 1.0}}, "best_metric 'robust_accuracy'"),
        ({"data": lambda step: None, "augment": brighter}, "augment is for.*mix="),
        ({"data": five_rows}, r"batch_size is 16, but data\(0\) makes .* of 5 rows"),
    ],
)
def test_messages_name_the_argument(train, changes, message):
    with pytest.raises(ValueError, match=message):
        train(**changes)


def test_a_full_disc_names_what_is_safe(train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    saved = checkpoint.ocp.save

    def full(path, arrays):
        if "00000008" in path:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        saved(path, arrays)

    monkeypatch.setattr(checkpoint.ocp, "save", full)
    with pytest.raises(OSError, match="step 8.*disc is full.*step 4 is intact"):
        train(out=out)
    monkeypatch.undo()
    resumed = train(out=out)
    assert same(resumed.state, train(out=tmp_path / "unbroken").state)


def test_out_is_a_file(train, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="run is a file; give a folder"):
        train(out=tmp_path / "run")


def test_weights_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of robustjax"):
        load_weights(tmp_path, ({}, {}))


def test_num_epochs_and_the_default_checkpoint(train):
    result = train(num_steps=None, num_epochs=2, checkpoint_every=None)
    assert int(result.state.step) == 8
    assert [row["step"] for row in result.history] == [4, 8]


def test_killed_in_a_checkpoint_and_resumed():
    """The real thing: SIGKILL in the middle of a save, in a process of its own."""
    done = subprocess.run(
        [ROOT / "scripts" / "prove_resume", "--fast", "--kills", "1", "--seed", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in a checkpoint" in done.stdout and ".saving_" in done.stdout
    assert "all equal" in done.stdout


def test_streams_reach_the_method_and_resume(tmp_path, train, model, data):
    """Rows of another set at every step, by key; a broken run ends the same."""
    more = resident(255 - np.asarray(data.x), np.asarray(data.y) * 0 + 7, 255)
    seen = []

    def loss(params, extra, carry, batch, step, key):
        rows = batch.streams["more"]
        seen.append((rows.x.shape, rows.y.shape))
        total = (rows.x.sum() + rows.index.sum()) * params["bias"].sum()
        metrics = {"loss": mean_of(rows.y), "first": mean_of(rows.index[:1])}
        return total, Aux(extra, carry, metrics)

    settings = {
        "method": from_loss(loss),
        "streams": {"more": (more, 12)},
        "tx": sgd(1e-6),
        "log_every": 1,
    }
    whole = train(**settings)
    assert seen[0] == ((12, 8, 8, 1), (12,))
    rows = [row for row in whole.history if row["kind"] == "train"]
    assert all(row["loss"] == 7 for row in rows)
    assert len({row["first"] for row in rows}) > 6
    on_mesh = train(**settings, mesh=data_mesh())
    assert [r["first"] for r in on_mesh.history] == [r["first"] for r in rows]
    train(**settings, out=tmp_path)
    go_back(tmp_path, 8)
    resumed = train(**settings, out=tmp_path)
    np.testing.assert_array_equal(resumed.params["bias"], whole.params["bias"])
    other = {**settings, "streams": {"more": (more, 8)}}
    with pytest.raises(ValueError, match="rows"):
        train(**other, out=tmp_path)


def test_labels_of_streams_need_a_logit(train, model, data):
    strange = data._replace(y=data.y.at[3].set(77))
    method = with_stream(standard(model), "more")
    with pytest.raises(ValueError, match=r"streams\['more'\] has the label 77"):
        train(method=method, streams={"more": (strange, 4)})


def test_images_per_second_are_those_of_streams_too(train, model, data, tmp_path):
    settings = {"method": with_stream(standard(model), "more"), "num_steps": 4}
    found = train(streams={"more": (data, 48)}, out=tmp_path, **settings)
    row = found.history[0]
    assert row["images_per_second"] == pytest.approx(64 * 4 / row["seconds"], rel=0.2)


def test_streams_that_nobody_reads_are_refused(train, data):
    with pytest.raises(ValueError, match=r"more, which the method does not read: wrap"):
        train(streams={"more": (data, 4)})


@pytest.mark.parametrize(
    ("streams", "kind", "message"),
    [
        ({"more": 3}, TypeError, r"streams\['more'\] is .*give \(resident"),
        ({"more": 0}, ValueError, r"streams\['more'\] has 0 rows"),
    ],
)
def test_streams_are_checked(train, data, streams, kind, message):
    if kind is ValueError:
        streams = {"more": (data, 0)}
    with pytest.raises(kind, match=message):
        train(streams=streams)
    with pytest.raises(ValueError, match="a function `step -> Batch` gives its own"):
        train(data=lambda step: None, streams={"more": (data, 1)})


def test_a_carry_with_rows_trains_on_a_mesh(train, model):
    """Free-AT's perturbation comes out of a step as it went in."""
    method = free(model, linf(0.1), repeats=2)
    one, four = (train(mesh=mesh, method=method) for mesh in (None, data_mesh()))
    np.testing.assert_allclose(
        one.params["kernel"], four.params["kernel"], rtol=1e-4, atol=1e-6
    )
    assert four.state.carry.sharding.is_fully_replicated
    assert np.abs(four.state.carry).max() > 0.09
