"""The command line of all jobs: absl flags, one line per error, and the exit codes.

0 done, 1 error, 2 usage, 75 interrupted but resumable (the same command goes on), 200 a peer is gone (launchers restart).
"""

import contextlib
import logging
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dit_jax.config import template
from dit_jax.error import (
    IDLE,
    Interrupted,
    UsageError,
    check_schemes,
    exit_code,
    nearest,
    report,
    unknown_flag,
    watching,
)
from dit_jax.files import remote
from dit_jax.job import help
from dit_jax.job.check import define_flags, introduce_buckets, reachable, run_check
from dit_jax.job.compiled import keep_programs
from dit_jax.workdir.folder import read_config

PATIENCE = 20.0  # seconds that a batch under way is given to end in after SIGTERM
_asked: list[int] = []  # SIGTERM while no job had a handler of its own


def launch(main: Callable[[], None], config: str = "", check: Callable | None = None) -> None:
    """Parse the command line, run `main()` and exit with its code; or print the help for `--help`, or see to `--check`.

    A job imports slow modules (jax, orbax, ...) in `main` only, so that help and wrong flags are answered at once.
    `config`: where `--config` comes from: "file" (a file of configs/), "optional" (the same, or None), "workdir" (the run's
    config.json, with `--config.a.b=v` overrides), or "" (none). `check(config, slice or None)`: raises UsageError if the job would not
    take them; without it a slice has to be one host.
    """
    sys.unraisablehook = _unraisable
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats the error of a failed save, with a traceback
    signal.signal(signal.SIGTERM, _stopped)  # until the job has a handler of its own
    define_flags()
    sys.exit(_guarded(lambda: _run(main, config, check)))


def _run(main: Callable[[], None], config: str, check: Callable | None) -> None:
    if help.asked(sys.argv[1:]):
        print(help.text(sys.modules["__main__"].__doc__ or "", config))
        return
    _parse(config)
    if flags.FLAGS.check:
        run_check(sys.modules["__main__"].__spec__.name.split(".")[1], config, check)
        return
    if flags.FLAGS.slice is not None:
        raise UsageError("--slice: found it without --check, expected both: a job takes the devices that are there")
    introduce_buckets()
    keep_programs()
    main()


def _unraisable(found) -> None:
    """Omit the dozens of errors of TensorStore's callbacks after a failed save, whose own error `report` prints."""
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


def _stopped(number: int, frame) -> None:
    _asked.append(number)
    raise Interrupted(IDLE)


@contextlib.contextmanager
def stop_flag(patience: float | None = None) -> Iterator[list]:
    """Yield a list that SIGTERM fills, for loops to check; the old handler is restored at the end.

    A second signal (or interrupt from the keyboard) ends the process at once. So does the first after `patience` seconds, for a
    loop that keeps on the disk what it has done: the program under way may take long, and its work would be lost anyway.
    """
    stop, seen = list(_asked), []
    old = signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))

    def react(number: int | None) -> float | None:
        if number in (signal.SIGTERM, signal.SIGINT):
            seen.append(number)
        if number is None or len(seen) > 1:
            os._exit(report(Interrupted("what was under way is given up; the same command goes on from what is saved")))
        return patience if seen else None

    try:
        with watching(react):
            yield stop
    finally:
        signal.signal(signal.SIGTERM, old)


def _guarded(command: Callable[[], None]) -> int:
    try:
        return exit_code(command)
    except Exception:
        if _asked:  # a library turned the Interrupted of `_stopped` into another exception
            return report(Interrupted(IDLE))
        raise


def _make_room_for_virtual_devices() -> None:
    """Give XLA more CPU threads than virtual devices, because threads waiting in a collective leave none to compute."""
    found = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if found and int(found[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(found[1])))


def _parse(config: str) -> None:
    _make_room_for_virtual_devices()
    absl_logging.set_verbosity(absl_logging.FATAL)
    check_schemes(sys.argv[1:])
    _check_overrides()
    with _parsing(flags.FLAGS):
        if config == "workdir":
            workdir = _early_workdir()
            away = "--check" in sys.argv and not reachable(workdir)
            values = template().unlock() if away else _config_of(workdir)
            config_flags.DEFINE_config_dict("config", values)
        elif config in ("file", "optional"):
            _check_file(_early_value("config"), optional=config == "optional")
            config_flags.DEFINE_config_file("config", help_string="a file of configs/, with :ARG where it takes one")
        rest = flags.FLAGS(sys.argv)
    if len(rest) > 1:
        raise UsageError(f"found the argument {rest[1]!r}, expected flags only (--name=value)")


