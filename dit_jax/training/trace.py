"""Traces of a training's steps for xprof: what hosts and devices do, and for how long, by the scopes of the program."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax

from dit_jax.files import delete, make_folder, remote, rename, upload

FOLDER = "profile"  # in the run's folder


def step_annotation(step: int) -> contextlib.AbstractContextManager:
    """Mark a step in a trace."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)


@contextlib.contextmanager
def tracing(ends: Sequence[int], workdir: str) -> Iterator[Callable]:
    """Yield `trace(step, state)`, to be called before each step with the state that it starts from.

    `ends`: first and last step of the trace, or (). All processes begin at the same step, after the one before it has ended on their
    devices. Their files lie in one folder, as xprof takes them for the hosts of one session:
    `W/profile/plugins/profile/steps_FIRST_LAST/process_K.xplane.pb`. What was traced is written however the block ends.
    """
    first, last = ends or (1, 0)
    name = f"process_{jax.process_index()}.tmp"
    running, own = False, os.path.join(tempfile.gettempdir() if remote(workdir) else workdir, FOLDER, name)

    def turn(on: bool) -> None:
        nonlocal running
        if on and not running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python are 1000 times as many events, and slow the step
            jax.profiler.start_trace(own, profiler_options=options)
        elif running and not on:
            jax.profiler.stop_trace()
            _keep(own, os.path.join(workdir, FOLDER, "plugins", "profile", f"steps_{first}_{last}"))
        running = on

    def trace(step: int, state) -> None:
        if running != (first <= step <= last):
            jax.block_until_ready(state)
            turn(not running)

    try:
        yield trace
    finally:
        turn(False)


def _keep(own: str, session: str) -> None:
    """Move this process's trace out of its own folder, which JAX names by the time and the host, into the session's."""
    make_folder(session)
    name = os.path.basename(own).removesuffix(".tmp")
    for path in glob.glob(os.path.join(glob.escape(own), "plugins", "profile", "*", "*.xplane.pb")):
        put = upload if remote(session) else rename
        put(path, os.path.join(session, f"{name}.xplane.pb"))
    delete(own)
