"""Images a second on one core: JPEG files read in random order, decoded, cropped to 256 px, flipped, to batches of float32, by five loaders.

python benchmarks/loaders.py [--repeats=7] [--peers=.venv/peers] [--tensorflow=.venv/tensorflow] [--json=OUT]

The files are crops of the photographs that scikit-learn ships, JPEG of quality 90, in two sets: 256 x 256 px, and 500 x 375 px (resized
and cropped to 256). Loaders: our folder and our tar, plain grain with Pillow, tf.data, and PyTorch's DataLoader with torchvision. Each has a
process of its own on one core, the same for all, and no reading threads; they take turns, and each turn is timed by the clock and by the
CPU seconds of the process. PyTorch comes by `make peers`, TensorFlow by
`pip install --target .venv/tensorflow tensorflow-cpu` (1.5 GB). A loader whose library is not there is left out.
"""

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE, BATCH = 256, 64
SETS = {"256 x 256": (256, 256), "500 x 375": (500, 375)}  # width, height
TARGETS = {"256 x 256": 400, "500 x 375": 150}  # images a second of ours
ONE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} | {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}


def files(folder: str) -> list[str]:
    return sorted(map(str, (Path(folder) / "train").glob("*.jpg")))


def load_ours(folder: str) -> Iterator:
    from dit_jax.config import DataConfig
    from dit_jax.data.pipeline import make_batches

    data = DataConfig(folder=folder, image_size=SIDE, flip=True, cache=False, workers=0)
    return (batch["image"] for batch in make_batches(data, batch_size=BATCH, seed=0))


def load_grain(folder: str) -> Iterator:
    import grain
    import numpy as np
    from PIL import Image, ImageOps

    def load(path: str, rng) -> np.ndarray:
        with Image.open(path) as image:
            image = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
        image = ImageOps.mirror(image) if rng.random() < 0.5 else image
        return np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)

    images = grain.MapDataset.source(files(folder)).seed(0).shuffle().repeat().random_map(load).batch(BATCH)
    return iter(images.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def load_tensorflow(folder: str) -> Iterator:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def load(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")
        if min(SETS[folder.rpartition("/")[2]]) != SIDE:
            shape = tf.cast(tf.shape(image)[:2], tf.float32)
            shape = tf.cast(tf.round(shape * SIDE / tf.reduce_min(shape)), tf.int32)
            image = tf.image.resize(image, shape, "bicubic", antialias=True)
        image = tf.image.resize_with_crop_or_pad(image, SIDE, SIDE)
        return tf.image.random_flip_left_right(tf.cast(image, tf.float32) / 127.5 - 1)

    paths = files(folder)
    images = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat().map(load).batch(BATCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
    return images.with_options(options).as_numpy_iterator()


def load_torch(folder: str) -> Iterator:
    import torch
    from PIL import Image
    from torchvision import transforms

    torch.set_num_threads(1)
    steps = [transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(SIDE)]
    steps += [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
    ]
    change = transforms.Compose(steps)

    class Photos(torch.utils.data.Dataset):
        paths = files(folder)

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, i):
            with Image.open(self.paths[i]) as image:
                return change(image.convert("RGB"))

    loader = torch.utils.data.DataLoader(Photos(), BATCH, shuffle=True, drop_last=True)
    while True:
        yield from (batch.numpy() for batch in loader)


LOADERS = {
    "ours, folder": load_ours,
    "ours, tar": lambda folder: load_ours(folder + " tar"),
    "grain and Pillow": load_grain,
    "tf.data": load_tensorflow,
    "torch DataLoader": load_torch,
}


def work(name: str, core: int) -> None:
    """Serve one loader: for each line [folder, batches] of the input, write [seconds, CPU seconds] of so many batches."""
    os.sched_setaffinity(0, {core})
    opened = {}
    for line in sys.stdin:
        folder, count = json.loads(line)
        if folder not in opened:
            opened[folder] = LOADERS[name](folder)
            first = next(opened[folder])
            assert first.dtype.name == "float32" and sorted(first.shape) == [3, BATCH, SIDE, SIDE], (
                first.dtype,
                first.shape,
            )
            assert -1.5 < first.min() < -0.8 and 0.8 < first.max() < 1.5, (first.min(), first.max())
        start = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(opened[folder])
        print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]), flush=True)


