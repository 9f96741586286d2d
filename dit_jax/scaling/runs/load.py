"""Where runs come from: the evaluation records of run folders, or a table; checked, and never of mixed protocols."""

import io
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from itertools import pairwise

from dit_jax.error import UsageError, shown
from dit_jax.files import DEEPEST, LARGEST, absolute, base, below, is_file, names, numbered, parse_json, read, remote
from dit_jax.log import warn
from dit_jax.scaling.runs.cells import (
    agrees,
    check_name,
    condition,
    is_number,
    nearest,
    opened,
    places,
    positive,
    readable,
)
from dit_jax.scaling.runs.columns import Columns, Expected, is_records, read_rows
from dit_jax.scaling.runs.conventions import of_record, require_same
from dit_jax.scaling.runs.run import Run, require_same_start, tell_start
from dit_jax.scaling.runs.stated import COLUMNS as STATED
from dit_jax.scaling.runs.stated import of_cells, of_table, require_stated
from dit_jax.scaling.runs.task import OBJECT, task_of
from dit_jax.workdir.scalars import segments

OPTIONAL = ("images", "run", "group", "loss_se", "unique_tokens", "unique_images", *STATED)
TABLE = Expected(("params", "loss"), OPTIONAL, (("tokens", "flops"),))
RECORD = {  # field of a record -> field of a Run
    "params_active": "params",
    "params": "params_total",
    "images_seen": "images",
    "tokens_seen": "tokens",
    "flops_train": "flops",
}
NEEDED = {"run": str, "step": int} | dict.fromkeys(RECORD, (int, float)) | {"metrics": dict, "protocol": dict}
NAME = "records.jsonl"
STUDY = 5, 3, 1.5  # runs, sizes and the ratio of the largest to the smallest compute, at least, of a study by itself


def load_runs(
    paths: str | os.PathLike | Iterable,
    metric: str = "loss",
    protocol_id: str | None = None,
    curves: bool = False,
    stated: Mapping | None = None,
    tokens_per_image: float | int = math.nan,
    columns: Mapping | None = None,
    where: Sequence[str] = (),
    best_of: str | None = None,
    missing: bool = False,
) -> list[Run]:
    """Runs of `paths`: workdirs, folders of workdirs, records or tables. One run per record name, at its last step; with `curves`, one for
    each step evaluated.

    Paths are on a disk or in a bucket (gs://). Folders are searched for `eval/records.jsonl` and for the objects in `eval/records/`, which
    a bucket holds instead; one named `extrapolation...` counts only when it is itself given, so that a model trained to
    test a law does not enter it. Of records `protocol_id` takes those of one protocol. Tables (CSV, TSV, JSON lines: told by their content)
    have the columns params, loss, and tokens or flops, of which one may be missing: C = 6ND then. `columns` gives them our names (ours ->
    theirs, or FACTOR*THEIRS), `stated` says what they do not (field of a Convention -> one of its CHOICES). `where` holds FIELD=VALUE texts
    over a table's own columns, or the dotted names of a protocol: only what agrees is taken. `best_of` names the column of a sweep, whose
    cells become `Run.setting`. Refused: runs whose protocols or conventions differ, or of which only some began with other weights, tables
    of several studies, and losses that are blank, nan or a word, unless `missing` keeps them as nan (`verdicts.quality.drop` leaves them
    out).
    """
    stated, table = stated or {}, Columns(columns or {}, where)
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    runs, read, known = [], *read_all(paths)
    for file, records in read:
        if records is None:
            runs += _read_table(file, table, stated, tokens_per_image, best_of)
        elif best_of:
            raise UsageError(f"{file}: holds records, expected a table with the column {best_of!r} of --best_of")
        else:
            found = _read_records(file, records, metric, protocol_id, curves, where, known)
            require_stated(found[-1:], stated)
            runs += found
    if not runs:
        chosen = f" with {', '.join(where)}" if where else ""
        raise UsageError(f"RUNS: found no run in {', '.join(map(str, paths)) or 'an empty list'}{chosen}")
    for run in runs[1:]:
        _same_protocol(runs[0], run)
        require_same_start(runs[0], run)
        require_same(runs[0].convention, run.convention, run.source)
    tell_start(runs)
    gone = [] if missing else [run.source for run in runs if math.isnan(run.loss)]
    if gone:
        what = f"loss is blank, nan or a word in {len(gone)} of {len(runs)} rows"
        rest = (
            "leave these rows out (fit: --drop=missing)" if len(gone) < len(runs) else "name another --column loss=NAME"
        )
        raise UsageError(f"{places(gone)}: {what}, expected numbers; fill them in, or {rest}")
    assumed = tuple({name: None for run in runs for name in run.convention.assumed})
    return [replace(run, convention=replace(run.convention, assumed=assumed)) for run in runs]


