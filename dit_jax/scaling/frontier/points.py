"""Scores of models sampled in many ways: from records or a CSV; only how an image is drawn may differ between them.

A point is one model, one sampler, one number of steps and one guidance, with the cost of an image and its score. What
differs beyond that (data set, weights, reference, number of samples, convention of FLOPs ...) is refused by name.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from scipy import stats

from dit_jax.error import UsageError, shown
from dit_jax.files import numbered
from dit_jax.scaling.names import SAMPLING
from dit_jax.scaling.runs import Run, flatten
from dit_jax.scaling.runs.cells import agrees, check_name, condition, finite, is_number, opened, positive
from dit_jax.scaling.runs.columns import Columns, Expected, is_records, read_rows, scaled
from dit_jax.scaling.runs.load import files_of, parse_record

NUMBERS = ("params", "tokens", "images", "flops_train", "loss", "seconds_sample")  # optional columns, as in a record
OPTIONAL = (*NUMBERS, "sampler", "steps", "guidance", "spacing", "passes", "flops_sample", "flops_step")
KNOWN = ("name", "run", "group", "seed", "step", "flops", "loss_se", *OPTIONAL)  # columns of tables that are no metric
HIGHER = ("is", "precision", "recall", "density", "coverage", "clip_score")  # metrics of which more is better
NAMES = {"flops_train": "train", "seconds_sample": "seconds", "flops_sample": "flops"}  # column -> field


@dataclass(frozen=True)
class Point:
    """One model at its last evaluated step, sampled in one way. nan or "" = not recorded; FLOPs are 2 x MACs."""

    name: str
    score: float | int
    score_se: float | int = 0.0  # of the evaluation; 0 = not recorded
    flops: float | int = math.nan  # of one sampled image, guided steps counted twice
    seconds: float | int = math.nan  # of one sampled image
    sampler: str = ""
    steps: float | int = math.nan
    guidance: float | int = math.nan
    spacing: str = ""
    train: float | int = math.nan  # training FLOPs
    params: float | int = math.nan  # active per token
    tokens: float | int = math.nan
    images: float | int = math.nan  # trained on
    loss: float | int = math.nan  # held out, of the same weights
    protocol: dict = field(default_factory=dict)
    loss_protocol: dict = field(default_factory=dict)
    source: str = ""  # file and line, for messages
    sign: int = 0  # of the metric: +1 more is better, -1 less, 0 = not recorded

    @property
    def sampling(self) -> str:
        """How its images are drawn, in words."""
        parts = [self.sampler, f"{self.steps:g} steps" * (not math.isnan(self.steps)), self.spacing]
        parts.append(f"guidance {self.guidance:g}" * (not math.isnan(self.guidance)))
        return ", ".join(part for part in parts if part)

    def run(self) -> Run:
        """The point as a run whose loss is the score, for the fits. Raises UsageError without params, tokens, flops_train."""
        for name in ("params", "tokens", "train"):
            if math.isnan(getattr(self, name)):
                column = {"train": "flops_train"}.get(name, name)
                raise UsageError(f"{self.source}: no {column} of {self.name}, expected it for a fit of budgets")
        numbers = dict(params=self.params, tokens=self.tokens, flops=self.train, loss=self.score, loss_se=self.score_se)
        return Run(self.name, images=self.images, protocol=self.protocol, source=self.source, **numbers)


def higher_is_better(metric: str, points: Sequence[Point] = ()) -> bool:
    """Whether more of a metric is better, as the points' records state, or else by its name, of whatever network."""
    if stated := {p.sign for p in points} - {0}:
        return stated == {1}
    return any(metric == name or metric.startswith(f"{name}_") for name in HIGHER)


