"""Train a feature network on your own images: `python -m dit_jax.features --config=configs/digits.py --out=DIR [--steps=4000]`.

A small classifier learns the classes of `data.split`; `evaluate` measures samples in its last hidden layer, with
`--config.eval.features=classifier --config.eval.classifier=DIR`, where Inception's weights are not at hand or do not fit the
images. DIR/meta.json states its accuracy on `data.held_out_split` and its checksum, and so does the protocol of a record.
"""

import dataclasses

from absl import flags

from dit_jax.config import Config, resolve
from dit_jax.error import UsageError
from dit_jax.files.out import holds
from dit_jax.job.check import Slice
from dit_jax.job.launch import launch


def check(cfg: Config, slice_: Slice | None) -> None:
    """Raises UsageError if the folder holds something, or the slice has several hosts."""
    out = flags.FLAGS.out
    if holds(out):
        raise UsageError(f"--out: found {out!r}, which holds something, expected a new folder")
    if slice_:
        slice_.one_host("features")


def main() -> None:
    from dit_jax.training.classifier import run

    values = flags.FLAGS
    check(cfg := resolve(values.config), None)
    data = dataclasses.replace(cfg.data.images, skip_bad=0)  # of images, also where a model is of latents
    meta = run(data, values.out, values.steps, values.seed)
    about = meta["source"]
    print(
        f"accuracy {about['accuracy']:.4f} on {about['held_out']['records']} held-out images, sha256 {meta['sha256']}"
    )
    print(values.out)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "the folder to make", required=True)
    flags.DEFINE_integer("steps", 4000, "training steps of 128 images", lower_bound=1, upper_bound=2**30)
    flags.DEFINE_integer("seed", 0, "of initial weights, order and augmentation", lower_bound=0, upper_bound=2**31 - 1)
    launch(main, config="file", check=check)
