"""Ends this process, in one line, when another process of the job has given no sign of life for `mesh.heartbeat` seconds.

JAX's own service notices too, but it aborts with a stack trace. It remains as the second line of defence, with more patience.
"""

import contextlib
import itertools
import os
import threading
import time
from typing import NoReturn

import jax

from dit_jax.error import PeerLost, report

SIGNS, LEAST = 40, 0.1  # signs of life in the time after which a process counts as lost; seconds between two
_ending = threading.Lock()


def end(error: BaseException) -> NoReturn:
    """Reports the error and exits at once; of several threads only the first does."""
    _ending.acquire()
    os._exit(report(error))


def watch(client, index: int, seconds: float, leaving: threading.Event) -> None:
    """Starts to end this process with PEER_LOST when another one is silent for `seconds`, until `leaving` is set.

    `client`: JAX's, of the coordinator's store; `index`: of this process. Each process counts up in the store. Process 0 reads the
    counts and writes there who is lost. The others look for that, and take a store that does not answer for a lost process 0.
    Time counts only while this process runs itself.
    """
    threading.Thread(target=_watch, args=(client, index, seconds, leaving), daemon=True).start()


def _watch(client, index: int, seconds: float, leaving: threading.Event) -> None:
    period, now, signs, lost = max(seconds / SIGNS, LEAST), [0.0], {}, []
    threading.Thread(target=_talk, args=(client, index, period, leaving, now, signs, lost), daemon=True).start()
    while not lost:
        if leaving.wait(period):
            return
        now[0] += period
        lost.extend(other for other, last in list(signs.items()) if now[0] - last > seconds)
    if index == 0:  # the runtime aborts processes whose coordinator is gone: the others go first
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"lost/{lost[0]}", "")
        time.sleep(4 * period)  # they look once a period, and once more at what they have seen
    end(
        PeerLost(
            f"process {lost[0]} gave no sign of life for {seconds:g} s (mesh.heartbeat): it is gone, frozen or cut off; what "
            "is saved is intact, and the same command on all hosts goes on from there"
        )
    )


def _talk(client, index: int, period: float, leaving: threading.Event, now: list, signs: dict, lost: list) -> None:
    """Gives signs of life, and notes when the others gave theirs. It has a thread of its own: without a network its calls hang."""
    counts = {}
    for count in itertools.count():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"alive/{index}", str(count), allow_overwrite=True)
            if index == 0:
                found = dict(client.key_value_dir_get("alive/"))
                signs.update({_number(key): now[0] for key in found if counts.get(key) != found[key]})
                counts = found
            else:
                lost.extend(_number(key) for key, _ in client.key_value_dir_get("lost/"))
                signs[0] = now[0]
        if leaving.wait(period):
            return


def _number(key: str) -> int:
    return int(key.rsplit("/", 1)[1])
