"""`launch/tpu_vm.sh resume --watch`: the script itself, with a gcloud that keeps a request in a file and workers in folders.

What the script sends to the workers is run there. Their job follows a plan, a word for each start: a number is its exit code.
"""

import os

import pytest
from launched import call

GCLOUD = r"""#!/bin/bash
cd "$(dirname "$0")/.."
echo "$*" >>calls
case "$*" in
  *queued-resources\ *) verb=$4 ;;
  *) verb=$4-worker ;;
esac
if [ -e requested ] && grep -qx "$verb" failures; then
  sed -i "0,/^$verb\$/{//d}" failures
  echo "ERROR: (gcloud) UNAVAILABLE: try again" >&2
  exit 1
fi
case $verb in
  create) touch requested; printf '%s\n' CREATING ACTIVE >states; for n in $(cat hosts); do mkdir -p "w-$n"; done ;;
  delete) /bin/rm -rf states w-* node ;;
  describe)
    [ -e states ] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'xl2' was not found" >&2; exit 1; }
    head -n 1 states
    [ "$(wc -l <states)" -lt 2 ] || sed -i 1d states ;;
  describe-worker) cat node 2>/dev/null || echo READY ;;
  ssh-worker)
    for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
    [ ! -e node ] && [ "$(cat states)" = ACTIVE ] || exit 255
    for n in $(cat hosts); do
      (cd "w-$n" && HOME=$PWD WORLD=$PWD/.. WORKER=$n PATH=$PWD/../worker:/usr/bin:/bin bash -c "$command") || failed=1
    done
    exit ${failed:-0} ;;
esac
"""
# ${0%/*} is dit_jax/.venv/bin; the job is started in dit_jax.
JOB = r"""#!/bin/bash
plan=$WORLD/plan-$WORKER
read -r word <"$plan"; sed -i 1d "$plan"
echo "$word" >>"$WORLD/ran-$WORKER"
echo "this is $word"
case $word in
  preempted) echo SUSPENDED >"$WORLD/states"; kill -9 $PPID ;;
  failed) echo FAILED >"$WORLD/states"; kill -9 $PPID ;;
  vanished) echo PREEMPTED >"$WORLD/node"; kill -9 $PPID ;;
  deleted) rm "$WORLD/states"; kill -9 $PPID ;;
  killed) kill -9 $PPID ;;
  stopped) touch run.stop; exit 75 ;;
  waits) trap 'exit 75' TERM; while true; do /bin/sleep 0.02; done ;;
esac
exit "${word:-0}"
"""
WORKER = {
    "hostname": 'echo "w-$WORKER"',
    "sudo": "exit 0",
    "sleep": "exit 0",
    "make": "exit 0",
    "tar": "mkdir -p dit_jax/.venv/bin; cp $WORLD/job dit_jax/.venv/bin/python; cp $WORLD/worker/make dit_jax/.venv/bin/pip",
}
SLICE = {"PROJECT": "lab", "ZONE": "us-central2-b", "NAME": "xl2", "POLL": "0"}
COMMAND = ["scaling", "fit", "--workdir=gs://lab-runs/xl2"]  # `scaling` is not checked here, which takes its time


