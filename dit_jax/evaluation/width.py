"""The best width of the EMAs that an evaluation has scored."""

import json
import re
from collections.abc import Sequence

from dit_jax.log import say


def best_widths(records: Sequence[dict]) -> list[tuple[int, str, str, float, float, int]]:
    """For each step, sampling and metric with several widths: (step, sampling, metric, width, score, widths tried).

    Records of EMAs that training kept have their own width; those of other weights do not count.
    """
    groups: dict = {}
    for record in records:
        rest, weights = dict(record["protocol"]), record["protocol"].get("weights")
        if not (isinstance(weights, dict) and "width" in weights):
            continue
        del rest["weights"]
        for metric, sign in record["metric_signs"].items():
            key = record["step"], json.dumps(rest, sort_keys=True), metric
            groups.setdefault(key, []).append((sign * record["metrics"][metric], weights["width"], record))
    found = []
    for (step, _, metric), scored in groups.items():
        tried = {width for _, width, _ in scored}
        _, width, record = max(scored, key=lambda one: one[:2])
        of = record["protocol"].get("samples", {})
        sampling = f"{of['sampler']} {of['steps']}, guidance {of['guidance']:g}" if of else "held-out images"
        if len(tried) > 1:
            found.append((step, sampling, metric, width, record["metrics"][metric], len(tried)))
    return found


def tell_best(records: Sequence[dict], told: set[str]) -> None:
    """Logs the best width for each metric, but for losses by time, distances of fewer images, ends of intervals, and what was `told`."""
    for step, sampling, metric, width, score, tried in best_widths(records):
        line = f"step {step}, {sampling}: best {metric} {score:.4g} at ema {width:g}, of {tried} widths"
        if line not in told and not re.search(r"^loss_(fixed_)?t\d+$|_n\d+$|_(low|high)$", metric):
            say(line)
            told.add(line)
