"""Converts other projects' files to run folders or network folders, and runs to files with the published names."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping

from safetensors.numpy import save_file

from dit_jax import checkpoint
from dit_jax.config import ModelConfig, to_dict
from dit_jax.error import JobError, StorageError, UsageError
from dit_jax.files import absolute, delete, file_sha256, is_file, read_json, remote, sync, whole, write_file
from dit_jax.files.out import UNFINISHED, holds, new_folder
from dit_jax.log import say, warn
from dit_jax.networks import diffusers_dit, dit, folder, locate, notes, text, tokenizer
from dit_jax.networks.tensors import Tensors
from dit_jax.workdir import manifest
from dit_jax.workdir.folder import flatten, provenance, read_config

MARKERS = {"dit": "x_embedder.proj.weight", "diffusers": "pos_embed.proj.weight", "sd-vae": "decoder.conv_in.weight"}


def import_dit(
    source: str, weights: str, out: str, heads: int = 0, step: int | None = None, classes: int = 0, item: str = ""
) -> None:
    """Convert a DiT in a file or folder to a run folder. `classes`: see `dit.add_null_row`; `item`: see `locate.read`.

    The config is the one that the file's notes state, else the paper's. Raises UsageError if the weights or `out` do not
    fit, JobError if writing fails.
    """
    located = locate.find(weights, "transformer")
    if source == "diffusers" and not located.config:
        raise UsageError(f"--weights: {weights!r}: expected a folder of diffusers, with config.json and its weights")
    with locate.fetched_files(located) as found:
        origin = found.describe(source, item)
        if holds(out):
            _check_done(out, origin, step, heads, classes)
            say(f"{out}: done before, from the same {found.name}")
            return
        tensors, file_notes, line = locate.read(found, MARKERS[source], item)
    stated, (null, said) = notes.read(file_notes, found.name), (True, "config.json")
    if source == "diffusers":
        model, params = diffusers_dit.read(tensors, read_json(found.config))
        null = not stated or stated.null
    else:
        count, said = (stated.config.model.classes, "its notes") if stated else dit.known_classes(tensors, file_notes)
        null = dit.add_null_row(tensors, classes or count, said := "--classes" if classes else said)
        model, params = dit.read(tensors, heads or (stated.config.model.heads if stated else 0))
    del tensors
    cfg, step = notes.apply(stated, model, null, found.name), (stated.step if stated and step is None else step or 0)
    with new_folder(out) as unfinished:
        versions = provenance()
        text = json.dumps({"config": to_dict(cfg), **versions}, indent=1) + "\n"
        write_file(os.path.join(unfinished, "config.json"), text)
        checkpoint.write_weights(unfinished, step, cfg.model, params, {**versions, "source": origin})
    say(line)
    say(f"{out}: {sum(p.size for p in flatten(params).values()):,} parameters of {_name(model)}, step {step}")
    rows = "and a null class" if null else "no null class: it is sampled at guidance 1"
    say(f"{model.classes} classes, {rows} (by {said})")
    by = "by its notes" if stated else "as published, for the file does not say"
    say(f"{cfg.diffusion.process} of {notes.space(cfg)} of images of {cfg.data.image_size} pixels ({by})")


def export_dit(workdir: str, out: str, item: str = "ema", step: int | None = None) -> None:
    """Write a run's weights under the published names to a .safetensors file, else as a folder of diffusers.

    Both hold the run's notes (`dit_jax.networks.notes`). Warns of what the names cannot say. Never overwrites.
    """
    single, ending = out.endswith(".safetensors"), os.path.splitext(out)[1]
    if ending and not single:
        raise UsageError(f"--out: found {out!r}, expected a file that ends in .safetensors, or a folder for diffusers")
    if not remote(out) and not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise UsageError(f"--out: {out}: its folder does not exist")
    cfg, step = read_config(workdir), checkpoint.find_step(workdir, step, item)
    model, params = checkpoint.load(workdir, step, item)
    if single:
        arrays, files = dit.write(model, params), {}
        if not cfg.train.cond_dropout:  # its null row was never trained
            arrays[dit.LABELS] = arrays[dit.LABELS][:-1]
    else:
        arrays, config = diffusers_dit.write(model, params)
        files = {"config.json": json.dumps(config, indent=2) + "\n"}
    before = _export(out, arrays, files, notes.write(cfg, step))
    say(f"{out}: " + ("done before, from the same weights" if before else f"{len(arrays)} tensors of {_name(model)}"))
    for reason in notes.unsaid(cfg, single):
        warn(f"{out}: other programs will not see that {reason}; dit_jax reads it from the file's notes")


class _DoneBefore(Exception):
    """What would be written is there."""


def _export(out: str, arrays: dict, files: dict, metadata: dict) -> bool:
    """Write a file, or a folder with `files`, whole; returns whether the same was there before. Raises UsageError if another."""
    name, rest = f"{locate.STEM}.safetensors" if files else "", f"{absolute(out)}{UNFINISHED}"
    try:
        if not remote(out):
            delete(rest)
        with new_folder(out) if files else whole(out, rest) as unfinished:
            save_file(arrays, target := os.path.join(unfinished, name) if files else unfinished, metadata)
            for other, text in files.items():
                write_file(os.path.join(unfinished, other), text)
            if holds(out):
                old = os.path.join(out, name) if files else out
                if not is_file(old) or file_sha256(old) != file_sha256(target):
                    raise UsageError(f"--out: {out!r} exists and holds something else; use another name")
                raise _DoneBefore
            sync(target)
    except _DoneBefore:
        return True
    except (UsageError, StorageError):
        raise
    except Exception as error:  # safetensors raises its own
        raise JobError(f"{out}: could not be written: {error}") from error
    return False


def import_network(source: str, weights: str, out: str, item: str = "") -> None:
    """Convert another network to a folder of `dit_jax.networks.folder`."""
    with locate.fetched_files(locate.find(weights, "vae")) as found:
        origin = found.describe(source, item)
        if holds(out):
            meta = folder.read_meta(out)
            _check_same(out, meta["source"], origin)
            folder.load_network(out, source)
            say(f"{out}: done before, from the same {found.name}")
            return
        tensors, _, line = locate.read(found, MARKERS.get(source, ""), item)
    config, params = READ[source](tensors, read_json(found.config) if found.config else {})
    meta = folder.save_network(out, source, config, params, origin)
    say(line)
    say(f"{out}: {meta['parameters']:,} parameters of {source}" + (f", {_sizes(config)}" if config else ""))


def import_encoder(kind: str, weights: str, out: str) -> None:
    """Convert an encoder of text, or CLIP's of images too, from a folder of transformers to a folder with its tokenizer.

    Raises UsageError if the weights, the tokenizer or `out` do not fit.
    """
    located = locate.find(weights, "text_encoder", locate.TRANSFORMERS)
    if not located.config:
        raise UsageError(f"--weights: {weights!r}: expected a folder of transformers, with config.json and its weights")
    cfgs = text.configs(kind, read_json(located.config), located.config)
    files = tokenizer.find_files(kind, os.path.dirname(located.config)) if "text" in cfgs else {}
    tokens = tokenizer.make_tokenizer(kind, files, cfgs["text"].vocabulary, weights) if files else None
    if kind == "clip" and tokens:
        text.check_end(cfgs["text"], tokens.end, tokens.size, located.config)
    with locate.fetched_files(located) as found:
        origin = found.describe(kind) | {"tokenizer": tokens.sha256 if tokens else {}}
        if holds(out):
            _check_same(out, folder.read_meta(out)["source"], origin)
            folder.load_network(out, kind)
            say(f"{out}: done before, from the same {found.name}")
            return
        tensors, _, line = locate.read(found, "", unused=lambda name: bool(text.UNUSED[kind].fullmatch(name)))
    cfgs, params = text.read(kind, tensors, cfgs)
    config = {half: dataclasses.asdict(cfg) for half, cfg in cfgs.items()}
    meta = folder.save_network(out, kind, config, params, origin, files)
    say(line)
    sizes = "; ".join(f"{half}: {cfg.depth} blocks of width {cfg.width}" for half, cfg in cfgs.items())
    say(f"{out}: {meta['parameters']:,} parameters of {kind}, {sizes}")
    if tokens:
        say(f"tokenizer: {tokens.size:,} entries, {', '.join(files)}")


def _read_vae(tensors: Tensors, config: Mapping) -> tuple[dict, dict]:
    from dit_jax.networks import vae

    found, params = vae.read(tensors, config=config)
    return dataclasses.asdict(found), params


def _read_inception(tensors: Tensors, config: Mapping) -> tuple[dict, dict]:
    from dit_jax.networks import inception

    return {}, inception.read(tensors)


READ: dict[str, Callable[[Tensors, Mapping], tuple[dict, dict]]] = {"sd-vae": _read_vae, "inception": _read_inception}


def _check_done(out: str, origin: dict, step: int | None, heads: int, classes: int) -> None:
    """Raises UsageError unless the folder matches this command, JobError if it is damaged."""
    if not is_file(os.path.join(out, "config.json")):
        raise UsageError(
            f"--out: {out!r} is not empty and holds no run; expected a new folder, or one made by this command"
        )
    model, found = read_config(out).model, checkpoint.steps(out)
    if len(found) != 1 or step not in (None, *found):
        raise UsageError(
            f"--out: {out!r} holds a run with checkpoints of steps {found}, not [{step or 0}]; use another --out"
        )
    step = found[0]
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
    keys = [key for key in ("sha256", "format", "item", "tokenizer") if found.get(key) != origin.get(key)]
    if keys:
        shown = "; ".join(f"{key}: the folder has {found.get(key)!r}, the command {origin.get(key)!r}" for key in keys)
        raise UsageError(f"--out: {out!r} holds other weights, of {found.get('file')!r} ({shown}); use another --out")


def _name(model: ModelConfig) -> str:
    return f"a DiT of {model.depth} blocks of width {model.width}, {model.heads} heads, patch {model.patch}"


def _sizes(config: dict) -> str:
    return f"{config['latent_channels']} channels a latent, scale {config['scale']:g}, shift {config['shift']:g}"
