"""Worker processes of a sweep on one machine: each pinned to its cores, and none lost when another dies."""

import concurrent.futures as futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from dit_jax.job.compiled import use_cache


def _follow(parent: int) -> None:
    """Save and stop once the sweep is gone, so that the same command finds no cell still running."""
    while os.getppid() == parent:
        time.sleep(1.0)
    while True:  # the first SIGTERM makes a training save and stop; the next one ends the idle worker
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.0)


def _start_worker(cores: list[int], counter, cache: str) -> None:
    """Pin this worker to one core: small models gain nothing from a second one."""
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if cores:
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    use_cache(cache)


def _pool(processes: int, cache: str) -> futures.ProcessPoolExecutor:
    """Start workers, each on its own core if there are several; virtual devices need more than one core a process."""
    virtual = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    pin = processes > 1 and not virtual and hasattr(os, "sched_getaffinity")
    context = multiprocessing.get_context("spawn")
    arguments = (sorted(os.sched_getaffinity(0)) if pin else [], context.Value("i", 0), cache)
    return futures.ProcessPoolExecutor(processes, context, _start_worker, arguments)


def run_cells(cells: list, processes: int, cache: str, job: Callable) -> Iterator[tuple[object, object]]:
    """Yield (cell, record or exception) as cells end, and (None, running cells) about once a second in between.

    A worker that dies (out of memory, say) breaks the pool. The cells that were running are then run again, one at a time,
    so that only the one that kills its process is lost.
    """
    waiting, suspects = list(cells), []
    while waiting or suspects:
        alone = not waiting
        queue, width = (suspects, 1) if alone else (waiting, processes)
        broken = yield from _drain(queue, width, cache, job, alone)
        if not alone:
            suspects += broken


def _drain(queue: list, width: int, cache: str, job: Callable, alone: bool):
    """Run cells of `queue` until it is empty or the pool breaks; returns the cells that ran when it broke."""
    running: dict[futures.Future, object] = {}
    with _pool(width, cache) as pool:
        try:
            while queue or running:
                while queue and len(running) < width:
                    cell = queue.pop(0)
                    running[pool.submit(job, cell)] = cell
                done, _ = futures.wait(running, timeout=1.0, return_when=futures.FIRST_COMPLETED)
                if any(isinstance(future.exception(), futures.process.BrokenProcessPool) for future in done):
                    lost = list(running.values())
                    if alone:
                        yield lost[0], RuntimeError("its process died (out of memory?)")
                    return lost
                for future in done:
                    yield running.pop(future), future.exception() or future.result()
                yield None, list(running.values())
        except BaseException:
            _stop(pool)
            raise
    return []


def _stop(pool: futures.ProcessPoolExecutor) -> None:
    """Ask the workers to save and stop."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)
