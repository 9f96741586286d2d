"""The command line that all jobs share: absl flags, one line per error, and the exit codes.

0 done, 1 error, 2 usage, 75 interrupted but resumable (the same command goes on).
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dit_jax import help
from dit_jax.checks import nearest, on_disk
from dit_jax.config import Config, JobError, UsageError, resolve, template, to_dict

LONGEST = 2**20  # bytes of one JSON value or line: a config, a record, a row
LARGEST = 2**27  # bytes of a file of lines
DEEPEST = 32  # JSON lists and objects within each other
DONE, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 75


class Interrupted(Exception):
    """The job was asked to stop and saved what it had; the same command goes on from there."""


def launch(main: Callable[[], None], config: str = "") -> None:
    """Parse the command line, run `main()`, exit with the documented code; or print the help that `--help` asks for.

    `config` says where `--config` comes from: "file" (a file of configs/), "optional" (the same, or None), "workdir" (the run's
    config.json, with `--config.a.b=v` overrides), or "" (none).
    """
    sys.unraisablehook = _unraisable
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats, with a traceback, what a failed save met
    signal.signal(signal.SIGTERM, _stopped)  # until the job says what to do
    if help.asked(sys.argv[1:]):
        print(help.text(sys.modules["__main__"].__doc__ or "", config))
        sys.exit(DONE)
    sys.exit(_guarded(lambda: _parse(config), main))


def _unraisable(found) -> None:
    """Leaves out what callbacks of TensorStore say, dozens of times, after a save failed: its error is told by `report`."""
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


IDLE = "SIGTERM: nothing was under way; the same command goes on"
_asked: list[int] = []  # SIGTERM while no job had a handler of its own


def _stopped(number: int, frame) -> None:
    _asked.append(number)
    raise Interrupted(IDLE)


@contextlib.contextmanager
def stop_flag() -> Iterator[list]:
    """A list that SIGTERM fills, for loops to look at. The old handler comes back at the end."""
    stop = list(_asked)
    old = signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, old)


def _guarded(parse: Callable[[], None], main: Callable[[], None]) -> int:
    try:
        parse()
        main()
    except (UsageError, JobError, OSError, Interrupted, KeyboardInterrupt) as error:
        return report(error)
    except Exception:
        if _asked:  # a library that `_stopped` interrupted made something else of it
            return report(Interrupted(IDLE))
        raise
    return DONE


def report(error: BaseException) -> int:
    """Say what ended the job, in one line where it is an error that is known; returns the exit code."""
    if isinstance(error, UsageError):
        return _complain(error, USAGE)
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
    print(f"{kind}: {message}", file=sys.stderr, flush=True)
    return code


def _make_room_for_virtual_devices() -> None:
    """XLA's CPU threads must outnumber virtual devices: threads that wait for each other's sum would leave none to work."""
    found = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if found and int(found[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(found[1])))


def _parse(config: str) -> None:
    _make_room_for_virtual_devices()
    absl_logging.set_verbosity(absl_logging.FATAL)
    _check_paths()
    _check_overrides()
    with _parsing(flags.FLAGS):
        if config == "workdir":
            values = ml_collections.ConfigDict(to_dict(read_config(_early_workdir())), type_safe=False)
            config_flags.DEFINE_config_dict("config", values)
        elif config in ("file", "optional"):
            _check_file(_early_value("config"), optional=config == "optional")
            config_flags.DEFINE_config_file("config", help_string="a file of configs/, with :ARG where it takes one")
        rest = flags.FLAGS(sys.argv)
    if len(rest) > 1:
        raise UsageError(f"found the argument {rest[1]!r}, expected flags only (--name=value)")


@contextlib.contextmanager
def _parsing(values: flags.FlagValues) -> Iterator[None]:
    """What absl, ml_collections, a config file or Python's own parser say against the command line is a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except flags.UnrecognizedFlagError as error:
        known = dict.fromkeys([*help.own_flags(), *({"config"} & set(values)), "help"])
        raise UsageError(f"--{error.flagname}: unknown flag{nearest(error.flagname, known)}") from None
    except (flags.Error, AttributeError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise UsageError(_line(error)) from None
    except (RecursionError, MemoryError):  # at a value of thousands of signs or brackets
        raise UsageError("--config: found a value nested too deeply, expected a number, a text or a list") from None


def _line(error: BaseException) -> str:
    """The one line of a parse error; what a config file raised lies under a traceback that ml_collections made a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Error whilst parsing config file" not in lines[0]:
        return lines[0]
    while error.__context__ is not None:
        error = error.__context__
    inner = str(error).strip("\"' \n").splitlines()
    return f"{lines[0].split(': ')[0]}: {inner[0] if inner else type(error).__name__}"


def _early_value(name: str) -> str:
    """The value of a flag before absl parses: the config flag's definition may depend on it."""
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
    path = value.split(":", 1)[0]
    if not value and not optional:
        raise UsageError("--config: not given, expected a file such as configs/digits.py")
    if value and not os.path.isfile(path):
        raise UsageError(f"--config: no file {path!r}")


def _check_paths() -> None:
    """Every flag's, before a file is looked for; those of `--config.` are only read, `data.data_dir` by TFDS."""
    for before, argument in itertools.pairwise(["", *sys.argv[1:]]):
        name, _, value = argument.partition("=") if argument.startswith("-") else (before, "", argument)
        if not name.lstrip("-").startswith("config."):
            on_disk(f"--{name.lstrip('-')}", value)


def _check_overrides() -> None:
    """Name an unknown `--config.a.b` and the known key nearest to it: absl's own message does not."""
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
    """A number where the default is one; absl's own message names no type."""
    if type(default) not in (int, float) or "=" not in argument:
        return
    value = argument.split("=", 1)[1]
    try:
        type(default)(value)
    except ValueError:
        raise UsageError(f"--{name}: found {value!r}, expected {type(default).__name__}") from None


def read_config(workdir: str, name: str = "config.json") -> Config:
    """The config of a run folder. Raises UsageError when the folder is missing or is not a run's."""
    path = os.path.join(workdir, name)
    if not os.path.isdir(workdir):
        raise UsageError(f"--workdir: no folder {workdir!r}, expected a run made by dit_jax.train")
    if not os.path.isfile(path):
        raise UsageError(f"--workdir: {workdir!r} holds no {name}, expected a run made by dit_jax.train")
    with open(path, "rb") as f:
        data = f.read(LONGEST + 1)
    try:
        values = parse_json(data)
    except ValueError as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, Mapping) or "config" not in values:
        raise UsageError(f"{path}: found no key 'config', expected a file written by dit_jax.train")
    return resolve(values["config"])


