"""What an evaluation has finished, on disk, so that a killed run goes on.

A folder holds `header.json` (what the verdicts belong to, as hashes), `logits.npy` (the
model's clean answers), `ledger.jsonl` (a line for each finished group of rows of each
stage, appended and flushed) and `groups/` (their arrays, written before the line). A
line that a kill has cut is ignored; its group is run again.
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.digests import digest, program_digest, tree_digest
from robustjax.evaluation.prepare import no_gradient
from robustjax.evaluation.stage import Outcome, Passes
from robustjax.logging import write_json
from robustjax.parallel import is_writer, wait_for_all
from robustjax.types import LogitsFn


def model_digest(f: LogitsFn, x: np.ndarray) -> str:
    """A hash of a model: its weights, its constants, and what it and its gradient
    compute (so BPDA around the same weights is another model).

    Args:
      f: `f(x, key)`, a pytree.
      x: `[N, ...]` inputs, for their shape.

    >>> from jax.tree_util import Partial
    >>> x, f = np.zeros((1, 2), np.float32), Partial(lambda w, x, key: x * w, 2.0)
    >>> model_digest(f, x) == model_digest(Partial(f.func, 2.0), x)
    True
    >>> model_digest(f, x) == model_digest(Partial(lambda w, x, key: x + w, 2.0), x)
    False
    """

    def gradient(f, x, key):
        return jax.grad(lambda x: jnp.sum(f(x, key).astype(jnp.float32)))(x)

    shape = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    computed = gradient if no_gradient(f, shape) is None else lambda f, *of: f(*of)
    closed = jax.make_jaxpr(computed)(f, shape, jax.random.key(0))
    return digest(tree_digest(f), program_digest(closed))


def code_digest() -> str:
    """A hash of the sources that decide a verdict: geometry, attacks, evaluation."""
    root = Path(__file__).parents[1]
    files = [*root.glob("*.py"), *root.glob("attacks/*.py")]
    files += root.glob("evaluation/*.py")
    return digest(*(file.read_text() for file in sorted(files)))


class Ledger:
    """The folder of one evaluation under one threat model.

    Args:
      folder: made where it is missing.
      header: name -> hash or text; an existing header must agree.
      logits: `[N, K]` the model's clean answers, compared up to rounding.

    Raises:
      ValueError: the folder belongs to another model, data set, threat, suite or key;
        the message names the field.
      NotADirectoryError: the folder is a file.
    """

    def __init__(self, folder: Path, header: dict[str, str], logits: np.ndarray):
        self.folder = folder
        self.lines: dict[str, dict[str, Any]] = {}
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"resume={folder} is a file; give a folder.")
        (folder / "groups").mkdir(parents=True, exist_ok=True)
        path = folder / "header.json"
        if path.exists():
            _compare(folder, _parsed(path), header, logits)
        elif is_writer():
            np.save(folder / "logits.npy", logits)
            write_json(path, header)
        self.file = folder / "ledger.jsonl"
        whole = self.file.read_bytes() if self.file.exists() else b""
        ends = whole.rfind(b"\n") + 1
        for line in whole[:ends].splitlines():
            row = json.loads(line)
            self.lines[row["group"]] = row
        wait_for_all("ledger was read")  # before process 0 writes on
        if ends < len(whole) and is_writer():  # cut by a kill: a line begins a line
            with open(self.file, "r+b") as file:
                file.truncate(ends)

    def get(self, group: str, index: np.ndarray, x: np.ndarray) -> Outcome | None:
        """What a group gave; None: it is not finished.

        Args:
          group: the stage's label and the group's number.
          index: `[n]` of its rows, which must be those of the ledger.
          x: `[n, ...]` where nothing better is stored.
        """
        row = self.lines.get(group)
        if row is None:
            return None
        if row["index"] != digest(index):
            raise ValueError(
                f"resume={self.folder}: the ledger's rows of {group!r} are not those "
                "of this run, although all else agrees. Delete the folder, and please "
                "report it."
            )
        with _arrays(self.folder / "groups" / row["file"]) as arrays:
            x_adv = np.array(x, np.float32)
            x_adv[arrays["places"]] = arrays["points"]
            return Outcome(
                arrays["broken"],
                x_adv,
                arrays["margin"],
                arrays["doubted"],
                arrays["handed"],
                arrays["refused"],
                Passes(*row["passes"]),
            )

    def put(
        self, group: str, stage: str, index: np.ndarray, outcome: Outcome, points: bool
    ) -> None:
        """Write what a group gave; `points`: those of all unbroken rows too.

        Without it those whose margin is gone or small: the last pass looks at them
        again, and its precision may be another than the attack's (bfloat16, TPUs).
        """
        name = f"{len(self.lines):06d}.npz"
        row = {
            "group": group,
            "stage": stage,
            "index": digest(index),
            "examples": len(index),
            "broken": np.asarray(index)[outcome.broken].tolist(),
            "passes": list(outcome.passes),
            "file": name,
        }
        self.lines[group] = row
        if not is_writer():
            return
        margin = outcome.margin
        usual = np.abs(margin[np.isfinite(margin)]).max(initial=0.0)
        kept = outcome.broken | (margin <= CLOSE * usual) | points
        places = np.flatnonzero(kept)
        temporary = self.folder / "groups" / f"{name}.saving"
        with open(temporary, "wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                places=places,
                points=outcome.x_adv[places],
                broken=outcome.broken,
                margin=outcome.margin,
                doubted=outcome.doubted,
                handed=outcome.handed,
                refused=outcome.refused,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "groups" / name)
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


CLOSE = 1 / 64
"""Of the largest margin of a group; products in bfloat16 are off by 1 / 256."""

FIXES = {
    "model": "the model differs, in its weights or in what it computes",
    "logits": "the model's clean answers differ",
    "x": "the inputs differ",
    "y": "the labels differ",
    "index": "the example indices differ",
    "threat": "norm, epsilon or box differ",
    "suite": "the suite, its constants or the names of the added attacks differ",
    "attacks": "an added attack computes something else",
    "key": "the random key differs",
    "rows": "the shapes differ, as they do with another batch_size or device count",
    "machine": "JAX's version, backend or precision differ",
    "code": "the code has changed since",
}


def _parsed(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: delete resume={path.parent}.") from error


def _arrays(path: Path) -> Any:
    try:
        return np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged or gone: delete resume={path.parents[1]}."
        ) from error


def _compare(folder, old: dict[str, str], new: dict[str, str], logits) -> None:
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"resume={folder} was begun with another {name!r}: {FIXES[name]} "
                f"({old.get(name)} then, {value} now). Give a new folder, or delete "
                "this one."
            )
    known = np.load(folder / "logits.npy")
    usable = np.isfinite(known) & np.isfinite(logits)
    scale = max(float(np.abs(known[usable]).max(initial=0)), 1e-6)
    same = known.shape == logits.shape and np.allclose(
        known, logits, rtol=0, atol=1e-4 * scale, equal_nan=True
    )
    if not same:
        raise ValueError(
            f"resume={folder} was begun with another 'logits': {FIXES['logits']}, so "
            "this is another checkpoint. Give a new folder, or delete this one."
        )
