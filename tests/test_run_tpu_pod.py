"""scripts/run_tpu_pod: the commands it would give, and a run on a pod of this machine.

The fake gcloud below keeps a pod of two workers as two folders and runs what is said to
them there, so quoting, exit codes and the way back after a preemption are real.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACE = ("--project", "p", "--zone", "z")

GCLOUD = """#!/bin/bash
set -e
[ "$1" != config ] || exit 1
action=$4 worker=0
echo "$action" >>"$POD/said"
for word in "$@"; do
  case "$word" in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
  esac
done
workers=$worker; [ "$worker" != all ] || workers="0 1"
case "$action" in
  create) mkdir -p "$POD/0" "$POD/1"; echo READY >"$POD/state" ;;
  delete) rm -rf "$POD/0" "$POD/1" "$POD/state" ;;
  describe) cat "$POD/state" ;;
  scp) for w in $workers; do cp "$5" "$POD/$w/${6#*:}"; done ;;
  ssh) for w in $workers; do (cd "$POD/$w" && bash -c "$command"); done ;;
esac
"""
SETUP = f"""#!/bin/sh
cd "$(dirname "$0")/.." && mkdir -p .venv/bin && echo "$@" >extras
printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' >.venv/bin/python
chmod +x .venv/bin/python
"""
EXPERIMENT = """
import pathlib, sys
# A mark for each worker: they share the folder, and either may come first.
worker = pathlib.Path.cwd().parent.name
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1], worker)
done = out.exists()
out.mkdir(parents=True, exist_ok=True)
print("arguments", sys.argv[1:], "again" if done else "first")
sys.exit(0 if done else 143)
"""


@pytest.fixture
def pod(tmp_path):
    """A checkout of its own, and `run(*arguments)`, which tells what gcloud heard."""
    checkout, place = tmp_path / "checkout", tmp_path / "pod"
    for path, text in {
        checkout / "scripts/setup": SETUP,
        checkout / "experiments/demo.py": EXPERIMENT,
        checkout / "experiments/__init__.py": "",
        tmp_path / "bin/gcloud": GCLOUD,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(ROOT / "scripts/run_tpu_pod", checkout / "scripts")
    place.mkdir()
    names = "-c user.name=n -c user.email=e -c init.defaultBranch=main"
    for command in ("init -q", "add .", "commit -q -m one"):
        arguments = ["git", *names.split(), *command.split()]
        subprocess.run(arguments, cwd=checkout, check=True)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(*arguments):
        (place / "said").write_text("")
        done = subprocess.run(
            [checkout / "scripts/run_tpu_pod", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "POD": str(place)},
        )
        return done, (place / "said").read_text().split()

    return run, checkout, place


def test_a_run_that_is_preempted_and_goes_on(pod, tmp_path):
    run, checkout, place = pod
    done, said = run("create", "pod", "--topology", "v5e:16x16", *PLACE)
    assert done.returncode == 0, done.stderr
    assert said == ["create", "scp", "ssh"]
    for worker in ("0", "1"):
        assert (place / worker / "robustjax/extras").read_text() == "tpu\n"
    # A quote, a space, a dollar and nothing at all have to arrive as they are.
    flags = ["--text", 'it\'s $HOME "x"', "", "--out", str(tmp_path / "out")]
    done, _ = run("start", "pod", "--", "demo", *flags)
    assert done.returncode == 0, done.stderr
    done, _ = run("follow", "pod")
    assert done.returncode == 143
    assert f"arguments {flags} " in done.stdout
    (checkout / "experiments/demo.py").write_text(EXPERIMENT + "\n# changed")
    (place / "state").write_text("PREEMPTED")
    done, said = run("resume", "pod")
    assert done.returncode == 0, done.stderr
    assert said == ["describe", "delete", "create", "scp", "ssh", "ssh"]
    assert "# changed" in (place / "1/robustjax/experiments/demo.py").read_text()
    done, _ = run("follow", "pod")
    assert done.returncode == 0
    assert f"arguments {flags} again" in done.stdout
    done, _ = run("status", "pod")
    assert done.stdout.splitlines()[:2] == ["READY", "0"]
    assert run("delete", "pod")[1] == ["delete"]
    # Gone altogether: what it was is remembered.
    done, said = run("resume", "pod")
    assert done.returncode == 0, done.stderr
    assert said == ["describe", "create", "scp", "ssh", "ssh"]
    run("follow", "pod")


def test_a_second_run_is_refused(pod, tmp_path):
    run, checkout, place = pod
    (checkout / "experiments/demo.py").write_text("import time; time.sleep(60)")
    run("create", "pod", "--topology", "v5e:2x2", *PLACE)
    run("start", "pod", "--", "demo", "--out", tmp_path)
    done, _ = run("start", "pod", "--", "demo", "--out", tmp_path)
    pids = [int((place / worker / "run.pid").read_text()) for worker in ("0", "1")]
    for pid in pids:
        os.killpg(pid, 9)
    assert done.returncode == 1
    assert "a run is going on here" in done.stderr


def dry(*arguments):
    done = subprocess.run(
        [ROOT / "scripts/run_tpu_pod", *arguments, *PLACE, "--dry-run"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("topology", "kind", "image"),
    [
        ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v6e:4x8", "v6e-32", "v2-alpha-tpuv6e"),
        ("v5p:4x4x4", "v5p-128", "v2-alpha-tpuv5"),
        ("v4:2x2x2", "v4-16", "tpu-ubuntu2204-base"),
    ],
)
def test_dry_run_prints_what_creates_the_machine(topology, kind, image):
    commands = dry("create", "of-a-test", f"--topology={topology}", "--spot")
    assert commands[0] == [
        *"gcloud compute tpus tpu-vm create of-a-test".split(),
        *(f"--accelerator-type={kind}", f"--version={image}", "--spot"),
        *("--project=p", "--zone=z"),
    ]
    assert [command[4 if command[0] == "gcloud" else 0] for command in commands] == [
        *("create", "mkdir", "git", "scp", "ssh")
    ]
    assert not (ROOT / "runs/pods/of-a-test").exists()


def test_dry_run_of_the_rest():
    share = ("--nfs", "10.0.0.2:/s")
    command = dry("create", "of-a-test", "--topology", "v5e:2x2", *share)[4]
    assert "--worker=all" in command
    assert "mount -t nfs 10.0.0.2:/s /mnt/robustjax" in command[7]
    assert dry("follow", "of-a-test")[0][6] == "--worker=0"
    assert dry("delete", "of-a-test")[0][4:7] == ["delete", "of-a-test", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the first word is ''"),
        (("create", "Pod"), "the pod's name is 'Pod'"),
        (("create", "pod", "--size", "3"), "unknown option '--size'"),
        (("create", "pod", "--zone"), "--zone needs a value"),
        (("create", "pod"), "no project; give --project"),
        (("create", "pod", "--project", "p"), "no zone; give --zone"),
        (("create", "pod", *PLACE), "no topology; give --topology"),
        (("create", "pod", *PLACE, "--topology", "v5e-8"), "--topology is 'v5e-8'"),
        (("create", "pod", *PLACE, "--topology", "v9:2x2"), "generation 'v9'"),
        (("start", "pod", *PLACE), "no experiment; give it"),
        (("start", "pod", *PLACE, "--", "dem"), "experiments/dem.py does not exist"),
        (("start", "pod", *PLACE, "--", "demo"), "the experiment has no --out"),
        (("resume", "pod", *PLACE), "this checkout did not create pod"),
    ],
)
def test_refusals(pod, arguments, message):
    done, said = pod[0](*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "ssh" not in said


def test_without_gcloud(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [ROOT / "scripts/run_tpu_pod", "delete", "pod", *PLACE],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "gcloud is not on PATH; install the Google Cloud SDK" in done.stderr