def sources(paths: Iterable) -> Iterator[tuple[str, Iterator[tuple[str, bytes]] | None]]:
    """Yield (name, (place, line) of each record) for the records and tables that paths name, each once; None for the lines of a table.

    The objects of a bucket are read several at once.
    """
    found, pool = files_of(paths), futures.ThreadPoolExecutor(8)
    try:
        away = [part for name, parts in found.items() if _is_run(name, parts) for part in parts if remote(part)]
        coming = {part: pool.submit(read, part, LARGEST) for part in away}
        for name, parts in found.items():
            yield name, _lines(parts, coming) if _is_run(name, parts) or is_records(name) else None
    finally:
        pool.shutdown(cancel_futures=True)


def _is_run(name: str, parts: Sequence[str]) -> bool:
    """Whether a source of `files_of` is told to hold records by its name alone."""
    return name not in parts or base(name) == NAME


def _lines(parts: Sequence[str], coming: Mapping) -> Iterator[tuple[str, bytes]]:
    for part in parts:
        with readable(part), io.BytesIO(coming[part].result()) if part in coming else opened(part) as data:
            for number, line in numbered(data, part):
                if line.strip():
                    yield f"{part}:{number}", line


def files_of(paths: Iterable) -> dict[str, list[str]]:
    """Map each source of runs that paths name to its files: a file itself, or for each run its `eval/records.jsonl` and the objects in its
    `eval/records/`, after which it is called if there are only these."""
    found = [one for path in paths for one in _below(os.fspath(path))]
    once = {name if remote(name) else os.path.realpath(name): (name, parts) for name, parts in reversed(found)}
    return dict([*once.values()][::-1])


def _below(path: str) -> list[tuple[str, list[str]]]:
    path = absolute(path) if remote(path) else path
    given = f"{path.rstrip('/')}.jsonl" if f"/{path.rstrip('/')}".endswith("/eval/records") else path
    if base(given) == NAME and (parts := _parts(given)):
        return [_named(given, parts)]
    if is_file(path):
        return [(path, [path])]
    found = _in_bucket(path) if remote(path) else _on_disk(path)
    if not found:
        raise UsageError(
            f"{path}: found no eval/records.jsonl in it, expected an evaluated workdir or a folder of them"
        )
    return [_named(os.path.join(folder, "eval", NAME), parts) for folder, parts in found.items()]


def _named(file: str, parts: list[str]) -> tuple[str, list[str]]:
    return (file if file in parts else segments(file)), parts


def _parts(file: str) -> list[str]:
    """The file of a run's records, and the objects in the folder that stands for it in a bucket, in order of their names."""
    folder = segments(file)
    return [file] * is_file(file) + [os.path.join(folder, name) for name in names(folder) if name.endswith(".json")]


def _on_disk(path: str) -> dict[str, list[str]]:
    """Map the folders of runs below `path` to the files of their records."""
    if not os.path.isdir(path):
        raise UsageError(f"{path}: no such file or folder")
    found = {}
    for folder, inside, _ in os.walk(path):
        if folder.count(os.sep) - path.count(os.sep) > DEEPEST:
            raise UsageError(f"{folder}: found folders more than {DEEPEST} deep, expected runs nearer to {path}")
        inside[:] = sorted(name for name in inside if not name.startswith("extrapolation"))
        if parts := _parts(os.path.join(folder, "eval", NAME)):
            found[folder] = parts
    return found


