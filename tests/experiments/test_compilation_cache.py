"""Where compiled programs are kept, who turns it on, and what a bad entry does."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import common, compilation_cache, madry_mnist, quickstart

ROOT = Path(__file__).parents[2]
OF_JAX = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """What is said to JAX's configuration, without saying it."""
    said = {}
    monkeypatch.setattr(
        jax.config, "update", lambda name, value: said.update({name: value})
    )
    for name in (*OF_JAX, "ROBUSTJAX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return said


def test_a_command_keeps_programs_and_a_call_does_not(kept, monkeypatch, tmp_path):
    common.parse(quickstart.Config(), quickstart.__doc__, ["--seed", "3"])
    assert not kept
    monkeypatch.setattr(sys, "argv", ["quickstart", "--seed", "3"])
    assert common.parse(quickstart.Config(), quickstart.__doc__).seed == 3
    folder = Path(kept["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path / "robustjax" / "programs" and folder.is_dir()


def test_ways_to_turn_it_off_or_elsewhere(kept, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["madry_mnist", "--no-cache"])
    common.parse(madry_mnist.PRESETS, madry_mnist.__doc__)
    monkeypatch.setenv("ROBUSTJAX_CACHE_DIR", "off")
    compilation_cache.turn_on()
    monkeypatch.setenv("ROBUSTJAX_CACHE_DIR", str(tmp_path / "mine"))
    for name in OF_JAX:
        with monkeypatch.context() as patch:
            patch.setenv(name, "false")
            compilation_cache.turn_on()
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:  # cannot be written
        patch.setenv("ROBUSTJAX_CACHE_DIR", str(tmp_path / "file" / "inside"))
        compilation_cache.turn_on()
    assert not kept
    compilation_cache.turn_on()
    assert kept["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    monkeypatch.setenv("ROBUSTJAX_CACHE_DIR", "")
    with pytest.raises(ValueError, match="ROBUSTJAX_CACHE_DIR is empty"):
        compilation_cache.turn_on()


PROGRAM = """
import jax, jax.numpy as jnp
from experiments import compilation_cache
compilation_cache.LEAST_SECONDS = 0.0
compilation_cache.turn_on()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
f = jax.jit(lambda x: jnp.sin(x @ x).sum())
print(float(f(jnp.eye(8))), sum("cache_hits" in name for name in hits) > 0)
"""


@pytest.mark.slow
def test_processes_share_programs_and_a_truncated_one_is_compiled_anew(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in OF_JAX}
    env |= {"ROBUSTJAX_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]

    def begin():
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    together = [begin() for _ in range(3)]
    said = [process.communicate()[0].split() for process in together]
    assert [process.returncode for process in together] == [0, 0, 0]
    assert len({value for value, _ in said}) == 1
    value, hit = begin().communicate()[0].split()
    assert (value, hit) == (said[0][0], "True")
    for entry in tmp_path.iterdir():
        whole = entry.read_bytes()
        entry.write_bytes(whole[: len(whole) // 2])
    value, hit = begin().communicate()[0].split()
    assert (value, hit) == (said[0][0], "False")
