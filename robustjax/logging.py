"""What a run leaves behind: a live line, metrics as JSON lines, and its provenance."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TextIO

import jax
import numpy as np

PACKAGES = ("robustjax", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")


def plain(value: Any) -> Any:
    """A value as JSON knows it, without this machine's paths.

    Dataclasses and mappings become dicts, tuples lists, numpy and JAX scalars numbers,
    NaN and infinities None; of an absolute path only the last part is kept.

    >>> plain({"lr": float("nan"), "out": PurePath("/somewhere/runs/a"), "n": (1, 2)})
    {'lr': None, 'out': 'a', 'n': [1, 2]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, (str, PurePath)):
        return PurePath(value).name if os.path.isabs(value) else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return plain(np.asarray(value).tolist())
    return getattr(value, "__qualname__", None) or str(value)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; readers of `path` see the old file or the whole new one."""
    temporary = path.with_name(path.name + ".saving")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one step."""
    with replacing(path) as whole:
        whole.write_text(json.dumps(plain(value), indent=2) + "\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object as one line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(plain(row)) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a line cut off by a crash ends the reading."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def keep_rows(
    path: Path, last_step: int, validated: bool = True
) -> list[dict[str, Any]]:
    """Drop the rows after `last_step`, and what validation said of it where that comes
    again (`validated` False): they will be written again. Return the rest."""

    def kept(row: dict[str, Any]) -> bool:
        again = not validated and row.get("kind") == "validate"
        return row["step"] < last_step + (not again)

    rows = [row for row in read_rows(path) if kept(row)]
    with replacing(path) as whole:
        whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def provenance() -> dict[str, Any]:
    """Versions, git revision, device, command and start time; no paths of the machine.

    `git` is None outside a checkout; `dirty` says whether tracked files were changed.
    """
    device = jax.devices()[0]
    command = [PurePath(sys.argv[0]).name if sys.argv else ""]
    return {
        "command": [*command, *(plain(_option(part)) for part in sys.argv[1:])],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _option(part: str) -> str:
    name, equals, value = part.partition("=")
    return f"{name}={plain(value)}" if equals else part


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside another project's checkout: only a revision that
    # tracks this file is ours.
    if not ask("ls-files", Path(__file__).name):
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return {"revision": ask("rev-parse", "HEAD"), "dirty": bool(changed)}


class LiveLine:
    """One line that tells how far a run is.

    On a terminal the line is rewritten in place. Elsewhere (a file, a CI log) a line is
    written now and then, at most one in `seconds`.
    """

    def __init__(self, stream: TextIO | None, seconds: float = 30.0):
        self.stream = stream
        self.seconds = seconds
        self.in_place = stream is not None and stream.isatty()
        self.width = 0
        self.written = time.monotonic()

    def update(self, text: str) -> None:
        """Show the present state of things."""
        if self.stream is None:
            return
        if self.in_place:
            self.stream.write("\r" + text.ljust(self.width))
            self.stream.flush()
            self.width = len(text)
        elif time.monotonic() - self.written >= self.seconds:
            self.note(text)

    def note(self, text: str) -> None:
        """Write a line that stays."""
        if self.stream is None:
            return
        self.stream.write(("\r" if self.width else "") + text.ljust(self.width) + "\n")
        self.stream.flush()
        self.width = 0
        self.written = time.monotonic()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725.4)
    '1:02:05'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
