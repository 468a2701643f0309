import dataclasses
import io
import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from robustjax import logging


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float
    out: Path
    sizes: tuple[int, ...]


def test_plain_is_json_without_paths_of_the_machine():
    config = Config(jnp.inf, Path("/home/somebody/run"), (1, 2))
    text = json.dumps(logging.plain({"config": config, "n": np.int64(3)}))
    assert json.loads(text) == {
        "config": {"rate": None, "out": "run", "sizes": [1, 2]},
        "n": 3,
    }
    assert logging.plain("relative/path") == "relative/path"
    assert logging.plain(jnp.array([1.5, jnp.nan])) == [1.5, None]


def test_rows_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        logging.append_row(path, {"step": step, "loss": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    kept = logging.keep_rows(path, 2)
    assert (
        [row["step"] for row in kept]
        == [1, 2]
        == [json.loads(line)["step"] for line in path.read_text().splitlines()]
    )


def test_live_line_rewrites_a_terminal_and_spares_a_file():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = logging.LiveLine(stream)
        line.update("step 1/20")
        line.update("step 2")
        line.note("done")
    assert terminal.getvalue() == "\rstep 1/20\rstep 2   \rdone  \n"
    assert file.getvalue() == "done\n"
    now_and_then = logging.LiveLine(file, seconds=0.0)
    now_and_then.update("step 3")
    assert file.getvalue().endswith("step 3\n")
    logging.LiveLine(None).update("nobody reads this")


def test_provenance_names_versions_and_no_paths(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/opt/somewhere/train.py", "--out=/data/run", "--lr", "0.1"]
    )
    found = logging.provenance()
    assert found["command"] == ["train.py", "--out=run", "--lr", "0.1"]
    assert found["versions"]["jax"] and found["device"]["platform"] == "cpu"
    assert str(Path.home()) not in json.dumps(found)
    here = Path(logging.__file__).parent
    head = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if head.returncode == 0 and found["git"] is not None:
        assert found["git"]["revision"] == head.stdout.strip()
        assert isinstance(found["git"]["dirty"], bool)


def test_provenance_without_git(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert logging.provenance()["git"] is None
