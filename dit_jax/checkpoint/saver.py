"""Saves of checkpoints and snapshots while a run trains, in the background; and what may be pruned."""

import concurrent.futures as futures
import contextlib
import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from typing import NoReturn

import jax
import orbax.checkpoint as ocp

from dit_jax.checkpoint.arrays import in_chunks
from dit_jax.checkpoint.place import CHECKPOINTS, REMOVING, SAVING, SNAPSHOTS, folder, free_name, path_of, steps
from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.files import delete, exists, lock, names, remote, rename, slow
from dit_jax.log import warn
from dit_jax.workdir import manifest

ITEMS = ("params", "ema", "opt", "extras", "tracks", "data", "meta")


class Saver:
    """Saves in the background, one at a time, and prunes as `prune` does. For the job that trains only.

    Opening removes half-written saves of a killed process. The next `check`, `save` or `close` raises the error of a
    failed save, as a JobError.
    """

    def __init__(self, workdir: str, keep: int, keep_at: Collection[int] = (), keep_every: int = 0):
        self.workdir, self._lock = workdir, contextlib.ExitStack()
        self._prune = functools.partial(prune, workdir, keep, keep_at, keep_every)
        self._pending: tuple[str, futures.Future] | None = None
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*ITEMS), async_options=at_once)
        if jax.process_index() == 0:
            busy = JobError(f"{workdir}: another process trains this run; wait for its end, or use another --workdir")
            self._check_lock = self._lock.enter_context(lock(os.path.join(folder(workdir), "lock"), busy))
            _remove_unfinished(workdir, CHECKPOINTS)
            _remove_unfinished(workdir, SNAPSHOTS)

    def save(self, step: int, items: dict, position: dict, meta: dict, after: Callable = lambda: None) -> None:
        """Copy `items` (name -> tree of arrays) from the devices and start writing them; `after()` runs once they are saved.

        `position` (of the data iterator) and `meta` (of the run) are JSON values.
        """
        self._start(path_of(self.workdir, step), items, {"data": position, "meta": {**meta, "step": step}}, after)

    def snapshot(self, step: int, tracks: dict, meta: dict) -> None:
        """Save power EMAs of the weights as `save` does, but never prune them. All processes must agree that it is not there yet."""
        self._start(path_of(self.workdir, step, SNAPSHOTS), {"tracks": tracks}, {"meta": {**meta, "step": step}})

    def _start(self, final: str, items: dict, values: dict, after: Callable | None = None) -> None:
        self.wait()
        arrays = {name: in_chunks(tree) for name, tree in items.items()}
        notes = {name: ocp.args.JsonSave(value) for name, value in values.items()}
        target = final + ("" if remote(self.workdir) else SAVING)
        if jax.process_index() == 0:
            self._check_lock()
        try:
            self._orbax.save(target, args=ocp.args.Composite(**arrays, **notes))
        except Exception as error:
            self._fail(final, error)
        self._pending = final, self._thread.submit(self._commit, final, target, (*items, *values), after)

    def check(self) -> None:
        """Raise the error of a background save that has ended."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is on the disk."""
        if not self._pending:
            return
        (final, future), self._pending = self._pending, None
        try:
            with slow(final, "saving"):
                future.result()
        except Exception as error:
            self._fail(final, error)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # its error was raised by `wait`
                self._orbax.close()
            if jax.process_index() == 0:
                with contextlib.suppress(StorageError):  # a lease that is lost: what is unfinished is another process's
                    self._check_lock()
                    _remove_unfinished(self.workdir, CHECKPOINTS)
                    _remove_unfinished(self.workdir, SNAPSHOTS)
            self._lock.close()

    def _commit(self, final: str, target: str, parts: Collection[str], after: Callable | None) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            publish(target, final, parts, self._check_lock)
            for what, action in (("the goodput", after), ("older checkpoints", self._prune)) if after else ():
                try:
                    action()
                except (OSError, UsageError) as error:  # the checkpoint is saved all the same
                    warn(f"{final} is saved, but {what} could not be tidied up: {error}")

    def _fail(self, final: str, error: Exception) -> NoReturn:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise error  # another process failed, not the disk
        left = steps(self.workdir)
        kept = f"the checkpoints of steps {left} are intact" if left else "there is no earlier checkpoint"
        raise JobError(
            f"{final}: the checkpoint could not be written ({cause(error)}); {kept}; make room "
            "or mend the disk, then the same command goes on"
        ) from error


def publish(unfinished: str, final: str, parts: Collection[str], check: Callable[[], None] = lambda: None) -> None:
    """Write the manifest of a finished folder, then rename it. `check`: raises if this process may not.

    Raises OSError if one of `parts` has no file there, or if `final` exists.
    """
    manifest.write_manifest(unfinished, parts, check)
    if unfinished == final:
        return
    if exists(final):
        raise OSError(f"{final} exists already")
    rename(unfinished, final)


def stays(step: int, keep_at: Collection[int], keep_every: int) -> bool:
    """Whether the checkpoint of a step is never pruned: one of `keep_at`, or a multiple of `keep_every` (0 = none)."""
    return step in keep_at or (keep_every > 0 and step % keep_every == 0)


def prune(workdir: str, keep: int, keep_at: Collection[int] = (), keep_every: int = 0) -> None:
    """Remove all but the `keep` newest checkpoints and those that stay (`stays`), unless the newest does not verify."""
    found = steps(workdir)
    if len(found) <= keep or manifest.problems(path_of(workdir, found[-1])):
        return
    for step in (step for step in found[:-keep] if not stays(step, keep_at, keep_every)):
        old = path_of(workdir, step)
        if remote(old):
            delete(old, first=manifest.NAME)
            continue
        aside = free_name(old + REMOVING)
        rename(old, aside)  # so that a removal cut short leaves no half checkpoint
        delete(aside)


def _remove_unfinished(workdir: str, kind: str) -> None:
    root = folder(workdir, kind)
    if remote(root):
        for step in {int(name) for name in names(root) if name.isdecimal()} - {*steps(workdir, kind)}:
            delete(path_of(workdir, step, kind))
        return
    for name in names(root):
        path, tries = os.path.join(root, name), 0
        # again and again, because threads of a failed save may still write there
        while (SAVING in name or REMOVING in name) and os.path.isdir(path) and tries < 20:
            shutil.rmtree(path, ignore_errors=True)
            tries += 1
            time.sleep(0.05 if os.path.isdir(path) else 0)


def cause(error: BaseException) -> str:
    """Return the system's message if there is one; TensorStore puts it at the end of a long line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().splitlines()
    said = re.search(r"([^:]+) \[os_error_code", str(error))
    return said[1].strip() if said else (text[0] if text else type(error).__name__)[:200]
