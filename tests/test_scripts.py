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


def _run(checkout, script, *arguments, **options):
    return subprocess.run(
        [checkout / "scripts" / script, *arguments],
        capture_output=True,
        text=True,
        **options,
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


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A checkout with the two scripts alone."""
    for name in ("scripts/test", "scripts/setup", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("given", [("--python", "3.11"), ("--python=3.11",)])
def test_test_takes_another_python(bare, given):
    _program(bare / "scripts/setup", 'echo "setup $ROBUSTJAX_PYTHON $ROBUSTJAX_VENV"')
    _program(bare / ".venv-3.11/bin/python", 'echo "3.11 $@"')
    _program(bare / ".venv/bin/python", 'echo "own $@"')
    done = _run(bare, "test", *given, "tests/x.py", "-k", "one two")
    setup, tests = done.stdout.splitlines()
    assert setup == "setup 3.11 .venv-3.11"
    assert tests == "3.11 -m pytest -n auto tests/x.py -k one two"
    assert _run(bare, "test", "-x").stdout.endswith("own -m pytest -n auto -x\n")
    assert _run(bare, "test").stdout.endswith("own -m pytest -n auto --dist loadfile\n")


@pytest.mark.parametrize(
    "given", [("--python",), ("--python", "new"), ("--python=2.7",)]
)
def test_test_refuses_what_is_no_version(bare, given):
    done = _run(bare, "test", *given)
    assert done.returncode == 2
    assert "give a version such as 3.11" in done.stderr


def test_setup_says_which_pythons_there_are(bare):
    """Fake ones, which answer as CPython 3.12.9 and 3.13.1 would."""
    _program(bare / "bin/python3.12", "echo 12 1 9 3.12.9")
    _program(bare / "bin/python3.13", "echo 13 1 1 3.13.1")
    env = {"PATH": f"{bare / 'bin'}:{bare / 'tools'}", "HOME": str(bare)}
    (bare / "tools").mkdir()  # what setup needs, without this machine's Pythons
    for tool in ("bash", "awk", "sort", "paste", "cat", "cksum", "dirname", "flock"):
        (bare / "tools" / tool).symlink_to(shutil.which(tool))
    env |= {"ROBUSTJAX_PYTHON": "3.11", "ROBUSTJAX_VENV": ".venv-3.11"}
    done = _run(bare, "setup", env=env)
    assert done.returncode == 1
    assert "no Python 3.11 found" in done.stderr
    assert "There are: 3.12.9 3.13.1." in done.stderr
    done = _run(bare, "setup", env={**env, "ROBUSTJAX_VENV": "venv/../.."})
    assert "ROBUSTJAX_VENV=venv/../.. is no name" in done.stderr
