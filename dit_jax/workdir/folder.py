"""A run folder: its config.json, the keys that may change on resuming, and the versions that wrote it."""

import hashlib
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping

from dit_jax.config import Config, resolve, to_dict
from dit_jax.error import StorageError, UsageError, shown
from dit_jax.files import absolute, below, file_sha256, is_file, is_folder, json_text, names, read_json, write_file
from dit_jax.files import make_folder as make

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INIT = "init.json"  # of a run that began from other weights
INIT_KEYS = {
    "source": (str,),
    "run": (str,),
    "step": (int,),
    "flops_train": (int, float, type(None)),
    "weights_sha256": (str,),
    "rows": (list,),
}


def read_config(workdir: str, name: str = "config.json", flag: str = "--workdir") -> Config:
    """Read the config of a run folder, which `flag` names. Raises UsageError if the folder is missing or holds no run."""
    path = os.path.join(workdir, name)
    if not is_folder(workdir):
        raise UsageError(f"{flag}: no folder {workdir!r}, expected a run made by dit_jax.train")
    if not is_file(path):
        raise UsageError(f"{flag}: {workdir!r} holds no {name}, expected a run made by dit_jax.train")
    values = read_json(path)
    if "config" not in values:
        raise UsageError(f"{path}: found no key 'config', expected a file written by dit_jax.train")
    return resolve(values["config"])


def provenance() -> dict:
    """Return the versions of the libraries and the commit of this code."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    command = ["git", "-C", PACKAGE, "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"versions": {name: _version(name) for name in names}, "commit": commit}


def code_sha256() -> str:
    """Hash the package's Python files, which tells apart checkouts without git, and changes that are not committed."""
    files = {name: file_sha256(os.path.join(PACKAGE, name)) for name in below(PACKAGE) if name.endswith(".py")}
    return hashlib.sha256(json_text(files).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# Keys that a resumed run may change: none of them changes what training computes.
FREE = (
    "mesh.", "eval.", "sample.", "sweep.", "data.data_dir", "data.folder", "data.latents", "data.captions",
    "data.cache", "data.workers", "data.prefetch",
    "data.skip_bad", "autoencoder.folder",
    "train.log_every", "train.checkpoint_every", "train.keep", "train.keep_at", "train.keep_every",
    "optim.snapshot_every",
    "train.skips_in_a_row", "train.replay_every", "train.profile", "train.evaluate_every", "train.grid_every", "train.wandb",
    "model.remat", "model.unroll", "model.attention", "model.text_encoder",
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
    unset = {"model.text_width": 0, "model.text_sha256": ""}  # in a command: a run that begins sets them
    new = {key: value for key, value in new.items() if key not in unset or value != unset[key]}
    changed = [key for key in new if new[key] != old[key] and not key.startswith(tuple(free))]
    if changed:
        shown = "; ".join(f"{key}: the folder has {old[key]!r}, the command {new[key]!r}" for key in changed[:4])
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        moved = any(key.startswith("data.") for key in changed)
        start = f", with --init={workdir} to start from its weights" * moved
        raise UsageError(f"{workdir} holds a run of another config: {shown}{more}; use another --workdir{start}")


def read_init(workdir: str) -> dict:
    """Read what a run began from: `source`, `run`, `step`, `flops_train`, `weights_sha256`, `rows`, ...; {} if it began from none.

    Raises UsageError if the file is damaged.
    """
    path = os.path.join(workdir, INIT)
    found = read_json(path) if is_file(path) else {}
    for key, kinds in INIT_KEYS.items() if found else ():
        if type(found.get(key)) not in kinds:
            what, expected = shown(found.get(key)), " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"{path}: {key}: found {what}, expected {expected}; restore the file from a copy")
    return found


def check_same_init(workdir: str, source: str, step: int | None) -> dict:
    """Return `read_init`. Raises UsageError if the folder holds a run that began otherwise than `--init` and `--init_step` say."""
    found = read_init(workdir)
    if not found and not is_file(os.path.join(workdir, "config.json")):
        return {}
    if found and not source:
        problem = f"no --init, expected --init={found['source']}, as the run began from it"
    elif source and not found:
        problem = f"--init={source}, expected none: the run in this folder began without"
    elif source and source != found["source"] and absolute(source) != absolute(found["source"]):
        problem = f"--init={source}, expected {found['source']}, as the run began from it"
    elif step not in (None, found.get("step")):
        problem = f"--init_step={step}, expected {found['step']}, as the run began from it"
    else:
        return found
    raise UsageError(f"{workdir}: found {problem}; or use another --workdir")


def make_folder(workdir: str, name: str, cfg: Config, init: Mapping | None = None) -> None:
    """Write the config as `workdir`/`name`, after `init` as INIT; the folder must be new, empty or hold one of them. Raises UsageError."""
    if is_file(workdir):
        raise UsageError(f"--workdir: {workdir!r} is a file, expected a folder")
    held = [file for file in names(workdir) if ".tmp" not in file and file != INIT]
    if held and name not in held:
        raise UsageError(
            f"--workdir: {workdir!r} is not empty and holds no {name}; expected a new folder or one made before"
        )
    text = json_text({"config": to_dict(cfg), **provenance()}, indent=1) + "\n"
    try:
        make(workdir)
        if init:
            write_file(os.path.join(workdir, INIT), json_text(init, indent=1) + "\n")
        write_file(os.path.join(workdir, name), text)
    except StorageError:
        raise
    except OSError as error:
        raise UsageError(f"--workdir: cannot write to {workdir!r} ({error.strerror})") from None
