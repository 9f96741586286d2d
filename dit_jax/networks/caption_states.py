"""Encodes the captions of splits once, into a cache (`data.text_cache`) that trainings read."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dit_jax.config import Config, ModelConfig
from dit_jax.data import text_cache
from dit_jax.data.skip import read_kept
from dit_jax.data.source import Source, bad_records, open_source
from dit_jax.devices.processes import agree, agreed, by_leader, check_folder, compare, everyone_is_here, leader, of_all
from dit_jax.error import Interrupted, UsageError
from dit_jax.log import drawing_progress, say, warn
from dit_jax.networks.caption import ROWS, Text, open_text
from dit_jax.networks.sharing import AT_ONCE


def about(model: ModelConfig) -> text_cache.About:
    """What the states of a model's captions are, in the notes of a cache."""
    return text_cache.About(model.text, *model.text_sha256.split(), model.text_length, model.text_width, model.dtype)


def cached(text: Text, folder: str) -> Callable:
    """A function: captions -> what batches hold of them, `cond["text"]`, from a cache. Raises UsageError if the cache does not fit."""
    cache = text_cache.open_cache(folder, about(text.cfg))
    empty = cache.states("")[None]

    def tokens(captions: list[str]) -> dict:
        found = cache.tokens(captions)
        return found | ({"empty": np.repeat(empty, len(captions), axis=0)} if text.cfg.null == "empty" else {})

    return tokens


def tokens_of(cfg: Config) -> Callable | None:
    """A function: captions -> what the batches of a training hold of them; None for a model without captions."""
    text = open_text(cfg.model)
    return cached(text, cfg.data.captions) if cfg.data.captions else text and text.tokens


def open_captions(cfg: Config) -> Text:
    """Open the encoder whose states are to be stored. Raises UsageError if the model has none, or it does not fit."""
    if not cfg.model.encoded:
        expected = "expected clip, t5 or bert, whose states are encoded"
        raise UsageError(f"model.text: found {cfg.model.text!r}, {expected}")
    return open_text(cfg.model)


def encode_captions(cfg: Config, out: str, splits: list[str], shard_bytes: int, stop: list) -> None:
    """Make a cache of all captions of splits, and of the empty one, in `out`, unless it is done. All processes of the job call it.

    Each makes some of the shards; those that are whole stay if it is stopped. Raises UsageError before anything is written, if the data
    or the encoder do not fit, or `out` holds other states; Interrupted when `stop` fills.
    """
    with agreed():
        text = open_captions(cfg)
        sources = {split: open_source(cfg.data, split) for split in dict.fromkeys(splits)}
        captions = all_captions(sources)
    is_of = about(text.cfg)
    bytes_each = is_of.length * is_of.width * np.dtype(is_of.dtype).itemsize
    per = max(1, int(shard_bytes // bytes_each))
    plan = text_cache.plan(captions, per)
    compare(
        of_all({"captions": len(captions), **plan, **dataclasses.asdict(is_of)}),
        "give every host the same data and encoder",
    )
    check_folder(out, "--out")
    if by_leader(lambda: _done(out, is_of, captions, plan)):
        say(f"{out}: done before, {len(captions):,} captions")
    else:
        shards = [captions[i : i + per] for i in range(0, len(captions), per)]
        _write(text, is_of, out, shards, stop)
        by_leader(lambda: text_cache.finish(out, is_of, len(shards), {"captions": len(captions)}))
    cut = int(text.cut(captions).sum())
    say(f"{out}: {len(captions):,} captions, {cut:,} of them cut after {is_of.length} tokens")
    if leader():
        print(out)


def all_captions(sources: dict[str, Source]) -> list[str]:
    """The empty caption and all captions of the splits, each once. Raises UsageError naming a split without, or without end."""
    found = {"": None}
    for split, source in sources.items():
        if source.captions is None:
            raise UsageError(f"{source.key}: found no captions in {source.where}, expected some to encode")
        if "records" not in source.identity:
            raise UsageError(
                f"{source.key}: found images without end in {split!r}, whose captions cannot be encoded beforehand"
            )
        for start in range(0, len(source), AT_ONCE):
            numbers = np.arange(start, min(start + AT_ONCE, len(source)))
            for some in read_kept(source.captions, numbers, source.skips)[1] or ():
                found |= dict.fromkeys(some)
        for index, problem in bad_records(source).items():
            warn(f"record {index} is left out: {problem}")
    return [*found]


def _done(out: str, is_of: text_cache.About, captions: list[str], plan: dict) -> bool:
    if text_cache.begin(out, is_of, plan) is None:
        return False
    cache = text_cache.open_cache(out, is_of)
    if missing := [caption for caption in captions if caption not in cache]:
        what = f"holds no states of {len(missing):,} captions, the first: {missing[0]!r}"
        raise UsageError(f"--out: {out!r} is complete and {what}; use another --out")
    return True


def _write(text: Text, is_of: text_cache.About, out: str, shards: list, stop: list) -> None:
    """Write this process's shards, those of every P-th number."""
    own = range(jax.process_index(), len(shards), jax.process_count())
    report, done = drawing_progress(0, total := sum(map(len, shards))), 0
    for i in range(-(-len(shards) // jax.process_count())):
        if agree(bool(stop)):
            raise Interrupted(f"{out}: not complete; the same command goes on from the shards that are")
        number = own[i] if i < len(own) else None
        with agreed():
            if number is not None and not text_cache.has_shard(out, number):
                text_cache.write_shard(out, number, is_of, shards[number], [*_states(text, shards[number])])
        done += sum(map(len, shards[i * jax.process_count() : (i + 1) * jax.process_count()]))
        report(min(done, total))
    everyone_is_here("captions")


def _states(text: Text, captions: Sequence[str]) -> Iterator[np.ndarray]:
    """The states (rows, w) of each caption."""
    some = ROWS * jax.local_device_count()
    for start in range(0, len(captions), some):
        found = text.encode(text.tokens([*captions[start : start + some]]))
        yield from (states[mask] for states, mask in zip(found["states"], found["mask"], strict=True))
