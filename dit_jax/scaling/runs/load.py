"""Where runs come from: the evaluation records of run folders, or a CSV; checked, and never of mixed protocols."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dit_jax.error import UsageError
from dit_jax.files import DEEPEST, numbered, parse_json
from dit_jax.log import warn
from dit_jax.scaling.runs.cells import agrees, check_name, condition, nearest, opened, positive
from dit_jax.scaling.runs.columns import Columns, Expected, read_rows
from dit_jax.scaling.runs.conventions import Convention, of_record, require_same
from dit_jax.scaling.runs.stated import COLUMNS as STATED
from dit_jax.scaling.runs.stated import of_cells, of_table, require_stated

OPTIONAL = ("images", "run", "group", "loss_se", "unique_tokens", "unique_images", *STATED)
TABLE = Expected(("params", "loss"), OPTIONAL, (("tokens", "flops"),))
RECORD = {  # field of a record -> field of a Run
    "params_active": "params",
    "params": "params_total",
    "images_seen": "images",
    "tokens_seen": "tokens",
    "flops_train": "flops",
}
ROUNDING = 1e-12  # of a loss: what differs by less differs by how float64 rounds
MOVED, CROWDED = (
    4,
    1.5,
)  # tolerances by which C is moved, and runs in a group over those of moved runs, from which budgets are meant


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
    unique: float = math.nan  # different tokens that the run could see, in the unit of `tokens`; nan = not recorded
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
    columns: Mapping | None = None,
    where: Sequence[str] = (),
) -> list[Run]:
    """Runs of `paths`: workdirs, folders of workdirs, records.jsonl files or CSVs. One run per record name, at its last step; with
    `curves`, one for each step evaluated.

    Folders are searched for `eval/records.jsonl`; one named `extrapolation` counts only when it is itself given, so that a
    model trained to test a law does not enter it. `protocol_id` takes the records of that protocol alone. `stated` says of CSVs what
    their columns do not: field of a Convention -> one of its CHOICES. `columns` gives the CSVs' columns our names (ours -> theirs:
    params, tokens, loss, flops, images, run, group, loss_se, ...); `where` holds FIELD=VALUE texts over a CSV's own columns, or the
    dotted names of a protocol: only what agrees is taken. Of tokens and flops a CSV may leave out one: C = 6ND then. Refuses runs
    whose protocols or conventions differ, naming the field and both values.
    """
    stated, table = stated or {}, Columns(columns or {}, where)
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    runs = []
    for file in files_of(paths):
        if file.endswith(".csv"):
            runs += _read_csv(file, table, stated, tokens_per_image)
        else:
            found = _read_records(file, metric, protocol_id, curves, where)
            require_stated(found[-1:], stated)
            runs += found
    if not runs:
        chosen = f" with {', '.join(where)}" if where else ""
        raise UsageError(f"RUNS: found no run in {', '.join(map(str, paths)) or 'an empty list'}{chosen}")
    for run in runs[1:]:
        _same_protocol(runs[0], run)
        require_same(runs[0].convention, run.convention, run.source)
    assumed = tuple({name: None for run in runs for name in run.convention.assumed})
    return [replace(run, convention=replace(run.convention, assumed=assumed)) for run in runs]


def require_varied(runs: Sequence[Run]) -> None:
    """Raises UsageError where the losses of 2 runs or more are all the same, rounding apart."""
    losses = [run.loss for run in runs]
    if len(runs) > 1 and max(losses) - min(losses) <= ROUNDING * max(losses):
        sources = runs[0].source if runs[0].source == runs[-1].source else f"{runs[0].source} to {runs[-1].source}"
        raise UsageError(
            f"{sources or 'RUNS'}: loss is {losses[0]:g} in all {len(runs)} runs, expected losses that differ: no law can be read from "
            "these; check the column, or name another with --column=loss=THEIRS"
        )


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


def scattered(groups: Sequence[tuple], tolerance: float = 0.05) -> str:
    """Why `groups`, as `budgets` gives them, are no planned budgets, or "".

    Fewer than half of the runs are at budgets of 3 sizes or more; or the groups hold hardly more runs than they would if every C were
    another, by up to MOVED x `tolerance` either way: then they are chance.
    """
    runs = [run for _, members in groups for run in members]
    full = sum(len(members) for _, members in groups if len({r.params for r in members}) >= 3)
    if 2 * full < len(runs):
        return f"the runs share no compute budgets: {full} of {len(runs)} are at a budget of 3 sizes or more"
    if all(run.group for run in runs):
        return ""
    size, chance = len(runs) / len(groups), len(runs) / len(budgets(_moved(runs, MOVED * tolerance), tolerance))
    if size >= CROWDED * chance:
        return ""
    return (
        f"the runs share no compute budgets: groups within {tolerance:.0%} of C hold {size:.1f} runs, and would hold {chance:.1f} if every "
        f"C were up to {MOVED * tolerance:.0%} off"
    )


def _moved(runs: Sequence[Run], most: float) -> list[Run]:
    """The runs with their log C moved evenly between -`most` and `most`, neighbours differently."""
    steps = (
        i * (math.sqrt(5) - 1) % 2 - 1 for i in range(len(runs))
    )  # multiples of the golden ratio fill an interval evenly
    ordered = sorted(runs, key=lambda run: run.flops)
    return [replace(run, flops=run.flops * math.exp(most * u)) for run, u in zip(ordered, steps, strict=True)]


def files_of(paths: Iterable) -> list[str]:
    """The files of runs that paths name, each once: a file itself, or every `eval/records.jsonl` below a folder."""
    found = [file for path in paths for file in _below(os.fspath(path))]
    return list({os.path.realpath(file): file for file in reversed(found)}.values())[::-1]


def _below(path: str) -> list[str]:
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


def _read_records(
    file: str, metric: str, protocol_id: str | None, curves: bool, where: Sequence[str] = ()
) -> list[Run]:
    """The last step's record of each run that carries `metric`, or the last record of each step."""
    wanted, last, other = [condition(text) for text in where], {}, set()
    with opened(file, "rb") as lines:
        for number, line in numbered(lines, file):
            if not line.strip():
                continue
            at = f"{file}:{number}"
            record = parse_record(line, at)
            if protocol_id not in (None, record["protocol_id"]):
                continue
            if metric not in record["metrics"]:
                other |= set(record["metrics"])
                continue
            if not agrees(flatten(record["protocol"]), wanted, at):
                continue
            step = record["step"]
            key = (record["run"], step) if curves else record["run"]
            if key not in last or step >= last[key][0]:
                last[key] = (step, record, at)
    if not last and not wanted:
        raise UsageError(f"{file}: no record has metrics.{metric}; found {', '.join(sorted(other)) or 'no metric'}")
    return [_run(record, metric, at) for _, record, at in last.values()]


