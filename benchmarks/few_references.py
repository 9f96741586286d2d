"""How a Frechet distance depends on the size of its reference: `python benchmarks/few_references.py [--draws=200]`.

The features are those of the shipped network of digits, 64 of an image. The reference is a random subset of the 1,442 digits
for training; a perfect sampler stands for itself by the 355 digits held out, a worse one by the same with Gaussian noise.
Prints a table in Markdown: mean and standard deviation over subsets, for each size. A minute on one core.
"""

import jax
import numpy as np
from absl import flags

from dit_jax.config import DataConfig
from dit_jax.data import pipeline
from dit_jax.job.launch import launch
from dit_jax.metrics import frechet
from dit_jax.models import classifier
from dit_jax.networks.folder import DIGITS, load_network

SIZES = (100, 200, 450, 900)
NOISE = {"held-out digits": 0.0, "with noise of 0.1": 0.1, "with noise of 0.3": 0.3}  # of the range [-1, 1]


def gaussian(features: np.ndarray) -> tuple:
    return frechet.mean_cov(frechet.update(frechet.empty(features.shape[1]), features))


def main() -> None:
    _, params, _ = load_network(DIGITS, "classifier")
    data, rng = DataConfig(data_dir=flags.FLAGS.data_dir), np.random.default_rng(0)
    images, held_out = (pipeline.load_arrays(data, split)[0] for split in ("train", "test"))
    apply = jax.jit(lambda x: classifier.apply(params, x)[0])
    reference = np.asarray(apply(images))
    print(f"| samples | {' | '.join(f'{n} images' for n in SIZES)} | all {len(images):,} |")
    print("|---" * (len(SIZES) + 2) + "|")
    for name, noise in NOISE.items():
        drawn = held_out + noise * rng.standard_normal(held_out.shape).astype(np.float32)
        samples, cells = gaussian(np.asarray(apply(np.clip(drawn, -1, 1)))), []
        for size in SIZES:
            chosen = [rng.choice(len(images), size, replace=False) for _ in range(flags.FLAGS.draws)]
            found = [frechet.frechet_distance(*gaussian(reference[some]), *samples) for some in chosen]
            cells.append(f"{np.mean(found):.3f} +- {np.std(found, ddof=1):.3f}")
        print(f"| {name} | {' | '.join(cells)} | {frechet.frechet_distance(*gaussian(reference), *samples):.3f} |")


if __name__ == "__main__":
    flags.DEFINE_integer("draws", 200, "random references of each size", lower_bound=2)
    flags.DEFINE_string("data_dir", "", 'TFDS folder; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets')
    launch(main)
