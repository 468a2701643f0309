"""These tests run many programs once: compile them without polish."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(quickly_compiled):
    pass
