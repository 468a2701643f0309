"""Flags of the machine: what they make of a training, and that a run outlives them."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import common, evaluate, machine, madry_cifar, madry_mnist, nfgsm_cifar
from experiments.machine import Machine
from robustjax import models
from robustjax.methods.madry import madry
from robustjax.threats import linf
from tests.experiments.test_experiments import write_images


@pytest.mark.parametrize("module", [madry_mnist, madry_cifar, nfgsm_cifar, evaluate])
def test_flags_are_flat_and_no_part_of_the_training(module):
    default = getattr(module, "PRESETS", None) or module.Config()
    flags = ["--num-devices", "2", "--shard-params", "--microbatches", "4"]
    flags += ["--dtype", "bfloat16", "--remat", "products", "--no-cache"]
    config = common.parse(default, module.__doc__, flags)
    plain = common.parse(default, module.__doc__, [])
    found = machine.of(config)
    assert found == Machine(2, True, 4, "bfloat16", "products", cache=False)
    assert machine.of(plain) == Machine()
    changed, usual = (common.training_part(c) for c in (config, plain))
    # What changes the arithmetic, or what BatchNorm sees, is compared on resume.
    assert (changed.pop("microbatches"), changed.pop("dtype")) == (4, "bfloat16")
    assert (usual.pop("microbatches"), usual.pop("dtype")) == (1, "float32")
    assert changed == usual and "machine" not in usual


def test_devices_are_those_that_can_share_a_batch():
    assert machine.mesh(Machine()).size == 4
    assert machine.mesh(Machine(), 50).size == 2
    assert machine.mesh(Machine(microbatches=2), 12).size == 3
    assert machine.mesh(Machine(num_devices=1), 7).size == 1
    assert machine.mesh(Machine(), 10, 22).size == 2
    assert machine.mesh(Machine(microbatches=2), 20, 44).size == 2
    with pytest.raises(ValueError, match="22 cannot be shared by 4 devices"):
        machine.mesh(Machine(num_devices=4), 12, 22)
    with pytest.raises(ValueError, match="50 .* 4 devices .* multiple of 4"):
        machine.mesh(Machine(num_devices=4), 50)
    with pytest.raises(ValueError, match="7 .* microbatches=2.* multiple of 2"):
        machine.mesh(Machine(microbatches=2), 7)
    with pytest.raises(ValueError, match="num_devices is 9; there are 4"):
        machine.mesh(Machine(num_devices=9))


def test_nets_compute_as_they_are_told():
    x = jnp.zeros((2, 32, 32, 3))
    for remat in ("none", "products", "blocks"):
        on = Machine(dtype="bfloat16", remat=remat)
        net = common.build_model("preact_resnet18", "cifar10", width=1, on=on)
        params, extra = jax.eval_shape(net.init, jax.random.key(0), x)
        text = str(
            jax.make_jaxpr(jax.grad(lambda p, e, n=net: n.apply(p, e, x)[0].sum()))(
                *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (params, extra))
            )
        )
        assert "bf16" in text
        assert ("remat" in text) == (remat != "none")
        assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match="no.* of its own: give 'products'"):
        common.build_model("madry_mnist", "mnist", on=Machine(remat="blocks"))


def test_methods_are_cut():
    method = madry(models.mlp((4,)), linf(0.1))
    assert machine.method(Machine(), method) is method
    assert machine.method(Machine(microbatches=2), method).stages is None


@pytest.mark.slow
@pytest.mark.quick
def test_a_run_goes_on_on_another_machine(tmp_path):
    write_images(tmp_path, "mnist", (28, 28, 1))
    config = madry_mnist.Config(
        out=str(tmp_path / "run"),
        data_dir=str(tmp_path),
        num_steps=3,
        batch_size=16,
        num_validation=20,
        num_attacked=20,
        num_test=12,
        machine=Machine(num_devices=4, shard_params=True, microbatches=2),
    )
    results = madry_mnist.main(config)
    with pytest.raises(ValueError, match="dtype = 'float32'"):
        other = Machine(1, dtype="bfloat16", microbatches=2)
        madry_mnist.main(dataclasses.replace(config, machine=other))
    again = madry_mnist.main(
        dataclasses.replace(config, machine=Machine(1, microbatches=2))
    )
    assert results["config"] == config and results["last"]["step"] == 3
    assert again["checkpoint"]["step"] == results["checkpoint"]["step"] == 3
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]
    assert [start["at_step"] for start in starts] == [0, 3]
    assert "machine" not in json.loads((tmp_path / "run" / "config.json").read_text())
    report = evaluate.main(
        evaluate.Config(
            run=str(tmp_path / "run"),
            data_dir=str(tmp_path),
            attacks=("FGSM",),
            norms=("Linf",),
            num_test=12,
            machine=Machine(num_devices=2),
        )
    )
    assert report["clean_accuracy"] == pytest.approx(results["clean_accuracy"])
    with pytest.raises(ValueError, match="for training"):
        evaluate.main(evaluate.Config(machine=Machine(microbatches=2)))


def test_only_the_first_process_prints(monkeypatch, capsys):
    calls = []

    def joined(*where):
        calls.append(where)
        return contextlib.nullcontext()

    monkeypatch.setattr(machine.parallel, "joined", joined)
    monkeypatch.setattr(machine.parallel, "is_writer", lambda: False)
    with machine.started(Machine(None, coordinator="a:1", cache=False)):
        print("nothing")
    assert calls == [("a:1", None, None)]
    monkeypatch.setattr(machine.parallel, "is_writer", lambda: True)
    with machine.started(Machine(cache=False)):
        print("something")
    assert capsys.readouterr().out == "something\n"