@contextlib.contextmanager
def _parsing(values: flags.FlagValues) -> Iterator[None]:
    """Turn errors of absl, ml_collections, a config file or Python's parser into UsageErrors."""
    try:
        yield
    except UsageError:
        raise
    except flags.UnrecognizedFlagError as error:
        known = dict.fromkeys([*help.own_flags(), *({"config"} & set(values)), "help"])
        raise unknown_flag(error.flagname, known) from None
    except (flags.Error, AttributeError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise UsageError(_line(error)) from None
    except (RecursionError, MemoryError):  # a value of thousands of signs or brackets
        raise UsageError("--config: found a value nested too deeply, expected a number, a text or a list") from None


def _line(error: BaseException) -> str:
    """Return the line of a parse error; ml_collections makes a message of the traceback of a config file's error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Error whilst parsing config file" not in lines[0]:
        return lines[0]
    while error.__context__ is not None:
        error = error.__context__
    inner = str(error).strip("\"' \n").splitlines()
    return f"{lines[0].split(': ')[0]}: {inner[0] if inner else type(error).__name__}"


def _config_of(workdir: str) -> ml_collections.ConfigDict:
    return template(read_config(workdir)).unlock()


def _early_value(name: str) -> str:
    """Return a flag's value before absl parses, because the definition of `--config` may depend on it."""
    for i, argument in enumerate(sys.argv[1:], 1):
        if argument in (f"--{name}", f"-{name}"):
            return sys.argv[i + 1] if i + 1 < len(sys.argv) else ""
        if argument.startswith((f"--{name}=", f"-{name}=")):
            return argument.split("=", 1)[1]
    return ""


def _early_workdir() -> str:
    workdir = _early_value("workdir")
    if not workdir:
        raise UsageError("--workdir: not given, expected the folder of a run")
    return workdir


def _check_file(value: str, optional: bool = False) -> None:
    if remote(value):
        raise UsageError(f"--config: found {value!r}, expected a file on this disk: a config is a program")
    path = value.split(":", 1)[0]
    if not value and not optional:
        raise UsageError("--config: not given, expected a file such as configs/digits.py")
    if value and not os.path.isfile(path):
        ours = CONFIGS / os.path.basename(path)
        raise UsageError(
            f"--config: no file {path!r}" + (f"; expected perhaps {str(ours)!r}" if ours.is_file() else "")
        )


def _check_overrides() -> None:
    """Raises UsageError naming an unknown `--config.a.b` and the nearest known key, which absl's message does not."""
    for argument in sys.argv[1:]:
        if not argument.startswith(("--config.", "-config.")):
            continue
        found, level = argument.lstrip("-").split("=", 1)[0], template()
        for key in found.split(".")[1:]:
            if not isinstance(level, ml_collections.ConfigDict) or key not in level:
                known = level if isinstance(level, ml_collections.ConfigDict) else ()
                raise UsageError(f"--{found}: unknown config key {key!r}{nearest(key, known)}")
            level = level[key]
        _check_number(found, argument, level)


def _check_number(name: str, argument: str, default) -> None:
    """Raises UsageError unless a value is a number if its default is one; absl's message names no type."""
    if type(default) not in (int, float) or "=" not in argument:
        return
    value = argument.split("=", 1)[1]
    try:
        type(default)(value)
    except ValueError:
        raise UsageError(f"--{name}: found {value!r}, expected {type(default).__name__}") from None


PACKAGE = Path(__file__).parents[1]
CONFIGS = (PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent) / "configs"  # a wheel's, or a checkout's


def load_config(value: str) -> ml_collections.ConfigDict:
    """Load the ConfigDict of a config file, `configs/x.py` or `configs/x.py:ARG`, for notebooks and scripts."""
    path, _, argument = value.partition(":")
    if not os.path.isfile(path):
        raise UsageError(f"no config file {path!r}")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(argument) if argument else get_config()
