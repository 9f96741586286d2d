#!/usr/bin/env bash
# Functions shared by the launch scripts. slurm.sbatch reads them only to submit, because SLURM copies that script alone to the node.
# shellcheck disable=SC2034  # dry and words are used by the callers

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { # MESSAGE [CODE]: 2 for a command that is wrong as typed, 1 for what the world refused
  echo "error: $1" >&2
  exit "${2:-2}"
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

many_hosts() { # JOB: whether it runs on all hosts of a slice, and goes on after a kill
  [[ $1 =~ ^(train|sample|evaluate|encode)$ ]]
}

value_of() { # NAME FLAGS...: prints the last --NAME, or nothing; absl takes one dash or two, and a value after = or as the next word
  local word before='' found=''
  for word in "${@:2}"; do
    if [[ $word =~ ^--?$1=(.*)$ ]]; then found=${BASH_REMATCH[1]}; elif [[ $before =~ ^--?$1$ ]]; then found=$word; fi
    before=$word
  done
  echo "$found"
}

check_job() { # PYTHON SLICE JOB FLAGS...: fails if the job would refuse its flags and config, or its mesh the slice
  local code=0 found
  found=$(value_of workdir "${@:4}")
  [[ ! $found =~ ^[A-Za-z][A-Za-z0-9+.-]*:/ || $found =~ ^gs://[a-z0-9][a-z0-9._-]*[a-z0-9](/|$) ]] ||
    fail "--workdir: found $found, expected a folder on a disk or in a bucket, such as gs://BUCKET/FOLDER; other stores are not supported"
  [[ $3 != scaling ]] || return 0
  found=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$1" -m "dit_jax.$3" "${@:4}" --check ${2:+"--slice=$2"} 2>&1) || code=$?
  case $code in
    0 | 2) echo "$found" >&2 ;;
    *) echo "not checked: $1 does not run dit_jax.$3 on this machine" >&2 ;;
  esac
  ((code != 2)) || exit 2
}

own_python() { # prints the interpreter of this checkout, else the machine's
  if [[ -x $root/.venv/bin/python ]]; then echo "$root/.venv/bin/python"; else echo python3; fi
}

commit_archive() { # FILE OPTIONS...: archives this commit, not the folder, because that may hold a .venv and runs
  run git -C "$root" archive "${@:2}" "--output=$root/$1" HEAD
}

# What jax[tpu] adds to the locked dependencies, for the same version of jax and by hash.
install_jax_tpu='.venv/bin/pip install --quiet --require-hashes --no-deps -r requirements-tpu.lock'
