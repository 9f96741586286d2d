"""The same pictures in every form of a photo folder, for tests."""

import functools
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data import pipeline
from dit_jax.error import UsageError
from dit_jax.models import vae

CLASSES = ("cat", "dog")
NETWORK = vae.VAEConfig(channels=3, widths=(8, 8), groups=4, blocks=1)


def picture(number):
    """An encoded picture of any size and form, by its number; the suffix of its file."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(9, 40, 2)
    array = rng.integers(0, 256, (height, width, 3), np.uint8)
    image, out = Image.fromarray(array).convert(("RGB", "L", "RGBA", "P")[number % 4]), io.BytesIO()
    form = "JPEG" if number % 4 < 2 else "PNG"
    image.save(out, form)
    return out.getvalue(), "jpg" if form == "JPEG" else "png"


def rows(split):
    """(class, name of the file, bytes) of 30 pictures to train on, or of 10 others, in order of their paths."""
    numbers = range(30) if split == "train" else range(30, 40)
    found = [(CLASSES[i % 2], f"{i:03d}.{picture(i)[1]}", picture(i)[0]) for i in numbers]
    return sorted(found, key=lambda row: row[:2])


def as_folder(root):
    for split in ("train", "test"):
        for name, file, content in rows(split):
            os.makedirs(root / split / name, exist_ok=True)
            (root / split / name / file).write_bytes(content)


def tar(path, members):
    """Write a tar of (name, bytes)."""
    os.makedirs(path.parent, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def as_tars(root):
    for split in ("train", "test"):
        found = [(f"{name}/{file}", content, CLASSES.index(name)) for name, file, content in rows(split)]
        for i in range(2):
            some = found[i * 7 : (7, 999)[i]]
            members = [
                [(name, x), (f"{name[:-4]}.cls", str(label).encode()), (f"{name[:-4]}.json", b"{}")]
                for name, x, label in some
            ]
            tar(root / f"pets-{split}-{i}.tar", [m for three in members for m in three])


def as_parquet(root, nested=True, named=True):
    """As Hugging Face writes data sets: a struct of bytes and path, the names of the classes in the file's notes."""
    notes = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    os.makedirs(root / "data")
    for split in ("train", "test"):
        names, files, contents = zip(*rows(split), strict=True)
        images = (
            [{"bytes": x, "path": file} for x, file in zip(contents, files, strict=True)] if nested else list(contents)
        )
        table = pa.table({"image": images, "label": [CLASSES.index(name) for name in names]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)}) if named else table
        for i in range(2):
            some = table.slice(i * 7, (7, 999)[i])
            pq.write_table(some, root / "data" / f"{split}-0000{i}-of-00002.parquet", row_group_size=4)


class Pets(tfds.core.GeneratorBasedBuilder):
    """The same pictures as a TFDS dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for i, (name, _, content) in enumerate(rows(split)):
            yield i, {"image": io.BytesIO(content), "label": name}


FORMS = {"folder": as_folder, "tars": as_tars, "parquet": as_parquet}
FORMS["bytes"] = functools.partial(as_parquet, nested=False, named=False)


def config(folder, **changes):
    return DataConfig(folder=str(folder), **{"image_size": 8, "flip": True} | changes)


def batches(data, count, start=None, batch_size=12, **how):
    iterator = pipeline.make_batches(data, batch_size=batch_size, seed=3, **how)
    if start is not None:
        iterator.set_state(start)
    found = [next(iterator) for _ in range(count)]
    state = iterator.get_state()
    iterator.close()
    return found, state


def refused(function, *args, **how):
    with pytest.raises(UsageError) as found:
        function(*args, **how)
    assert "\n" not in str(found.value)
    return str(found.value)


def small(size=(4, 4), mode="RGB", colour=0, form="PNG", **how):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, form, **how)
    return out.getvalue()


def written(root, found):
    for name, content in found.items():
        os.makedirs(os.path.dirname(root / name), exist_ok=True)
        (root / name).write_bytes(content)
    return config(root)


def twins(count=20, label=lambda i: i % 2, start=0):
    """Members of a tar: pictures with labels."""
    pairs = [
        ((f"{i:03d}.png", small(colour=(i, 0, 0))), (f"{i:03d}.cls", b"%d\n" % label(i)))
        for i in range(start, start + count)
    ]
    return [member for pair in pairs for member in pair]
