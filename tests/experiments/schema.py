"""What docs/results.md promises of every results.json, as a check."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def fields() -> set[str]:
    """The names in the first column of the table of docs/results.md."""
    text = (ROOT / "docs" / "results.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def read(folder: str | Path) -> dict[str, Any]:
    """`results.json`, where NaN and infinity are no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"results.json holds {name}")

    text = (Path(folder) / "results.json").read_text()
    return json.loads(text, parse_constant=refuse)


def check(folder: str | Path) -> dict[str, Any]:
    """Read the results of a folder and assert that they are as documented."""
    results = read(folder)
    wrong = set(results) ^ fields()
    assert not wrong, f"missing or unknown: {wrong}"
    for name in ("config", "claims", "measurements", "provenance"):
        assert isinstance(results[name], dict), name
    assert results["config"]
    for name in ("seconds", "cpu_seconds"):
        assert results[name] >= 0, name
    assert {"git", "versions", "device"} <= set(results["provenance"])
    for name, claim in results["claims"].items():
        assert set(claim) == {"says", "value", "bounds", "holds"}, name
        assert isinstance(claim["says"], str) and claim["says"], name
        low, high = claim["bounds"]
        value = claim["value"]
        holds = (
            value is not None
            and (low is None or low <= value)
            and (high is None or value <= high)
        )
        assert claim["holds"] is holds, name
    assert results["figures"], "no figure"
    for name in results["figures"]:
        image = (Path(folder) / name).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 1000, name
    return results
