"""Converts other projects' files to run folders or network folders, and runs to files with the published names."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.numpy import save_file

from dit_jax import checkpoint
from dit_jax.config import Config, ModelConfig, resolve, to_dict
from dit_jax.error import JobError, UsageError
from dit_jax.files import delete, file_sha256, new_folder, read_json, rename, sync, write_file
from dit_jax.job.launch import load_config
from dit_jax.log import say
from dit_jax.networks import diffusers_dit, dit, folder
from dit_jax.networks.tensors import Tensors
from dit_jax.networks.weights import read_arrays
from dit_jax.workdir import manifest
from dit_jax.workdir.folder import flatten, provenance, read_config

CONFIGS = Path(__file__).parent.parent.parent / "configs"
IN_FOLDERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # as diffusers names them


def import_dit(source: str, weights: str, out: str, heads: int = 0, step: int = 0, classes: int = 0) -> None:
    """Convert a DiT in a file or folder to a run folder. `classes`: see `dit.add_null_row`.

    Raises UsageError if the weights or `out` do not fit, JobError if writing fails.
    """
    file, config = find_files(weights)
    if source == "diffusers" and not config:
        raise UsageError(
            f"--weights: {weights!r}: expected a folder of diffusers, with config.json and one of {IN_FOLDERS}"
        )
    origin = describe_source(file, source)
    if os.path.isdir(out) and os.listdir(out):
        _check_done(out, origin, step, heads, classes)
        say(f"{out}: done before, from the same {file}")
        return
    tensors, null = Tensors(read_arrays(file), file), True
    if source == "diffusers":
        model, params = diffusers_dit.read(tensors, read_json(config))
    else:
        null = dit.add_null_row(tensors, classes)
        model, params = dit.read(tensors, heads)
    del tensors
    cfg = run_config(model, null)
    with new_folder(out) as unfinished:
        notes = provenance()
        text = json.dumps({"config": to_dict(cfg), **notes}, indent=1) + "\n"
        write_file(os.path.join(unfinished, "config.json"), text)
        os.makedirs(checkpoint.folder(unfinished))
        checkpoint.write_weights(unfinished, step, model, params, {**notes, "source": origin})
    say(f"{out}: {sum(p.size for p in flatten(params).values()):,} parameters of {_name(model)}, step {step}")
    say(f"{model.classes} classes, " + ("and a null class" if null else "no null class: it is sampled at guidance 1"))


def export_dit(workdir: str, out: str, item: str = "ema", step: int | None = None) -> None:
    """Write a run's weights as safetensors under the published names; never overwrites a file."""
    if not out.endswith(".safetensors"):
        raise UsageError(f"--out: found {out!r}, expected a name that ends in .safetensors")
    if not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise UsageError(f"--out: {out}: its folder does not exist")
    model, params = checkpoint.load(workdir, step, item)
    arrays = dit.write(model, params)
    if not read_config(workdir).train.label_dropout:  # its null row was never trained
        arrays[dit.LABELS] = arrays[dit.LABELS][:-1]
    unfinished = f"{out}.unfinished"
    try:
        save_file(arrays, unfinished)
        before = os.path.exists(out)
        if before and file_sha256(out) != file_sha256(unfinished):
            raise UsageError(f"--out: {out!r} exists and holds something else; use another name")
        if not before:
            sync(unfinished)
            rename(unfinished, out)
    except UsageError:
        raise
    except Exception as error:  # safetensors raises its own
        raise JobError(f"{out}: could not be written: {error}") from error
    finally:
        delete(unfinished)
    say(f"{out}: " + ("done before, from the same weights" if before else f"{len(arrays)} tensors of {_name(model)}"))


def import_network(source: str, weights: str, out: str) -> None:
    """Convert another network to a folder of `dit_jax.networks.folder`."""
    file, _ = find_files(weights)
    origin = describe_source(file, source)
    if os.path.isdir(out) and os.listdir(out):
        meta = folder.read_meta(out)
        _check_same(out, meta["source"], origin)
        folder.load_network(out, source)
        say(f"{out}: done before, from the same {file}")
        return
    config, params = READ[source](Tensors(read_arrays(file), file))
    meta = folder.save_network(out, source, config, params, origin)
    say(f"{out}: {meta['parameters']:,} parameters of {source}")


