#!/usr/bin/env bash
# Requests a Cloud TPU slice, runs jobs on it and deletes it:
#
#   launch/tpu_vm.sh create                     request it as a queued resource and wait until it is active
#   launch/tpu_vm.sh setup                      copy this commit to all workers and install it
#   launch/tpu_vm.sh run train --config=... --workdir=/mnt/share/xl2      start a job on all workers, in the background
#   launch/tpu_vm.sh logs                       follow worker 0
#   launch/tpu_vm.sh stop                       let the job save and exit with 75
#   launch/tpu_vm.sh resume train --config=... --workdir=/mnt/share/xl2   after preemption: request anew, then run the same
#   launch/tpu_vm.sh delete                     delete the slice and its request
#
# With --dry-run, in any position, the commands are printed and not run.
#
#   PROJECT, ZONE   of Google Cloud
#   NAME            of the slice
#   ACCELERATOR     such as v4-64                                              (create, resume; run, for all jobs but train)
#   NFS             HOST:/EXPORT of a share that all workers mount as /mnt/share, for --workdir            (setup, resume)
# Optional (defaults):
#   SPOT=1          cheaper, may be preempted
#   RUNTIME         the image (depends on the accelerator: tpu-ubuntu2204-base up to v4)
#   POLL            seconds between checks of a request (30)
#   RESTARTS        how often at most a training that lost a process starts again on its worker (100)
# Needs gcloud, logged in. Python 3.11 is installed from the image's own packages.
# shellcheck disable=SC2154  # dry, words, root and install_jax_tpu come from functions.bash
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/functions.bash"

# shellcheck disable=SC2153 # NAME is the user's
queued() { run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"; }

on() { run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"; }

runtime() {
  case $ACCELERATOR in
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local options=("--node-id=$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=${RUNTIME:-$(runtime)}")
  [[ -z ${SPOT:-} ]] || options+=(--spot)
  queued create "${options[@]}"
  await
}

await() { # waits until the request is active
  if ((dry)); then
    echo "# every ${POLL:-30} s until ACTIVE: $(state)"
    return
  fi
  local found
  while true; do
    found=$(state)
    echo "$NAME: $found" >&2
    case $found in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) fail "$NAME: the request is $found; look with gcloud compute tpus queued-resources describe" ;;
    esac
    sleep "${POLL:-30}"
  done
}

state() { queued describe "--format=value(state.state)"; }

setup() {
  local archive=dit_jax.tar.gz
  commit_archive "$archive" --format=tar.gz --prefix=dit_jax/
  run gcloud compute tpus tpu-vm scp "$root/$archive" "$NAME:$archive" --project="$PROJECT" --zone="$ZONE" --worker=all
  run rm "$root/$archive"
  on all "sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv make nfs-common"
  on all "sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount -t nfs -o hard '$NFS' /mnt/share) && sudo chmod a+rwx /mnt/share"
  on all "tar xzf $archive && cd dit_jax && make setup PYTHON=python3.11"
  on all "cd dit_jax && $install_jax_tpu"
}

start() { # JOB FLAGS...: one job a slice, because a second one would find the chips taken
  local command loop restarts=0 running="[ -e run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null"
  command=$(shown .venv/bin/python -m "dit_jax.$1" "${@:2}")
  [[ $1 != train ]] || restarts=${RESTARTS:-100}
  # Again if the process was killed (128 and more) or lost one that was (200), unless `stop` was asked for.
  loop="trap '' HUP; for _ in \$(seq 0 $restarts); do $command; [ \$? -ge 128 ] && [ ! -e run.stop ] || break; sleep 10; done"
  on all "cd dit_jax || exit; if $running; then echo 'error: a job is running here; stop it first' >&2; exit 1; fi; rm -f run.stop; ($loop) >>run.log 2>&1 </dev/null & echo \$! >run.pid"
}

fits_slice() { # JOB: only train runs on many hosts, and one host alone cannot use a larger slice: its chips wait for each other
  [[ $1 != train ]] || return 0
  need ACCELERATOR
  # One host has 8 cores (v2 to v5p: the name counts cores), or up to 8 chips (v5e, v6e: it counts chips).
  [[ $ACCELERATOR =~ ^v[2-6][a-z]*-[1-8]$ ]] || fail "ACCELERATOR: found $ACCELERATOR, expected one host, such as v4-8: $1 runs on one"
}

resume() { # JOB FLAGS...: a request that is waiting is kept, because a new one would begin at the end of the queue
  local found=''
  if ((dry)); then
    echo "# ACTIVE: only the last; SUSPENDED, SUSPENDING, FAILED: all; no request: no delete; else: no delete, no create: $(state)"
  else
    found=$(state 2>/dev/null) || true
  fi
  if [[ $found != ACTIVE ]]; then
    if ((dry)) || [[ $found =~ ^(SUSPENDED|SUSPENDING|FAILED)$ ]]; then
      queued delete --force --quiet
      found=''
    fi
    if [[ -z $found ]]; then create; else await; fi
    setup
  fi
  start "$@"
}

take_words "$@"
set -- "${words[@]}"
verb=${1:-}
case $verb in
  create) needed=(PROJECT ZONE NAME ACCELERATOR) ;;
  setup) needed=(PROJECT ZONE NAME NFS) ;;
  resume) needed=(PROJECT ZONE NAME ACCELERATOR NFS) ;;
  run | logs | stop | delete) needed=(PROJECT ZONE NAME) ;;
  *) fail "found ${verb:-no verb}, expected create, setup, run, logs, stop, resume or delete" ;;
esac
[[ $verb =~ ^(run|resume)$ ]] || alone "$@"
need "${needed[@]}"
case $verb in
  run | resume)
    known_job "${2:-}"
    fits_slice "$2"
    (cd "$root" && check_job "$(own_python)" "${ACCELERATOR:-}" "${@:2}")
    if [[ $verb == run ]]; then start "${@:2}"; else resume "${@:2}"; fi
    ;;
  create) create ;;
  setup) setup ;;
  logs) on 0 "tail -n 100 -F dit_jax/run.log" ;;
  stop) on all "cd dit_jax && touch run.stop && pkill -TERM -P \$(cat run.pid)" ;;
  delete) queued delete --force --quiet ;;
esac
