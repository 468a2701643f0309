"""Prove exact resume: `kill -9` at any moment, same command again, same final bytes.

Trains once unbroken, then once for every kill: the process is killed (SIGKILL) at a
random moment or in the middle of a checkpoint, started again with the same command, and
its final state (weights, statistics, optimizer, averages), its best checkpoint and the
rows of its metrics are compared with those of the unbroken run. Exit code 0: all equal.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY, FAST_STEPS, STEPS = 25, 100, 300
TIMES = ("seconds", "images_per_second")


def state_hash(result: Any) -> str:
    """Of all that a training ends with (a `FitResult`), to the bit."""
    import jax
    import jax.numpy as jnp

    from robustjax.parallel import fetch

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((result.state, result.params, result.extra)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(fetch(leaf).tobytes())
    return digest.hexdigest()


def train(out: Path, fast: bool) -> None:
    """The training that is killed; ends by writing the hash of its final state."""
    import jax
    import jax.numpy as jnp

    from robustjax.attacks.base import last
    from robustjax.attacks.pgd import pgd
    from robustjax.data import augment
    from robustjax.data.resident import resident
    from robustjax.data.sources import load
    from robustjax.methods.madry import madry
    from robustjax.models.madry_mnist import small_cnn
    from robustjax.models.mlp import mlp
    from robustjax.threats import linf
    from robustjax.training import optimizers
    from robustjax.training.loop import fit

    digits = load("digits")
    steps = FAST_STEPS if fast else STEPS
    model = mlp((64,)) if fast else small_cnn(channels=(8, 16), hidden=32)
    x = jnp.asarray(digits.x_test, jnp.float32) / digits.max_value
    y = jnp.asarray(digits.y_test)

    @jax.jit
    def validate(params, extra):
        logits = model.apply(params, extra, x)[0]
        return {"clean_accuracy": jnp.mean(jnp.argmax(logits, -1) == y)}

    result = fit(
        jax.random.key(3),
        model,
        madry(model, linf(0.1), pgd(5, 0.3, keep=last)),
        optimizers.sgd(optimizers.one_cycle(0.03, steps), weight_decay=5e-4),
        resident(digits.x_train, digits.y_train, digits.max_value),
        batch_size=64,
        num_steps=steps,
        augment=lambda key, x, index: augment.random_crop(key, x, index, padding=1),
        validate=validate,
        best_metric="clean_accuracy",
        checkpoint_every=EVERY,
        steps_per_dispatch=10,
        ema_decay=0.98,
        out=out,
        config={"model": "mlp" if fast else "small_cnn"},
    )
    numbers = {"sha256": state_hash(result), "best": result.metrics}
    (out / "final.json").write_text(json.dumps(numbers))


def start(out: Path, fast: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--train", str(out)]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command + (["--fast"] if fast else []), stdout=log, stderr=log
        )


def finish(out: Path, fast: bool) -> dict:
    if start(out, fast).wait():
        sys.exit(out.with_suffix(".log").read_text())
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in TIMES:
            row.pop(name, None)
    return {**json.loads((out / "final.json").read_text()), "rows": rows}


def wait_for(condition, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the condition holds; False: the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


def kill_once(out: Path, fast: bool, in_checkpoint: bool) -> tuple[str, str]:
    """Kill a run at a random moment, or in the middle of a random checkpoint.

    Returns:
      What the folder looked like: the last whole checkpoint, and what was half written.
    """
    checkpoints = out / "checkpoints"
    step = EVERY * random.randint(1, (FAST_STEPS if fast else STEPS) // EVERY - 2)
    # The machine's load decides how long a step takes: so a moment is a random time
    # after a random checkpoint.
    name = f".saving_{step:08d}" if in_checkpoint else f"step_{step:08d}"
    process = start(out, fast)
    if not wait_for((checkpoints / name).exists, process):
        return "", ""
    if not in_checkpoint:
        time.sleep(random.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return "", ""
    names = sorted(os.listdir(checkpoints))
    whole = [name for name in names if name.startswith("step_")]
    half = [name for name in names if name.startswith(".")]
    return (whole[-1] if whole else "none"), " ".join(half)


def prove(kills: int, fast: bool, seed: int, folder: Path) -> bool:
    random.seed(seed)
    began = time.monotonic()
    unbroken = finish(folder / "unbroken", fast)
    print(f"unbroken run: {unbroken['sha256'][:16]}, best {unbroken['best']}")
    print(f"{'killed':<20}{'last whole':<16}{'half written':<32}{'state':<18}equal")
    equal = True
    for number in range(kills):
        out = folder / f"killed_{number}"
        in_checkpoint = number == kills - 1
        for _ in range(9):
            whole, half = kill_once(out, fast, in_checkpoint)
            if whole and (half or not in_checkpoint):
                break
            # The run or the checkpoint was finished before the signal came.
            print(out.with_suffix(".log").read_text()[-2000:], file=sys.stderr)
            shutil.rmtree(out, ignore_errors=True)
        else:
            sys.exit("no kill hit its moment in 9 tries; see the output above")
        resumed = finish(out, fast)
        same = resumed == unbroken
        equal &= same
        moment = "in a checkpoint" if in_checkpoint else "at a random moment"
        print(f"{moment:<20}{whole:<16}{half:<32}{resumed['sha256'][:16]:<18}{same}")
    print(f"{'all equal' if equal else 'NOT EQUAL'}, {time.monotonic() - began:.0f} s")
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5, help="the last in a checkpoint")
    parser.add_argument("--fast", action="store_true", help="an MLP instead of a CNN")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the kills"
    )
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills is {arguments.kills}; give 1 or more")
    if arguments.train:
        train(arguments.train, arguments.fast)
        return
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder:
        done = prove(arguments.kills, arguments.fast, arguments.seed, Path(folder))
    sys.exit(not done)


if __name__ == "__main__":
    main()