def write_photos(folder: str, size: tuple[int, int], count: int) -> int:
    """Write a folder with the splits train and test, and the same as tars in the folder "... tar"; returns the bytes of an image."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    (width, height), rng, photos, total = size, np.random.default_rng(0), load_sample_images().images, 0
    os.makedirs(folder + " tar")
    for split, number in (("train", count), ("test", 1)):
        os.makedirs(os.path.join(folder, split))
        with tarfile.open(os.path.join(folder + " tar", f"{split}.tar"), "w") as tar:
            for i in range(number):
                photo, out = photos[i % len(photos)], io.BytesIO()
                y, x = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
                Image.fromarray(photo[y : y + height, x : x + width]).save(out, "JPEG", quality=90)
                path = os.path.join(folder, split, f"{i:05d}.jpg")
                total += Path(path).write_bytes(out.getvalue())
                tar.add(path, os.path.basename(path))
    return total // (count + 1)


def start(name: str, args: argparse.Namespace) -> subprocess.Popen | None:
    """Start the process of a loader; None without its library."""
    path = {"tf.data": args.tensorflow, "torch DataLoader": args.peers}.get(name, "")
    env = (
        os.environ
        | ONE
        | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path, os.environ.get("PYTHONPATH")]))}
    )
    module = {"tf.data": "tensorflow", "torch DataLoader": "torchvision"}.get(name, "grain")
    if subprocess.run([sys.executable, "-c", f"import {module}"], env=env, capture_output=True, check=False).returncode:
        print(f"{name}: left out, as {module} cannot be imported (see --help)", file=sys.stderr)
        return None
    command = [sys.executable, __file__, f"--worker={name}", f"--core={args.core}"]
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(worker: subprocess.Popen, folder: str, count: int) -> list[float]:
    worker.stdin.write(json.dumps([folder, count]) + "\n")
    worker.stdin.flush()
    if not (line := worker.stdout.readline()):
        sys.exit(f"a loader ended with {worker.wait()}; its error stands above")
    return json.loads(line)


def measure(args: argparse.Namespace) -> dict:
    """Return the rates of each loader on each set: {set: {loader: {"clock": [...], "cpu": [...]}}}."""
    found, bytes_ = {}, {}
    workers = {name: worker for name in LOADERS if (worker := start(name, args))}
    with tempfile.TemporaryDirectory(prefix="loaders-") as root:
        for kind, size in SETS.items():
            folder = os.path.join(root, kind)
            bytes_[kind] = write_photos(folder, size, args.files)
            found[kind] = {name: {"clock": [], "cpu": []} for name in workers}
            for turn in range(args.repeats + 1):
                for name, worker in list(workers.items())[:: 1 if turn % 2 else -1]:
                    seconds = ask(worker, folder, args.batches if turn else 1)
                    for clock, value in zip(("clock", "cpu"), seconds, strict=True):
                        found[kind][name][clock] += [args.batches * BATCH / value] * bool(turn)
                print(f"{kind}: turn {turn} of {args.repeats}", end="\r", file=sys.stderr)
        for worker in workers.values():
            worker.communicate()
    return {"rates": found, "bytes": bytes_, "load": os.getloadavg()[0], "arguments": vars(args)}


def show(found: dict) -> None:
    sys.path.insert(0, str(ROOT))
    from dit_jax.log import table

    for kind, loaders in found["rates"].items():
        middle, rows = functools.partial(statistics.median), []
        for name, rates in loaders.items():
            clock, cpu = rates["clock"], rates["cpu"]
            spread = f"{min(clock):.0f} to {max(clock):.0f}"
            aim = f">= {TARGETS[kind]}" if name.startswith("ours") else ""
            rows.append([name, f"{middle(clock):.0f}", spread, f"{middle(cpu):.0f}", aim])
        title = f"JPEG {kind} px, {found['bytes'][kind]:,} bytes each, load {found['load']:.1f}"
        table(["loader", "images/s", "lowest to highest", "images/CPU second", "target"], rows, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each loader on each set")
    parser.add_argument("--batches", type=int, default=8, help=f"of {BATCH} images in a turn")
    parser.add_argument("--files", type=int, default=512, help="in each set")
    parser.add_argument(
        "--core", type=int, default=max(os.sched_getaffinity(0)), help="the core that all are pinned to"
    )
    parser.add_argument("--peers", default=str(ROOT / ".venv/peers"), help="folder of PyTorch and torchvision")
    parser.add_argument("--tensorflow", default=str(ROOT / ".venv/tensorflow"), help="folder of TensorFlow")
    parser.add_argument("--json", default="", help="file for all rates")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.core)
    if min(args.repeats, args.batches) < 1 or args.files < BATCH:
        parser.error(f"expected --repeats and --batches above 0 and --files of at least {BATCH}")
    if args.json:
        sys.path.insert(0, str(ROOT))
        from dit_jax.files.out import check_json, write_report

        check_json(args.json)
    found = measure(args)
    show(found)
    if args.json:
        write_report(args.json, found)


if __name__ == "__main__":
    main()
