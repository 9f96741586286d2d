"""Signs of life between processes, here threads with a store in memory: who is silent is told to all, and only then."""

import threading
import time

import pytest

from dit_jax.devices import alive

SECONDS = 1.0


class Store:
    """The coordinator's store as a process sees it; `cut`: calls hang, as without a network."""

    def __init__(self, values):
        self.values, self.cut = values, threading.Event()

    def key_value_set(self, key, value, allow_overwrite=False):
        self._reach()
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        self._reach()
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]

    def _reach(self):
        while self.cut.is_set():
            time.sleep(0.01)


@pytest.fixture
def watched(monkeypatch):
    """(their stores, what each process said at its end) of three processes that watch each other."""
    stores, said, leaving, values = [], {}, threading.Event(), {}

    def end(error):
        said[threading.current_thread().name] = (time.monotonic(), str(error).split(" gave")[0])

    monkeypatch.setattr(alive, "end", end)
    for index in range(3):
        stores.append(Store(values))
        thread = threading.Thread(target=alive._watch, args=(stores[-1], index, SECONDS, leaving), name=str(index))
        thread.start()
    yield stores, said
    leaving.set()
    for store in stores:
        store.cut.clear()


def ends(said, count):
    began = time.monotonic()
    while len(said) < count and time.monotonic() - began < 20:
        time.sleep(0.01)
    return {name: who for name, (_, who) in said.items()}


def test_a_silent_process_is_told_to_all_and_process_0_ends_last(watched):
    stores, said = watched
    time.sleep(1.5 * SECONDS)
    assert not said
    stores[2].cut.set()
    assert ends(said, 3) == {"0": "process 2", "1": "process 2", "2": "process 0"}
    assert said["0"][0] >= said["1"][0]


def test_a_store_that_does_not_answer_is_a_lost_process_0(watched):
    stores, said = watched
    time.sleep(SECONDS / 2)
    for store in stores[1:]:
        store.cut.set()
    found = ends(said, 3)
    assert found["0"] in ("process 1", "process 2") and found["1"] == found["2"] == "process 0"
