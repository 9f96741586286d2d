"""Settings of the images."""

import re
from dataclasses import dataclass

from dit_jax.error import UsageError, at_least, choice, shown

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
    buckets: tuple = ()  # (h, w) in pixels of batches of pictures, each in that of nearest aspect ratio; () = squares of image_size
    crop: str = "center"  # center | random: where pictures are cropped, determined by (seed, position); for scores always center
    flip: bool = False  # random horizontal flips, determined by (seed, position)
    cache: bool = True  # keep the decoded split in memory (for small datasets)
    workers: int = 2  # reading threads
    prefetch: int = 8  # batches read ahead
    latents: str = ""  # folder written by `encode`, with one folder of latents per split; "" = images
    skip_bad: int = 0  # malformed records that may be skipped; 0 = the first is an error

    def __post_init__(self):
        # TFDS would import or download a namespace or an argument in the name.
        if len(self.dataset) > 200 or not DATASET.fullmatch(self.dataset):
            expected = "a TFDS name: letters, digits and _, then /config and :1.2.3 where it has them"
            raise UsageError(f"data.dataset: found {self.dataset!r}, expected {expected}")
        at_least(1, self, "image_size")
        choice("data.crop", self.crop, ("center", "random"))
        self._check_buckets()
        at_least(0, self, "workers", "prefetch", "skip_bad")

    def _check_buckets(self) -> None:
        for shape in self.buckets:
            if not (
                isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**15 for n in shape)
            ):
                raise UsageError(
                    f"data.buckets: found {shown(shape)}, expected pairs (h, w) of pixels, such as (64, 96)"
                )
        if len({*self.buckets}) < len(self.buckets):
            raise UsageError(f"data.buckets: found {shown(self.buckets)}, expected each pair once")
        for name, usual in (("buckets", ()), ("crop", "center")):
            if self.latents and (found := getattr(self, name)) != usual:
                why = "latents were cropped when they were encoded, to squares"
                raise UsageError(f"data.{name}: found {shown(found)}, expected {usual!r} beside data.latents: {why}")

    @property
    def name(self) -> str:  # in records, the same wherever a folder lies
        return "folder" if self.folder else self.dataset
