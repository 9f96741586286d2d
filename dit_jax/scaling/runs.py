"""Where runs come from: the evaluation records of run folders, or a CSV; checked, and never of mixed protocols."""

import contextlib
import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from dit_jax.command import DEEPEST, numbered, parse_json
from dit_jax.config import UsageError
from dit_jax.scaling.conventions import Convention, of_record, require_same
from dit_jax.scaling.stated import of_cells, of_table, require_stated

REQUIRED = ("params", "tokens", "loss")
OPTIONAL = ("flops", "images", "run", "group", "loss_se")
RECORD = {  # field of a record -> field of a Run
    "params_active": "params",
    "params": "params_total",
    "images_seen": "images",
    "tokens_seen": "tokens",
    "flops_train": "flops",
}
SMALLEST = 1e-100  # number of a run, and 1 over the largest: squares and products of such numbers are finite
COLUMNS = 1000  # of a CSV, at most; and names that are searched for a near one


@dataclass(frozen=True)
class Run:
    """One trained model at its last evaluated step. D is counted in tokens and in images; FLOPs are 2 x MACs."""

    name: str
    params: float  # active per token: the N of the fits
    tokens: float  # D
    flops: float  # training
    loss: float  # held out
    loss_se: float = 0.0  # of the evaluation; 0 = not recorded
    params_total: float = math.nan  # nan = not recorded
    images: float = math.nan  # nan = not recorded
    group: str = ""  # budget label; "" = runs are grouped by their FLOPs
    protocol: dict = field(default_factory=dict)
    protocol_id: str = ""
    metrics: dict = field(default_factory=dict)
    source: str = ""  # file and line, for messages
    convention: Convention = field(default_factory=Convention)


def load_runs(
    paths: str | os.PathLike | Iterable,
    metric: str = "loss",
    protocol_id: str | None = None,
    curves: bool = False,
    stated: Mapping | None = None,
    tokens_per_image: float | int = math.nan,
) -> list[Run]:
    """Runs of `paths`: workdirs, folders of workdirs, records.jsonl files or CSVs. One run per record name, at its last step; with
    `curves`, one for each step evaluated.

    Folders are searched for `eval/records.jsonl`; one named `extrapolation` counts only when it is itself given, so that a
    model trained to test a law does not enter it. `protocol_id` takes the records of that protocol alone. `stated` says of CSVs what
    their columns do not: field of a Convention -> one of its CHOICES. Refuses runs whose protocols or conventions differ, naming the
    field and both values.
    """
    stated = stated or {}
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    runs, seen = [], set()
    for path in map(os.fspath, paths):
        for file in _files(path):
            if os.path.realpath(file) not in seen:
                seen.add(os.path.realpath(file))
                if file.endswith(".csv"):
                    runs += _read_csv(file, stated, tokens_per_image)
                else:
                    runs += _read_records(file, metric, protocol_id, curves)
                    require_stated(runs[-1], stated)
    if not runs:
        raise UsageError(f"RUNS: found no run in {', '.join(map(str, paths)) or 'an empty list'}")
    for run in runs[1:]:
        _same_protocol(runs[0], run)
        require_same(runs[0].convention, run.convention, run.source)
    assumed = tuple({name: None for run in runs for name in run.convention.assumed})
    return [replace(run, convention=replace(run.convention, assumed=assumed)) for run in runs]


def budgets(runs: Iterable[Run], tolerance: float = 0.05) -> list[tuple[str, tuple]]:
    """(label, runs) of each compute budget: runs grouped by label where all have one, else by training FLOPs within `tolerance`."""
    runs, groups = list(runs), {}
    if all(r.group for r in runs):
        for run in runs:
            groups.setdefault(run.group, []).append(run)
        return [(label, tuple(members)) for label, members in groups.items()]
    start, key = -math.inf, ""
    for run in sorted(runs, key=lambda r: r.flops):
        if run.flops > start * (1 + tolerance) or not key:
            start, key = run.flops, f"{run.flops:.3g}"
            while key in groups:
                key += "'"
        groups.setdefault(key, []).append(run)
    return [(label, tuple(members)) for label, members in groups.items()]


