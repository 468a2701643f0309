"""How long a whole `standard` evaluation compiles: cold, and with a warm cache.

Every stage makes one step only and nothing falls (epsilon 1e-6): all stages, all
targets, all shapes of the ladder, the checks with them where asked for. What the first
evaluation of a process takes longer than the second is tracing, and compiling or
reading programs. Each figure is from a process of its own: "cold" keeps no programs,
"first" writes them into an empty folder, "warm" finds them there. Where a folder is
set, convolutions are XLA's own (docs/evaluate.md).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

EPSILON = 1e-6
COMPILES = "/jax/core/compile/backend_compile_duration"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    import robustjax as rj
    from robustjax import models
    from robustjax.evaluation import board, judge

    compiled: list[float] = []

    def note(name: str, duration: float, **_: Any) -> None:
        if name == COMPILES:
            compiled.append(duration)

    run = board.Board.run

    def one_step(self: Any, stage: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, stage._replace(num_steps=1), *args, **kwargs)

    if options.folder:
        jax.config.update("jax_compilation_cache_dir", options.folder)
        least = 0.0 if options.quick else 0.1
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    if options.quick:
        model = models.small_cnn(10)
        shape = (8, 8, 1)
    else:
        model = models.preact_resnet18(10, width=options.width)
        shape = (32, 32, 3)
    count = sum(judge.ladder(options.batch_size, 10**6, 1))
    x = np.random.default_rng(0).uniform(size=(count, *shape)).astype(np.float32)
    f = models.logits_fn(model, *model.init(jax.random.key(0), x[:1]))
    y = np.concatenate([f(x[i : i + 64], None).argmax(1) for i in range(0, count, 64)])
    board.Board.run = one_step
    jax.monitoring.register_event_duration_secs_listener(note)

    def evaluate() -> tuple[float, Any]:
        began = time.monotonic()
        report = rj.evaluate(
            *(f, x, y, rj.threat(options.norm, EPSILON)),
            batch_size=options.batch_size,
            checks=options.checks,
            progress=False,
        )
        return time.monotonic() - began, report

    wall, report = evaluate()
    made = {"programs": len(compiled), "compile": sum(compiled)}
    again, _ = evaluate()
    assert report.robust_accuracy == 1, report.robust_accuracy
    (judged,) = report.threats.values()
    stages = [stage.name for stage in judged.stages]
    return {"wall": wall, "again": again, "stages": stages, **made}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/compile_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", default="Linf", choices=["Linf", "L2", "L1"])
    add("--width", type=int, default=16, help="of PreActResNet-18")
    add("--batch-size", type=int, default=256)
    add("--checks", default="none", choices=["none", "default", "full"])
    add("--quick", action="store_true", help="a small net on small images")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        print(json.dumps(measure(options)), file=out)
        return
    own = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
    env = {k: v for k, v in os.environ.items() if k not in own}
    with tempfile.TemporaryDirectory() as folder:
        for what, where in (("cold", ""), ("first", folder), ("warm", folder)):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
            done = subprocess.run(
                [*command, "--folder", where], env=env, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"compile_time: {what} failed.\n{done.stderr}")
            row = json.loads(done.stdout)
            print(
                f"{what:6}{row['wall'] - row['again']:6.1f} s: {row['wall']:.1f} s, "
                f"{row['again']:.1f} s the second time; {row['programs']} programs, "
                f"{row['compile']:.1f} s compiling or reading them "
                f"({', '.join(row['stages'])})",
                flush=True,
            )


if __name__ == "__main__":
    main()
