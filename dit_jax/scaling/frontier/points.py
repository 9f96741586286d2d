"""Scores of models sampled in many ways: from records or a CSV; only how an image is drawn may differ between them.

A point is one model, one sampler, one number of steps and one guidance, with the cost of an image and its score. What
differs beyond that (data set, weights, reference, number of samples, convention of FLOPs ...) is refused by name.
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from scipy import special

from dit_jax.error import UsageError, shown
from dit_jax.files import absolute
from dit_jax.scaling.names import HOW, SAMPLING
from dit_jax.scaling.runs import Run, flatten
from dit_jax.scaling.runs.cells import agrees, check_name, condition, finite, is_number, positive
from dit_jax.scaling.runs.columns import Columns, Expected, read_rows, scaled
from dit_jax.scaling.runs.load import init_of, read_all
from dit_jax.scaling.runs.run import tell_start

NUMBERS = ("params", "tokens", "images", "flops_train", "loss", "seconds_sample")  # optional columns, as in a record
OPTIONAL = (*NUMBERS, "sampler", "steps", "guidance", "spacing", *HOW, "passes", "flops_sample", "flops_step")
LOSSES = ("loss", "vlb", "likelihood")  # first words of the targets of held-out images
KNOWN = ("name", "run", "group", "seed", "step", "flops", "loss_se", *OPTIONAL)  # columns of tables that are no metric
# Metrics of which more is better.
HIGHER = ("is", "precision", "recall", "density", "coverage", "clip_score", "clipscore", "psnr")
REST = "1-"  # before the name of a share of which more is better: what is missing to 1, of which less is better
NAMES = {"flops_train": "train", "seconds_sample": "seconds", "flops_sample": "flops"}  # column -> field
RECORD = {"params": "params_active", "tokens": "tokens_seen", "images": "images_seen"}  # column -> field of a record
RECORD |= {name: name for name in ("flops_train", "flops_sample", "seconds_sample")}


@dataclass(frozen=True)
class Point:
    """One model at an evaluated step, sampled in one way. nan or "" = not recorded; FLOPs are 2 x MACs."""

    name: str
    score: float | int
    score_se: float | int = 0.0  # of the evaluation; 0 = not recorded
    flops: float | int = math.nan  # of one sampled image, guided steps counted twice
    seconds: float | int = math.nan  # of one sampled image
    sampler: str = ""
    steps: float | int = math.nan
    guidance: float | int = math.nan
    spacing: str = ""
    interval: str = ""  # of times at which guidance acts; "" = all
    guide: str = ""  # run of autoguidance; "" = the null condition
    rescale: str = ""  # share of the guided output that is rescaled; "" = none
    reuse: str = ""  # share of the blocks that is computed; "" = all
    quantize: str = ""  # of the products of the blocks; "" = not
    times: str = ""  # of the steps, where they are stated; "" = by `spacing`
    train: float | int = math.nan  # training FLOPs, without those of weights that it began with
    params: float | int = math.nan  # active per token
    tokens: float | int = math.nan
    images: float | int = math.nan  # trained on
    loss: float | int = math.nan  # held out, of the same weights
    protocol: dict = field(default_factory=dict)
    loss_protocol: dict = field(default_factory=dict)
    source: str = ""  # file and line, for messages
    sign: int = 0  # of the metric: +1 more is better, -1 less, 0 = not recorded
    run_name: str = ""  # the training run, of which curves give several points
    init: dict = field(default_factory=dict)  # run, step and flops_train of the weights that it began with; {} = none

    @property
    def sampling(self) -> str:
        """How its images are drawn, in words."""
        parts = [self.sampler, f"{self.steps:g} steps" * (not math.isnan(self.steps)), self.spacing]
        parts += [f"{name} {text}" for name in HOW if (text := getattr(self, name))]
        parts.append(f"guidance {self.guidance:g}" * (not math.isnan(self.guidance)))
        return ", ".join(part for part in parts if part)

    def run(self) -> Run:
        """The point as a run whose loss is the score, for the fits. Raises UsageError without params, tokens, flops_train."""
        for name in ("params", "tokens", "train"):
            if math.isnan(getattr(self, name)):
                column = {"train": "flops_train"}.get(name, name)
                raise UsageError(f"{self.source}: no {column} of {self.name}, expected it for a fit of budgets")
        numbers = dict(params=self.params, tokens=self.tokens, flops=self.train, loss=self.score, loss_se=self.score_se)
        return Run(self.name, images=self.images, protocol=self.protocol, init=self.init, source=self.source, **numbers)


def higher_is_better(metric: str, points: Sequence[Point] = ()) -> bool:
    """Whether more of a metric is better, as the points' records state, or else by its name, of whatever network."""
    if stated := {p.sign for p in points} - {0}:
        return stated == {1}
    return any(metric == name or metric.startswith(f"{name}_") for name in HIGHER)