def _files(path: str) -> list[str]:
    if os.path.isfile(path):
        if not path.endswith((".csv", ".jsonl")):
            raise UsageError(f"{path}: found a file, expected a workdir, a .csv or a records.jsonl")
        return [path]
    if not os.path.isdir(path):
        raise UsageError(f"{path}: no such file or folder")
    found = []
    for folder, below, _ in os.walk(path):
        if folder.count(os.sep) - path.count(os.sep) > DEEPEST:
            raise UsageError(f"{folder}: found folders more than {DEEPEST} deep, expected runs nearer to {path}")
        below[:] = sorted(b for b in below if b != "extrapolation")
        file = os.path.join(folder, "eval", "records.jsonl")
        if os.path.isfile(file):
            found.append(file)
    if not found:
        raise UsageError(
            f"{path}: found no eval/records.jsonl in it, expected an evaluated workdir or a folder of them"
        )
    return found


@contextlib.contextmanager
def _opened(file: str, mode: str, **options) -> Iterator:
    """An open file; what the system or the csv module says against it is a UsageError."""
    try:
        with open(file, mode, **options) as lines:
            yield lines
    except (OSError, csv.Error) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


def _read_records(file: str, metric: str, protocol_id: str | None, curves: bool) -> list[Run]:
    """The last step's record of each run that carries `metric`, or the last record of each step."""
    last, other = {}, set()
    with _opened(file, "rb") as lines:
        for number, line in numbered(lines, file):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            record = _parse(line, where)
            if protocol_id not in (None, record["protocol_id"]):
                continue
            if metric not in record["metrics"]:
                other |= set(record["metrics"])
                continue
            step = record["step"]
            key = (record["run"], step) if curves else record["run"]
            if key not in last or step >= last[key][0]:
                last[key] = (step, record, where)
    if not last:
        raise UsageError(f"{file}: no record has metrics.{metric}; found {', '.join(sorted(other)) or 'no metric'}")
    return [_run(record, metric, where) for _, record, where in last.values()]


def _parse(line: bytes, where: str) -> dict:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where}: not a JSON line ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: found {type(record).__name__}, expected a JSON object")
    for name, kind in {
        "run": str,
        "step": int,
        **dict.fromkeys(RECORD, (int, float)),
        "metrics": dict,
        "protocol": dict,
    }.items():
        if name not in record:
            raise UsageError(f"{where}: no field {name!r}; {_nearest(name, record)}")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise UsageError(f"{where}: {name} is {record[name]!r}, a {type(record[name]).__name__}")
    if not isinstance(record.setdefault("protocol_id", ""), str):
        raise UsageError(f"{where}: protocol_id is {record['protocol_id']!r}, expected text")
    _check_name(record["run"], "run", where)
    return record


def _check_name(name: str, what: str, where: str) -> None:
    """Names go to terminals and reports."""
    if not name.isprintable() or len(name) > 200:
        raise UsageError(f"{where}: {what} is {name!r}, expected at most 200 characters, all of them printable")


def _run(record: dict, metric: str, where: str) -> Run:
    metrics = record["metrics"]
    values = {ours: _positive(record[theirs], theirs, where) for theirs, ours in RECORD.items()}
    try:
        convention = of_record(record["protocol"])
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return Run(
        name=record["run"],
        loss=_metric(record, metric, where),
        loss_se=_metric(record, f"{metric}_se", where, 0.0),
        protocol=record["protocol"],
        protocol_id=record["protocol_id"],
        metrics=metrics,
        source=where,
        convention=convention,
        **values,
    )


def _metric(record: dict, name: str, where: str, default: float | None = None) -> float:
    value = record["metrics"].get(name, default)
    if not isinstance(value, (int, float)):
        raise UsageError(f"{where}: metrics.{name} is {value!r}, expected a number")
    return _positive(value, f"metrics.{name}", where, zero=default is not None)


