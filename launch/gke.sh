#!/usr/bin/env bash
# Runs jobs on TPU slices of Google Kubernetes Engine, through xpk:
#
#   launch/gke.sh create                        make a cluster with slices of TPU_TYPE
#   launch/gke.sh run train --config=... --workdir=gs://BUCKET/xl2     run this commit on all hosts of a slice
#   launch/gke.sh status                        list the workloads; with NAME, its hosts with their last exit code and last line
#   launch/gke.sh logs                          follow process 0 of NAME
#   launch/gke.sh stop                          let the job save, delete the workload, keep its files
#   launch/gke.sh delete                        delete the cluster
#   launch/gke.sh share                         make a Filestore share, /mnt/share in every workload; a bucket needs none
#
# With --dry-run, in any position, the commands are printed and not run.
#
#   PROJECT, ZONE   of Google Cloud
#   CLUSTER         its name
#   TPU_TYPE        as xpk names it: v4-64, v5p-128, v5litepod-16, v6e-256 (create, run)
#   CAPACITY        on-demand, spot or reservation=ID                      (create)
#   NAME            of the workload                                        (run, logs, stop)
# Optional (defaults):
#   SERVICE_ACCOUNT whom the hosts are for a bucket (the default account of Compute Engine; xpk gives them its scopes)
#   SLICES          number in the cluster (1)
#   SIZE            of the share, in GB (1024)
#   IMAGE           with Python 3.11 or later and make (python:3.11)
#   RESTARTS        most restarts of a workload that was preempted, lost a process (200) or exited with 75 (100)
# Needs xpk 1.16.0, gcloud and kubectl, logged in, and crane, by which xpk builds the image.
# shellcheck disable=SC2154  # dry, words, root and install_jax_tpu come from functions.bash
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/functions.bash"

on_cluster() { run xpk "$1" "$2" "${@:3}" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"; }

create() {
  local options=("--$CAPACITY")
  [[ -z ${SERVICE_ACCOUNT:-} ]] || options+=("--custom-nodepool-arguments=--service-account=$SERVICE_ACCOUNT")
  on_cluster cluster create --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" "${options[@]}"
}

share() {
  on_cluster storage create "$CLUSTER-share" --type=gcpfilestore --vol=share --size="${SIZE:-1024}" --tier=BASIC_HDD \
    --mount-point=/mnt/share --readonly=false --auto-mount=true
}

# shellcheck disable=SC2153 # NAME is the user's
start() {
  local command
  command=$(shown .venv/bin/python -m "dit_jax.$1" "${@:2}")
  run rm -rf "$root/build/gke" "$root/build/gke.tar"
  run mkdir -p "$root/build/gke"
  commit_archive build/gke.tar
  run tar -xf "$root/build/gke.tar" -C "$root/build/gke"
  on_cluster workload create --workload="$NAME" --tpu-type="$TPU_TYPE" --num-slices=1 \
    --base-docker-image="${IMAGE:-python:3.11}" --script-dir="$root/build/gke" \
    --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=75,200 --termination-grace-period-seconds=120 \
    --command="make gcs PYTHON=python3 && $install_jax_tpu && exec $command"
}

known_type() { # xpk knows no v2, v3 and v5e, names v5e as v5litepod, and has hosts of 4 chips
  [[ $TPU_TYPE =~ ^v6e-(1|4|8|16|32|64|128|256)$ || $TPU_TYPE =~ ^v5litepod-(8|16|32|64|128|256)$ ||
    $TPU_TYPE =~ ^v(4|5p)-(8|16|32|64)$ ]] && return
  [[ $TPU_TYPE =~ ^v(4|5p)-([1-9][0-9]{0,5})$ ]] && ((BASH_REMATCH[2] % 128 == 0)) && return
  fail "TPU_TYPE: found $TPU_TYPE, expected a name of xpk, such as v4-64, v5p-128, v5litepod-16 or v6e-256"
}

fits_slice() { # JOB: one host alone cannot use a larger slice, whose chips wait for each other
  # A host of xpk has 4 chips, or 8 cores. v4 and v5p names count cores, v5e and v6e names chips.
  many_hosts "$1" || [[ $TPU_TYPE =~ ^v(4|5p)-[1-8]$ || $TPU_TYPE =~ ^v(5litepod|5e|6e)-[1-4]$ ]] ||
    fail "TPU_TYPE: found $TPU_TYPE, expected one host, such as v4-8 or v6e-4: $1 runs on one"
}

of_name() { # VERB FLAGS...: kubectl for the hosts of NAME
  run gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --region="${ZONE%-*}"
  run kubectl "$@"
}

logs() {
  of_name logs --follow --tail=100 --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
}

status() {
  local selector="--selector=jobset.sigs.k8s.io/jobset-name=${NAME:-}" of='.status.containerStatuses[0]'
  on_cluster workload list
  [[ -n ${NAME:-} ]] || return 0
  of_name get pods "$selector" --output="custom-columns=HOST:.metadata.name,JOB:.status.phase,EXIT:$of.state.terminated.exitCode"
  run kubectl logs --tail=1 --prefix "$selector"
}

take_words "$@"
set -- "${words[@]}"
verb=${1:-}
case $verb in
  create) needed=(TPU_TYPE CAPACITY) ;;
  run) needed=(TPU_TYPE NAME) ;;
  logs | stop) needed=(NAME) ;;
  share | status | delete) needed=() ;;
  *) fail "found ${verb:-no verb}, expected create, share, run, status, logs, stop or delete" ;;
esac
[[ $verb == run ]] || alone "$@"
need PROJECT ZONE CLUSTER "${needed[@]}"
[[ ! $verb =~ ^(create|run)$ ]] || known_type
case $verb in
  create)
    [[ $CAPACITY =~ ^(on-demand|spot|reservation=.+)$ ]] || fail "CAPACITY: found $CAPACITY, expected on-demand, spot or reservation=ID"
    create
    ;;
  share) share ;;
  run)
    known_job "${2:-}"
    fits_slice "$2"
    (cd "$root" && check_job "$(own_python)" "$TPU_TYPE" "${@:2}")
    start "${@:2}"
    ;;
  status) status ;;
  logs) logs ;;
  stop) on_cluster workload delete --workload="$NAME" --force ;;
  delete) on_cluster cluster delete --force ;;
esac
