#!/usr/bin/env bash
# Requests a Cloud TPU slice, runs jobs on it and deletes it:
#
#   launch/tpu_vm.sh create                     request it as a queued resource and wait until it is active
#   launch/tpu_vm.sh setup                      copy this commit to all workers and install it
#   launch/tpu_vm.sh run train --config=... --workdir=gs://BUCKET/xl2     start a job on all workers, in the background
#   launch/tpu_vm.sh status                     the request, and for each worker the job, its last exit code and its last line
#   launch/tpu_vm.sh logs                       follow worker 0
#   launch/tpu_vm.sh stop                       let the job save and exit with 75
#   launch/tpu_vm.sh resume train --config=... --workdir=gs://BUCKET/xl2  after preemption: request anew, then run the same
#   launch/tpu_vm.sh resume --watch train ...   do so again and again, until the job has ended
#   launch/tpu_vm.sh delete                     delete the slice and its request
#
# With --dry-run, in any position, the commands are printed and not run.
#
#   PROJECT, ZONE   of Google Cloud
#   NAME            of the slice
#   ACCELERATOR     such as v4-64                                              (create, resume; run, for all jobs but train)
# Optional (defaults):
#   NFS             HOST:/EXPORT of a share that all workers mount as /mnt/share; needed if --workdir is not in a bucket
#   SERVICE_ACCOUNT whom the workers are for a bucket (the default account of Compute Engine)
#   SPOT=1          cheaper, may be preempted
#   RUNTIME         the image (depends on the accelerator: tpu-ubuntu2204-base up to v4)
#   POLL            seconds between looks at a request (30)
#   RESTARTS        how often at most a training that lost a process starts again on its worker, and --watch a job (100)
# Needs gcloud, logged in. Python 3.11 is installed from the image's own packages.
# shellcheck disable=SC2154  # dry, words, root and install_jax_tpu come from functions.bash
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/functions.bash"

