"""Whatever an experiment on ideas saves is checked against docs/results.md."""

import pytest

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
