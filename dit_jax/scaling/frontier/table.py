"""The command `table`: evaluation records of run folders as rows to read, for a spreadsheet (CSV), for a page (Markdown) or as a figure."""

import csv
import json
import math
import re
import sys
from collections.abc import Sequence

from dit_jax.error import UsageError, one_line
from dit_jax.scaling.frontier.choice import choose
from dit_jax.scaling.frontier.points import SAMPLING, Point, find_metric, higher_is_better, how
from dit_jax.scaling.report.text import finite, print_table
from dit_jax.scaling.runs import flatten
from dit_jax.scaling.runs.cells import agrees, condition
from dit_jax.scaling.runs.load import parse_record, sources

SPREAD = re.compile("_(se|std|low|high)$")  # of another metric
BUCKET = re.compile(r"loss_t\d+")  # of the held-out loss, by time: in CSV and JSON only
HEAD = ("run", "step", "weights", "sampler", "steps", "guidance")
BEST_HEAD = ("run", "step", "weights", "sampling", "metric", "best guidance", "score", "tried")
NORMAL = 1.96  # standard errors in half of a 95 % interval
PANELS = 8  # most rows of panels in a figure


def run(args) -> dict:
    """Print the records, what their protocol is and the best guidance of each checkpoint; return the same as JSON.

    Write the figure of one metric if asked.
    """
    records = _read(args.runs, args.where)
    if args.out:
        _draw(records, args.metric or find_metric(args.runs, args.where), args.out)
    kinds = {"loss": [r for r in records if not _sampled(r)], "samples": [r for r in records if _sampled(r)]}
    protocols, differ = {}, {}
    for kind, some in kinds.items():
        fields = [_rest(r) for r in some]
        names = dict.fromkeys(name for flat in fields for name in flat)
        values = {name: list(dict.fromkeys(str(flat.get(name, "")) for flat in fields)) for name in names}
        differ |= {name: None for name, found in values.items() if len(found) > 1}
        if some:
            protocols[kind] = {name: found[0] for name, found in values.items() if len(found) == 1}
    best = _best(kinds["samples"], list(differ))
    rows = [_row(record, list(differ)) for record in records]
    lines = [_protocol_line(kind, fields) for kind, fields in protocols.items()]
    if args.csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        print("\n".join(lines), file=sys.stderr)
    else:
        show = _markdown if args.md else print_table
        print("\n".join(lines) + "\n")
        show("Records", *_printed(records, list(differ)))
        if best:
            show("Best guidance of each checkpoint", BEST_HEAD, [tuple(map(_cell, b.values())) for b in best])
    if args.out:
        print(args.out, file=sys.stderr if args.csv else sys.stdout)
    return finite({"protocols": protocols, "records": rows, "best_guidance": best})


def _read(paths: Sequence[str], where: Sequence[str]) -> list[dict]:
    """Every record that agrees with `where`, by run and step; of one written twice the last."""
    wanted, found = [condition(text) for text in where], {}
    for file, lines in sources(paths):
        if lines is None:
            raise UsageError(f"{file}: holds no records, expected run folders, or their eval/records.jsonl")
        for at, line in lines:
            record = parse_record(line, at)
            flat = flatten(record["protocol"])
            if agrees(flat, [(n, v) for n, v in wanted if n in flat or n.partition(".")[0] != "samples"], at):
                found[file, record["run"], record["step"], json.dumps(record["protocol"], sort_keys=True)] = record
    if not found:
        raise UsageError(f"RUNS: found no record in {', '.join(paths)}{' with ' * bool(where)}{', '.join(where)}")
    return sorted(found.values(), key=lambda r: (r["run"], r["step"]))


def _sampled(record: dict) -> bool:
    return isinstance(record["protocol"].get("samples"), dict)


def _rest(record: dict) -> dict:
    """The flat protocol less what has columns of its own."""
    own = ("weights", *(f"samples.{name}" for name in ("sampler", "steps", "guidance")))
    return {name: value for name, value in flatten(record["protocol"]).items() if name not in own}


def _weights(record: dict) -> str:
    found = record["protocol"].get("weights", "")
    if isinstance(found, dict):
        return f"ema {found.get('width')}" if "snapshots_of" in found else "ema"
    return "raw" if found == "params (raw)" else str(found)


def _own(record: dict, differ: Sequence[str]) -> dict:
    """The cells that say which record this is."""
    samples = record["protocol"].get("samples") if _sampled(record) else {}
    own = {"run": record["run"], "step": record["step"], "weights": _weights(record)}
    own |= {name: samples.get(name, "") for name in ("sampler", "steps", "guidance")}
    return own | {name: _rest(record).get(name, "") for name in differ}