def _read_vae(tensors: Tensors) -> tuple[dict, dict]:
    from dit_jax.networks import vae

    config, params = vae.read(tensors)
    return dataclasses.asdict(config), params


def _read_inception(tensors: Tensors) -> tuple[dict, dict]:
    from dit_jax.networks import inception

    return {}, inception.read(tensors)


READ: dict[str, Callable[[Tensors], tuple[dict, dict]]] = {"sd-vae": _read_vae, "inception": _read_inception}


def find_files(weights: str) -> tuple[str, str]:
    """Find (file of weights, config.json beside it or "") for a file or a folder."""
    if not os.path.isdir(weights):
        if not os.path.isfile(weights):
            raise UsageError(f"--weights: no file or folder {weights!r}")
        return weights, ""
    found = [os.path.join(weights, name) for name in IN_FOLDERS if os.path.isfile(os.path.join(weights, name))]
    if not found:
        raise UsageError(f"--weights: {weights!r}: found none of {', '.join(IN_FOLDERS)} in the folder")
    config = os.path.join(weights, "config.json")
    return found[0], config if os.path.isfile(config) else ""


def describe_source(file: str, form: str) -> dict:
    """Return the origin of weights, as kept in checkpoints and network folders."""
    return {"file": os.path.basename(file), "sha256": file_sha256(file), "format": form}


def run_config(model: ModelConfig, null: bool = True) -> Config:
    """Return the paper's ImageNet config at the model's resolution (8 pixels a latent), with this model.

    Without a trained `null` class, label dropout is 0.
    """
    pixels = 8 * model.input_size
    values = load_config(str(CONFIGS / ("imagenet512.py" if pixels == 512 else "imagenet256.py")))
    values.data.image_size = pixels
    values.model.update(to_dict(model))
    if not null:
        values.train.label_dropout = 0.0
    return resolve(values)


def _check_done(out: str, origin: dict, step: int, heads: int, classes: int) -> None:
    """Raises UsageError unless the folder matches this command, JobError if it is damaged."""
    if not os.path.isfile(os.path.join(out, "config.json")):
        raise UsageError(
            f"--out: {out!r} is not empty and holds no run; expected a new folder, or one made by this command"
        )
    model, found = read_config(out).model, checkpoint.steps(out)
    if found != [step]:
        raise UsageError(
            f"--out: {out!r} holds a run with checkpoints of steps {found}, not [{step}]; use another --out"
        )
    wrong = manifest.problems(checkpoint.path_of(out, step))
    if wrong:
        raise JobError(f"{checkpoint.path_of(out, step)}: damaged ({wrong[0]}); remove the folder and convert again")
    source = checkpoint.read_meta(out, step).get("source")
    if source is None:
        raise UsageError(f"--out: {out!r} holds a run that was trained; use another --out")
    _check_same(out, source, origin)
    if classes not in (0, model.classes):
        raise UsageError(f"--out: {out!r} was made with {model.classes} classes, not {classes}; use another --out")
    if heads not in (0, model.heads):
        raise UsageError(f"--out: {out!r} was made with {model.heads} heads, not {heads}; use another --out")


def _check_same(out: str, found: Mapping, origin: dict) -> None:
    keys = [key for key in ("sha256", "format") if found.get(key) != origin[key]]
    if keys:
        shown = "; ".join(f"{key}: the folder has {found.get(key)!r}, the command {origin[key]!r}" for key in keys)
        raise UsageError(f"--out: {out!r} holds other weights, of {found.get('file')!r} ({shown}); use another --out")


def _name(model: ModelConfig) -> str:
    return f"a DiT of {model.depth} blocks of width {model.width}, {model.heads} heads, patch {model.patch}"