def load_points(
    paths: str | os.PathLike | Iterable,
    metric: str = "fid",
    where: Sequence[str] = (),
    sampled: bool = False,
    columns: Mapping | None = None,
) -> list[Point]:
    """The points of `paths`: workdirs, folders of them, records.jsonl files or CSVs; of each run those of its last step.

    `where` holds FIELD=VALUE texts over the dotted names of the protocol (or the columns of a CSV): only what agrees is
    taken. `sampled` asks for the cost of an image. A CSV has the columns `name`, the metric, and either `flops_sample`
    (FLOPs of one image) or `flops_step` (of one unguided call of the model) and `steps`: then the cost is flops_step x
    steps x passes, where `passes`, if it is not a column, is 2 where there is a guidance other than 1. `columns` gives a CSV's
    columns our names (ours -> theirs). Raises UsageError on what is missing or no number, and where the protocols differ in more than
    SAMPLING.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    wanted, table = [condition(text) for text in where], Columns(columns or {}, where)
    points: list = []
    for file in files_of(paths):
        if not is_records(file):
            points += _read_csv(file, metric, table)
        else:
            points += _own_names(_read_records(file, metric, wanted), file, {p.name for p in points})
    if not points:
        raise UsageError(f"RUNS: found no {metric} in {', '.join(map(str, paths))}{_which(where)}")
    for point in points:
        _same(points[0], point, "protocol")
        if sampled and math.isnan(point.flops):
            raise UsageError(
                f"{point.source}: no flops_sample of {point.name}, expected the FLOPs of one sampled image"
            )
    for point in (found := [p for p in points if p.loss_protocol]):
        _same(found[0], point, "loss_protocol")
    _check_distinct(points)
    return points


def find_metric(paths: Iterable, where: Sequence[str] = (), columns: Mapping | None = None) -> str:
    """The metric that records or CSVs have: "fid" if it is among them, else the only one besides the loss.

    Raises UsageError, listing them, where there are several others. If there is none it is "fid", of which the loading says that it lacks.
    """
    found: set = set()
    for file in files_of(paths):
        found |= _metrics(file, where) if is_records(file) else _columns(file, where, columns or {})
    if not found or any(name.lower() == "fid" for name in found):
        return "fid"
    if len(found) > 1:
        raise UsageError(f"--metric: found none, expected one of {', '.join(sorted(found))}")
    return found.pop()


def _values(names: set) -> set:
    """Those of the names that are neither the loss nor the spread of another."""
    return {n for n in names if n.split("_")[0] != "loss" and re.sub("_(se|std|low|high)$", "", n) not in names - {n}}


def _metrics(file: str, where: Sequence[str]) -> set:
    """Names of the metrics in records that agree with `where`."""
    found, wanted = set(), [condition(text) for text in where]
    with opened(file, "rb") as lines:
        for number, line in numbered(lines, file):
            if line.strip():
                record = parse_record(line, at := f"{file}:{number}")
                found |= set(record["metrics"]) if agrees(flatten(record["protocol"]), wanted, at) else set()
    return _values(found)


def _columns(file: str, where: Sequence[str], names: Mapping) -> set:
    """Columns of numbers of a CSV, under our names, that are none of ours."""
    ours, found = {scaled(theirs)[1]: name for name, theirs in names.items()}, set()
    for row, _ in read_rows(file, Expected((), ()), Columns({}, where)):
        found |= {column for column, cell in row.items() if is_number(cell)}
    return {name for column in _values(found) if (name := ours.get(column, column)).lower() not in KNOWN}


def _check_distinct(points: list[Point]) -> None:
    seen: dict = {}
    for point in points:
        first = seen.setdefault((point.name, point.sampling), point)
        if first is not point:
            raise UsageError(
                f"{point.source}: {point.name} ({point.sampling or 'no sampling'}) is also in {first.source}, expected it once; "
                "give models, and repeated trainings of one, names of their own"
            )


def _which(where: Sequence[str]) -> str:
    return f" with {', '.join(where)}" if where else ""


def _own_names(points: list[Point], file: str, taken: set) -> list[Point]:
    """Two run folders may hold runs of one name: the later one is then called after its folder too."""
    if not taken.intersection(p.name for p in points):
        return points
    folder = os.path.dirname(os.path.abspath(file))
    return [replace(p, name=f"{p.name} ({folder})") if p.name in taken else p for p in points]


def _same(first: Point, point: Point, which: str) -> None:
    a, b = (_rest(flatten(getattr(p, which))) for p in (first, point))
    name = next((k for k in [*a, *b] if a.get(k, "(absent)") != b.get(k, "(absent)")), None)
    if name is None:
        return
    kind = "protocol" if which == "protocol" else "protocol of the loss"
    raise UsageError(
        f"{point.source}: {kind} field {name!r} is {b.get(name, '(absent)')!r}, but {a.get(name, '(absent)')!r} in "
        f"{first.source}; only {', '.join(SAMPLING)} may differ; choose with --where {name}=VALUE"
    )


def _rest(fields: dict) -> dict:
    """What of a flat protocol must agree."""
    return {name: value for name, value in fields.items() if name not in {f"samples.{s}" for s in SAMPLING}}


def _read_records(file: str, metric: str, wanted: list) -> list[Point]:
    found, losses, last, other = [], {}, {}, set()
    with opened(file, "rb") as lines:
        for number, line in numbered(lines, file):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            record = parse_record(line, where)
            if "loss" in record["metrics"]:
                losses[record["run"], record["step"], _weights(record)] = record
            if metric not in record["metrics"]:
                other |= set(record["metrics"])
            elif agrees(flatten(record["protocol"]), wanted, where):
                found.append((record, where))
                last[record["run"]] = max(record["step"], last.get(record["run"], record["step"]))
    if not found and not wanted:
        raise UsageError(f"{file}: no record has metrics.{metric}; found {', '.join(sorted(other)) or 'no metric'}")
    newest = {}
    for record, where in found:
        if record["step"] == last[record["run"]]:  # a record written twice counts once
            newest[record["run"], repr(sorted(flatten(record["protocol"]).items()))] = (record, where)
    return [_point(r, metric, where, losses.get((r["run"], r["step"], _weights(r)))) for r, where in newest.values()]


def _weights(record: dict) -> str:
    return repr(record["protocol"].get("weights"))


def _point(record: dict, metric: str, where: str, with_loss: dict | None) -> Point:
    metrics, samples = record["metrics"], record["protocol"].get("samples")
    samples = samples if isinstance(samples, dict) else {}
    numbers = {"train": "flops_train", "params": "params_active", "tokens": "tokens_seen", "images": "images_seen"}
    values = {ours: positive(record[theirs], theirs, where) for ours, theirs in numbers.items()}
    for ours, theirs in (("flops", "flops_sample"), ("seconds", "seconds_sample")):
        values[ours] = positive(record[theirs], theirs, where) if theirs in record else math.nan
    for name in ("steps", "guidance"):
        values[name] = positive(samples[name], f"samples.{name}", where, zero=True) if name in samples else math.nan
    if with_loss and metric != "loss":
        values["loss"] = positive(with_loss["metrics"]["loss"], "metrics.loss", where)
        values["loss_protocol"] = with_loss["protocol"]
    return Point(
        name=record["run"],
        score=positive(metrics[metric], f"metrics.{metric}", where),
        score_se=_standard_error(metrics, metric, where, record["protocol"].get("bootstrap")),
        sampler=str(samples.get("sampler", "")),
        spacing=str(samples.get("spacing", "")),
        protocol=record["protocol"],
        source=where,
        sign=_sign(record.get("metric_signs", {}), metric, where),
        **values,
    )


def _sign(signs: object, metric: str, where: str) -> int:
    found = signs.get(metric, 0) if isinstance(signs, dict) else signs
    if found not in (-1, 0, 1):
        raise UsageError(f"{where}: metric_signs: found {shown(found)} for {metric}, expected 1 or -1")
    return int(found)


def _standard_error(metrics: dict, metric: str, where: str, resamples=None) -> float:
    """From METRIC_se, else from the 95 % interval METRIC_low, METRIC_high, which is Student's t over `resamples`; else 0."""
    if f"{metric}_se" in metrics:
        return positive(metrics[f"{metric}_se"], f"{metric}_se", where, zero=True)
    ends = [metrics.get(f"{metric}_{end}") for end in ("low", "high")]
    if None in ends:
        return 0.0
    low, high = (finite(end, f"{metric}_{name}", where) for end, name in zip(ends, ("low", "high"), strict=True))
    if low > high:
        raise UsageError(f"{where}: {metric}_low is {low:g}, above {metric}_high, {high:g}")
    freedom = resamples - 1 if isinstance(resamples, int) and resamples > 1 else math.inf
    return (high - low) / 2 / float(stats.t.ppf(0.975, freedom))


