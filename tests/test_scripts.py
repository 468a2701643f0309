"""The scripts that write files do what docs/add_an_attack.md says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("robustjax", "scripts", "docs", "tests/conformance", "README.md")


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


def _new_attack(checkout, *arguments):
    return subprocess.run(
        [checkout / "scripts" / "new_attack", *arguments],
        capture_output=True,
        text=True,
    )


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
