"""Progressive distillation: a student's step does two of its teacher's, round by round (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2).

A round's student has N equal steps, its teacher 2 N. The teacher goes from t to s = t - 1/N by two Euler steps, which are DDIM's for a
flow; the student's velocity at t should lead there in one: (x_s - x_t) / (s - t). At the end of a round the student's weights become
the teacher's, and N is halved. With objective.rounds = 0 there is no round: the student's velocity should be the teacher's guided one
at every t (Meng et al. 2023, arXiv 2210.03142, section 3.1).
"""

import jax
import jax.numpy as jnp

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.diffusion.objective.denoising import denoising, velocity
from dit_jax.diffusion.objective.row import Objective, unchanged
from dit_jax.diffusion.objective.teacher import guided, keep_teacher
from dit_jax.diffusion.process import denoiser


def progressive(cfg: Config) -> Objective:
    """Objective with the teacher, and the number of the student's steps now, in `extras`.

    FLOPs: a forward and backward pass of the student, and two forward passes of the teacher: its two steps, or a guided pair.
    """
    noising, how = denoising(cfg, velocity), cfg.objective
    process = noising.process

    def compare(model, params, points, x_t, t, v):
        student = denoiser(process, lambda x, t: model.apply(params, x, t, points["cond"]))
        mse = jnp.square(student(x_t, t) - jax.lax.stop_gradient(v)).mean(axis=(1, 2, 3))
        return mse, {"mse": mse}

    def distil_guidance(model, params, extras, points: dict):
        t, x_t = points["t"], process.noise(points["x"], points["t"], points["eps"])
        teacher = guided(process, model, extras["teacher"], points["cond"], how.guidance)
        return compare(model, params, points, x_t, t, teacher(x_t, t))

    def halve(model, params, extras, points: dict):
        count = extras["steps"].astype(jnp.float32)
        step = jnp.floor(points["u"] * count) + 1  # u < 1, and count is far below 2^24
        t, middle, s = (process.shifted((step - back) / count) for back in (0.0, 0.5, 1.0))
        x_t = process.noise(points["x"], t, points["eps"])
        teacher = guided(process, model, extras["teacher"], points["cond"], 1.0)
        column = lambda t: t[:, None, None, None]  # noqa: E731
        x_m = x_t + column(middle - t) * teacher(x_t, t)
        x_s = x_m + column(s - middle) * teacher(x_m, middle)
        return compare(model, params, points, x_t, t, (x_s - x_t) / column(s - t))

    def draw(model, key: jax.Array, batch: dict) -> dict:
        points = noising.draw(model, key, batch)
        return {**points, "u": jax.random.uniform(jax.random.fold_in(key, 3), points["t"].shape)}

    def init(params) -> dict:
        return {**keep_teacher(params), "steps": jnp.int32(how.steps_at(0))}

    def update(extras: dict, params, step) -> dict:
        end = ((step + 1) % how.round_steps == 0) & (extras["steps"] > how.steps)
        teacher = jax.tree.map(lambda old, new: jnp.where(end, new, old), extras["teacher"], params)
        return {"teacher": teacher, "steps": jnp.where(end, extras["steps"] // 2, extras["steps"])}

    def cost(shape: flops.Shape = None) -> int:
        return 5 * flops.forward_flops(cfg.model, shape)

    if not how.rounds:
        return Objective(process, noising.draw, distil_guidance, cost, keep_teacher, unchanged)
    return Objective(process, draw, halve, cost, init, update)
