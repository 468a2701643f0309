"""The folder of a run: what is in it, and when a run may be taken up again.

config.json       what the run was asked to do
provenance.json   versions, revision, device, command; one entry for each start
metrics.jsonl     one object per line: kind "train" or "validate", step, numbers
checkpoints/      the last two and the best (see `checkpoint`)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustjax.logging import append_row, keep_rows, plain, provenance, write_json
from robustjax.parallel import is_writer, wait_for_all
from robustjax.training import checkpoint
from robustjax.types import PyTree

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


def last_step(out: Path) -> int | None:
    """The newest complete checkpoint of a run; None: there is none."""
    found = checkpoint.steps(out / CHECKPOINTS)
    return found[-1] if found else None


def remembered_of(out: Path) -> dict[str, Any] | None:
    """What the newest complete checkpoint remembers, among it "step", "best" and
    "settings"; None: there is none.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    step = last_step(out)
    if step is None:
        return None
    return checkpoint.read_meta(out / CHECKPOINTS, step)["remembered"]


def open_run(
    out: Path, settings: Mapping[str, Any], config: Any
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Begin a run, or make ready to go on with the one that is there.

    Args:
      out: the run's folder, made where it is missing.
      settings: what decides the result; compared with those of the checkpoint.
      config: what the user asked for, for `config.json`.

    Returns:
      What the last checkpoint remembers (None: a fresh run), and the rows of
      `metrics.jsonl` up to it; later rows are dropped, they will be made again.

    Raises:
      ValueError: a setting differs from the run's (the message names it), or the
        checkpoint is damaged.
      NotADirectoryError: `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out {out} is a file; give a folder.")
    step, remembered = None, remembered_of(out)
    if remembered is not None:
        step = remembered["step"]
        then, now = dict(remembered["settings"]), plain(settings)
        programs = then.pop("program", None), now.pop("program", None)
        check_settings(out, then, now)
        _check_program(out, *programs)
    rows: list[dict[str, Any]] = []
    wait_for_all("run folder was read")
    if is_writer():
        out.mkdir(parents=True, exist_ok=True)
        validated = (remembered or {}).get("validated", True)
        rows = keep_rows(out / METRICS, -1 if step is None else step, validated)
        if step is None:
            write_json(out / "config.json", {} if config is None else config)
        _note_start(out / "provenance.json", step)
    return remembered, rows


def checkpoint_now(
    out: Path,
    step: int,
    state: PyTree,
    remembered: dict[str, Any],
    earlier: dict[str, Any] | None,
) -> None:
    """Save a checkpoint; keep it, the one before, and what either calls the best.

    Saved once more (a validation is made up for), the one before is an older step's.

    Args:
      out: the run's folder.
      step: names the checkpoint.
      state: what is saved.
      remembered: with "step" and "best" (a dict with "step", or None), among others.
      earlier: the same of the checkpoint before; None: there is none.
    """
    checkpoint.save(out / CHECKPOINTS, step, state, remembered)
    keep = set()
    for kept in (remembered, earlier):
        if kept is not None:
            keep |= {kept["step"]} | ({kept["best"]["step"]} if kept["best"] else set())
    if earlier is not None and earlier["step"] == step:
        keep |= set([s for s in checkpoint.steps(out / CHECKPOINTS) if s < step][-1:])
    checkpoint.prune(out / CHECKPOINTS, keep)


def append(out: Path, row: Mapping[str, Any]) -> None:
    """Append a row to the run's metrics.

    Raises:
      OSError: it cannot be written; the message says what is safe.
    """
    try:
        append_row(out / METRICS, row)
    except OSError as error:
        step = last_step(out)
        kept = (
            "No checkpoint was written yet"
            if step is None
            else (f"The checkpoint of step {step} is intact")
        )
        raise OSError(
            error.errno,
            f"{out / METRICS} cannot be written ({error.strerror}). {kept}: "
            "free some space or permit writing, and run the same command again",
        ) from error


def check_settings(
    out: Path, then: Mapping[str, Any], now: Mapping[str, Any], within: str = ""
) -> None:
    """Raise ValueError naming the first setting that differs from the run's."""
    for name in [*then, *(n for n in now if n not in then)]:
        old, new = then.get(name, "not set"), now.get(name, "not set")
        if old == new:
            continue
        field = f"{within}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_settings(out, old, new, field + ".")
        if name not in then:
            raise ValueError(
                f"{out} holds a run that was started without {field}, now it is "
                f"{new!r}. Leave it out to go on with that run; if it cannot be left "
                "out, an earlier version made the run: give another folder."
            )
        raise ValueError(
            f"{out} holds a run that was started with {field} = {old!r}, now it is "
            f"{new!r}. Give {field} = {old!r} to go on with that run, or another "
            "folder to start a new one."
        )


def _check_program(
    out: Path, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> None:
    """Raise ValueError where the run computed something else (see `fit`)."""
    if then is None or now is None or then == now:
        return
    if then["start"] == now["start"] and then["versions"] != now["versions"]:
        return  # the texts cannot be compared
    raise ValueError(
        f"{out} holds a run of another model, method, tx, augment, mix or start, of "
        "other code of theirs, or of other settings of JAX. Give another folder to "
        "start a new one, or what that run was given. If it is the same training, "
        "config={} goes on without this comparison."
    )


def _note_start(path: Path, step: int | None) -> None:
    starts = []
    if step is not None and path.exists():
        try:
            starts = json.loads(path.read_text())["starts"]
        except (ValueError, KeyError):
            starts = []
    write_json(path, {"starts": [*starts, {"at_step": step or 0, **provenance()}]})
