"""Liang et al.'s comparison on scenes: captions in context against cross-attention, by the laws of four targets, with intervals.

    python benchmarks/text_laws.py [--records=docs/text_laws] [--collect=runs/scenes]

`--collect` copies the records of the ladders of configs/scenes_isoflop.py, KIND/seedS/cells/CELL/eval/records.jsonl of that folder, to
`--records` first. Prints the tables of docs/text_laws.md, by `scaling compare --curves`, and draws docs/text_laws.png, in half a minute.

Liang et al. 2024 (arXiv 2410.08184), table 3 and section 4.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from dit_jax.log import table
from dit_jax.scaling.__main__ import main as scaling
from dit_jax.scaling.frontier.points import load_points
from dit_jax.scaling.report import axes

DOCS = Path(__file__).resolve().parent.parent / "docs"
KINDS = {"in_context": "in context", "cross_attention": "cross-attention"}
TARGETS = {
    "loss": "held-out loss",
    "vlb_bits_per_dim": "bound, bits/dim",
    "likelihood_bits_per_dim": "likelihood, bits/dim",
    "1-composition_scenes": "pictures that are wrong",
}
PLAIN = "_plain"  # after the conditioning: its models scored on plain digits


def collect(runs: Path, records: Path) -> None:
    """Copy the records of the cells, those of plain digits to a folder of their own, and nothing else of the cells."""
    found = sorted(runs.glob("*/seed*/cells/*/eval/records.jsonl"))
    if not found:
        raise SystemExit(f"error: --collect: found no KIND/seedS/cells/CELL/eval/records.jsonl in {runs}")
    for path in found:
        kind, seed, _, *rest = path.relative_to(runs).parts
        lines = path.read_text().splitlines(keepends=True)
        plain = [json.loads(line)["protocol"].get("data", {}).get("split") == "plain" for line in lines]
        for folder, wanted in ((kind, False), (kind + PLAIN, True)):
            to = records.joinpath(folder, seed, *rest)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text("".join(line for line, is_plain in zip(lines, plain, strict=True) if is_plain == wanted))


def compared(a: Path, b: Path, *flags: str) -> dict:
    """What `scaling compare --curves --law=pure` finds."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "found.json")
        with contextlib.redirect_stdout(io.StringIO()):
            code = scaling(["compare", str(a), str(b), "--curves", "--law=pure", f"--json={out}", *flags])
        if code:
            raise SystemExit(code)
        return json.loads(Path(out).read_text())


def spread(value: float, ends: list, digits: int = 3) -> str:
    return f"{value:.{digits}f} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


def row(found: dict, law: str) -> list[str]:
    one = next(e for e in found["exponents"] if e["law"].startswith(law))
    return [
        spread(one["a"], one["a_interval"]),
        spread(one["b"], one["b_interval"]),
        spread(one["difference"], one["interval"]),
    ]


def draw(records: Path, out: Path) -> None:
    """Each target against training FLOPs: a thin line for each size, the mean over seeds, and a thick one along the best."""
    figure, grid = axes.panels((axes.SIZE[1],) * 2, 2)
    for axis, (metric, title) in zip(grid.flat, TARGETS.items(), strict=True):
        reached, scores = [], []
        for index, (kind, label) in enumerate(KINDS.items()):
            points = load_points(records / kind, metric, curves=True)
            sizes: dict = {}
            for point in points:
                sizes.setdefault(point.params, {}).setdefault(float(f"{point.train:.2g}"), []).append(point.score)
            best: dict = {}
            for seeds in sizes.values():
                mean = {c: float(np.exp(np.mean(np.log(s)))) for c, s in sorted(seeds.items())}
                axis.plot(*zip(*mean.items(), strict=True), **axes.style(index) | {"linewidth": 0.6, "markersize": 2})
                best |= {c: min(s, best.get(c, s)) for c, s in mean.items()}
            best = dict(sorted(best.items()))
            axis.plot(
                *zip(*best.items(), strict=True), label=label, **axes.style(index) | {"linewidth": 2.4, "markersize": 5}
            )
            reached += [*best]
            scores += [s for seeds in sizes.values() for some in seeds.values() for s in some]
        axes.scale(axis, "x", "training FLOPs", reached)
        axes.scale(axis, "y", title, scores)
    axes.legend(figure)
    figure.savefig(out, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=DOCS / "text_laws")
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--out", type=Path, default=DOCS / "text_laws.png")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.records)
    sides = [args.records / kind for kind in KINDS]
    best, sizes, levels = [], [], []
    for metric, name in TARGETS.items():
        found = compared(*sides, f"--metric={metric}")
        best.append([name, *row(found, "L_opt")])
        sizes.append([name, *row(found, "N_opt")])
        levels.append([name, f"{found['common']:.3g}", spread(found["ratio"], found["ratio_interval"])])
    head = [*KINDS.values(), "cross-attention - in context"]
    table(["exponent of the best", *head], best)
    table(["exponent of N_opt", *head], sizes)
    table(["ratio, cross-attention over in context", "at training FLOPs", "ratio"], levels)
    offsets = []
    for kind, label in KINDS.items():
        found = compared(args.records / kind, args.records / (kind + PLAIN))
        offsets.append(
            [label, *row(found, "L_opt"), *row(found, "N_opt")[1:], spread(found["ratio"], found["ratio_interval"])]
        )
    table(
        [
            "plain digits, loss",
            "exponent, scenes",
            "plain",
            "difference",
            "N_opt, plain",
            "difference",
            "offset: ratio",
        ],
        offsets,
    )
    draw(args.records, args.out)


if __name__ == "__main__":
    main()
