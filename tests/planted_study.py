"""Records of a study whose answer is known, for tests/jobs/test_study.py: no training, the protocols of the real cells."""

import dataclasses
import json
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.study.cells import Cell, make_cells
from benchmarks.study.table import DIGITS
from benchmarks.study.work import grids
from dit_jax import flops
from dit_jax.diffusion.objective import make_objective
from dit_jax.evaluation.protocol import draws_protocol, samplings, weights_protocol
from dit_jax.workdir.records import protocol_id

EXPONENT = 0.4  # of the planted best size in FLOPs an image


def small(**changes):
    """The digits study with one budget and the main share, or other `changes`."""
    students = {name: dataclasses.replace(s, shares=(0.05,)) for name, s in DIGITS.students.items()}
    return dataclasses.replace(DIGITS, **{"budgets": (1e11,), "students": students, "seeds": 1, **changes})


def planted(cell: Cell, params: float, cost: float) -> float:
    """A score that falls with the cost, and is lowest at a size that grows as cost^EXPONENT; students need a tenth of the cost."""
    best = 2e4 * (cost * (10 if cell.student else 1) / 1.5e7) ** EXPONENT
    return float(np.exp(0.15 * np.log(params / best) ** 2) * (cost * (10 if cell.student else 1) / 1e7) ** -0.6)


def record(cell: Cell, cfg, sample, score: Callable) -> dict:
    """What `evaluate` would record of one sampling (None: of the held-out loss), with an error of 2 %."""
    params, images = flops.active_parameters(cfg.model), cfg.train.steps * cfg.train.batch_size
    if sample:
        own = dataclasses.replace(cfg, sample=sample)
        cost = flops.forward_flops(cfg.model) * sample.steps * (1 + (sample.guidance != 1)) * sample.reuse
        value = score(cell, params, cost)
        metrics = {"fd_digits": value, "fd_digits_low": 0.96 * value, "fd_digits_high": 1.04 * value}
        protocol = draws_protocol(own) | {"features": "digits", "metrics": {"bootstrap": 20}}
        more = {"flops_sample": int(cost), "metric_signs": {"fd_digits": -1}}
    else:
        protocol, metrics = weights_protocol(cfg) | {"held_out": {}}, {"loss": 0.4, "loss_se": 0.004}
        more = {"metric_signs": {"loss": -1}}
    protocol = json.loads(json.dumps(protocol))
    cost = make_objective(cfg).flops()
    return {
        "run": cell.run, "task": "labels", "step": cfg.train.steps, "images_seen": images, "tokens_seen": 16 * images,
        "params": flops.parameters(cfg.model), "params_active": params, "flops_train": images * cost,
        "flops_image": flops.forward_flops(cfg.model), "metrics": metrics, "protocol": protocol,
        "protocol_id": protocol_id(protocol), "weights_sha256": "0" * 64, "device": {"kind": "cpu"}, "goodput": {}, **more,
        "study": cell.note,
    }  # fmt: skip


def records(cells: Iterable[Cell] = (), score: Callable = planted) -> list[dict]:
    """The records of all samplings of these cells, by default of `small()`."""
    found = []
    for cell in cells or make_cells([small()]):
        for cfg in grids(cell):
            found += [record(cell, cfg, one, score) for one in (samplings(cfg) if cfg.eval.samples else [None])]
    return found
