#!/usr/bin/env bash
# A real SLURM on this one machine, of Debian's packages, in a folder of its own: tests/slurm.sh start|stop FOLDER
#
# `start` installs slurm-wlm and munge where they are missing (as root, with apt-get), starts munged, slurmctld and slurmd and
# waits until the node is idle; it prints the path of slurm.conf, which every command of SLURM takes from SLURM_CONF.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 1
}

installed() { command -v munged && command -v slurmctld && command -v slurmd && command -v sbatch; } >/dev/null

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

configure() {
  local memory
  memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  cat >"$folder/slurm.conf" <<CONF
ClusterName=dit-jax-test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=sched_interval=1,sched_min_interval=0
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  [[ $(id -u) == 0 ]] || fail "SLURM's daemons need root here; run this test as root, in a container say"
  if ! installed; then
    command -v apt-get >/dev/null || fail "SLURM is not installed, and there is no apt-get to install slurm-wlm and munge with"
    apt-get update -qq || fail "apt-get could not read the lists of packages"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null ||
      fail "apt-get could not install slurm-wlm and munge"
  fi >&2
  mkdir -p "$folder"/{munge,state,spool}
  # munged refuses folders that others may write to; the way to this one is not its business.
  dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
  chmod 400 "$folder/munge/key"
  munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
  configure
  export SLURM_CONF=$folder/slurm.conf
  slurmctld
  slurmd
  for _ in $(seq 60); do
    if [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]]; then
      echo "$SLURM_CONF"
      return
    fi
    sleep 0.5
  done
  tail -n 20 "$folder"/*.log >&2
  fail "the node was not idle within 30 s"
}

stop() {
  local pid
  for pid in "$folder"/slurmd.pid "$folder"/slurmctld.pid "$folder"/munge/pid; do
    [[ ! -s $pid ]] || kill "$(cat "$pid")" 2>/dev/null || true
  done
}

[[ $# == 2 ]] || fail "found $# arguments, expected start or stop, and a folder"
folder=$(realpath -m "$2") host=$(hostname -s)
case $1 in
  start) start ;;
  stop) stop ;;
  *) fail "found $1, expected start or stop" ;;
esac
