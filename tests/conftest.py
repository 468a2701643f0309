"""Every test runs on four fake CPU devices, with JAX's strictest settings."""

import gc
import os
from pathlib import Path

# Before JAX starts: a GPU or TPU would make the same tests other tests.
os.environ["JAX_PLATFORMS"] = "cpu"
# Plots go to files; a window would wait for somebody.
os.environ["MPLBACKEND"] = "agg"
# Most tests run many programs once, and LLVM's polish takes a third of that time; what
# XLA makes of a program stays. Another value polishes all: scripts/test says how.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = os.environ.get(
    "JAX_DISABLE_MOST_OPTIMIZATIONS", "1"
)

import hypothesis
import jax
import pytest

NUM_DEVICES = 4

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property compiles, so no deadline; the same examples on
# every machine, so that a failure in CI is a failure here.
hypothesis.settings.register_profile("robustjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("robustjax")

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def polish(request, monkeypatch):
    """Slow tests compute for minutes, but for those marked `quick`; those marked
    `polished` look at programs or numbers as users get them."""
    marked = request.node.get_closest_marker
    if not (marked("polished") or (marked("slow") and not marked("quick"))):
        yield
        return
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # for processes of theirs
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are memory maps, and Linux gives a process 65,530 of them:
    beyond, XLA's compiler ends with a segmentation fault."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
