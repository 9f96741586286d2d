"""Runs the launch scripts, for the tests of what they would run and refuse."""

import os
import subprocess

from job import ROOT

JOB = ["train", "--config=configs/imagenet256.py:DiT-XL/2", "--workdir=/mnt/share/xl2"]
TYPED = " ".join(JOB[1:])
CLOUD = {"PROJECT": "lab", "ZONE": "us-central2-b", "NAME": "xl2"}
TPU = CLOUD | {"ACCELERATOR": "v4-64", "NFS": "10.0.0.2:/share"}
GKE = CLOUD | {"CLUSTER": "pods", "TPU_TYPE": "v4-64", "CAPACITY": "spot"}


def call(script, *arguments, root=ROOT, **variables):
    """(exit code, lines on standard output with the checkout as ROOT, standard error); no variable but these is set."""
    env = {"PATH": os.environ["PATH"], **variables}
    command = ["bash", f"launch/{script}", *arguments]
    found = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    return found.returncode, found.stdout.replace(str(root), "ROOT").splitlines(), found.stderr


def unchecked_in(root):
    """A checkout whose python does not look at the job: for facts about what a script does once the job is checked (test_check.py)."""
    for name in ("launch", "dit_jax"):
        (root / name).symlink_to(ROOT / name)
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text("#!/bin/bash\nexit 0\n")
    python.chmod(0o755)
    return root


def fakes_in(tmp_path):
    """(PATH whose first folder holds what the scripts call, a function that returns the calls so far)."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("gcloud", "xpk", "kubectl", "sbatch", "git", "rm", "mkdir", "tar"):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{log}\n{STATES if name == "gcloud" else ""}')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", lambda: log.read_text().splitlines() if log.exists() else []


# The fake gcloud tells the next of the states that a file lists, and fails at "none" as it does where there is no such request,
# and at "broken" in another way. To a look at the workers it prints another file.
STATES = """
cd "$(dirname "$0")"
if [[ $* == *queued-resources\\ describe* ]]; then
  read -r state <states || exit 1
  sed -i 1d states
  [[ $state != none ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'xl2' was not found" >&2; exit 1; }
  [[ $state != broken ]] || { echo "ERROR: (gcloud) UNAVAILABLE" >&2; exit 1; }
  echo "$state"
elif [[ $* == *tpu-vm\\ describe* ]]; then
  cat node 2>/dev/null
elif [[ $* == *worker\\ \\$* ]]; then
  cat workers 2>/dev/null
fi
"""


def dry(script, *arguments, **variables):
    """What a script would run, and that it checked the job, if it starts one."""
    code, lines, err = call(script, "--dry-run", *arguments, **variables)
    assert code == 0 and all(line.startswith(("checked: ", "not checked")) for line in err.splitlines()), err
    return lines


PODS = "--cluster=pods --project=lab --zone=us-central2-b"


NO_SHARE = ", but no NFS; give gs://BUCKET/..., or set NFS to HOST:/EXPORT of a share and give a path in /mnt/share"
ONE_NODE = {"CPUS": "8", "TIME": "60", "NODES": "1"}
ONE_HOST = {"ACCELERATOR": "v4-8", "TPU_TYPE": "v4-8"}