def training(point: Point) -> float | int:
    """Training FLOPs. Raises UsageError where they are not recorded."""
    if math.isnan(point.train):
        raise UsageError(f"{point.source}: no flops_train of {point.name}, expected its training FLOPs")
    return point.train


def all_training(point: Point) -> float | int:
    """Training FLOPs with those of the weights that it began with, as far as they are recorded. Raises UsageError as `training`."""
    return training(point) + (point.init.get("flops_train") or 0)


def load_points(
    paths: str | os.PathLike | Iterable,
    metric: str = "fid",
    where: Sequence[str] = (),
    sampled: bool = False,
    columns: Mapping | None = None,
    curves: bool = False,
) -> list[Point]:
    """The points of `paths`: workdirs, folders of them, records.jsonl files or CSVs; of each run those of its last step, or with `curves`
    those of every step, each a model of its own.

    `metric` is a name in the records, or `1-NAME` of a share, such as 1-composition_scenes: the share that is wrong, to which laws that
    fall can be fitted. `where` holds FIELD=VALUE texts over the dotted names of the protocol (or the columns of a CSV): only what agrees
    is taken; FIELD= takes the records without that field. `sampled` asks for the cost of an image. A CSV has the columns `name`, the
    metric, and either `flops_sample` (FLOPs of one image) or `flops_step` (of one unguided call of the model) and `steps`: then the cost
    is flops_step x steps x passes, where `passes`, if it is not a column, is 2 where there is a guidance other than 1. `columns` gives a
    CSV's columns our names (ours -> theirs). Raises UsageError on what is missing or no number, and where the protocols differ in more
    than SAMPLING.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    table, points, (read, known) = Columns(columns or {}, where), [], read_all(paths)
    for file, records in read:
        if records is None:
            points += _read_csv(file, metric, table)
        else:
            records = [(_with_rest(record, metric, at), at) for record, at in records]
            found = _of_records(records, file, metric, where, curves, known)
            points += _own_names(found, file, {p.name for p in points})
    _check(points, paths, metric, where, sampled)
    tell_start(points)
    return points


def points_of(records: Sequence[tuple[dict, str]], metric: str, where: Sequence[str] = ()) -> list[Point]:
    """The points of `records`, pairs of a record and where it stands, as `load_points` gives them with `curves`; [] if none has the metric.

    Raises UsageError as `load_points` does.
    """
    points = _of_records(records, "", metric, where, curves=True) if records else []
    if points:
        _check(points, [], metric, where, sampled=True)
    return points


def _check(points: list[Point], paths: Sequence, metric: str, where: Sequence[str], sampled: bool) -> None:
    """Raises UsageError if there are no points, if one is there twice, or if they differ in more than SAMPLING."""
    if not points:
        chosen = f" with {', '.join(where)}" if where else ""
        raise UsageError(f"RUNS: found no {metric} in {', '.join(map(str, paths))}{chosen}")
    seen: dict = {}
    for point in points:
        _same(points[0], point, "protocol")
        if sampled and math.isnan(point.flops):
            raise UsageError(
                f"{point.source}: no flops_sample of {point.name}, expected the FLOPs of one sampled image"
            )
        first = seen.setdefault((point.name, point.sampling), point)
        if first is not point:
            raise UsageError(
                f"{point.source}: {point.name} ({point.sampling or 'no sampling'}) is also in {first.source}, expected it once; "
                "give models, and repeated trainings of one, names of their own"
            )
    for point in (found := [p for p in points if p.loss_protocol]):
        _same(found[0], point, "loss_protocol")


def find_metric(paths: Iterable, where: Sequence[str] = (), columns: Mapping | None = None) -> str:
    """The metric that records or CSVs have: "fid" if it is among them, else the only one besides the loss, the bound and the likelihood.

    Raises UsageError, listing them, where there are several others. If there is none it is "fid", of which the loading says that it lacks.
    """
    ours, names = {scaled(theirs)[1]: name for name, theirs in (columns or {}).items()}, set()
    read, known = read_all(paths)
    for file, records in read:
        if records is None:
            rows = read_rows(file, Expected((), ()), Columns({}, where))
            names |= {column for row, _ in rows for column, cell in row.items() if is_number(cell)}
        else:
            names |= {name for r, at in records if _agrees(r, where, at, known) for name in r["metrics"]}
    values = {
        n for n in names if re.sub("_(se|std|low|high)$", "", n) not in names - {n} and n.split("_")[0] not in LOSSES
    }
    found = {name for n in values if (name := ours.get(n, n)).lower() not in KNOWN}
    if not found or any(name.lower() == "fid" for name in found):
        return "fid"
    if len(found) > 1:
        raise UsageError(f"--metric: found none, expected one of {', '.join(sorted(found))}")
    return found.pop()


def _own_names(points: list[Point], file: str, taken: set) -> list[Point]:
    """Two run folders may hold runs of one name: the later one is then called after its folder too."""
    folder = os.path.dirname(absolute(file))
    return [replace(p, name=f"{p.name} ({folder})") if p.name in taken else p for p in points]


def _same(first: Point, point: Point, which: str) -> None:
    """Raises UsageError where two points differ in more than how an image is drawn."""
    a, b = (flatten(getattr(p, which)) for p in (first, point))
    free = {"reuse", "quantize", *(f"samples.{s}" for s in SAMPLING)}
    names = [k for k in [*a, *b] if k not in free and not k.startswith("guide.")]
    name = next((k for k in names if a.get(k, "(absent)") != b.get(k, "(absent)")), None)
    if name is not None:
        kind = "protocol" if which == "protocol" else "protocol of the loss"
        raise UsageError(
            f"{point.source}: {kind} field {name!r} is {b.get(name, '(absent)')!r}, but {a.get(name, '(absent)')!r} in "
            f"{first.source}; only {', '.join(SAMPLING)} may differ; choose with --where {name}=VALUE"
        )


def _with_rest(record: dict, metric: str, where: str) -> dict:
    """The record, with `1-NAME` among its metrics if that is `metric` and it has NAME."""
    name = metric.removeprefix(REST)
    if name == metric or name not in record["metrics"]:
        return record
    metrics, signs = dict(record["metrics"]), record.get("metric_signs", {})
    for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
        if name + end in metrics:
            share = finite(metrics[name + end], f"metrics.{name}{end}", where)
            if not 0 <= share <= 1:
                raise UsageError(
                    f"{where}: metrics.{name}{end} is {share:g}, expected a share, 0 to 1, for --metric={metric}"
                )
            metrics[metric + other] = 1 - share
    if f"{name}_se" in metrics:
        metrics[f"{metric}_se"] = metrics[f"{name}_se"]
    sign = signs.get(name, 0) if isinstance(signs, dict) else 0
    return record | {"metrics": metrics, "metric_signs": {metric: -1 if sign == 1 else sign and 1}}


def _agrees(record: dict, where: Sequence[str], at: str, known: Collection) -> bool:
    return agrees(flatten(record["protocol"]), [condition(text) for text in where], at, known)


def _of_records(
    every: Sequence[tuple[dict, str]],
    file: str,
    metric: str,
    where: Sequence[str],
    curves: bool,
    known: Collection = (),
) -> list[Point]:
    scored = [(r, at) for r, at in every if metric in r["metrics"] and _agrees(r, where, at, known)]
    if not scored and not where:
        other = sorted({name for r, _ in every for name in r["metrics"]})
        advice = (
            ""
            if any("samples" in r["protocol"] for r, _ in every)
            else "; draw and score images with evaluate (eval.samples) or sweep (sweep.samples)"
        )
        raise UsageError(f"{file}: no record has metrics.{metric}; found {', '.join(other) or 'no metric'}{advice}")
    weights = [repr(r["protocol"].get("weights")) for r, _ in every]
    losses = {(r["run"], r["step"], w): r for (r, _), w in zip(every, weights, strict=True) if "loss" in r["metrics"]}
    last = {r["run"]: r["step"] for r, _ in sorted(scored, key=lambda found: found[0]["step"])}
    steps, newest = {(r["run"], r["step"]) for r, _ in scored}, {}
    for r, at in scored:
        if curves or r["step"] == last[r["run"]]:  # a record written twice counts once
            newest[r["run"], r["step"], repr(sorted(flatten(r["protocol"]).items()))] = (r, at)
    found = []
    for r, at in newest.values():
        loss = losses.get((r["run"], r["step"], repr(r["protocol"].get("weights"))))
        many = curves and sum(run == r["run"] for run, _ in steps) > 1
        found.append(_of_record(r, metric, at, loss, f"{r['run']} at step {r['step']}" if many else r["run"]))
    return found


def _of_record(record: dict, metric: str, where: str, with_loss: dict | None, name: str) -> Point:
    protocol = record["protocol"]
    row = dict(record["metrics"]) | {ours: record.get(theirs) for ours, theirs in RECORD.items()} | {"name": name}
    row |= {k: how(v) if k in HOW else v for k, v in _mapping(protocol, "samples").items() if k in SAMPLING}
    row["loss"] = with_loss["metrics"]["loss"] if with_loss and metric != "loss" else None
    signs = record.get("metric_signs", {})
    sign = signs.get(metric, 0) if isinstance(signs, dict) else signs
    if sign not in (-1, 0, 1):
        raise UsageError(f"{where}: metric_signs: found {shown(sign)} for {metric}, expected 1 or -1")
    more = dict(protocol=protocol, sign=int(sign), run_name=record["run"], init=init_of(record, where))
    more |= {"loss_protocol": with_loss["protocol"]} if with_loss and metric != "loss" else {}
    return _point(
        row | {metric: record["metrics"][metric]}, metric, where, _mapping(protocol, "metrics").get("bootstrap"), **more
    )


def how(value) -> str:
    """A field of HOW in words; "" for all times."""
    if isinstance(value, (list, tuple)):
        return "" if [*value] == [0.0, 1.0] else " to ".join(map(str, value))
    return str(value)


def _mapping(protocol: dict, name: str) -> dict:
    return protocol[name] if isinstance(protocol.get(name), dict) else {}


def _read_csv(file: str, metric: str, columns: Columns) -> list[Point]:
    expected = Expected(("name", metric), (*OPTIONAL, *(f"{metric}_{end}" for end in ("se", "low", "high"))))
    points = [_point(row, metric, at, run_name=row["name"] or "") for row, at in read_rows(file, expected, columns)]
    if not points and not columns.where:
        raise UsageError(f"{file}: found a header and no row below it")
    return points


def _point(row: Mapping, metric: str, where: str, resamples=None, **more) -> Point:
    """The point of a row of our columns: text, or the numbers of a record."""
    cells = {name: cell for name, cell in row.items() if cell is not None and str(cell).strip()}

    def number(name: str, zero: bool = False) -> float:
        return positive(cells[name], name, where, zero) if name in cells else math.nan

    if "name" not in cells:
        raise UsageError(f"{where}: name is empty, expected the name of the model")
    texts = {name: str(cells.get(name, "")).strip() for name in ("name", "sampler", "spacing", *HOW)}
    for name, text in texts.items():
        check_name(text, name, where)
    values = {NAMES.get(name, name): number(name) for name in (*NUMBERS, "flops_sample", "steps")}
    values["guidance"] = guidance = number("guidance", zero=True)
    if math.isnan(values["flops"]):
        passes = number("passes") if "passes" in cells else 1 if guidance == 1 or math.isnan(guidance) else 2
        values["flops"] = number("flops_step") * values["steps"] * passes
    error, score = _standard_error(cells, metric, where, resamples), positive(row.get(metric), metric, where)
    return Point(score=score, score_se=error, source=where, **texts, **values, **more)


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
    return (high - low) / 2 / float(special.stdtrit(freedom, 0.975))
