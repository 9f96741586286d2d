"""What the modern blocks are worth: each against the base on scenes, at equal training FLOPs, with intervals.

    python benchmarks/blocks.py --out=runs/blocks [--steps=3000] [--seeds=2] [--only=rope] [--set=model.width=64 ...]

Trains `configs/scenes.py`, with the keys of BASE, and its variants, each until it has spent the training FLOPs of the base's `--steps`,
with each seed, in OUT/NAME-seedS, and scores the last checkpoint: the held-out loss at equal times t = 1/8 to 7/8, and composition. What
is there is not computed again. Then it prints a row for each variant: the difference to the base and its 95 % interval, from the
standard deviation over seeds, which is taken to be the same for all variants (Student's t with variants x (seeds - 1) degrees of freedom).

The loss at t = 0 is left out: below t = 0.05 predictions of the clean image have another target (docs/models.md).
"""

import argparse
import json
import math
import runpy
from pathlib import Path

import numpy as np
from scipy import stats

from dit_jax import flops
from dit_jax.config import Config, resolve, to_dict
from dit_jax.evaluation.run import run as evaluate
from dit_jax.job.compiled import use_cache
from dit_jax.training import loop
from dit_jax.workdir.records import read_records

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "scenes.py"
VARIANTS = {
    "base": {},
    "rope": {"model.positions": "rope"},
    "RMSNorm, SwiGLU": {"model.block": "llama"},
    "x-prediction": {"diffusion.prediction": "x"},
    "shift 2": {"diffusion.shift": 2.0},
}
TIMES = 8
BASE = {  # beside its variants: the velocity, sinusoids, times as they come
    "diffusion.prediction": "velocity",
    "diffusion.shift": 1.0,
    "diffusion.time_law": "uniform",
    "model.positions": "sincos",
    "model.patch": 4,
    "model.width": 64,
}
SCORES = {"loss at fixed t": "loss", "composition": "composition"}


def with_keys(cfg: Config, changes: dict) -> Config:
    """A config with keys such as model.width set."""
    values = to_dict(cfg)
    for key, value in changes.items():
        group, name = key.split(".")
        values[group][name] = value
    return resolve(values)


def score(cfg: Config, workdir: str) -> dict[str, float]:
    """Train to the end and evaluate, as far as that is not done: the scores of the last step."""
    loop.run(cfg, workdir)
    evaluate(cfg, workdir, [cfg.train.steps])
    metrics = {}
    for (step, _), record in read_records(workdir).items():
        metrics |= record["metrics"] if step == cfg.train.steps else {}
    fixed = [metrics[f"loss_fixed_t{k}"] for k in range(1, TIMES)]
    return {"loss": float(np.mean(fixed)), "composition": metrics["composition_scenes"], "flops": spent(cfg)}


def spent(cfg: Config) -> float:
    """Training FLOPs of a run."""
    return cfg.train.steps * flops.train_flops(cfg.model, cfg.train.batch_size)


def rows(found: dict[str, list[dict]]) -> list[list[str]]:
    """Cells of the table: name, training FLOPs, then for each score the mean and the difference to the base with its interval."""
    seeds, table = len(found["base"]), []
    freedom = len(found) * (seeds - 1)
    for name, runs in found.items():
        cells = [name, f"{runs[0]['flops']:.3e}"]
        for key in SCORES.values():
            values = {other: np.array([run[key] for run in of]) for other, of in found.items()}
            cells.append(f"{values[name].mean():.4f}")
            if name == "base":
                cells.append("")
                continue
            off = f"{values[name].mean() - values['base'].mean():+.4f}"
            if freedom:
                pooled = math.sqrt(sum(v.var(ddof=1) for v in values.values()) / len(values))
                off += f" ± {stats.t.ppf(0.975, freedom) * pooled * math.sqrt(2 / seeds):.4f}"
            cells.append(off)
        table.append(cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=3000, help="of the base")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", choices=[*VARIANTS][1:], default="", help="one variant beside the base; default: all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="GROUP.KEY=VALUE", help="of all runs, the value as JSON"
    )
    args = parser.parse_args()
    base = resolve(runpy.run_path(str(CONFIG))["get_config"]())
    common = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in args.set)}
    base = with_keys(base, BASE | {"eval.fixed_times": TIMES, "train.steps": args.steps} | common)
    use_cache(str(Path(args.out) / "compiled"))
    found = {}
    for name, changes in VARIANTS.items():
        if args.only and name not in ("base", args.only):
            continue
        cfg = with_keys(base, changes)
        steps = round(spent(base) / flops.train_flops(cfg.model, cfg.train.batch_size))
        found[name] = [
            score(
                with_keys(cfg, {"train.steps": steps, "train.seed": seed}),
                str(Path(args.out) / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"),
            )
            for seed in range(args.seeds)
        ]
    head = ["variant", "training FLOPs"] + [part for name in SCORES for part in (name, "difference")]
    for cells in (head, ["---"] * len(head), *rows(found)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