# shellcheck disable=SC2153 # NAME is the user's
queued() { run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"; }

node() { run gcloud compute tpus tpu-vm "$1" "${@:2}" --project="$PROJECT" --zone="$ZONE"; }

on() { node ssh "$NAME" --worker="$1" --ssh-flag=-oServerAliveInterval=30 --command="$2"; } # a connection that died ends after 90 s

say() { echo "$NAME: $1" >&2; }

runtime() {
  case $ACCELERATOR in
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

request() {
  local options=("--node-id=$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=${RUNTIME:-$(runtime)}")
  [[ -z ${SERVICE_ACCOUNT:-} ]] || options+=("--service-account=$SERVICE_ACCOUNT")
  [[ -z ${SPOT:-} ]] || options+=(--spot)
  queued create "${options[@]}"
}

await() { # waits until the request is active; a look that failed is repeated
  if ((dry)); then
    echo "# every ${POLL:-30} s until ACTIVE: $(state)"
    return
  fi
  local found
  while true; do
    if found=$(state); then
      say "$found"
      [[ $found != ACTIVE ]] || return 0
      [[ ! $found =~ $gone && ! $found =~ ^(NONE|DELETING)$ ]] ||
        fail "$NAME: the request is $found; look with gcloud compute tpus queued-resources describe" 1
    fi
    sleep "${POLL:-30}"
  done
}

state() { # prints the state of the request, NONE without one, PREEMPTED if only its node is; fails if gcloud does
  local look=(describe "--format=value(state.state)") said
  if ((dry)); then
    queued "${look[@]}"
  elif said=$(queued "${look[@]}" 2>&1); then
    said=$(grep -xE '[A-Z_]+' <<<"$said") || said=UNKNOWN # without what gcloud says beside it
    [[ $said != ACTIVE || $(node describe "$NAME" "--format=value(state)" 2>/dev/null || true) != PREEMPTED ]] || said=PREEMPTED
    echo "$said"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "$said"
    return 1
  fi
}

setup() {
  local archive=dit_jax.tar.gz
  commit_archive "$archive" --format=tar.gz --prefix=dit_jax/
  node scp "$root/$archive" "$NAME:$archive" --worker=all --scp-flag=-oServerAliveInterval=30
  run rm "$root/$archive"
  on all "sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv make${NFS:+ nfs-common}"
  [[ -z ${NFS:-} ]] ||
    on all "sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount -t nfs -o hard '$NFS' /mnt/share) && sudo chmod a+rwx /mnt/share"
  on all "tar xzf $archive && cd dit_jax && make gcs PYTHON=python3.11"
  on all "cd dit_jax && $install_jax_tpu && touch run.ready"
}

# What a worker keeps in dit_jax: run.ready (set up), run.pid (of the loop that runs the job), run.log, run.stop (asked to stop),
# run.exit (how the job ended last, and how often it was started).
# The process of an old run.pid may be a zombie, or after a reboot another program's.
running="[ -e run.pid ] && grep -qs dit_jax /proc/\$(cat run.pid)/cmdline"
busy="echo 'error: a job is running here; stop it first' >&2; exit 1"
probe="cd dit_jax 2>/dev/null; job= code=- n=0; if $running; then job=running; fi; [ ! -s run.exit ] || read -r code n <run.exit; \
if [ \$job ]; then :; elif [ ! -e run.ready ]; then job=bare; elif [ ! -e run.pid ]; then job=idle; elif [ -e run.stop ]; then job=stopped; \
elif [ \$code = - ]; then job=killed; else job=ended; fi; echo \"worker \$(hostname) \$job \$code \$n \$(tail -n 1 run.log 2>/dev/null | cut -c -200)\""
halt="cd dit_jax && touch run.stop && pkill -TERM -P \$(cat run.pid)"
gone='^(SUSPENDED|SUSPENDING|FAILED|PREEMPTED)$' # a slice does not come back from these
left=${RESTARTS:-100}

start() { # JOB FLAGS...: one job a slice, because a second one would find the chips taken
  local command loop starts=1
  command=$(shown .venv/bin/python -m "dit_jax.$1" "${@:2}")
  ! many_hosts "$1" || starts=$((left + 1))
  # Again if the process was killed (128 and more) or lost one that was (200), unless `stop` was asked for.
  loop="trap '' HUP; for n in \$(seq $starts); do $command; code=\$?; echo \$code \$n >run.exit; [ \$code -ge 128 ] || break; sleep 10; [ ! -e run.stop ] || break; done"
  on all "cd dit_jax || exit; if $running; then $busy; fi; rm -f run.stop run.exit; ($loop) >>run.log 2>&1 </dev/null & echo \$! >run.pid"
}

fits_slice() { # JOB: one host alone cannot use a larger slice, whose chips wait for each other
  ! many_hosts "$1" || return 0
  need ACCELERATOR
  # One host has 8 cores (v2 to v5p: the name counts cores), or up to 8 chips (v5e, v6e: it counts chips).
  [[ $ACCELERATOR =~ ^v[2-6][a-z]*-[1-8]$ ]] || fail "ACCELERATOR: found $ACCELERATOR, expected one host, such as v4-8: $1 runs on one"
}

is_shared() { # FLAGS...: a folder on a worker's own disk is not seen by the others, and is lost with the slice
  local flag path
  for flag in workdir out; do
    path=$(value_of "$flag" "$@")
    [[ -z $path || $path == gs://* || -n ${NFS:-} ]] ||
      fail "--$flag: found $path, but no NFS; give gs://BUCKET/..., or set NFS to HOST:/EXPORT of a share and give a path in /mnt/share"
  done
}

resume() { # JOB FLAGS...: a request that is waiting is kept, because a new one would begin at the end of the queue
  local found='' workers
  busy="echo 'a job is running here already' >&2; exit 0"
  if ((dry)); then
    echo "# SUSPENDED, SUSPENDING, FAILED, PREEMPTED: all; no request: no delete; ACTIVE or another: no delete, no create: $(state)"
  else
    found=$(state)
  fi
  if ((dry)) || [[ $found =~ $gone ]]; then
    queued delete --force --quiet
    found=NONE
  fi
  if [[ $found == NONE ]]; then create; elif [[ $found != ACTIVE ]]; then await; fi
  workers=$(on all "$probe")
  ((!dry)) || echo "# set up only if a worker is bare: $workers"
  if ((dry)) || [[ $workers == *" bare "* ]]; then setup; fi
  start "$@"
}

create() {
  request
  await
}

spend() { # REASON [STARTS]: counts what had to be done again, and ends if that was too often
  left=$((left - ${2:-1}))
  ((left >= 0)) || fail "$NAME: $1; that was too often (RESTARTS=${RESTARTS:-100})" 1
  say "$1; again, $left left"
}

over() { # CODE MESSAGE
  say "$2; the slice is still there and is paid for until launch/tpu_vm.sh delete"
  exit "$1"
}

attend() { # JOB FLAGS...: looks at the workers of an active slice; sets up and starts what does not run; exits if the job is over
  local lines host job code n line bare='' again='' most=1 idle='' runs='' stopped='' ended=''
  lines=$(on all "$probe" | sed -n 's/^worker //p') && [[ -n $lines ]] || { say "no answer from the workers" && return; }
  while read -r host job code n line; do
    [[ -z $first || $job =~ ^(running|bare)$ ]] || job=idle # how an earlier job ended is no matter
    case $job:$code in
      running:*) runs=1 ;;
      bare:*) bare=1 ;;
      idle:*) idle=1 ;;
      *:0) ;;
      stopped:*) stopped=1 ;;
      killed:* | *:75 | *:12[89] | *:1[3-9]? | *:2??) again="$host: $job $code" most=$((n > most ? n : most)) ;;
      *) ended=$code again="$host ended with $code: $line" ;;
    esac
  done <<<"$lines"
  [[ -n $bare$idle ]] || first=''
  if [[ -n $ended ]]; then
    [[ -z $runs ]] || on all "$halt" || true
    over "$ended" "$again"
  elif [[ -n $bare ]]; then
    { "$root/launch/tpu_vm.sh" setup && start "$@" && first=''; } || spend "not set up"
  elif [[ -n $stopped ]]; then
    [[ -n $runs ]] || over 75 "stopped"
  elif [[ -n $again$idle ]]; then
    [[ -z $again ]] || spend "$again" "$most"
    { start "$@" && first=''; } || spend "not started"
  elif [[ -z $runs ]]; then
    over 0 "ended with 0"
  fi
}