def parse_json(data: bytes, most: int = LONGEST) -> object:
    """One JSON value. Raises ValueError saying what is wrong, also for one too long, nested too deeply, or with a key twice."""
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_keys_once)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    inside = [value]
    for _ in range(DEEPEST + 1):
        inside = [v for x in inside for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    if inside:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def _keys_once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {name!r} is there twice")
    return found


def numbered(lines: IO, path: str, most: float = LARGEST) -> Iterator[tuple]:
    """(number, line) of an open file. Raises UsageError at a line beyond LONGEST, or when all lines are beyond `most`."""
    number = total = 0
    while line := lines.readline(LONGEST + 1):
        number, total = number + 1, total + len(line)
        if len(line) > LONGEST:
            raise UsageError(f"{path}:{number}: found more than {LONGEST:,} bytes in a line, expected fewer")
        if total > most:
            raise UsageError(f"{path}: found more than {most:,} bytes, expected fewer; split the file")
        yield number, line


def load_config(value: str) -> ml_collections.ConfigDict:
    """The ConfigDict of a config file, `configs/x.py` or `configs/x.py:ARG`, for notebooks and scripts."""
    path, _, argument = value.partition(":")
    if not os.path.isfile(path):
        raise UsageError(f"no config file {path!r}")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(argument) if argument else get_config()


def write_file(path: str, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A folder to write into, which gets the name `path` when all went well and is removed when not.

    `path` must not exist, or be an empty folder. What a killed job left behind is removed by the next one.
    """
    path = os.path.abspath(path)
    unfinished = path + ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        yield unfinished
        sync(unfinished)
        os.rename(unfinished, path)
        sync(os.path.dirname(path))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def file_sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def provenance() -> dict:
    """Versions and commit of what computes."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"versions": {name: _version(name) for name in names}, "commit": commit}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def sync(path: str) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