def _read_csv(file: str, metric: str, columns: Columns) -> list[Point]:
    expected = Expected(("name", metric), (*OPTIONAL, *(f"{metric}_{end}" for end in ("se", "low", "high"))))
    points = [_csv_point(row, metric, at) for row, at in read_rows(file, expected, columns)]
    if not points and not columns.where:
        raise UsageError(f"{file}: found a header and no row below it")
    return points


def _csv_point(row: dict, metric: str, where: str) -> Point:
    def number(name: str, zero: bool = False) -> float:
        found = (row.get(name) or "").strip()
        return positive(found, name, where, zero) if found else math.nan

    def text(name: str) -> str:
        found = (row.get(name) or "").strip()
        check_name(found, name, where)
        return found

    if not text("name"):
        raise UsageError(f"{where}: name is empty, expected the name of the model")
    values = {NAMES.get(name, name): number(name) for name in (*NUMBERS, "flops_sample", "steps")}
    values["guidance"] = guidance = number("guidance", zero=True)
    if math.isnan(values["flops"]):
        passes = number("passes")
        passes = (1 if guidance == 1 or math.isnan(guidance) else 2) if math.isnan(passes) else passes
        values["flops"] = number("flops_step") * values["steps"] * passes
    metrics = {name: cell for name, cell in row.items() if (cell or "").strip()}
    return Point(
        name=text("name"),
        score=positive(row.get(metric), metric, where),
        score_se=_standard_error(metrics, metric, where),
        sampler=text("sampler"),
        spacing=text("spacing"),
        source=where,
        **values,
    )
