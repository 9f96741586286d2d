"""scikit-learn's handwritten digits, and the TFDS dataset that is built of them."""

import numpy as np
import tensorflow_datasets as tfds


def digit_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scikit-learn's digits, in their order there: images uint8 (n, 8, 8), labels (n,), and which are `test`, bool (n,)."""
    from sklearn.datasets import load_digits  # takes seconds to import, and is needed once

    levels, labels = load_digits(return_X_y=True)
    images = ((255 * levels.astype(np.int64) + 8) // 16).astype(np.uint8).reshape(-1, 8, 8)
    number = np.zeros(len(labels), np.int64)  # within its class
    for digit in range(10):
        number[labels == digit] = np.arange((labels == digit).sum())
    return images, labels, number % 5 == 4


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 digits of `sklearn.datasets.load_digits`, in their order there.

    A grey level v in 0..16 is stored as u = `(255 v + 8) // 16`, that is 255 v / 16 rounded to nearest (8 -> 128);
    `(16 u + 127) // 255` gives v back. Of each class, images number 4, 9, 14, ... are `test`, the others `train`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Every 5th image of a class is held out."}  # noqa: RUF012, TFDS reads a class attribute

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8 x 8 pixels, from scikit-learn.",
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # record i is the i-th image of the split
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool):
        images, labels, test = digit_images()
        for i in np.flatnonzero(test == held_out).tolist():
            yield i, {"image": images[i, ..., None], "label": int(labels[i])}
