"""Every public function, class and module of robustjax says what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import robustjax

ROOT = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT)): path
    for path in sorted((ROOT / "robustjax").rglob("*.py"))
}


def undocumented(source: str) -> list[str]:
    """Names of public functions and classes of a module that have no docstring.

    Read from the source: a NamedTuple or dataclass writes one of its own, and an
    inherited docstring says nothing about the heir.
    """
    tree = ast.parse(source)
    missing = [] if not tree.body or ast.get_docstring(tree) else ["the module"]
    for node in definitions(tree):
        if not ast.get_docstring(node):
            missing.append(node.name)
    return missing


def definitions(
    tree: ast.Module,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("_"):
                yield node


def untyped(source: str) -> list[str]:
    """Public functions whose arguments or result have no type."""
    missing = []
    for node in definitions(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.returns is None or any(a.annotation is None for a in arguments):
            missing.append(node.name)
    return missing


@pytest.mark.parametrize("file", FILES)
def test_public_names_are_documented_and_typed(file):
    source = FILES[file].read_text()
    assert not undocumented(source)
    assert not untyped(source)


def test_the_checkers_see_what_is_missing():
    bare = "def f(x: int) -> int:\n    return x\nclass C:\n    pass\ndef _g(): pass\n"
    assert undocumented(bare) == ["the module", "f", "C"]
    assert untyped("def f(x) -> int: ...\ndef g(x: int): ...\ndef _h(x): ...") == [
        "f",
        "g",
    ]


def test_the_front_offers_what_it_names():
    assert len(set(robustjax.__all__)) == len(robustjax.__all__)
    assert all(hasattr(robustjax, name) for name in robustjax.__all__)


def test_what_the_front_offers_shows_its_use():
    """A function of the front has an example, and pytest runs it as a doctest."""
    functions = {
        name: getattr(robustjax, name)
        for name in robustjax.__all__
        if callable(getattr(robustjax, name))
        and not isinstance(getattr(robustjax, name), type)
    }
    assert functions
    bare = [n for n, f in functions.items() if ">>>" not in (f.__doc__ or "")]
    assert not bare