def _in_bucket(path: str) -> dict[str, list[str]]:
    """The same of a bucket, in the same order, by one listing."""
    found: dict = {}
    if not (objects := below(path)):
        raise UsageError(f"{path}: no such file or folder")
    for name in objects:
        folder = (match := OBJECT.fullmatch(name)) and (match[1] or "").split("/")
        if match and not any(part.startswith("extrapolation") for part in folder):
            found.setdefault(tuple(folder), []).append(os.path.join(path, name))
    return {os.path.join(path, *folder).rstrip("/"): found[folder] for folder in sorted(found)}


def _read_records(
    file: str,
    records: Sequence[tuple[dict, str]],
    metric: str,
    protocol_id: str | None,
    curves: bool,
    where: Sequence[str] = (),
    known: Collection = (),
) -> list[Run]:
    """The last step's record of each run that carries `metric`, or the last record of each step."""
    wanted, last, other = [condition(text) for text in where], {}, set()
    for record, at in records:
        if protocol_id not in (None, record["protocol_id"]):
            continue
        if metric not in record["metrics"]:
            other |= set(record["metrics"])
            continue
        if not agrees(flatten(record["protocol"]), wanted, at, known):
            continue
        step = record["step"]
        key = (record["run"], step) if curves else record["run"]
        if key not in last or step >= last[key][0]:
            last[key] = (step, record, at)
    if not last and not wanted:
        raise UsageError(f"{file}: no record has metrics.{metric}; found {', '.join(sorted(other)) or 'no metric'}")
    return [_run(record, metric, at) for _, record, at in last.values()]


def read_all(paths: Iterable) -> tuple[list, set]:
    """(file, its records with where they stand, or None of a table) for each source of `paths`, and the dotted names that any of their
    protocols has."""
    read = [(f, ls if ls is None else [(parse_record(line, at), at) for at, line in ls]) for f, ls in sources(paths)]
    return read, {name for _, records in read for r, _ in records or () for name in flatten(r["protocol"])}


def parse_record(line: bytes, where: str) -> dict:
    """A line of records.jsonl with the fields that a run needs, checked; its task stands in its protocol, so that tasks do not mix."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where}: not a JSON line ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: found {type(record).__name__}, expected a JSON object")
    for name, kind in NEEDED.items():
        if name not in record:
            raise UsageError(f"{where}: no field {name!r}; {nearest(name, record)}")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise UsageError(f"{where}: {name} is {record[name]!r}, a {type(record[name]).__name__}")
    if not isinstance(record.setdefault("protocol_id", ""), str):
        raise UsageError(f"{where}: protocol_id is {record['protocol_id']!r}, expected text")
    check_name(record["run"], "run", where)
    if record["protocol"]:
        record["protocol"] = {**record["protocol"], "task": task_of(record, where)}
    for name, value in [*record["metrics"].items()]:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            warn(f"{where}: metrics.{name} is {value}, which is no number; it counts as not recorded")
            del record["metrics"][name]
    return record


def _run(record: dict, metric: str, where: str) -> Run:
    metrics = record["metrics"]
    values = {ours: positive(record[theirs], theirs, where) for theirs, ours in RECORD.items()}
    try:
        convention = of_record(record["protocol"])
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    unique = record.get("unique_images")
    if unique is not None:
        unique = positive(unique, "unique_images", where) * values["tokens"] / values["images"]
    return Run(
        name=record["run"],
        unique=math.nan if unique is None else unique,
        loss=_metric(record, metric, where),
        loss_se=_metric(record, f"{metric}_se", where, 0.0),
        protocol=record["protocol"],
        protocol_id=record["protocol_id"],
        metrics=metrics,
        source=where,
        convention=convention,
        init=init_of(record, where),
        **values,
    )


def init_of(record: dict, where: str) -> dict:
    """What a record's run began with, checked; {} if nothing."""
    found = record.get("init") or {}
    cost = found.get("flops_train") if isinstance(found, dict) else None
    if found and not (isinstance(found, dict) and isinstance(found.get("run"), str) and type(found.get("step")) is int):
        raise UsageError(f"{where}: init is {shown(found)}, expected an object with run, step and flops_train")
    return found and found | {"flops_train": None if cost is None else positive(cost, "init.flops_train", where, True)}


