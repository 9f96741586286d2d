"""Errors of one line each, safe to print whatever file they quote, and the exit codes of jobs."""

import contextlib
import dataclasses
import difflib
import itertools
import logging
import math
import os
import re
import select
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

LONGEST = 4000  # characters in a message
LARGEST = 2**31 - 1  # integer that a device counts to


def one_line(message) -> str:
    """Make text safe for a terminal: unprintable characters escaped, the middle of a long message left out."""
    text, half = str(message), LONGEST // 2
    text = text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(ValueError):
    """Wrong usage, in one line: which key or file, what was found, what was expected."""

    def __init__(self, message=""):
        super().__init__(one_line(message))


class NotFiniteError(UsageError):
    """A model's output is not finite: it has diverged, while other models of the same command may be sound."""


class JobError(RuntimeError):
    """A failure of a correct command, in one line: what happened, what is kept and what to do."""

    def __init__(self, message=""):
        super().__init__(one_line(message))


class StorageError(JobError, OSError):
    """A bucket refused something or did not answer: what, and what to do."""

    def __init__(self, message=""):
        super().__init__(message)
        self.strerror = str(self)


class PeerLost(JobError):
    """Another process of the job is gone, or never came. Launchers start the job again; see PEER_LOST."""


def shown(value) -> str:
    """`repr(value)`, which fails for integers of thousands of digits and for endless nesting."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def choice(name: str, found, allowed, rank: Callable | None = None) -> None:
    if found not in allowed:
        hint = "".join(f"; did you mean {near!r}?" for near in (rank or alike)(str(found), map(str, allowed)))
        raise UsageError(f"{name}: found {shown(found)}, expected one of {', '.join(map(str, allowed))}{hint}")


def number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**1000


def in_range(name: str, found, low=-math.inf, high=math.inf) -> None:
    if not low <= found <= high:
        expected = f"a value from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        raise UsageError(f"{name}: found {shown(found)}, expected {expected}")


def at_least(low: int | float, config, *names: str) -> None:
    """Raises UsageError if one of the fields `names` is below `low`."""
    group = type(config).__name__.removesuffix("Config").lower()
    for name in names:
        in_range(f"{group}.{name}", getattr(config, name), low)


def alike(name: str, known, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known names most similar to `name`, nearest first."""
    return difflib.get_close_matches(name[:100], list(known), most, cutoff)


def nearest(key: str, known) -> str:
    """Name the known key most similar to `key`, for an error message."""
    near = alike(key, known, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


def check_scheme(name: str, path: str) -> None:
    """Raises UsageError if `path` is a URL of anything but a bucket of Google Cloud Storage."""
    if re.match(r"[a-z][a-z\d+.-]*:/", path, re.IGNORECASE) and not path.startswith("gs://"):
        raise UsageError(
            f"{name}: found {shown(path)}, expected a path on a disk or gs://BUCKET/...: other stores are not supported; copy the "
            "files, or mount the store as a folder"
        )


def check_schemes(arguments: Sequence[str]) -> None:
    """Raises UsageError if a command line names a path that no job can open."""
    for before, argument in itertools.pairwise(["", *arguments]):
        name, _, value = argument.partition("=")
        if not argument.startswith("-"):
            name, value = before if before.startswith("-") and "=" not in before else "argument", argument
        check_scheme(f"--{name.lstrip('-')}" if name.startswith("-") else name, value)


def unknown_flag(name: str, known) -> UsageError:
    """Return the error for an unknown flag."""
    return UsageError(f"--{name}: unknown flag{nearest(name, known)}")


def typed(value, kind: type | types.GenericAlias, name: str):
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
    if type(value) is not kind:
        raise UsageError(f"{name}: found {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is int and abs(value) > LARGEST:
        raise UsageError(f"{name}: found {shown(value)}, expected at most {LARGEST}: devices count in 32 bits")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{name}: found {value!r}, expected a finite number")
    return value


def build(cls, values, prefix: str):
    """Make a dataclass of nested mappings. Raises UsageError naming the key that is unknown or mistyped, after `prefix`."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{prefix.rstrip('.') or 'config'}: found {shown(values)}, expected a group of keys")
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if not isinstance(key, str) or key not in known:
            key = key if isinstance(key, str) else shown(key)
            raise UsageError(f"{prefix}{key}: unknown config key{nearest(key, known)}")
        if dataclasses.is_dataclass(known[key]):
            arguments[key] = build(known[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = typed(value, known[key], f"{prefix}{key}")
    return cls(**arguments)


DONE, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 75
PEER_LOST = 200  # above the codes of signals (128 to 192), among those that xpk restarts (42, 127 to 255)


class Interrupted(Exception):
    """The job was asked to stop and saved its state; the same command continues it."""


IDLE = "SIGTERM: nothing was under way; the same command goes on"


def exit_code(command: Callable[[], object]) -> int:
    """Run a command and return its exit code, errors reported in a line. A closed pipe (`| head`) is no error."""
    try:
        command()
        sys.stdout.flush()
    except (UsageError, JobError, OSError, Interrupted, KeyboardInterrupt) as error:
        return DONE if isinstance(error, BrokenPipeError) and _unread() else report(error)
    finally:
        _unread()  # so that the interpreter raises nothing when it flushes at exit
    return DONE


def _unread() -> bool:
    """Return whether a reader of standard output or error has gone; that stream then goes to /dev/null."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a stream without a file, as in tests
            look = select.poll()
            look.register(stream.fileno(), 0)
            if look.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                found = True
    return found


@contextlib.contextmanager
def watching(react: Callable[[int | None], float | None], seconds: float | None = None) -> Iterator[None]:
    """Call `react` in a thread at each signal, with its number, and with None after `seconds`; it returns the next `seconds`.

    A call that does not return to Python, such as a program on a device, runs no handler of Python's; the thread reads the
    signals' numbers from a pipe. It sees those that have a handler of Python's.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        left = seconds
        while True:
            number = os.read(reader, 1)[0] if select.select([reader], [], [], left)[0] else None
            if number == 0:  # the end of the block
                return
            left = react(number)

    thread, before = (
        threading.Thread(target=watch, daemon=True),
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False),
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, bytes(1))
        thread.join()
        os.close(reader)
        os.close(writer)


def report(error: BaseException) -> int:
    """Log the error that ended the job, with a traceback if it is unexpected; returns the exit code."""
    if isinstance(error, UsageError):
        return _complain(error, USAGE)
    if isinstance(error, PeerLost):
        return _complain(error, PEER_LOST)
    if isinstance(error, (JobError, OSError)):
        return _complain(error, ERROR)
    if isinstance(error, Interrupted):
        return _complain(error, INTERRUPTED, "interrupted")
    if isinstance(error, KeyboardInterrupt):
        text = "stopped from the keyboard; the same command goes on from the last checkpoint"
        return _complain(text, INTERRUPTED, "interrupted")
    traceback.print_exception(error)
    return ERROR


def _complain(message, code: int, kind: str = "error") -> int:
    with contextlib.suppress(BrokenPipeError):
        logging.getLogger("dit_jax").error(f"{kind}: {message}")
    return code
