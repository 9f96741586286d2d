"""Seeds of a demo's target: how far the verdict on a finished ladder is from models trained beyond it.

    python benchmarks/targets.py runs/demo --multiple=10 --seeds=2

Fits the ladder in W/cells, trains the size that the verdict recommends at `multiple` times the largest budget with each seed, in
W/extrapolation-MULTIPLEx, evaluates its loss and prints predicted beside measured, and draws the mean as tested.png there. What is there
is not trained again.
"""

import argparse
import dataclasses
import math
import os

import numpy as np

from dit_jax.evaluation.run import run as evaluate
from dit_jax.job.compiled import use_cache
from dit_jax.scaling import runs
from dit_jax.scaling.report import axes, figures
from dit_jax.scaling.report.text import TESTED_HEAD, print_table, tested_rows
from dit_jax.scaling.verdicts.methods import fit_methods
from dit_jax.scaling.verdicts.verdict import ANSWER, foretold, judge, lines
from dit_jax.sweep.ladder import recommended_cell
from dit_jax.training import loop
from dit_jax.workdir.folder import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", help="of a finished sweep")
    parser.add_argument("--multiple", type=float, required=True, help="of the largest budget")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    cfg = read_config(args.workdir, "sweep.json")
    use_cache(os.path.join(args.workdir, "compiled"))
    ladder = runs.load_runs([os.path.join(args.workdir, "cells")], curves=cfg.sweep.curves)
    target = args.multiple * max(cfg.sweep.budgets)
    found = fit_methods(ladder, target, ANSWER)
    fits, made = found.fits, judge(ladder, found.fits, found.refits.__getitem__, target)
    print("\n".join(lines(made)))
    cfg = dataclasses.replace(cfg, sweep=dataclasses.replace(cfg.sweep, extrapolate=args.multiple))
    tested, targets = [], os.path.join(args.workdir, f"extrapolation-{args.multiple:g}x")
    for seed in range(args.seeds):
        cell = recommended_cell(cfg, args.workdir, fits[made.method])
        folder = os.path.join(targets, f"{cell.name}-seed{seed}")
        own = dataclasses.replace(cell.cfg, train=dataclasses.replace(cell.cfg.train, seed=seed))
        own = dataclasses.replace(own, eval=dataclasses.replace(own.eval, samples=0))
        loop.run(own, folder)
        evaluate(own, folder, [own.train.steps])
        tested.append(foretold(made, fits, runs.load_runs([folder])[0]))
    print_table("Predicted against measured", TESTED_HEAD, [row for one in tested for row in tested_rows(one)])
    measured, one = [t.measured for t in tested], tested[0]
    half = (one.interval[1] - one.interval[0]) / 2 / one.predicted
    spread = f", standard deviation {np.std(measured, ddof=1):.4f}" if len(measured) > 1 else ""
    error = one.predicted / np.mean(measured) - 1
    print(f"mean of {len(measured)} seeds {np.mean(measured):.4f}{spread}: error {error:+.2%}, half-width {half:.2%}")
    error = np.std(measured, ddof=1) / len(measured) ** 0.5 if len(measured) > 1 else one.measured_se
    mean = dataclasses.replace(one, measured=float(np.mean(measured)), measured_se=float(error))
    path = os.path.join(targets, "tested.png")
    axes.save(figures.law({made.method: fits[made.method]}, "L_opt", (2 * one.flops,), test=mean), path)
    print(path)
    if not math.isfinite(half):
        print("no method may speak: there is no interval")


if __name__ == "__main__":
    main()
