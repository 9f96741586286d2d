"""Encode images to latents: `python -m dit_jax.encode --config=configs/imagenet256.py --autoencoder=DIR --out=DIR [--split=train ...]`.

Images of each split, by default `data.split` and `data.held_out_split`, are cropped as in training and encoded. The moments
of their posteriors go to OUT/SPLIT in record order, with those of the mirror images if the config has `data.flip`. Training
reads them with `--config.data.latents=OUT`. Malformed images are left out, at most `data.skip_bad` of a split. The
autoencoder is a folder that `convert --source=sd-vae` wrote. A latent depends on its image only, not on the number of devices.

Stored latents are not normalised: scale and shift are noted beside them, those of the config's `autoencoder` or, if it has
the defaults, the autoencoder's own. `--whiten` chooses both so that each channel of a model's input has mean 0 and variance
1 over the posteriors of `data.split`; they then serve all splits.

A split appears whole or not at all. The same command again finds it done (it compares the origin and number of the latents;
with --whiten, notes with one number per channel), or resumes after the last whole shard. SIGTERM exits 75; like a kill, it
costs the work on one shard.
"""

import dataclasses

from absl import flags

from dit_jax.config import resolve
from dit_jax.job import compiled
from dit_jax.job.launch import launch, stop_flag


def main() -> None:
    from dit_jax.networks.encoding import encode_splits, open_job

    values = flags.FLAGS
    cfg = resolve(values.config)
    if values.autoencoder is not None:
        cfg = dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, folder=values.autoencoder))
    splits = values.split or [cfg.data.split, cfg.data.held_out_split]
    with stop_flag() as stop:
        encode_splits(open_job(cfg, values.dtype, values.whiten), values.out, splits, values.shard_bytes, stop)


if __name__ == "__main__":
    flags.DEFINE_string(
        "autoencoder", None, "folder of a converted autoencoder; default: the config's autoencoder.folder"
    )
    flags.DEFINE_string("out", None, "the folder that gets one folder a split", required=True)
    flags.DEFINE_multi_string(
        "split", [], "a split to encode; may be given again. Default: data.split and data.held_out_split"
    )
    flags.DEFINE_enum("dtype", "float16", ("float16", "bfloat16", "float32"), "of the stored moments")
    flags.DEFINE_boolean("whiten", False, "scale and shift from the latents of data.split, one number per channel")
    flags.DEFINE_integer("shard_bytes", 1 << 30, "size of a file; a kill costs the work on one", lower_bound=1)
    compiled.define_flag()
    launch(main, config="file")
