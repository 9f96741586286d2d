"""Students of few steps of the digits model of configs/digits.py (docs/few_steps.md): consistency | mean_flow | guidance | progressive.

python -m dit_jax.train --config=configs/digits_few.py:consistency --workdir=runs/digits4 --init=runs/digits
python -m dit_jax.sample --workdir=runs/digits4 --num=100 --grid=grid.png
"""

import importlib.util
from pathlib import Path

from dit_jax.error import choice

SPEC = importlib.util.spec_from_file_location("digits", Path(__file__).with_name("digits.py"))
digits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits)

# Images of 64 pixels want a weaker adaptive weight than large ones (docs/few_steps.md).
MEAN_FLOW = dict(name="mean_flow", guidance=1.1, ratio=0.75, adaptive=0.5)
KINDS = {  # objective, training steps, sampler
    "consistency": (dict(name="consistency", guidance=1.5, adaptive=0.0), 200, "consistency"),
    "mean_flow": (MEAN_FLOW, 8000, "flow_map"),
    "guidance": (dict(name="progressive", guidance=1.5, rounds=0), 300, "euler"),
    "progressive": (dict(name="progressive", rounds=3, steps=4, round_steps=200), 600, "euler"),  # of `guidance`
}


def get_config(kind="consistency"):
    """`kind`: one of KINDS; progressive begins with a run of guidance."""
    choice("kind", kind, KINDS)
    c, (objective, steps, sampler) = digits.get_config(), KINDS[kind]
    c.objective.update(objective)
    c.model.target = "later" if kind == "mean_flow" else ""
    c.model.time_scale = 0.03 if kind in ("consistency", "mean_flow") else 1.0  # they need derivatives in t
    c.optim.update(learning_rate=2e-4 if kind == "consistency" else 1e-3, warmup_steps=50)
    c.optim.schedule = "cosine" if kind == "mean_flow" else "constant"
    c.train.update(steps=steps, checkpoint_every=1000 if kind == "mean_flow" else 100)
    c.sample.update(sampler=sampler, steps=32 if kind == "guidance" else 4, guidance=1.0)
    c.eval.loss = False
    return c
