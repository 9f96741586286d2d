"""A whole life in a bucket: encode, train with kills, evaluate with a kill, sweep, report; equal to the same on disk."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from bucket import environment
from job import Job, run
from runs import STEPS, assert_same_run, train
from sklearn.datasets import load_digits
from test_bucket import scored
from test_encode import DATA, MODEL, save_vae

from dit_jax.data.latents import open_latents
from dit_jax.files import below, read
from dit_jax.workdir.records import read_records

pytestmark = [
    pytest.mark.bucket,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
LADDER = """
from dit_jax.config import template

def get_config():
    c = template()
    c.model.update(patch=2, input_size=8, channels=1, classes=10, learn_sigma=False)
    c.diffusion.process = "flow"
    c.optim.update(learning_rate=6e-3, warmup_steps=20, clip=1.0, ema="power", ema_width=0.1, schedule="constant")
    c.train.update(batch_size=32)
    c.sample.update(sampler="euler", steps=4, labels="balanced", batch_size=40)
    sizes = ((4, 1, 1), (8, 2, 1), (12, 3, 1), (16, 4, 1))
    c.sweep.update(budgets=(3e8, 6e8, 1.2e9), sizes=sizes, windows=((0, 4),) * 3, width_power=0.5, curves=True, processes=2)
    c.eval.update(times_per_image=8, samples=0, max_images=64)
    return c
"""


def killed(job, arguments, cache_dir, server, moment):
    """Whether the job was killed at `moment()`; if it ended before, it ended well."""
    process = Job(job, *arguments, cache_dir=cache_dir, environment=environment(server.address))
    end = time.monotonic() + 300
    while process.poll() is None and not moment():
        assert time.monotonic() < end, process.err.read_text()
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


def without_places(content, place):
    """A text without the names of the folder and of the files in which its records lie."""
    return re.sub(r"/records(\.jsonl:\d+|/\d+-[0-9a-f]+\.json(:\d+)?)", "/records", content.decode().replace(place, ""))


def test_a_life_in_a_bucket_is_that_on_disk(server, tmp_path, data_dir, cache_dir):
    save_vae(tmp_path / "tiny", 0)
    (tmp_path / "ladder.py").write_text(LADDER)
    disk, there = tmp_path / "disk", "gs://test"
    shutil.copytree(tmp_path / "tiny", disk / "nets" / "tiny")
    images = load_digits().images[:300, :, :, None] * (255 / 16)
    np.savez(disk / "nets" / "reference.npz", arr_0=images.astype(np.uint8))
    server.load(disk)
    rng = random.Random(seed := random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")

    def both(job, arguments, kills=0, within=150, before=None):
        """Run a job on disk, and in the bucket with kills."""
        for place in (str(disk), there):
            words = [str(word).replace("PLACE", place) for word in arguments]
            for _ in range(kills if place == there else 0):
                done = len(server.requests) + rng.randrange(3, within)
                moment = before or (lambda done=done: len(server.requests) > done)
                assert killed(job, words, cache_dir, server, moment), f"{job} ended before its kill"
            code, out, err = run(job, *words, cache_dir=cache_dir, environment=environment(server.address))
            assert code == 0, err
        return out

    encode = ["--config=configs/digits.py", "--autoencoder=PLACE/nets/tiny", "--out=PLACE/latents", *MODEL, *DATA]
    both("encode", encode, kills=1, within=15)
    for split in ("train[:205]", "test[:50]"):
        assert open_latents(f"{there}/latents/{split}").content == open_latents(f"{disk}/latents/{split}").content

    more = [*MODEL, *DATA, "--config.data.latents=PLACE/latents", "--config.data.workers=0"]
    both("train", [*train("PLACE/run", *more)], kills=10)
    server.dump(tmp_path / "copy")
    assert_same_run(disk / "run", tmp_path / "copy" / "run")

    grid = [
        "--config.eval.reference=PLACE/nets/reference.npz",
        "--config.eval.samples=80",
        "--config.eval.guidance=(1.0,2.0)",
        "--config.autoencoder.folder=PLACE/nets/tiny",
    ]
    partial = lambda: any("/eval/partial/" in name for name in list(server.buckets["test"]))  # noqa: E731
    both("evaluate", ["--workdir=PLACE/run", f"--at={STEPS}", *grid], kills=1, before=partial)
    assert len(read_records(f"{there}/run")) == 3
    assert scored(read_records(f"{there}/run")) == scored(read_records(str(disk / "run")))

    both("sweep", [f"--config={tmp_path / 'ladder.py'}", "--workdir=PLACE/sweep"])
    for cell in sorted(path.name for path in (disk / "sweep" / "cells").iterdir()):
        assert scored(read_records(f"{there}/sweep/cells/{cell}")) == scored(read_records(f"{disk}/sweep/cells/{cell}"))
    both("scaling", ["fit", "PLACE/sweep", "--curves", "--json=PLACE/fit.json"])
    both("scaling", ["report", "PLACE/sweep", "--curves", "--out=PLACE/report/index.html"])
    fits = [json.loads(without_places(read(f"{place}/fit.json"), place)) for place in (str(disk), there)]
    assert fits[0] == fits[1] and fits[0]["n_runs"] == 12
    pages = below(str(disk / "report"))
    assert pages == below(f"{there}/report") and len(pages) > 3
    for name in pages:
        one, other = Path(disk / "report" / name).read_bytes(), read(f"{there}/report/{name}", 2**27)
        if name.endswith((".html", ".json")):
            one, other = without_places(one, str(disk)), without_places(other, there)
        assert one == other, name
