#!/usr/bin/env bash
# For the scripts beside it, which have `root` and `fail`. slurm.sbatch reads it before it submits: SLURM copies the script alone.

# shellcheck disable=SC2154  # root is theirs
known_job() { # a name that is a program of this checkout
  local known
  [[ ${1:-} =~ ^[a-z]+$ ]] || fail "found ${1:-no job}, expected a job such as train, and its flags"
  known=$(cd "$root/dit_jax" && grep -l '__name__ == "__main__"' [a-z]*.py [a-z]*/__main__.py | sed 's|/__main__||; s|\.py$||' | sort)
  [[ $'\n'$known$'\n' == *$'\n'"$1"$'\n'* ]] || fail "found job $1, expected ${known//$'\n'/, }"
}