@pytest.fixture
def watch(tmp_path):
    """Runs a watch over workers with these plans; returns (exit code, its messages, the verbs of the request, the starts of worker 0)."""

    def program(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    program(tmp_path / "bin" / "gcloud", GCLOUD)
    program(tmp_path / "job", JOB)
    for name in ("git", "rm"):
        program(tmp_path / "bin" / name, "exit 0")
    for name, text in WORKER.items():
        program(tmp_path / "worker" / name, text)
    (tmp_path / "calls").touch()

    def run(*plans, failures="", job=COMMAND, accelerator="v4-8", **variables):
        (tmp_path / "hosts").write_text(" ".join(map(str, range(len(plans)))))
        (tmp_path / "failures").write_text(failures.replace(" ", "\n"))
        for n, plan in enumerate(plans):
            (tmp_path / f"plan-{n}").write_text("".join(f"{word}\n" for word in plan.split()))
            (tmp_path / f"ran-{n}").write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        code, out, err = call(
            "tpu_vm.sh", "resume", "--watch", *job, PATH=path, ACCELERATOR=accelerator, **SLICE, **variables
        )
        assert not out or all(line.startswith("dit_jax") for line in out), out
        calls = (tmp_path / "calls").read_text().splitlines()
        verbs = [line.split()[3] for line in calls if " queued-resources " in line and " describe " not in line]
        said = [line.removeprefix("xl2: ") for line in err.splitlines() if line.startswith(("xl2: ", "error: "))]
        return code, said, verbs, (tmp_path / "ran-0").read_text().split()

    return run


STILL = "; the slice is still there and is paid for until launch/tpu_vm.sh delete"


@pytest.mark.parametrize("how,state", [("preempted", "SUSPENDED"), ("failed", "FAILED"), ("vanished", "PREEMPTED")])
def test_a_slice_that_is_taken_away_is_requested_again_and_the_job_goes_on(watch, how, state):
    code, said, verbs, ran = watch(f"{how} {how} 0")
    assert (code, verbs, ran) == (0, ["create", *["delete", "create"] * 2], [how, how, "0"])
    again = [f"the request was {state}; again, {left} left" for left in (99, 98)]
    assert [line for line in said if "again" in line] == again
    assert said[-1] == f"ended with 0{STILL}" and said[0] == "NONE"


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_job_ends_the_watch_with_its_code_and_its_last_line(watch, code):
    found = watch(f"75 {code} 0")
    assert found[0] == code and found[3] == ["75", str(code)]
    assert found[1][-1] == f"w-0 ended with {code}: this is {code}{STILL}"


@pytest.mark.parametrize("how", ["75", "137", "200", "killed"])
def test_a_job_that_was_killed_or_lost_a_peer_starts_again_on_its_slice(watch, how):
    code, said, verbs, ran = watch(f"{how} {how} 0")
    assert (code, verbs, ran) == (0, ["create"], [how, how, "0"])
    assert sum("again" in line for line in said) == 2


def test_a_job_that_was_told_to_stop_is_not_started_again(watch):
    code, said, _, ran = watch("75 stopped 0")
    assert (code, ran, said[-1]) == (75, ["75", "stopped"], f"stopped{STILL}")


@pytest.mark.parametrize("plan,starts", [("200 200 200 200", 3), ("preempted killed 75 0", 3)])
def test_restarts_are_bounded(watch, plan, starts):
    code, said, _, ran = watch(plan, RESTARTS="2")
    assert (code, len(ran)) == (1, starts) and said[-1].endswith("; that was too often (RESTARTS=2)")


def test_restarts_of_a_worker_by_itself_count(watch):
    job = ["train", "--workdir=gs://lab-runs/xl2", "--config=configs/imagenet256.py:DiT-S/2"]
    code, said, _, ran = watch("200 134 75 " + "200 " * 9, job=job, RESTARTS="4")
    assert (code, len(ran)) == (1, 5) and said[-1].endswith("; that was too often (RESTARTS=4)")
    assert [line for line in said if "left" in line] == ["w-0: ended 75; again, 1 left"]


@pytest.mark.parametrize("verb", ["describe", "create", "delete", "ssh-worker", "scp-worker", "describe-worker"])
def test_what_gcloud_fails_at_once_is_tried_again(watch, verb):
    code, _, _, ran = watch("preempted 75 0", failures=f"{verb} {verb} {verb}")
    assert (code, ran) == (0, ["preempted", "75", "0"])


def test_the_first_look_must_succeed(watch, tmp_path):
    (tmp_path / "requested").touch()
    code, said, verbs, ran = watch("0", failures="describe")
    assert (code, verbs, ran, said) == (1, [], [], ["ERROR: (gcloud) UNAVAILABLE: try again"])


def test_a_request_that_is_never_taken_ends_the_watch(watch, tmp_path):
    (tmp_path / "requested").touch()
    code, said, verbs, _ = watch("0", failures="create " * 5, RESTARTS="2")
    assert (code, verbs) == (1, ["create"] * 3) and said[
        -1
    ] == "error: xl2: not requested; that was too often (RESTARTS=2)"


def test_a_slice_that_the_user_deletes_is_not_requested_again(watch):
    code, said, verbs, _ = watch("deleted 0")
    assert (code, verbs) == (1, ["create"])
    assert said[-1] == "error: xl2: the request was deleted, but not by this watch, which ends"


def test_how_an_earlier_job_ended_does_not_matter(watch):
    assert watch("1 0")[0] == 1
    code, _, verbs, ran = watch("0")
    assert (code, verbs, ran) == (0, ["create"], ["0"])


def test_workers_are_waited_for_and_those_left_behind_by_an_error_are_stopped(watch, tmp_path):
    code, said, _, _ = watch("1", "waits")
    assert code == 1 and said[-1].startswith("w-0 ended with 1: this is 1")
    assert (tmp_path / "w-1" / "dit_jax" / "run.stop").exists()
    code, said, _, ran = watch("200 0", "200 0")
    assert (code, ran) == (0, ["200", "0"]) and (tmp_path / "ran-1").read_text().split() == ["200", "0"]


def test_status_shows_the_request_and_each_worker(watch, tmp_path):
    variables = {**SLICE, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert call("tpu_vm.sh", "status", **variables)[:2] == (0, ["xl2: NONE"])
    watch("0", "1")
    shown = ["xl2: ACTIVE", "worker w-0 ended 0 1 this is 0", "worker w-1 ended 1 1 this is 1"]
    assert call("tpu_vm.sh", "status", **variables)[:2] == (0, shown)
    (tmp_path / "w-1" / "dit_jax" / "run.exit").unlink()
    (tmp_path / "w-0" / "dit_jax" / "run.ready").unlink()
    shown[1:] = ["worker w-0 bare 0 1 this is 0", "worker w-1 killed - 0 this is 1"]
    assert call("tpu_vm.sh", "status", **variables)[:2] == (0, shown)
