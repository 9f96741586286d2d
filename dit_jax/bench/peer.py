"""Another implementation to time beside ours: a Python file, `--peer=tests/peers/torch_dit.py`, with three functions.

    check(cfg, platform)                                          raises UsageError for a config it does not support
    make_trainer(cfg, params, batch, platform, threads) -> Side   the whole training step on one batch
    make_sampler(cfg, params, rows, platform, threads) -> Side    a batch of `rows` images by `cfg.sample`

`params` and `batch` are ours, as NumPy arrays; `platform` is cpu or gpu; `threads` is the number that JAX has on a CPU.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from dit_jax.error import UsageError

HOW = (
    "`make parity` installs PyTorch's CPU build (then PYTHONPATH=.venv/peers), `pip install -e .[torch]` the one that pip "
    "finds, on Linux with CUDA"
)
FUNCTIONS = ("check", "make_trainer", "make_sampler")


@dataclass(frozen=True)
class Side:
    """One of the implementations compared, its program compiled."""

    run: Callable[[int], None]  # makes so many calls and waits for their results
    first: float  # seconds of the first call, compilation included
    memory: Callable[[], tuple[int | None, str]]  # bytes at the peak, and where the figure comes from
    compiled: Callable[[], int]  # programs compiled so far
    about: dict  # plain values for the report


def load(path: str) -> ModuleType:
    """Imports a peer's file. Raises UsageError if it is absent, lacks a function or needs a package that is not installed."""
    if not os.path.isfile(path):
        raise UsageError(f"--peer: no file {path!r}, expected one such as tests/peers/torch_dit.py")
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UsageError(f"--peer: found {path!r}, expected a Python file such as tests/peers/torch_dit.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        how = f": {HOW}" if error.name == "torch" else ""
        raise UsageError(f"--peer: {path} needs {error.name or error}, which is not installed{how}") from None
    except Exception as error:
        raise UsageError(f"--peer: {path} cannot be read: {type(error).__name__}: {error}") from None
    if lacking := [name for name in FUNCTIONS if not callable(getattr(module, name, None))]:
        raise UsageError(f"--peer: {path} has no {', '.join(lacking)}, expected the functions {', '.join(FUNCTIONS)}")
    return module
