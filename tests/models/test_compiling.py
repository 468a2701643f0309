"""Compiler options: those for TPUs reach `jit` on TPUs, and nowhere else."""

from types import SimpleNamespace

import jax
import pytest

from robustjax import models
from robustjax.models import compiling


@pytest.fixture
def on_tpu(monkeypatch):
    """As if the process held one; what `jit` is told is kept and nothing compiled."""
    told = []

    def on(kind, works=True):
        def jit(f, compiler_options):
            told.append(compiler_options)
            if not works:
                raise RuntimeError("No such compile option")
            return SimpleNamespace(
                lower=lambda x: SimpleNamespace(compile=lambda: None)
            )

        fake = SimpleNamespace(
            default_backend=lambda: "tpu",
            devices=lambda: [SimpleNamespace(device_kind=kind)],
            jit=jit,
        )
        monkeypatch.setattr(compiling, "jax", fake)
        return told

    return on


def test_a_v5e_compiles_with_larger_tiles(on_tpu):
    told = on_tpu("TPU v5 lite")
    options = models.convolution_options.__wrapped__()
    assert options == {"xla_tpu_scoped_vmem_limit_kib": "32768"} == models.tpu_options()
    assert told == [options]


def test_other_kinds_and_compilers_without_the_option_have_none(on_tpu):
    on_tpu("TPU v4")
    assert models.convolution_options.__wrapped__() == {} == models.tpu_options()
    on_tpu("TPU v5 lite", works=False)
    assert models.convolution_options.__wrapped__() == {}


def test_no_option_of_a_tpu_is_given_to_a_cpu():
    assert jax.default_backend() == "cpu"
    assert models.tpu_options() == {}
    assert not any("tpu" in name for name in models.convolution_options())
