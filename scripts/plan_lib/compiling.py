"""Runs worker.py as a child: shows progress, keeps the compiler's noise apart."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# No TPU is looked for: not on this machine, not in the cloud's metadata. Several
# compilers may run at once; only programs that hold a TPU must not.
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
MISSING = (
    "the TPU compiler, libtpu, is not installed beside this JAX: run "
    "`scripts/setup tpu` (works without a TPU)."
)


class CompileError(RuntimeError):
    """A program could not be compiled; the message is for people."""


def compiler_is_there() -> bool:
    return find_spec("libtpu") is not None


def compile_job(job: dict[str, Any], label: str, show: Any = sys.stderr) -> Path:
    """The folder of the compiled program, from the cache or after minutes.

    Raises:
      CompileError: what the child died of: its last line, and where the rest stands.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False) as log:
        child = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            text=True,
        )
        done = threading.Event()
        ticker = threading.Thread(target=_tick, args=(label, began, done, show))
        ticker.start()
        try:
            out, _ = child.communicate(json.dumps(job))
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            done.set()
            ticker.join()
    if child.returncode == 0:
        Path(log.name).unlink()
        return Path(json.loads(out.strip().splitlines()[-1])["folder"])
    raise CompileError(_reason(Path(log.name), label, child.returncode))


def _reason(log: Path, label: str, code: int) -> str:
    lines = [line.strip() for line in log.read_text().splitlines()]
    # Out of memory has an error of many lines, of which the first says it; below an
    # exception of another kind JAX may tell of tracebacks.
    telling = [n for n in lines if "RESOURCE_EXHAUSTED" in n] or [
        n for n in lines if n.strip("-") and not n.startswith("For simplicity, JAX")
    ][-1:]
    cause = telling[0] if telling else f"exit code {code}"
    return f"{label}: {cause[:600]}\n(everything that was said: {log})"


def _tick(label: str, began: float, done: threading.Event, show: Any) -> None:
    """Every second on a terminal, every minute elsewhere."""
    live = show.isatty()
    while not done.wait(1 if live else 60):
        seconds = int(time.monotonic() - began)
        text = f"{label}: compiling, {seconds // 60}:{seconds % 60:02d}"
        print(f"\r{text}" if live else text, end="" if live else "\n", file=show)
        show.flush()
    if live:
        print("\r" + " " * (len(label) + 30) + "\r", end="", file=show)
