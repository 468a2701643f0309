"""The floors of docs/design.md ("Rooms"), read from the imports themselves."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"types"},
    {"norms"},
    {"threats", "losses"},
    {"problems", "gradients"},
    {"attacks"},
    {"models", "data", "methods", "evaluation", "certify"}
    | {"digests", "metrics", "logging", "parallel", "plots", "testing"},
    {"training"},
    {"experiments"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What a room of floor 5 may take from its neighbors (prefixes of module names).
NEIGHBORS = {
    "models": set(),
    "digests": {"parallel"},
    "metrics": set(),
    "parallel": set(),
    "plots": set(),
    "logging": {"metrics", "parallel"},
    "data": {"parallel"},
    "methods": {"models.base", "metrics"},
    "evaluation": {"models.base", "models.canonical", "models.compiling", "data"}
    | {"digests", "metrics", "logging", "parallel"},
    "certify": {"evaluation", "plots"},
    "testing": FLOORS[5],
}
# Third-party packages and names that one room only may know.
OWNED_PACKAGES = {
    "flax": "models",
    "orbax": "training.checkpoint",
    "grain": "data",
    "tensorflow_datasets": "data",
    "array_record": "data",
    "PIL": "data",
}
OWNED_NAMES = dict.fromkeys(
    ["Mesh", "AbstractMesh", "make_mesh", "process_index"], "parallel"
)
# Slow to import, or in an extra: imported by the function that needs them.
IN_FUNCTIONS_ONLY = {"grain", "tensorflow_datasets", "array_record", "PIL"} | {
    "matplotlib",
    "tyro",
}
# Asked for where it happens to be; nothing here needs it (TFDS's own downloads do).
NOT_DECLARED = {"tensorflow": "data.prepare", "tensorboard": "training.tensorboard"}
DISTRIBUTION = {"orbax": "orbax-checkpoint", "PIL": "pillow"}


def module_name(path: Path) -> str:
    """`robustjax/attacks/pgd.py` -> `robustjax.attacks.pgd`; a package: its name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for package in ("robustjax", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def declared() -> tuple[set[str], set[str]]:
    """Names of the core dependencies, and of those plus all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[A-Za-z0-9-]+", r)[0].lower() for r in requirements}

    core = names(project["dependencies"])
    return core, core.union(*map(names, project["optional-dependencies"].values()))


def imports(
    tree: ast.Module, module: str, is_package: bool
) -> Iterator[tuple[str, str | None, bool]]:
    """(module, name taken from it or None, at import time) of every import."""
    later = {  # what importing the module does not run
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and dotted(node.test)[-1:] == ["TYPE_CHECKING"])
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, at_import
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                yield base, alias.name, at_import


def dotted(node: ast.expr) -> list[str]:
    """`jax.lax.scan` -> ["jax", "lax", "scan"]; [] if it does not start at a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def inside(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def split_room(module: str) -> tuple[str, str]:
    """`robustjax.models.base` -> (`models`, `models.base`)."""
    local = module.removeprefix("robustjax.")
    return local.split(".")[0], local


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `source`, as the text of `module`, imports against the rules."""
    tree = ast.parse(source)
    room, local = split_room(module)
    facade = module == "robustjax"
    core, known = declared()
    found = []
    foreign = set()  # names here that mean something of another distribution
    if not facade and room not in FLOOR:
        found.append(f"room {room!r} has no floor: add it here and to docs/design.md")

    for base, name, at_import in imports(tree, module, is_package):
        package = base.split(".")[0]
        target = f"{base}.{name}" if name and f"{base}.{name}" in SOURCES else base
        if any(map(is_private, base.split("."))) or is_private(name or ""):
            found.append(f"private: {base} {name or ''}")
        if package in ("robustjax", "experiments"):
            if facade:
                continue
            if target == "robustjax":
                # An experiment is a user and may say `import robustjax as rj`.
                if room != "experiments":
                    found.append(f"imports {name} from the front, not from its room")
                continue
            other, other_local = split_room(target)
            mine, theirs = FLOOR.get(room, -1), FLOOR.get(other, len(FLOORS))
            if theirs > mine:
                found.append(f"floor {mine} imports {target} of floor {theirs}")
            elif room != other and theirs == mine and room in NEIGHBORS:
                if not any(inside(other_local, near) for near in NEIGHBORS[room]):
                    found.append(f"{room} imports its neighbor {target}")
            elif room == "methods" and theirs > 3 and other not in (room, "attacks"):
                found.append(f"methods imports {target}")
        elif package not in sys.stdlib_module_names:
            distribution = DISTRIBUTION.get(package, package.replace("_", "-"))
            if NOT_DECLARED.get(package) == local and not at_import:
                continue
            if distribution not in known:
                found.append(f"{package} is not declared in pyproject.toml")
            owner = OWNED_PACKAGES.get(package, local)
            if room != "experiments" and not facade and not inside(local, owner):
                found.append(f"{package} belongs to {owner}")
            if room != "experiments" and at_import:
                if package in IN_FUNCTIONS_ONLY:
                    found.append(f"{package} is imported outside of a function")
                elif distribution not in core:
                    found.append(f"{package} is in an extra: import it in a function")
            if name in OWNED_NAMES and local != OWNED_NAMES[name]:
                found.append(f"{name} belongs to {OWNED_NAMES[name]}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] not in sys.stdlib_module_names:
                    foreign.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and not node.level:
            package = (node.module or "").split(".")[0]
            if package not in sys.stdlib_module_names:
                foreign.update(alias.asname or alias.name for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = dotted(node)
            if parts and parts[0] in foreign and is_private(parts[-1]):
                found.append(f"private: {'.'.join(parts)}")
            if node.attr in OWNED_NAMES and local != OWNED_NAMES[node.attr]:
                found.append(f"{node.attr} belongs to {OWNED_NAMES[node.attr]}")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_keep_to_their_floor(module):
    path = SOURCES[module]
    assert not violations(module, path.read_text(), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("norms", "from robustjax.threats import linf", "floor 1 imports"),
        ("attacks.new", "from robustjax.models.base import Model", "floor 4 imports"),
        ("attacks.new", "from ..data import load", "floor 4 imports"),
        ("attacks.new", "def f():\n    import robustjax.training", "floor 4 imports"),
        ("attacks.new", "from robustjax import pgd", "from the front"),
        ("methods.new", "from robustjax.models.mlp import mlp", "its neighbor"),
        ("methods.new", "from robustjax.data import load", "its neighbor"),
        ("data.new", "from robustjax.evaluation import report", "its neighbor"),
        ("attacks.new", "import flax.linen as nn", "flax belongs to models"),
        ("training.loop", "from orbax.checkpoint import v1", "orbax belongs to"),
        ("data.new", "import grain", "outside of a function"),
        ("attacks.new", "import sklearn", "sklearn is not declared"),
        ("data.new", "def f():\n    import tensorflow", "tensorflow is not declared"),
        ("attacks.new", "import equinox", "equinox is in an extra"),
        ("attacks.new", "from jax._src import core", "private: jax._src"),
        ("attacks.new", "import jax\njax._src.core.Tracer", "private: jax._src"),
        ("attacks.new", "from robustjax.norms import _sort", "private: robustjax"),
        ("training.loop", "from jax.sharding import Mesh", "Mesh belongs"),
        ("training.loop", "import jax\njax.process_index()", "process_index belongs"),
        ("new_room", "import jax", "has no floor"),
    ],
)
def test_the_checker_sees_violations(module, source, complaint):
    found = violations(f"robustjax.{module}", source)
    assert any(complaint in one for one in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("attacks.new", "import jax\nfrom robustjax.problems import Problem"),
        ("attacks.new", "from robustjax import norms\nnorms.Linf()"),
        ("attacks.new", "from .base import Attack\nfrom ..threats import project"),
        ("methods.new", "from robustjax.models.base import Model"),
        ("methods.new", "from robustjax.attacks.pgd import pgd"),
        ("models.new", "from flax import linen as nn"),
        ("training.checkpoint", "from orbax.checkpoint import v1"),
        ("data.new", "def f():\n    import grain"),
        ("data.new", "if TYPE_CHECKING:\n    import grain"),
        ("data.prepare", "def f():\n    import tensorflow"),
        ("parallel", "import jax\nfrom jax.sharding import Mesh\njax.process_index()"),
        ("attacks.new", "class A:\n    def f(self):\n        return self._x"),
    ],
)
def test_the_checker_allows_what_the_design_allows(module, source):
    assert not violations(f"robustjax.{module}", source)


def test_an_experiment_may_use_the_front():
    assert not violations("experiments.new", "import robustjax as rj\nimport tyro")
