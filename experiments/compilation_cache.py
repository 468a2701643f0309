"""Compiled programs are kept between runs, so that the second start is a short one.

A command `python -m experiments.NAME` keeps them in the user's cache folder,
`$XDG_CACHE_HOME/robustjax/programs` (`~/.cache/...`), one folder for each kind of
processor: a program for one may use instructions that another lacks.

    ROBUSTJAX_CACHE_DIR=off python -m experiments.NAME      compiles anew, keeps nothing
    ROBUSTJAX_CACHE_DIR=DIR python -m experiments.NAME      keeps them there

Who sets JAX's own JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE is left
alone. Several processes may share the folder: JAX knows a program by its text, its
options and the versions, an entry that it cannot read (half written, damaged) is
compiled anew, and of a run of several processes only process 0 writes. On CPU a
training step that calls oneDNN (`models.convolution_options()`) is compiled at every
start: JAX cannot keep such a program.
"""

import os
import platform
import warnings
import zlib
from pathlib import Path

import jax

LEAST_SECONDS = 0.3  # what compiles faster is not worth a file


def folder() -> Path | None:
    """Where programs are kept; None: nowhere, by the user's wish.

    Raises:
      ValueError: `$ROBUSTJAX_CACHE_DIR` is set and empty.
    """
    given = os.environ.get("ROBUSTJAX_CACHE_DIR")
    if given == "off":
        return None
    if given == "":
        raise ValueError(
            "ROBUSTJAX_CACHE_DIR is empty; give a folder, or `off` to keep no programs."
        )
    if given is not None:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "robustjax" / "programs" / _processor()


def turn_on() -> None:
    """Let JAX keep compiled programs; for a process that is an experiment's own."""
    of_jax = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    where = folder()
    if where is None or any(name in os.environ for name in of_jax):
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: then without
        return
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    # A step with `models.convolution_options()` calls oneDNN and cannot be kept: JAX
    # says so at every start, of a thing that nobody can mend.
    said = "Error writing persistent compilation cache entry .*bad_alloc"
    warnings.filterwarnings("ignore", said, UserWarning)


def _processor() -> str:
    """Kinds that differ in what they can do have different names."""
    features = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                features = line
                break
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
