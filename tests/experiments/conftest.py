"""Whatever an experiment on ideas saves is checked against docs/results.md; compiled
programs are kept, as a command keeps them."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import ideas
from tests.experiments import schema


@pytest.fixture(autouse=True)
def checked_results(monkeypatch):
    save = ideas.save

    def checked(out, *arguments, **options):
        results = save(out, *arguments, **options)
        schema.check(out)
        return results

    monkeypatch.setattr(ideas, "save", checked)


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """An experiment compiles the same programs for each of its nets."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX asks for the folder once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
