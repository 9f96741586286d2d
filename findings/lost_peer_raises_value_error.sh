#!/usr/bin/env bash
# jax 0.10.2 on CPU: a collective whose peer is gone raises a ValueError instead of a JaxRuntimeError once its program has run before.
#
# Two processes gather a number again and again, and one of them leaves without a word. The other's next gather fails in Gloo. A
# program that has run before is called through jax's fast path, whose errors are ValueErrors with the status in their text; a program
# that is called for the first time raises jax.errors.JaxRuntimeError for the same failure. Code that catches JaxRuntimeError to tell
# a lost peer from a fault of its own misses the first, which is the usual one.
# Output seen:
#   jax 0.10.2
#   called before: ValueError UNKNOWN: Gloo AllGather failed
#   called first: JaxRuntimeError UNKNOWN: Gloo AllGather failed
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/peer.py" <<'END'
import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

index, before, port = int(sys.argv[1]), sys.argv[2] == "before", sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
multihost_utils.process_allgather(np.zeros(1, np.float32))
if index == 1:
    os._exit(0)
time.sleep(1)
try:
    multihost_utils.process_allgather(np.zeros(1 if before else 2, np.float32))
except Exception as error:
    text = " ".join(str(error).split()[:4]).rstrip(":")
    print(f"called {'before' if before else 'first'}: {type(error).__name__} {text}", flush=True)
os._exit(0)
END
cd "$folder"
{
  venv/bin/python -c 'import jax; print("jax", jax.__version__)'
  for when in before first; do
    port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    venv/bin/python peer.py 1 $when "$port" >/dev/null 2>&1 &
    venv/bin/python peer.py 0 $when "$port" 2>/dev/null | grep called
    wait
  done
} | tee seen
diff seen <(sed -n 's/^#   //p' "$script") || { echo "this has changed" >&2; exit 1; }