def _read_csv(file: str, stated: Mapping, tokens_per_image: float | int) -> list[Run]:
    with _opened(file, "r", newline="", encoding="utf-8-sig", errors="replace") as lines:
        reader = csv.reader((line for _, line in numbered(lines, file)), skipinitialspace=True, strict=True)
        columns = [c.strip() for c in next(reader, [])]
        _check_columns(file, columns)
        rows = (_row(columns, cells, f"{file}:{reader.line_num}") for cells in reader if cells)
        runs, said, given = [], [], []
        for i, row in enumerate(rows):
            where = f"{file}:{reader.line_num}"
            runs.append(_csv_run(row, where, i))
            said.append(of_cells(row, where))
            given.append(bool((row.get("flops") or "").strip()))
    if not runs:
        raise UsageError(f"{file}: found a header and no run below it")
    return of_table(runs, said, given, stated, tokens_per_image)


def _row(columns: list, cells: list, where: str) -> dict:
    """Column -> cell. Cells beyond the header would shift a number into another column's place."""
    if any(cell.strip() for cell in cells[len(columns) :]):
        raise UsageError(f"{where}: found {len(cells)} fields, expected {len(columns)} as in the header")
    return dict(zip(columns, cells, strict=False))


def _check_columns(file: str, columns: list) -> None:
    if len(columns) > COLUMNS:
        raise UsageError(f"{file}: found {len(columns):,} columns, expected at most {COLUMNS:,}")
    for name in REQUIRED + OPTIONAL:
        if columns.count(name) > 1:
            raise UsageError(f"{file}: found the column {name!r} twice, expected it once")
    for name in REQUIRED:
        if name not in columns:
            raise UsageError(f"{file}: no column {name!r}; {_nearest(name, columns)}")
    absent = [name for name in OPTIONAL if name not in columns]
    for column in columns:  # a misspelt optional column would silently fall back to its default
        near = get_close_matches(column[:100].lower(), absent, 1, cutoff=0.8)
        if column not in REQUIRED + OPTIONAL and near:
            raise UsageError(f"{file}: unknown column {column!r}; did you mean {near[0]!r}?")


def _csv_run(row: dict, where: str, index: int) -> Run:
    def number(name, default=None, zero=False):
        found = row.get(name)
        if default is not None and not (found or "").strip():
            return default
        return _positive(found, name, where, zero)

    def text(name, default=""):
        found = (row.get(name) or "").strip() or default
        _check_name(found, name, where)
        return found

    params, tokens = number("params"), number("tokens")
    return Run(
        name=text("run", f"row{index + 1}"),
        params=params,
        tokens=tokens,
        flops=_positive(number("flops", 6.0 * params * tokens), "flops", where),
        loss=number("loss"),
        loss_se=number("loss_se", 0.0, zero=True),
        images=number("images", math.nan),
        group=text("group"),
        source=where,
    )


def _positive(value, name: str, where: str, zero: bool = False) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{where}: {name} is {value!r}, expected a number") from None
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise UsageError(f"{where}: {name} is {value}, expected a finite number {'at least' if zero else 'above'} 0")
    if number and not SMALLEST <= number <= 1 / SMALLEST:
        raise UsageError(f"{where}: {name} is {value}, expected a number from {SMALLEST:g} to {1 / SMALLEST:g}")
    return number


def _nearest(name: str, found) -> str:
    found = list(found)[:COLUMNS]
    near = get_close_matches(name, [f[:100] for f in found], 1, cutoff=0.3)
    return f"nearest found {near[0]!r}" if near else f"found {', '.join(map(str, found)) or 'nothing'}"


def _same_protocol(first: Run, run: Run) -> None:
    if first.protocol == run.protocol:
        return
    a, b = flatten(first.protocol), flatten(run.protocol)
    absent = "(absent)"
    name = next((k for k in [*a, *b] if a.get(k, absent) != b.get(k, absent)), None)
    if name is None:  # the same dotted names and values, nested otherwise
        raise UsageError(f"{run.source}: protocol is {run.protocol!r}, but {first.protocol!r} in {first.source}")
    raise UsageError(
        f"{run.source}: protocol field {name!r} is {b.get(name, absent)!r}, but {a.get(name, absent)!r} in {first.source}; "
        "one fit takes one protocol"
    )


def flatten(nested: dict, prefix: str = "") -> dict:
    """Nested mapping -> dotted key -> leaf."""
    flat = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat
