"""Which size of model wins under a sampling budget, before and after distillation: `make study`, then `make study-page`.

    python -m benchmarks.study [--only=digits] [--sizes=12,16] [--budgets=1e11,3e11] [--processes=2]
    python -m benchmarks.study --page

Trains and scores the cells of benchmarks/study/table.py, the cheapest first, and adds each record to docs/study/records.jsonl as it is
made. A cell recorded there is skipped, so the same command goes on after a kill, and the file can be committed in parts. A cell that fails
is recorded with its reason and left out; --retry tries it again. Runs lie in runs/study. The whole takes about 6 hours on 2 cores.
`--launcher=print` writes a command for each column (a size with its budgets and students), for any scheduler; `--cell` runs one column.
`--page` writes docs/study.md and its figures from the records alone.
"""

import argparse
import functools
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from benchmarks.study.cells import Cell, make_cells
from benchmarks.study.decide import deciding_cells
from benchmarks.study.records import RECORDS, read
from benchmarks.study.table import STUDIES
from benchmarks.study.work import Place, missing, run_column, weight
from dit_jax.error import INTERRUPTED, USAGE, Interrupted, UsageError
from dit_jax.job.launcher import find_cell, own_arguments
from dit_jax.job.workers import run_cells
from dit_jax.log import bar, clock, complain, say


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kinds of data, with commas: digits, scenes; default: both")
    parser.add_argument("--sizes", default="", help="widths, with commas; default: all")
    parser.add_argument("--budgets", default="", help="training FLOPs, with commas; default: all")
    parser.add_argument("--processes", type=int, default=2, help="columns that run side by side, each on a core")
    parser.add_argument("--workdir", default="runs/study", help="folder of the runs")
    parser.add_argument("--records", default=RECORDS, help="file of the records")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--launcher", default="local", choices=("local", "print"), help="who runs the columns")
    parser.add_argument("--cell", default=None, help="run this column alone: its name, or its number from 0")
    parser.add_argument("--page", action="store_true", help="write the page from the records, and train nothing")
    return parser.parse_args(given)


def _chosen(text: str, known: Sequence, flag: str, kind=float) -> list:
    """The values of a flag. Raises UsageError for one that is not known."""
    try:
        found = [kind(part) for part in text.split(",") if part]
    except ValueError:
        found = [text]
    for value in found:
        if value not in known:
            raise UsageError(
                f"{flag}: found {value}, expected some of {', '.join(f'{one:g}' if kind is float else one for one in known)}"
            )
    return found or list(known)


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the flags name. Raises UsageError for a size or budget that no chosen study has."""
    studies = [STUDIES[name] for name in _chosen(args.only, list(STUDIES), "--only", str)]
    cells = make_cells(studies)
    widths = _chosen(args.sizes, sorted({float(cell.size[0]) for cell in cells}), "--sizes")
    budgets = _chosen(args.budgets, sorted({cell.budget for cell in cells}), "--budgets")
    return [cell for cell in cells if cell.size[0] in widths and cell.budget in budgets]


def column_of(cell: Cell) -> str:
    """Name of the column that a cell stands in: a size with all of its budgets and students."""
    return cell.teacher.run


def columns(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by column, in their order."""
    found: dict = {}
    for cell in cells:
        found.setdefault(column_of(cell), []).append(cell)
    return found


def run(cells: list[Cell], place: Place, processes: int, retry: bool = False) -> list[str]:
    """Work on all cells that are not recorded, then on the points that decide; returns the names of cells that failed."""
    _run(cells, place, processes, retry)
    studies = list({cell.study.name: cell.study for cell in cells}.values())
    if chosen := deciding_cells(studies, read(place.records)[0], cells):
        _run(chosen, place, processes, retry)
    names = {cell.name for cell in cells}
    return [name for name in read(place.records)[1] if name in names]


def _run(cells: list[Cell], place: Place, processes: int, retry: bool) -> None:
    """Work on cells round by round of a budget."""
    records, failed = read(place.records)
    todo = [(cell, missing(cell, records)) for cell in cells if retry or cell.name not in failed]
    costs = {_key(cell): weight(cell, grids) for cell, grids in todo if grids}
    open_cells = [cell for cell, grids in todo if grids]
    what = "points that decide" if cells[0].chosen else "cells"
    say(
        f"{len(open_cells)} of {len(cells)} {what} to do, about {clock(sum(costs.values()) / processes)} on {processes} idle core(s)"
    )
    job, cache, done = functools.partial(run_column, place=place), os.path.join(place.workdir, "compiled"), 0.0
    with bar("study", sum(costs.values())) as move:
        for _, some in itertools.groupby(open_cells, key=lambda cell: (cell.study.name, *cell.rank[:3])):
            for column, outcome in run_cells(list(columns(some).values()), processes, cache, job):
                if column is None:
                    continue
                done += sum(costs[_key(cell)] for cell in column)
                if isinstance(outcome, BaseException):
                    complain(
                        f"{column_of(column[0])}: {type(outcome).__name__}: {outcome}; the same command tries it again"
                    )
                say(f"{column_of(column[0])}: {outcome}  {move(done)}")


def _key(cell: Cell) -> tuple:
    return cell.name, cell.rest, cell.chosen


def _interrupt(number, frame) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(INTERRUPTED))
    raise Interrupted("SIGTERM: what is recorded stays; the same command goes on from there")


def main(given: Sequence[str]) -> None:
    args = arguments(given)
    if args.page:
        from benchmarks.study.page import write

        print(write(args.records))
        return
    cells, place = chosen_cells(args), Place(args.workdir, args.records)
    names = list(columns(cells))
    if args.launcher == "print":
        own = own_arguments(given)
        for name in names:
            print(shlex.join([sys.executable, "-m", "benchmarks.study", *own, "--processes=1", f"--cell={name}"]))
        return
    if args.cell is not None:
        cells = columns(cells)[names[find_cell(names, args.cell)]]
    signal.signal(signal.SIGTERM, _interrupt)
    failed = run(cells, place, args.processes, args.retry)
    for name in failed:
        complain(f"{name}: {read(place.records)[1][name]}")
    print(place.records)


def command(given: Sequence[str]) -> int:
    """Run the command with these arguments; returns its exit code."""
    try:
        main(given)
    except UsageError as error:
        complain(str(error))
        return USAGE
    except Interrupted as error:
        complain(str(error))
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