def _metric(record: dict, name: str, where: str, default: float | None = None) -> float:
    value = record["metrics"].get(name, default)
    if not isinstance(value, (int, float)) and (value is not None or default is not None):
        raise UsageError(f"{where}: metrics.{name} is {value!r}, expected a number")
    return (
        _loss(value, f"metrics.{name}", where) if default is None else positive(value, f"metrics.{name}", where, True)
    )


def _loss(value, name: str, where: str) -> float:
    """A loss; nan where there is none: nothing, or a word such as nan or diverged."""
    none = not isinstance(value, bool) and not any(c.isdigit() for c in str(value))
    return math.nan if none else positive(value, name, where)


def _read_table(
    file: str, columns: Columns, stated: Mapping, tokens_per_image: float | int, best_of: str | None
) -> list[Run]:
    rows, runs = [], []
    for row, where in read_rows(file, TABLE, columns):
        if best_of and best_of not in row:
            raise UsageError(f"{file}: no column {best_of!r}, which --best_of names; {nearest(best_of, row)}")
        rows.append(row)
        runs.append(_table_run(row, where, len(rows), best_of))
    if not runs and not columns.where:
        raise UsageError(f"{file}: found a header and no run below it")
    said = [of_cells(row, run.source) for row, run in zip(rows, runs, strict=True)]
    given = [("tokens",) * ("tokens" in row) + ("flops",) * bool((row.get("flops") or "").strip()) for row in rows]
    runs = runs and of_table(runs, said, given, stated, tokens_per_image)
    _check_studies(file, rows, runs, {best_of, "seed", *(condition(text)[0] for text in columns.where)})
    return runs


def _table_run(row: dict, where: str, number_of_row: int, best_of: str | None) -> Run:
    """A row as a run; of tokens and flops the one that is absent is that of C = 6ND."""

    def number(name, default=None, zero=False):
        found = row.get(name)
        if default is not None and not (found or "").strip():
            return default
        return positive(found, name, where, zero)

    def text(name, default=""):
        found = (row.get(name) or "").strip() or default
        check_name(found, name, where)
        return found

    params = number("params")
    derived = "tokens" not in row
    tokens = positive(number("flops") / (6.0 * params), "flops / (6 params)", where) if derived else number("tokens")
    images, unique = number("images", math.nan), number("unique_tokens", math.nan)
    if math.isnan(unique) and (row.get("unique_images") or "").strip():
        if math.isnan(images):
            raise UsageError(f"{where}: found unique_images and no images, expected both, or unique_tokens")
        unique = number("unique_images") * tokens / images
    return Run(
        name=text("run", f"row{number_of_row}") + (f", seed {text('seed')}" if row.get("run") and text("seed") else ""),
        params=params,
        tokens=tokens,
        flops=positive(number("flops", 6.0 * params * tokens), "flops", where),
        loss=_loss(row["loss"], "loss", where),
        loss_se=number("loss_se", 0.0, zero=True),
        images=images,
        unique=unique,
        group=text("group"),
        setting=text(best_of) if best_of else "",
        source=where,
    )


def _check_studies(file: str, rows: Sequence[dict], runs: Sequence[Run], chosen: set) -> None:
    """Raises UsageError where text columns split the runs into studies: ladders over the same compute, each with sizes of its own."""
    few, sizes, wide = STUDY
    found = {}
    for name in rows[0] if rows else ():
        cells = [(row[name] or "").strip() for row in rows]
        if name in TABLE.known or name in chosen or any(map(is_number, cells)):
            continue
        studies: dict = {}
        for cell, run in zip(cells, runs, strict=True):
            studies.setdefault(cell, []).append(run)
        ladders = [s for s in studies.values() if len(s) >= few and len({r.params for r in s}) >= sizes]
        spans = sorted((min(r.flops for r in s), max(r.flops for r in s)) for s in ladders)
        if any(b[0] < a[1] / wide for a, b in pairwise([s for s in spans if s[1] > wide * s[0]])):
            found[name] = list(studies)
    if found:
        what = "; ".join(f"{name} ({', '.join(v[:5])}{', ...' * (len(v) > 5)})" for name, v in found.items())
        name, (value, *_) = next(iter(found.items()))
        raise UsageError(
            f"{file}: text columns split the runs into studies over the same compute: {what}; take one with --where '{name}={value}', or "
            f"all as one with --where '{name}=*'"
        )


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
