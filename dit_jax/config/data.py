"""Settings of the images."""

import dataclasses
import re
from dataclasses import dataclass

from dit_jax.error import UsageError, at_least, choice, in_range, shown

DATASET = re.compile(r"[A-Za-z]\w*(/\w[\w+-]*(\.[\w+-]+)*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)
PART = ("dataset", "split", "held_out_split", "folder", "data_dir", "latents")  # keys that a part of a mixture may set
MOST = 1000  # of a weight


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out images."""

    dataset: str = "digits"  # a TFDS name; `digits` is built here from scikit-learn
    split: str = "train"  # trained on
    held_out_split: str = "test"  # never trained on
    folder: str = ""  # of pictures, .tar or .parquet files that are read in place of `dataset`; "" = none
    mixture: tuple = ()  # of several data: rows (WEIGHT, 'KEY=VALUE', ...), such as ((3, 'folder=photos'), (1, 'dataset=digits'))
    data_dir: str = ""  # "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    image_size: int = 8  # pixels; other sizes are centre-cropped and resized to it (ADM's rule)
    buckets: tuple = ()  # (h, w) in pixels of batches of pictures, each in that of nearest aspect ratio; () = squares of image_size
    crop: str = "center"  # center | random: where pictures are cropped, determined by (seed, position); for scores always center
    flip: bool = False  # random horizontal flips, determined by (seed, position)
    template: str = ""  # captions of labelled data without any, such as 'a photo of a {}' with the class; "" = none
    degrade: str = "area"  # how low-resolution images (model.superres) are made: area (means of squares) | bicubic
    degrade_noise: float = 0.0  # of them: standard deviation of Gaussian noise, in levels of 0 to 255
    degrade_jpeg: int = 0  # of them: quality of JPEG that they pass through, 1 to 100; 0 = none
    cache: bool = True  # keep the decoded split in memory (for small datasets)
    workers: int = 2  # reading threads
    prefetch: int = 8  # batches read ahead
    latents: str = ""  # folder written by `encode`, with one folder of latents per split; "" = images
    captions: str = ""  # folder written by `encode --captions`, with states of captions; "" = the step encodes captions
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
        choice("data.crop", self.crop, ("center", "random"))
        self._check_buckets()
        if self.template and self.template.count("{}") != 1:
            expected = "text with {} once, where the name of the class goes, such as 'a photo of a {}'"
            raise UsageError(f"data.template: found {self.template!r}, expected {expected}")
        at_least(0, self, "workers", "prefetch", "skip_bad")
        choice("data.degrade", self.degrade, ("area", "bicubic"))
        in_range("data.degrade_noise", self.degrade_noise, 0.0, 255.0)
        in_range("data.degrade_jpeg", self.degrade_jpeg, 0, 100)
        _ = self.parts  # raises for a part that is wrong

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
        if self.buckets and self.encode == "in_step":
            why = "the encoder in the step takes squares of data.image_size"
            raise UsageError(
                f"data.buckets: found {shown(self.buckets)}, expected () with data.encode = 'in_step': {why}"
            )
        for name, usual in (("buckets", ()), ("crop", "center")):
            if self.latents and (found := getattr(self, name)) != usual:
                why = "latents were cropped when they were encoded, to squares"
                raise UsageError(f"data.{name}: found {shown(found)}, expected {usual!r} beside data.latents: {why}")

    @property
    def name(self) -> str:  # in records, the same wherever a folder lies
        return "mixture" if self.mixture else "folder" if self.folder else self.dataset

    @property
    def title(self) -> str:
        """What the data are called before people."""
        found = (f"{row[0]} {part.title}" for row, part in zip(self.mixture, self.parts, strict=True))
        return " + ".join(found) if self.mixture else self.folder or self.dataset

    @property
    def parts(self) -> tuple["DataConfig", ...]:
        """The data of each part of a mixture; otherwise these data alone."""
        return tuple(_part(self, *one) for one in enumerate(self.mixture, 1)) or (self,)

    @property
    def images(self) -> "DataConfig":
        """The same data as images, where they are read as latents."""
        rows = ((row[0], *(text for text in row[1:] if not text.startswith("latents="))) for row in self.mixture)
        return dataclasses.replace(self, latents="", mixture=tuple(rows))

    @property
    def recipe(self) -> tuple:
        """(weight, name, split, held-out split) of each part of a mixture, the same wherever it lies."""
        parts = zip(self.mixture, self.parts, strict=False)
        return tuple((row[0], part.name, part.split, part.held_out_split) for row, part in parts)


def _part(data: DataConfig, number: int, row: object) -> DataConfig:
    """Return the data of one row of a mixture. Raises UsageError."""
    where, example = f"data.mixture: part {number}", "such as (3, 'folder=photos')"
    weight, *texts = row if isinstance(row, tuple) and row else (None,)
    if isinstance(weight, float) or (type(weight) is int and not 1 <= weight <= MOST):
        expected = f"a whole number from 1 to {MOST}: 7 and 3 for 0.7 and 0.3"
        raise UsageError(f"{where}: found the weight {shown(weight)}, expected {expected}")
    if type(weight) is not int or not all(isinstance(text, str) and "=" in text for text in texts):
        raise UsageError(f"{where}: found {shown(row)}, expected (WEIGHT, 'KEY=VALUE', ...), {example}")
    pairs = [text.split("=", 1) for text in texts]
    for i, (key, _) in enumerate(pairs):
        choice(f"{where}: key", key, PART)
        if key in (other for other, _ in pairs[:i]):
            raise UsageError(f"{where}: found {key} twice, expected it once")
    changes = dict(pairs)
    try:
        return dataclasses.replace(data, mixture=(), **({"folder": ""} if "dataset" in changes else {}) | changes)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
