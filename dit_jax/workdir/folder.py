"""A run folder: its config.json, the keys that may change on resuming, and the versions that wrote it."""

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping

from dit_jax.config import Config, resolve, to_dict
from dit_jax.error import StorageError, UsageError
from dit_jax.files import is_file, is_folder, json_text, names, read_json, write_file
from dit_jax.files import make_folder as make


def read_config(workdir: str, name: str = "config.json") -> Config:
    """Read the config of a run folder. Raises UsageError if the folder is missing or holds no run."""
    path = os.path.join(workdir, name)
    if not is_folder(workdir):
        raise UsageError(f"--workdir: no folder {workdir!r}, expected a run made by dit_jax.train")
    if not is_file(path):
        raise UsageError(f"--workdir: {workdir!r} holds no {name}, expected a run made by dit_jax.train")
    values = read_json(path)
    if "config" not in values:
        raise UsageError(f"{path}: found no key 'config', expected a file written by dit_jax.train")
    return resolve(values["config"])


def provenance() -> dict:
    """Return the versions of the libraries and the commit of this code."""
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


# Keys that a resumed run may change: none of them changes what training computes.
FREE = (
    "mesh.", "eval.", "sample.", "sweep.", "data.data_dir", "data.folder", "data.latents", "data.cache", "data.workers", "data.prefetch",
    "data.skip_bad",
    "train.log_every", "train.checkpoint_every", "train.keep", "train.keep_at", "train.keep_every",
    "train.skips_in_a_row", "train.replay_every", "train.profile", "train.evaluate_every", "train.grid_every", "train.wandb",
    "model.remat", "model.unroll", "model.attention",
)  # fmt: skip


def flatten(values: Mapping, separator: str = ".") -> dict:
    """Flatten nested mappings to {"a.b": value}. Raises ValueError for a key that could not be split again."""
    flat = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key or separator in key:
            raise ValueError(f"{key!r}: expected names without {separator!r}")
        inside = flatten(value, separator) if isinstance(value, Mapping) else None
        flat |= {key: value} if inside is None else {f"{key}{separator}{name}": v for name, v in inside.items()}
    return flat


def check_same_run(cfg: Config, workdir: str) -> None:
    """Raises UsageError if the folder's config differs in a key that changes what is computed."""
    old, new = (flatten(to_dict(c)) | {"data.mixture": c.data.recipe} for c in (read_config(workdir), cfg))
    free = [*FREE, "train.steps"] if cfg.optim.schedule == "constant" else list(FREE)
    changed = [key for key in new if new[key] != old[key] and not key.startswith(tuple(free))]
    if changed:
        shown = "; ".join(f"{key}: the folder has {old[key]!r}, the command {new[key]!r}" for key in changed[:4])
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        raise UsageError(f"{workdir} holds a run of another config: {shown}{more}; use another --workdir")


def make_folder(workdir: str, name: str, cfg: Config) -> None:
    """Write the config as `workdir`/`name`; the folder must be new, empty or already hold `name`. Raises UsageError."""
    if is_file(workdir):
        raise UsageError(f"--workdir: {workdir!r} is a file, expected a folder")
    held = [file for file in names(workdir) if ".tmp" not in file]
    if held and name not in held:
        raise UsageError(
            f"--workdir: {workdir!r} is not empty and holds no {name}; expected a new folder or one made before"
        )
    text = json_text({"config": to_dict(cfg), **provenance()}, indent=1) + "\n"
    try:
        make(workdir)
        write_file(os.path.join(workdir, name), text)
    except StorageError:
        raise
    except OSError as error:
        raise UsageError(f"--workdir: cannot write to {workdir!r} ({error.strerror})") from None
