"""The scripts that write files do what add_an_attack.md and add_a_method.md say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("robustjax", "scripts", "docs", "tests/conformance", "README.md")
COPIED += ("tests/methods",)


@pytest.fixture
def checkout(tmp_path):
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return tmp_path


def _run(checkout, script, *arguments):
    return subprocess.run(
        [checkout / "scripts" / script, *arguments], capture_output=True, text=True
    )


def _new_attack(checkout, *arguments):
    return _run(checkout, "new_attack", *arguments)


def test_new_attack_writes_an_attack_that_passes_the_conformance_checks(checkout):
    done = _new_attack(checkout, "my_attack")
    assert done.returncode == 0, done.stderr
    assert "| `my_attack` |" in (checkout / "README.md").read_text()
    table = (checkout / "tests/conformance/test_attacks.py").read_text()
    assert '"my_attack": Row(my_attack.my_attack(60, 0.5), ("Linf", "L2")),' in table
    compile(table, "table", "exec")
    program = (
        "from robustjax import testing\n"
        "from robustjax.attacks.my_attack import my_attack\n"
        "testing.check_attack(my_attack(60, 0.5), 'Linf')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    again = _new_attack(checkout, "my_attack")
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize("arguments", [(), ("My-Attack",), ("2nd",)])
def test_new_attack_refuses_a_bad_name(checkout, arguments):
    done = _new_attack(checkout, *arguments)
    assert done.returncode == 2
    assert "usage: scripts/new_attack NAME" in done.stderr


def test_new_method_writes_a_method_that_trains(checkout):
    done = _run(checkout, "new_method", "my_method")
    assert done.returncode == 0, done.stderr
    assert "| my_method |" in (checkout / "docs/methods.md").read_text()
    table = (checkout / "tests/methods/test_methods.py").read_text()
    row = "Row(lambda model: my_method.my_method(model, linf(0.1), SHORT), 2)"
    assert f'"my_method": {row}' in table
    compile(table, "table", "exec")
    program = """
import sys; sys.path.insert(0, "tests/methods")
import test_methods as checks
assert "my_method" in checks.METHODS
checks.test_loss_is_finite_and_falls("my_method")
checks.test_statistics_move_as_the_method_says("my_method")
checks.test_masked_rows_never_count("my_method")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    again = _run(checkout, "new_method", "my_method")
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize("arguments", [(), ("My-Method",), ("2nd",), ("lambda",)])
def test_new_method_refuses_a_bad_name(checkout, arguments):
    done = _run(checkout, "new_method", *arguments)
    assert done.returncode == 2
    assert "new_method NAME" in done.stderr or "word of Python" in done.stderr