def _draw(records: Sequence[dict], metric: str, out: str) -> None:
    """Write the figure of a metric over steps and guidances, with a row of panels for each sampling of each run."""
    from dit_jax.scaling.report import axes, curves  # here because texts need no matplotlib

    records = [r for r in records if isinstance(r["metrics"].get(metric), (int, float))]
    rests = [{name: str(value) for name, value in _rest(r).items()} for r in records]
    differ = [n for n in dict.fromkeys(n for r in rests for n in r) if len({r.get(n) for r in rests}) > 1]
    owns = [{n: v for n, v in _own(r, differ).items() if n not in ("step", "guidance")} for r in records]
    told = [name for name in (owns or [{}])[0] if len({str(own[name]) for own in owns}) > 1]
    rows: dict = {}
    for record, own in zip(records, owns, strict=True):
        title = ", ".join(str(own[n]) if n in ("run", "weights", "sampler") else f"{n} {own[n]}" for n in told)
        guidance = record["protocol"]["samples"].get("guidance") if _sampled(record) else None
        guidance = float(guidance) if isinstance(guidance, (int, float)) else math.nan
        ends = _interval(record["metrics"], metric)
        rows.setdefault(title, []).append(curves.Score(record["step"], guidance, record["metrics"][metric], *ends))
    if len(rows) > PANELS:
        few = "take some with --where, such as --where samples.sampler=ddim"
        raise UsageError(f"--out: found {len(rows)} samplings or runs, expected at most {PANELS} in one figure; {few}")
    if not rows or (figure := curves.curves(rows, metric)) is None:
        raise UsageError(f"--out: found {len(records)} records of {metric}, expected several steps or guidances")
    axes.save(figure, out)


def _row(record: dict, differ: Sequence[str]) -> dict:
    cells = _own(record, differ) | {"protocol_id": record["protocol_id"]} | record["metrics"]
    return {one_line(name): one_line(value) if isinstance(value, str) else value for name, value in cells.items()}


def _interval(metrics: dict, name: str) -> tuple:
    """The recorded 95 % interval of a metric, or that of its standard error; (nan, nan) without."""
    if isinstance(metrics.get(f"{name}_se"), (int, float)):
        half = NORMAL * metrics[f"{name}_se"]
        return metrics[name] - half, metrics[name] + half
    ends = tuple(metrics.get(f"{name}_{end}") for end in ("low", "high"))
    return ends if all(isinstance(end, (int, float)) for end in ends) else (math.nan, math.nan)


def _metrics(records: Sequence[dict]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    return [n for n in names if not (BUCKET.fullmatch(n) or (SPREAD.search(n) and SPREAD.sub("", n) in names))]


def _cell(value) -> str:
    return one_line(f"{value:.4g}" if isinstance(value, float) else value)


def _printed(records: Sequence[dict], differ: Sequence[str]) -> tuple:
    """The head and rows of text: each metric with its interval in one cell."""
    metrics, rows = _metrics(records), []
    for record in records:
        cells, found = [_cell(v) for v in _own(record, differ).values()], record["metrics"]
        for name in metrics:
            low, high = _interval(found, name) if isinstance(found.get(name), (int, float)) else (math.nan, math.nan)
            span = "" if math.isnan(low) else f" ({low:.4g} to {high:.4g})"
            cells.append(f"{_cell(found.get(name, ''))}{span}")
        rows.append(tuple(cells))
    return tuple(map(one_line, (*HEAD, *differ, *metrics))), rows


def _markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [head, ["---"] * len(head), *rows]
    print(f"**{title}**\n")
    print("\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n")


def _protocol_line(kind: str, fields: dict) -> str:
    short = [f"{name}={re.sub(r'(?<=[0-9a-f]{12})[0-9a-f]{20,}', '', value)}" for name, value in fields.items()]
    return one_line(f"Protocol ({kind}): {', '.join(short)}")


def _best(records: Sequence[dict], differ: Sequence[str]) -> list[dict]:
    """For each checkpoint, sampling and metric with several guidances, the best one: the minimum of `choice.choose`."""
    groups: dict = {}
    for record in records:
        own = _own(record, differ)
        for metric in _metrics([record]):
            key = (*(str(value) for name, value in own.items() if name != "guidance"), metric)
            groups.setdefault(key, []).append((own, record))
    found = []
    for (*_, metric), members in groups.items():
        points = [_point(own, record, metric) for own, record in members]
        if len({p.guidance for p in points}) < 2 or not all(p.score > 0 and p.guidance > 0 for p in points):
            continue
        (choice,) = choose(points, higher=higher_is_better(metric, points))
        own, sampling = members[0][0], choice.best.sampling.rpartition(", ")[0]
        edge = f", the {choice.edge} tried" * bool(choice.edge)
        told = {"metric": metric, "guidance": f"{choice.best.guidance:g}{edge}", "score": choice.best.score}
        found.append({name: own[name] for name in HEAD[:3]} | {"sampling": sampling} | told | {"tried": len(points)})
    return found


def _point(own: dict, record: dict, metric: str) -> Point:
    samples, metrics = record["protocol"]["samples"], record["metrics"]
    low, high = _interval(metrics, metric)
    numbers = {
        n: float(samples[n]) if isinstance(samples.get(n), (int, float)) else math.nan for n in ("steps", "guidance")
    }
    texts = {n: how(samples.get(n, "")) for n in SAMPLING if n not in numbers}
    signs = record.get("metric_signs")
    sign = signs.get(metric, 0) if isinstance(signs, dict) else 0
    se = 0.0 if math.isnan(low) else (high - low) / 2 / NORMAL
    score = metrics[metric] if isinstance(metrics[metric], (int, float)) else math.nan
    return Point(own["run"], score, se, sign=sign if sign in (-1, 1) else 0, **numbers, **texts)
