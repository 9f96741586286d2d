"""Where runs come from: the evaluation records of run folders, or a CSV; checked, and never of mixed protocols."""

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from dit_jax.config import UsageError

REQUIRED = ("params", "tokens", "loss")
OPTIONAL = ("flops", "images", "run", "group", "loss_se")
RECORD = {  # field of a record -> field of a Run
    "params_active": "params",
    "params": "params_total",
    "images_seen": "images",
    "tokens_seen": "tokens",
    "flops_train": "flops",
}


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


def load_runs(paths: str | os.PathLike | Iterable, metric: str = "loss", protocol_id: str | None = None) -> list[Run]:
    """Runs of `paths`: workdirs, folders of workdirs, records.jsonl files or CSVs. One run per record name, at its last step.

    Folders are searched for `eval/records.jsonl`; one named `extrapolation` counts only when it is itself given, so that a
    model trained to test a law does not enter it. `protocol_id` takes the records of that protocol alone. Refuses runs whose
    protocols differ, naming the field and both values.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    runs, seen = [], set()
    for path in map(os.fspath, paths):
        for file in _files(path):
            if os.path.realpath(file) not in seen:
                seen.add(os.path.realpath(file))
                runs += _read_csv(file) if file.endswith(".csv") else _read_records(file, metric, protocol_id)
    if not runs:
        raise UsageError(f"RUNS: found no run in {', '.join(map(str, paths)) or 'an empty list'}")
    for run in runs[1:]:
        _same_protocol(runs[0], run)
    return runs


def _files(path: str) -> list[str]:
    if os.path.isfile(path):
        if not path.endswith((".csv", ".jsonl")):
            raise UsageError(f"{path}: found a file, expected a workdir, a .csv or a records.jsonl")
        return [path]
    if not os.path.isdir(path):
        raise UsageError(f"{path}: no such file or folder")
    found = []
    for folder, below, _ in os.walk(path):
        below[:] = sorted(b for b in below if b != "extrapolation")
        file = os.path.join(folder, "eval", "records.jsonl")
        if os.path.isfile(file):
            found.append(file)
    if not found:
        raise UsageError(
            f"{path}: found no eval/records.jsonl in it, expected an evaluated workdir or a folder of them"
        )
    return found


def _read_records(file: str, metric: str, protocol_id: str | None) -> list[Run]:
    """The last step's record of each run that carries `metric`."""
    last, other = {}, set()
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            record = _parse(line, where)
            if protocol_id not in (None, record.get("protocol_id", "")):
                continue
            if metric not in record["metrics"]:
                other |= set(record["metrics"])
                continue
            step, before = record["step"], last.get(record["run"])
            if before is None or step >= before[0]:
                last[record["run"]] = (step, record, where)
    if not last:
        raise UsageError(f"{file}: no record has metrics.{metric}; found {', '.join(sorted(other)) or 'no metric'}")
    return [_run(record, metric, where) for _, record, where in last.values()]


def _parse(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not a JSON line ({error.msg} at column {error.colno})") from None
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
    return record


def _run(record: dict, metric: str, where: str) -> Run:
    metrics = record["metrics"]
    values = {ours: _positive(record[theirs], theirs, where) for theirs, ours in RECORD.items()}
    return Run(
        name=record["run"],
        loss=_positive(metrics[metric], f"metrics.{metric}", where),
        loss_se=_positive(metrics.get(f"{metric}_se", 0.0), f"metrics.{metric}_se", where, zero=True),
        protocol=record["protocol"],
        protocol_id=str(record.get("protocol_id", "")),
        metrics=metrics,
        source=where,
        **values,
    )


def _read_csv(file: str) -> list[Run]:
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True)
        columns = [c.strip() for c in reader.fieldnames or ()]
        _check_columns(file, columns)
        reader.fieldnames = columns
        runs = [_csv_run(row, f"{file}:{reader.line_num}", i) for i, row in enumerate(reader)]
    if not runs:
        raise UsageError(f"{file}: found a header and no run below it")
    return runs


def _check_columns(file: str, columns: list) -> None:
    for name in REQUIRED:
        if name not in columns:
            raise UsageError(f"{file}: no column {name!r}; {_nearest(name, columns)}")
    absent = [name for name in OPTIONAL if name not in columns]
    for column in columns:  # a misspelt optional column would silently fall back to its default
        near = get_close_matches(column.lower(), absent, 1, cutoff=0.8)
        if column not in REQUIRED + OPTIONAL and near:
            raise UsageError(f"{file}: unknown column {column!r}; did you mean {near[0]!r}?")


def _csv_run(row: dict, where: str, index: int) -> Run:
    def number(name, default=None, zero=False):
        text = row.get(name)
        if default is not None and not (text or "").strip():
            return default
        return _positive(text, name, where, zero)

    params, tokens = number("params"), number("tokens")
    return Run(
        name=(row.get("run") or "").strip() or f"row{index + 1}",
        params=params,
        tokens=tokens,
        flops=number("flops", 6.0 * params * tokens),
        loss=number("loss"),
        loss_se=number("loss_se", 0.0, zero=True),
        images=number("images", math.nan),
        group=(row.get("group") or "").strip(),
        source=where,
    )


def _positive(value, name: str, where: str, zero: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{where}: {name} is {value!r}, expected a number") from None
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise UsageError(f"{where}: {name} is {value}, expected a finite number {'at least' if zero else 'above'} 0")
    return number


def _nearest(name: str, found) -> str:
    found = list(found)
    near = get_close_matches(name, found, 1, cutoff=0.3)
    return f"nearest found {near[0]!r}" if near else f"found {', '.join(map(str, found)) or 'nothing'}"


def _same_protocol(first: Run, run: Run) -> None:
    if first.protocol == run.protocol:
        return
    a, b = flatten(first.protocol), flatten(run.protocol)
    absent = "(absent)"
    name = next(k for k in [*a, *b] if a.get(k, absent) != b.get(k, absent))
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
