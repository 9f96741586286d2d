"""Settings of the images."""

import re
from dataclasses import dataclass

from dit_jax.error import UsageError, at_least, choice

DATASET = re.compile(r"[A-Za-z]\w*(/\w[\w+-]*(\.[\w+-]+)*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out images."""

    dataset: str = "digits"  # a TFDS name; `digits` is built here from scikit-learn
    split: str = "train"  # trained on
    held_out_split: str = "test"  # never trained on
    folder: str = ""  # of pictures, .tar or .parquet files that are read in place of `dataset`; "" = none
    data_dir: str = ""  # "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    image_size: int = 8  # pixels; other sizes are centre-cropped and resized to it (ADM's rule)
    flip: bool = False  # random horizontal flips, determined by (seed, position)
    cache: bool = True  # keep the decoded split in memory (for small datasets)
    workers: int = 2  # reading threads
    prefetch: int = 8  # batches read ahead
    latents: str = ""  # folder written by `encode`, with one folder of latents per split; "" = images
    encode: str = "precomputed"  # precomputed: as stored | in_step: the step encodes images, by `autoencoder.folder`
    skip_bad: int = 0  # malformed records that may be skipped; 0 = the first is an error

    def __post_init__(self):
        # TFDS would import or download a namespace or an argument in the name.
        if len(self.dataset) > 200 or not DATASET.fullmatch(self.dataset):
            expected = "a TFDS name: letters, digits and _, then /config and :1.2.3 where it has them"
            raise UsageError(f"data.dataset: found {self.dataset!r}, expected {expected}")
        choice("data.encode", self.encode, ("precomputed", "in_step"))
        if self.encode == "in_step" and self.latents:
            expected = (
                "expected none with data.encode = 'in_step', which encodes images; or set data.encode=precomputed"
            )
            raise UsageError(f"data.latents: found {self.latents!r}, {expected}")
        at_least(1, self, "image_size")
        at_least(0, self, "workers", "prefetch", "skip_bad")

    @property
    def name(self) -> str:  # in records, the same wherever a folder lies
        return "folder" if self.folder else self.dataset