watch() { # JOB FLAGS...: keeps the job going until it has ended or was stopped, whatever becomes of the slice
  local found seen='' ours=1 first=1 # ours: if there is no request, it is because of us; first: not started yet
  busy="exit 0"
  if ((dry)); then
    echo "# every ${POLL:-30} s until the job has ended with 0, 1 or 2; again at most $left times, as it is needed:"
    resume "$@"
    return
  fi
  while true; do
    if found=$(state); then
      [[ $found == "$seen" ]] || say "$found"
      seen=$found
      if [[ $found == ACTIVE ]]; then
        ours=''
        attend "$@"
      elif [[ $found == NONE ]]; then
        [[ -n $ours ]] || fail "$NAME: the request was deleted, but not by this watch, which ends" 1
        request || spend "not requested"
      elif [[ $found =~ $gone ]]; then
        ours=1
        ! queued delete --force --quiet || spend "the request was $found"
      elif [[ $found != DELETING ]]; then
        ours=''
      fi
    elif [[ -z $seen ]]; then
      exit 1 # a name or a login that is wrong; what fails later is repeated
    fi
    sleep "${POLL:-30}"
  done
}

status() {
  local found
  found=$(state)
  if ((dry)); then echo "$found"; else echo "$NAME: $found"; fi
  if ((dry)) || [[ $found == ACTIVE ]]; then on all "$probe"; fi
}

take_words "$@"
set -- "${words[@]}"
verb=${1:-}
act=$verb
if [[ $verb == resume && ${2:-} == --watch ]]; then act=watch && set -- resume "${@:3}"; fi
case $verb in
  create | resume) needed=(PROJECT ZONE NAME ACCELERATOR) ;;
  setup | run | status | logs | stop | delete) needed=(PROJECT ZONE NAME) ;;
  *) fail "found ${verb:-no verb}, expected create, setup, run, status, logs, stop, resume or delete" ;;
esac
[[ $verb =~ ^(run|resume)$ ]] || alone "$@"
need "${needed[@]}"
case $verb in
  run | resume)
    known_job "${2:-}"
    fits_slice "$2"
    (cd "$root" && check_job "$(own_python)" "${ACCELERATOR:-}" "${@:2}")
    is_shared "${@:3}"
    if [[ $verb == run ]]; then start "${@:2}"; else "$act" "${@:2}"; fi
    ;;
  create) create ;;
  setup) setup ;;
  status) status ;;
  logs) on 0 "tail -n 100 -F dit_jax/run.log" ;;
  stop) on all "$halt" ;;
  delete) queued delete --force --quiet ;;
esac
