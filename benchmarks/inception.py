"""Times features and statistics for FID and Inception Score: ours against torch-fidelity's, on the same weights and images.

    PYTHONPATH=.venv/peers .venv/bin/python benchmarks/inception.py --images=10000

Both take turns with chunks of images, and each goes first in every other turn, so that other load on the machine affects both
alike. Compilation and a first chunk of each are left out. Weights are random because the time does not depend on them. Each half
of a chunk has crops of one of scikit-learn's two photographs. Printed: milliseconds an image (median over chunks), their ratio,
and the differences between both sides' statistics and FID between the halves.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]
from parity import inception_pair  # noqa: E402

from dit_jax.metrics import frechet, inception_score  # noqa: E402
from dit_jax.models import inception  # noqa: E402


def load_peers(threads: int):
    warnings.simplefilter("ignore")
    import torch

    operators = torch.library.Library("torchvision", "DEF")  # see tests/parity/conftest.py
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.set_num_threads(threads)
    import torch_fidelity

    return torch, torch_fidelity, operators


def make_ours(path: str, batch: int):
    """A function that adds a chunk of images to the statistics of the two halves, and these statistics."""
    params, apply = jax.device_put(inception_pair.ours(path)), jax.jit(inception.apply)
    state = {"pool": [frechet.empty(inception.WIDTH)] * 2, "score": inception_score.empty(inception.CLASSES)}

    def add(images):
        parts = [apply(params, images[i : i + batch]) for i in range(0, len(images), batch)]  # dispatched all at once
        halves = np.split(np.concatenate([p.pool for p in parts]), 2)
        state["pool"] = [frechet.update(stats, half) for stats, half in zip(state["pool"], halves, strict=True)]
        logits = np.concatenate([p.logits_unbiased for p in parts])
        state["score"] = inception_score.update(state["score"], logits)

    return add, state


def make_theirs(torch, torch_fidelity, path: str, batch: int):
    """A function that adds a chunk's features to two lists, as torch-fidelity does, and these lists."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    state = {"pool": [], "logits": []}

    def add(images):
        with torch.no_grad():
            for i in range(0, len(images), batch):
                x = torch.from_numpy(np.ascontiguousarray(images[i : i + batch].transpose(0, 3, 1, 2)))
                pool, logits = network(x)
                state["pool"].append(pool)
                state["logits"].append(logits)

    return add, state


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def finish(torch, ours: dict, theirs: dict) -> tuple[float, float, str]:
    """Seconds that each side takes to compute the scores, and a text on how far statistics and scores differ."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    start = time.perf_counter()
    one, two = (frechet.mean_cov(stats) for stats in ours["pool"])
    fid = frechet.frechet_distance(*one, *two)
    score = inception_score.score([ours["score"]])[0]
    middle = time.perf_counter()
    pool = torch.cat(theirs["pool"]).reshape(-1, 2, len(theirs["pool"][0]) // 2, inception.WIDTH)
    stats = [fid_features_to_statistics(pool[:, i].flatten(0, 1)) for i in (0, 1)]
    other_fid = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    other = isc_features_to_metric(torch.cat(theirs["logits"]), splits=1)["inception_score_mean"]
    end = time.perf_counter()
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(one, stats[0].values(), strict=True)]
    text = (
        f"largest relative differences: mean {errors[0]:.1e}, covariance {errors[1]:.1e}\n"
        f"Inception Score {score:.6f}, theirs {other:.6f}; FID of the halves {fid:.6f}, theirs {other_fid:.6f}"
    )
    return middle - start, end - middle, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(images=10_000, size=64, chunk=64, batch=8, their_batch=64, threads=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if min(vars(args).values()) < 1 or args.chunk % args.batch or args.chunk != args.their_batch or args.chunk % 2:
        parser.error("expected numbers above 0, and an even chunk that is their batch and that ours divides")
    torch, torch_fidelity, _ = load_peers(args.threads)
    path = f"/tmp/inception-benchmark-{os.getpid()}.pth"
    inception_pair.save(torch, path)
    ours, ours_state = make_ours(path, args.batch)
    theirs, theirs_state = make_theirs(torch, torch_fidelity, path, args.their_batch)
    os.remove(path)
    run(args, torch, (ours, ours_state), (theirs, theirs_state))


def run(args, torch, ours: tuple, theirs: tuple) -> None:
    times, photos, chunks = {"ours": [], "theirs": []}, inception_pair.photographs(), -(-args.images // args.chunk)
    for turn in track(range(chunks + 1), "features", console=Console(stderr=True)):
        half = args.chunk // 2 or 1
        crops = [inception_pair.crops(p, half, args.size, args.size, turn) for p in photos]
        images = np.concatenate(crops)[: args.chunk]
        order = [("ours", ours[0]), ("theirs", theirs[0])]
        for name, add in order if turn % 2 else order[::-1]:
            times[name].append(timed(add, images))
    a, b = (1000 * np.array(times[name][1:]) / args.chunk for name in ("ours", "theirs"))
    end_a, end_b, differences = finish(torch, ours[1], theirs[1])
    n, load = chunks * args.chunk, os.getloadavg()[0]
    print(f"{n} images {args.size} x {args.size}, chunks of {args.chunk}, {os.cpu_count()} cores, load {load:.1f}")
    for name, t, end in (("ours", a, end_a), ("torch-fidelity", b, end_b)):
        low, high = np.quantile(t, [0.25, 0.75])
        rate = f"{np.median(t):7.1f} ms an image (quartiles {low:.1f} to {high:.1f})"
        print(f"{name:15} {rate}, {end:.2f} s for the scores")
    ratio = np.quantile(a / b, [0.25, 0.5, 0.75])
    print(f"ours / theirs, by chunk: median {ratio[1]:.2f} (quartiles {ratio[0]:.2f} to {ratio[2]:.2f})")
    print(differences)


if __name__ == "__main__":
    main()
