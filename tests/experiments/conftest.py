"""Whatever an experiment on ideas saves is checked against docs/results.md.

Tiny runs compile for half a minute each. Of the experiments on ideas that of
linear_margin runs always, the others' are slow.
"""

import functools

import pytest

import robustjax as rj
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


@pytest.fixture(autouse=True)
def untimed_steps(request, monkeypatch):
    """Timing a step compiles it once more; test_ideas.py has a test of it."""
    marked = request.node.get_closest_marker
    if marked("quick") or not marked("slow"):
        monkeypatch.setattr(ideas, "step_seconds", lambda *given, **more: 0.001)


@pytest.fixture
def without_doctor(monkeypatch):
    """It examines a model in test_cifar_experiments.py; it compiles for seconds."""
    monkeypatch.setattr(rj, "evaluate", functools.partial(rj.evaluate, checks="none"))
