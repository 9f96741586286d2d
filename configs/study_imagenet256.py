"""The study of docs/study.md on latents of ImageNet at 256 x 256, for a pod: S/2 to XL/2, and their students of few steps.

    python -m dit_jax.train --config=configs/study_imagenet256.py:DiT-S/2,v4-64 --config.data.latents=latents/256 --workdir=runs/s2
    python -m dit_jax.train --config=configs/study_imagenet256.py:DiT-S/2+mean_flow,v4-64 --config.data.latents=latents/256 \
      --workdir=runs/s2-mean-flow --init=runs/s2
    python -m dit_jax.evaluate --workdir=runs/s2 --autoencoder=... --config.eval.samples=5000 --config.eval.steps='(1,2,4,8,16,50)' \
      --config.eval.samplers="('euler','dpmpp_2m')" --config.eval.guidance='(1.0,1.5,2.25)'

Latents are encoded as for configs/imagenet256.py. Each of S/2, B/2, L/2 and XL/2 is one run of 1e20 training FLOPs at a constant rate,
kept at 1e19, 3e19 and 1e20. A student costs 5 % of its teacher's FLOPs at a budget, which is the argument's last part, such as
DiT-S/2+mean_flow,v4-64,1024,1e19 (default: 1e20); `--init_step` then names the teacher's step at that budget (`train.keep_at`).

Expected: not run. Hours and price on v4-64 are in docs/study.md, by preflight.
"""

from dataclasses import asdict

from dit_jax import flops
from dit_jax.config import ObjectiveConfig, model_config, resolve, template
from dit_jax.devices.layout import argument, lay_out
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import choice

BUDGETS = (1e19, 3e19, 1e20)  # training FLOPs of a teacher
SHARE, INSIDE = 0.05, 1.5  # of its FLOPs for a student; guidance that is learned
STUDENTS = {
    "consistency": (dict(name="consistency", guidance=INSIDE, adaptive=0.0), "", 1e-5),
    "mean_flow": (dict(name="mean_flow", guidance=1.0, ratio=0.5), "later", 1e-4),
}  # objective, blocks that read the target time, learning rate


def get_config(arg="DiT-S/2"):
    """`arg`: MODEL[+STUDENT][,SLICE[,BATCH[,BUDGET]]], STUDENT one of STUDENTS."""
    arg, _, asked = arg.rpartition(",") if arg.count(",") == 3 else (arg, "", f"{BUDGETS[-1]:g}")
    budget = {f"{one:g}".replace("+", ""): one for one in BUDGETS}
    choice("BUDGET", asked.replace("+", ""), tuple(budget))
    budget = budget[asked.replace("+", "")]
    first, comma, rest = arg.partition(",")
    model, _, student = first.partition("+")
    model, slice, batch = argument(model + comma + rest, "DiT-S/2")
    choice("STUDENT", student, ("", *STUDENTS))
    c = template()
    c.model.update(asdict(model_config(model, image_size=256, dtype="bfloat16", remat="dots", learn_sigma=False)))
    c.diffusion.process = "flow"
    c.data.update(
        dataset="imagenet2012", held_out_split="validation", image_size=256, flip=True, cache=False, workers=16
    )
    c.optim.update(learning_rate=1e-4, warmup_steps=1000, clip=1.0, ema="power", ema_width=0.1, ema_tracks=(0.05, 0.2))
    c.train.update(batch_size=batch or 1024, checkpoint_every=5000)
    c.sample.update(sampler="euler", steps=50, guidance=1.5)
    c.eval.update(max_images=10_000)
    per_step = flops.train_flops(resolve(c).model, c.train.batch_size)
    if student:
        objective, target, rate = STUDENTS[student]
        c.model.update(time_scale=0.03, target=target)
        c.objective.update(asdict(ObjectiveConfig(**objective)))
        c.optim.update(learning_rate=rate, ema_tracks=())
        c.sample.update(sampler="flow_map" if target else "consistency", steps=4, guidance=1.0)
        c.eval.loss = False
        per_step = make_objective(resolve(c)).flops() * c.train.batch_size
        c.train.steps = round(SHARE * budget / per_step)
    else:
        c.train.keep_at = tuple(round(one / per_step) for one in BUDGETS if one <= budget)
        c.train.steps = c.train.keep_at[-1]
    c.mesh.fsdp = 4
    lay_out(c, slice)
    return c
