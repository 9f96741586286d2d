"""launch/gke.sh beside xpk itself, in an environment of its own: names of TPUs, every command, the codes that start a job again.

Run by `make xpk`, which says where that environment is.
"""

import json
import os
import shlex
import subprocess

import pytest
from launched import GKE, JOB, call, dry

from dit_jax import hardware
from dit_jax.error import ERROR, INTERRUPTED, PEER_LOST, USAGE

pytestmark = pytest.mark.xpk
ASK = """
import argparse, contextlib, io, json, sys
from xpk.commands.workload import get_restart_exit_codes
from xpk.parser.core import set_parser
from xpk.utils.feature_flags import FeatureFlags

def parsed(words):
    parser = argparse.ArgumentParser(prog="xpk")
    set_parser(parser=parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(words), ""
    except SystemExit:
        return None, said.getvalue()

asked, found = json.load(sys.stdin), []
for words in asked:
    values, error = parsed(words)
    codes = get_restart_exit_codes(values) if hasattr(values, "restart_on_exit_codes") else []
    found.append({"error": error, "codes": codes})
print(json.dumps({"found": found, "crane": FeatureFlags.CRANE_WORKLOADS_ENABLED}), file=sys.stderr)
"""


def ask(commands):
    """What xpk's own parser makes of each command: {"error", "codes"}; and whether it builds images by crane."""
    command = [os.path.join(os.environ["XPK"], "bin", "python"), "-c", ASK]
    found = subprocess.run(command, input=json.dumps(commands), capture_output=True, text=True, check=True)
    return json.loads(found.stderr.splitlines()[-1])


def commands(folder, **variables):
    """Every command that the script would give to xpk."""
    lines = [line for verb in (["create"], ["share"], ["run", *JOB], ["status"], ["stop"], ["delete"])
             for line in dry("gke.sh", *verb, **GKE | variables)]  # fmt: skip
    found = [shlex.split(line)[1:] for line in lines if line.startswith("xpk ")]
    return [[word.replace("ROOT/build/gke", str(folder)) for word in words] for words in found]


@pytest.mark.parametrize("capacity", ["spot", "on-demand", "reservation=mine"])
def test_xpk_parses_every_command_and_restarts_the_codes_that_are_to_be(tmp_path, capacity):
    asked = commands(tmp_path, CAPACITY=capacity, SERVICE_ACCOUNT="dit@lab.iam.gserviceaccount.com")
    answer = ask(asked)
    assert [found["error"] for found in answer["found"]] == [""] * 6
    assert answer["crane"]
    (codes,) = [found["codes"] for found in answer["found"] if found["codes"]]
    assert {INTERRUPTED, PEER_LOST, 134, 137} <= set(codes)  # the runtime aborts; the kernel kills
    assert not {0, ERROR, USAGE} & set(codes)


def test_the_script_takes_the_names_that_xpk_takes_and_refuses_the_others_first(tmp_path):
    names = [name for name in hardware.names() if name.startswith("v")] + [
        "v4-24",
        "v6e-2",
        "v5litepod-2",
        "v5p-100",
        "v3-8",
    ]
    create = [["cluster", "create", "--cluster=c", "--spot", f"--tpu-type={name}"] for name in names]
    by_xpk = {n for n, found in zip(names, ask(create)["found"], strict=True) if not found["error"]}
    by_us = {name for name in names if call("gke.sh", "--dry-run", "create", **GKE | {"TPU_TYPE": name})[0] == 0}
    assert by_us == by_xpk and len(by_us) > 30
