"""What is studied: the digits by class and the scenes by caption, their sizes, budgets, students and sampling settings."""

from benchmarks.study.cells import Student, Study

STEPS, FEW, SECOND = (1, 2, 4, 8, 16, 50), (1, 2, 4, 8, 16), (2, 4, 8, 16)  # of dpmpp_2m one step is Euler's
SMOOTH = {"time_scale": 0.03}  # students are differentiated in time
INSIDE = 1.5  # guidance that is learned


def teacher_samplings(guidance: tuple, reuse: tuple, ema: tuple) -> tuple:
    """The grids of a teacher: two samplers, each with all guidances; half of the blocks reused; other widths of the EMA."""
    euler, second = dict(samplers=("euler",), steps=STEPS), dict(samplers=("dpmpp_2m",), steps=SECOND)
    reused = dict(samplers=("euler",), steps=reuse, guidance=guidance[:2], reuse=(0.5,))
    widths = dict(samplers=("euler",), steps=(16,), guidance=guidance[:1], ema=ema)
    return euler | dict(guidance=guidance), second | dict(guidance=guidance), reused, widths


def students(guidance: tuple, shares: tuple, main: float) -> dict:
    """Consistency with guidance inside; a flow map without, guided from outside; and the same with guidance inside, for the main share."""
    outside = dict(samplers=("flow_map",), steps=FEW, guidance=guidance)
    flow_map = dict(rate=1e-3, model=SMOOTH | {"target": "later"})
    taught = dict(name="consistency", guidance=INSIDE, adaptive=0.0)
    return {
        "consistency": Student(
            taught,
            rate=2e-4,
            shares=shares,
            model=SMOOTH,
            samplings=(dict(samplers=("consistency",), steps=FEW, guidance=(1.0,)),),
        ),
        "mean_flow": Student(dict(name="mean_flow", ratio=0.5), shares=shares, samplings=(outside,), **flow_map),
        "mean_flow_inside": Student(
            dict(name="mean_flow", ratio=0.5, guidance=INSIDE),
            shares=(main,),
            samplings=(outside | dict(guidance=(1.0,)),),
            **flow_map,
        ),
    }


DIGITS = Study(
    name="digits",
    config="configs/digits_isoflop.py",
    changes={
        "optim": dict(ema_tracks=(0.05, 0.2)),
        "sample": dict(batch_size=500),
        "eval": dict(bootstrap=20),
    },
    sizes=tuple((4 * k, k, 1) for k in (3, 4, 5, 6, 7, 8)),
    budgets=(1e11, 3e11, 1e12),
    samplings=teacher_samplings((1.0, 1.5, 2.25), reuse=(8, 16), ema=(0.05, 0.2)),
    students=students((1.0, 1.5, 2.25), shares=(0.01, 0.05, 0.1), main=0.05),
    metric="fd_digits",
    later=("mean_flow_inside",),
)
SCENES = Study(
    name="scenes",
    config="configs/scenes.py",
    changes={
        "model": dict(depth=4),
        "optim": dict(schedule="constant", ema_tracks=(0.05, 0.2)),
        "sample": dict(batch_size=500),
        "sweep": dict(base_width=128, width_power=0.5),
    },
    sizes=((32, 4, 2), (48, 4, 2), (64, 4, 2), (96, 4, 4)),
    budgets=(1e12, 4e12),
    samplings=teacher_samplings((1.5, 3.0, 6.0), reuse=(8, 16), ema=(0.05, 0.2)),
    students={"mean_flow": students((1.5, 3.0, 6.0), shares=(0.05,), main=0.05)["mean_flow"]},
    metric="fd_scenes",
    seeds=1,
)
STUDIES = {study.name: study for study in (DIGITS, SCENES)}
