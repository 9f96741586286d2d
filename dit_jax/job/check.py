"""`--check`: whether a command would be taken, said without starting it, also where neither its devices nor its paths are."""

import dataclasses
import os
import re
from collections.abc import Callable

from absl import flags

from dit_jax import hardware
from dit_jax.config import Config, resolve
from dit_jax.error import StorageError, UsageError
from dit_jax.files import be_quick, bucket_of, exists, introduce, remote
from dit_jax.log import say
from dit_jax.workdir.folder import check_same_init, check_same_run

PATHS = (
    "workdir",
    "out",
    "grid",
    "images",
    "json",
    "autoencoder",
    "weights",
    "init",
    "prompts",
    "low",
    "compilation_cache",
)  # flags that name a path
KEYS = (
    ("data", "data_dir"),
    ("data", "folder"),
    ("data", "latents"),
    ("data", "captions"),
    ("model", "text_encoder"),
    ("autoencoder", "folder"),
    ("eval", "inception"),
    ("eval", "classifier"),
    ("eval", "clip"),
    ("eval", "captions"),
    ("eval", "reference"),
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """The devices that a command is meant for."""

    name: str
    devices: int
    hosts: int
    slices: int = 1

    def one_host(self, job: str) -> None:
        """Raises UsageError if there are several hosts, for a job that runs on one."""
        if self.hosts > 1:
            raise UsageError(f"--slice: found {self.name} of {self.hosts} hosts, expected one host: {job} runs on one")


def define_flags() -> None:
    """Define `--check` and `--slice`."""
    flags.DEFINE_bool("check", False, "check flags, config and mesh, and start nothing; exits 0 or 2")
    flags.DEFINE_string(
        "slice", None, "with --check: the devices, such as v4-64, 2xv4-64, h100x8 or 4x8 (HOSTSxDEVICES)"
    )


def find_slice(name: str) -> Slice:
    """Return the slice of a name. Raises UsageError if there is none."""
    if found := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", name):
        return Slice(name, int(found[1]) * int(found[2]), int(found[1]))
    slice_ = hardware.topology(name)
    return Slice(name, slice_.devices, slice_.hosts, slice_.slices)


def run_check(job: str, config: str, check: Callable | None) -> None:
    """Check a parsed command and say what could not be checked here. `config`, `check`: as in `dit_jax.job.launch.launch`."""
    values = flags.FLAGS
    be_quick()
    away = config == "workdir" and not reachable(values.workdir)
    cfg = resolve(values.config) if config and values.config is not None and not away else None
    file = values["config"].config_filename if cfg and config != "workdir" else ""
    name = values.slice or next((word for word in file.partition(":")[2].split(",") if word in hardware.names()), "")
    slice_, done = find_slice(name) if name else None, ["flags", *(["config"] if cfg else [])]
    if check and not away:
        check(cfg, slice_)
    elif slice_ and not check:
        slice_.one_host(job)
    if slice_:
        hosts = "1 host" if slice_.hosts == 1 else f"{slice_.hosts} hosts"
        done.append(f"slice {slice_.name} ({slice_.devices} devices, {hosts})")
    say(f"checked: {', '.join(done)}")
    if absent := [f"{name}={path}" for name, path in _paths(values, cfg) if not reachable(path)]:
        run = ", and with the run what depends on its model" if away else ""
        say(f"not checked, as they are not on this machine: {', '.join(absent)}{run}")
    if job == "train" and cfg and reachable(os.path.join(values.workdir, "config.json")):
        check_same_run(cfg, values.workdir)
        check_same_init(values.workdir, values.init, values.init_step)


def introduce_buckets() -> None:
    """Raises StorageError now if a bucket that the command names refuses; warns if it is in another region."""
    values = flags.FLAGS
    cfg = resolve(values.config) if "config" in values and values.config is not None else None
    for place in {bucket_of(path) for _, path in _paths(values, cfg) if remote(path)}:
        introduce(place)


def reachable(path: str) -> bool:
    """Whether a path is there for this machine, as far as it can tell. Raises UsageError for a name that is no bucket's."""
    if remote(path):
        bucket_of(path)
    try:
        return exists(path)
    except (StorageError, UsageError):  # no network, no permission, no client
        return False


def _paths(values: flags.FlagValues, cfg: Config | None) -> list[tuple[str, str]]:
    found = [(f"--{name}", values[name].value) for name in PATHS if name in values]
    if cfg:
        groups = {"data": cfg.data.parts, "autoencoder": (cfg.autoencoder,), "model": (cfg.model,), "eval": (cfg.eval,)}
        found += [(f"{group}.{key}", getattr(one, key)) for group, key in KEYS for one in groups[group]]
        found += [("sample.guide", re.sub(r"@\d+$", "", cfg.sample.guide))]
    return [(name, path) for name, path in found if path]
