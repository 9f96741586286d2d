"""Encode images to latents: `python -m dit_jax.encode --config=configs/imagenet256.py --autoencoder=DIR --out=DIR [--split=train ...]`.

Without an autoencoder the images are copied into shards as they are: the bytes of their files (or PNG if the data are pixels), labels,
names of classes and captions. Training reads them with `--config.data.folder=OUT`, and sees what it would see of the data itself.

With one, the images of each split, by default `data.split` and `data.held_out_split`, are cropped as in training and encoded. The moments
of their posteriors go to OUT/SPLIT in record order, with those of the mirror images if the config has `data.flip`. Training
reads them with `--config.data.latents=OUT`. Malformed images are left out, at most `data.skip_bad` of a split. The
autoencoder is a folder that `convert --source=sd-vae` wrote. A latent depends on its image only, not on the number of devices.

Stored latents are not normalised: scale and shift are noted beside them, those of the config's `autoencoder` or, if it has
the defaults, the autoencoder's own. `--whiten` chooses both so that each channel of a model's input has mean 0 and variance
1 over the posteriors of `data.split`; they then serve all splits.

`--captions` encodes the captions of the splits in place of their images, by `model.text_encoder` of the config: each caption once, found by
its checksum, without padding. Training reads them with `--config.data.captions=OUT`.

A split appears whole or not at all. The same command again finds it done (it compares the origin and number of the latents;
with --whiten, notes with one number per channel), or makes the shards that are not whole yet, of the size it began with. SIGTERM
exits 75; like a kill, it costs each host the work on one shard. Several hosts share the shards, and write the same files.
"""

import dataclasses

from absl import flags

from dit_jax.config import Config, resolve
from dit_jax.error import UsageError
from dit_jax.job import compiled, hosts
from dit_jax.job.check import Slice, reachable
from dit_jax.job.launch import launch, stop_flag


def _config(values) -> Config:
    """Return the config, with the flag's autoencoder."""
    cfg = resolve(values.config)
    if values.captions and (values.whiten or values.autoencoder):
        given = "--whiten" if values.whiten else "--autoencoder"
        raise UsageError(f"{given}: found it with --captions, expected one of them: captions have no latents")
    if cfg.data.buckets and not values.captions:
        raise UsageError(f"data.buckets: found {cfg.data.buckets}, expected (): latents are of squares of one size")
    if values.autoencoder is None:
        return cfg
    return dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, folder=values.autoencoder))


def check(_: Config, __: Slice | None) -> None:
    """Raises UsageError if an autoencoder that is here does not fit image size and model."""
    from dit_jax.networks.caption_states import open_captions
    from dit_jax.networks.encoding import open_job

    cfg, values = _config(flags.FLAGS), flags.FLAGS
    if values.captions:
        if not cfg.model.text_encoder or reachable(cfg.model.text_encoder):
            open_captions(cfg)
        return
    if not cfg.autoencoder.folder or reachable(cfg.autoencoder.folder):
        open_job(cfg, values.dtype, values.whiten)


def main() -> None:
    from dit_jax.devices.processes import agreed, together
    from dit_jax.networks.caption_states import encode_captions
    from dit_jax.networks.encoding import encode_splits, open_job

    values = flags.FLAGS
    cfg = _config(values)
    splits = values.split or [cfg.data.split, cfg.data.held_out_split]
    hosts.join(resolve(values.config))
    with stop_flag() as stop, together():
        if values.captions:
            encode_captions(cfg, values.out, splits, values.shard_bytes, stop)
            return
        with agreed():
            job = open_job(cfg, values.dtype, values.whiten)
        encode_splits(job, values.out, splits, values.shard_bytes, stop)


if __name__ == "__main__":
    flags.DEFINE_string(
        "autoencoder",
        None,
        "folder of a converted autoencoder; default: autoencoder.folder of the config; none: images are copied",
    )
    flags.DEFINE_string("out", None, "the folder that gets one folder a split", required=True)
    flags.DEFINE_multi_string(
        "split", [], "a split to encode; may be given again. Default: data.split and data.held_out_split"
    )
    flags.DEFINE_enum("dtype", "float16", ("float16", "bfloat16", "float32"), "of the stored moments of latents")
    flags.DEFINE_boolean("captions", False, "encode captions in place of images, by model.text_encoder")
    flags.DEFINE_boolean("whiten", False, "scale and shift from the latents of data.split, one number per channel")
    flags.DEFINE_integer("shard_bytes", 1 << 30, "size of a file; a kill costs the work on one", lower_bound=1)
    compiled.define_flag()
    hosts.define_flags()
    launch(main, config="file", check=check)
