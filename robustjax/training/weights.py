"""The weights that a training leaves for use."""

from pathlib import Path
from typing import Any

from robustjax.training import checkpoint, run_folder
from robustjax.training.state import TrainState
from robustjax.types import PyTree


def weights_of(state: TrainState) -> tuple[PyTree, PyTree]:
    """The weights to use, `(params, extra)`: the averages where they are kept."""
    if state.ema is not None:
        return state.ema.params, state.ema.extra
    return state.params, state.extra


def load_weights(
    out: str | Path,
    like: tuple[PyTree, PyTree],
    which: int | str = "best",
    sharding: Any = None,
) -> tuple[PyTree, PyTree]:
    """Load `(params, extra)` of a run, without its optimizer.

    Args:
      out: the run's folder.
      like: `(params, extra)` of the model, or their shapes:
        `jax.eval_shape(model.init, key, x)`.
      which: "best" by validation (without validation the last), "last", or a step.
      sharding: where to place the arrays; None: the default device.

    Returns:
      The averaged weights where the run kept averages, else the plain ones.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is damaged, foreign, or of another model.
    """
    folder = Path(out) / run_folder.CHECKPOINTS
    last = run_folder.last_step(Path(out))
    if last is None:
        raise FileNotFoundError(
            f"{out} holds no checkpoint of robustjax; give the folder that was `out` "
            f"of a training (it has a folder {run_folder.CHECKPOINTS})."
        )
    if which == "best":
        remembered = run_folder.remembered_of(Path(out))
        assert remembered is not None  # for `last` is not
        which = (remembered["best"] or remembered)["step"]
    elif which == "last":
        which = last
    if not isinstance(which, int):
        raise ValueError(f'which is {which!r}; give "best", "last" or a step.')
    leaves = checkpoint.read_meta(folder, which)["leaves"]
    part = ".ema" if any(name.startswith(".ema") for name in leaves) else ""
    params, extra = like
    return (
        checkpoint.restore(folder, which, params, sharding, within=f"{part}.params"),
        checkpoint.restore(folder, which, extra, sharding, within=f"{part}.extra"),
    )
