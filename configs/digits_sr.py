"""Super-resolution of the digits of configs/digits.py, from 4 x 4 or 2 x 2 pixels to 8 x 8 (docs/superres.md); begun from such a run.

python -m dit_jax.train --config=configs/digits_sr.py --workdir=runs/digits-x2 --init=runs/digits
python -m dit_jax.evaluate --workdir=runs/digits-x2
python -m dit_jax.sample --workdir=runs/digits-x2 --num=60 --grid=grid.png
"""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("digits", Path(__file__).with_name("digits.py"))
digits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits)


def get_config(factor="2"):
    """`factor`: 2 or 4."""
    c = digits.get_config()
    c.model.superres = int(factor)
    c.optim.update(learning_rate=1e-3, warmup_steps=50)
    c.train.update(steps=1000, checkpoint_every=250)
    c.sample.guidance = 1.0
    return c