def parse_record(line: bytes, where: str) -> dict:
    """A line of records.jsonl with the fields that a run needs, checked."""
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
            raise UsageError(f"{where}: no field {name!r}; {nearest(name, record)}")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise UsageError(f"{where}: {name} is {record[name]!r}, a {type(record[name]).__name__}")
    if not isinstance(record.setdefault("protocol_id", ""), str):
        raise UsageError(f"{where}: protocol_id is {record['protocol_id']!r}, expected text")
    check_name(record["run"], "run", where)
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
        **values,
    )


def _metric(record: dict, name: str, where: str, default: float | None = None) -> float:
    value = record["metrics"].get(name, default)
    if not isinstance(value, (int, float)):
        raise UsageError(f"{where}: metrics.{name} is {value!r}, expected a number")
    return positive(value, f"metrics.{name}", where, zero=default is not None)


def _read_csv(file: str, columns: Columns, stated: Mapping, tokens_per_image: float | int) -> list[Run]:
    runs, said, given = [], [], []
    for row, where in read_rows(file, TABLE, columns):
        runs.append(_csv_run(row, where, len(runs)))
        said.append(of_cells(row, where))
        given.append(("tokens",) * ("tokens" in row) + ("flops",) * bool((row.get("flops") or "").strip()))
    if not runs and not columns.where:
        raise UsageError(f"{file}: found a header and no run below it")
    return runs and of_table(runs, said, given, stated, tokens_per_image)


def _csv_run(row: dict, where: str, index: int) -> Run:
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
        name=text("run", f"row{index + 1}"),
        params=params,
        tokens=tokens,
        flops=positive(number("flops", 6.0 * params * tokens), "flops", where),
        loss=number("loss"),
        loss_se=number("loss_se", 0.0, zero=True),
        images=images,
        unique=unique,
        group=text("group"),
        source=where,
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
