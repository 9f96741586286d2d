"""Students of few steps of the model of words of configs/scenes.py (docs/few_steps.md): mean_flow | consistency.

python -m dit_jax.train --config=configs/scenes_few.py:mean_flow --workdir=runs/scenes4 --init=runs/words
python -m dit_jax.sample --workdir=runs/scenes4 --prompt='red three left of blue seven' --num=16 --grid=grid.png
"""

import importlib.util
from pathlib import Path

from dit_jax.error import choice

SPEC = importlib.util.spec_from_file_location("scenes", Path(__file__).with_name("scenes.py"))
scenes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scenes)

MEAN_FLOW = dict(name="mean_flow", guidance=2.0, ratio=0.75, adaptive=0.5)  # see configs/digits_few.py
KINDS = {  # objective, learning rate, training steps, sampler
    "consistency": (dict(name="consistency", guidance=2.25, adaptive=0.0), 1e-5, 300, "consistency"),
    "mean_flow": (MEAN_FLOW, 5e-4, 4000, "flow_map"),
}


def get_config(kind="mean_flow"):
    """`kind`: one of KINDS."""
    choice("kind", kind, KINDS)
    c, (objective, rate, steps, sampler) = scenes.get_config(), KINDS[kind]
    c.objective.update(objective)
    c.model.update(target="later" if kind == "mean_flow" else "", time_scale=0.03)
    c.optim.update(learning_rate=rate, warmup_steps=50)
    c.train.update(steps=steps, checkpoint_every=1000 if kind == "mean_flow" else 100)
    c.sample.update(sampler=sampler, steps=4, guidance=1.0)
    c.eval.loss = False
    return c
