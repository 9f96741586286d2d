#!/usr/bin/env bash
# Functions shared by the launch scripts. slurm.sbatch reads them only to submit, because SLURM copies that script alone to the node.
# shellcheck disable=SC2034  # dry and words are used by the callers

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $1" >&2
  exit 2
}

need() { # NAME...: fails unless these variables are set
  local missing=() name
  for name in "$@"; do [[ -n ${!name:-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) || fail "${missing[*]}: not set; the head of launch/${0##*/} says what they are"
}

shown() { # prints a command, quoted as one would type it
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  echo "${line[*]}"
}

run() { if ((dry)); then shown "$@"; else "$@"; fi; }

take_words() { # puts the arguments without --dry-run into `words`, and whether it was given into `dry`
  local word
  dry=0 words=()
  for word in "$@"; do
    if [[ $word == --dry-run ]]; then dry=1; else words+=("$word"); fi
  done
}

alone() { # VERB...: fails if anything follows the verb
  (($# == 1)) || fail "$1: found ${*:2} after it, expected nothing"
}

known_job() { # NAME: fails unless it is a program of this checkout
  local known
  [[ ${1:-} =~ ^[a-z]+$ ]] || fail "found ${1:-no job}, expected a job such as train, and its flags"
  known=$(cd "$root/dit_jax" && grep -l '__name__ == "__main__"' [a-z]*.py [a-z]*/__main__.py | sed 's|/__main__||; s|\.py$||' | sort)
  [[ $'\n'$known$'\n' == *$'\n'"$1"$'\n'* ]] || fail "found job $1, expected ${known//$'\n'/, }"
}

commit_archive() { # FILE OPTIONS...: archives this commit, not the folder, because that may hold a .venv and runs
  run git -C "$root" archive "${@:2}" "--output=$root/$1" HEAD
}

# What jax[tpu] adds to the locked dependencies, for the same version of jax and by hash.
install_jax_tpu='.venv/bin/pip install --quiet --require-hashes --no-deps -r requirements-tpu.lock'
