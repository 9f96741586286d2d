"""Facts about which runs to train next: the chosen cells narrow the interval more than equally costly others."""

import math
from dataclasses import replace

import numpy as np
import pytest
from planted import BUDGETS, L_LAW, LAW, N_LAW, ladder, study

from dit_jax.error import UsageError
from dit_jax.scaling.fits import METHODS, fit_akima, fit_gadre, fit_isoflop, fit_varpro
from dit_jax.scaling.plans.design import Cell, make_variance, next_cells
from dit_jax.scaling.runs import Run


def truth(c: float, n: float) -> float:
    return float(L_LAW(c)) + 0.02 * math.log(n / float(N_LAW(c))) ** 2


def drawn(runs, seed: int, noise: float) -> list[Run]:
    """Runs of the same sizes and budgets with another noise."""
    rng = np.random.default_rng(seed)
    return [replace(r, loss=truth(r.flops, r.params) + noise * float(rng.standard_normal())) for r in runs]


def trained(cells) -> list[Run]:
    return [Run(f"new{i}", c.params, c.flops / 6 / c.params, c.flops, 1.0) for i, c in enumerate(cells)]


def others(proposal, runs, seed: int) -> tuple:
    """As many FLOPs of cells drawn at random: sizes at the budgets that there are, and whole new budgets."""
    rng, chosen, left = np.random.default_rng(seed), [], proposal.cost
    budgets = np.geomspace(BUDGETS[0], proposal.cost / 3, 12)
    while left > BUDGETS[0] and len(chosen) < 25:
        new, spread = rng.random() < 0.5, float(rng.uniform(0.5, 1.8))
        c = float(rng.choice(budgets if new else BUDGETS))
        sizes = [-spread, 0.0, spread] if new else [float(rng.uniform(-1.8, 1.8))]
        if c * len(sizes) <= left:
            chosen += [Cell(c, float(N_LAW(c)) * math.exp(u)) for u in sizes]
            left -= c * len(sizes)
    return tuple(chosen)


def proposed(noise: float) -> tuple:
    """(runs of a study, cells for as many FLOPs again that tell N_opt at 10x best, that compute)."""
    runs, target = study(noise=noise, seed=1), 10 * float(BUDGETS[-1])
    return runs, next_cells(fit_isoflop(runs), runs, target, sum(r.flops for r in runs)), target


def narrowed(studies: int, rivals: int) -> tuple:
    """(standard deviation of log N_opt at 10x with no cells, with those chosen, with rivals; the share predicted to be left)."""
    noise, found = 0.003, []
    runs, proposal, target = proposed(noise)
    for cells in [(), proposal.cells, *(others(proposal, runs, seed) for seed in range(rivals))]:
        assert sum(c.flops for c in cells) <= proposal.cost * (1 + 1e-9)
        drawn_ = (drawn([*runs, *trained(cells)], s, noise) for s in range(studies))
        found.append(float(np.std([math.log(fit_isoflop(r, resamples=0).laws["N_opt"](target)) for r in drawn_])))
    return found[0], found[1], found[2:], proposal.after / proposal.before


@pytest.mark.slow
def test_the_chosen_cells_narrow_the_interval_more_than_equally_costly_others():
    runs, proposal, target = proposed(0.003)
    variance = make_variance(fit_isoflop(runs), target)
    chosen = variance(proposal.cells)
    assert chosen < 0.5 * variance(())
    assert all(chosen < variance(others(proposal, runs, seed)) for seed in range(10))
    before, after, _, predicted = narrowed(48, 0)
    assert after < 0.9 * before and after / before == pytest.approx(predicted, rel=0.35)


@pytest.mark.slow
def test_the_chosen_cells_narrow_the_interval_more_in_300_studies():
    before, chosen, rivals, predicted = narrowed(300, 10)
    assert chosen < 0.65 * before and chosen < min(rivals) and chosen < 0.8 * np.median(rivals)
    assert chosen / before == pytest.approx(predicted, rel=0.2)


def narrowed_surface(method, studies: int, rivals: int) -> tuple:
    """As `narrowed`, of a surface's N_opt at 1e22; rivals are cells at random of the same cost."""
    noise, base = 0.005, ladder(noise=0.005, seed=1, budgets=4, sizes=5)
    fit = method(base)
    proposal = next_cells(fit, base, 1e22, 0.5 * sum(r.flops for r in base))
    sets, rng = [(), proposal.cells], np.random.default_rng(0)
    for _ in range(rivals):
        cells, left = [], proposal.cost
        while left > 1e18 and len(cells) < 20:
            c = math.exp(rng.uniform(math.log(1e18), math.log(left)))
            cells.append(Cell(c, float(fit.laws["N_opt"](c)) * math.exp(rng.uniform(-1.4, 1.4))))
            left -= c
        sets.append(tuple(cells))
    found = []
    for cells in sets:
        values = []
        for seed in range(studies):
            rng = np.random.default_rng(seed)
            runs = [*base, *trained(cells)]
            runs = [
                replace(r, loss=float(LAW(r.params, r.tokens)) * math.exp(noise * rng.standard_normal())) for r in runs
            ]
            values.append(math.log(method(runs, resamples=0).laws["N_opt"](1e22)))
        found.append(float(np.std(values)))
    return found[0], found[1], found[2:], proposal.after / proposal.before


@pytest.mark.parametrize("method", [fit_varpro, fit_gadre])
@pytest.mark.parametrize(("studies", "rivals"), [(12, 0), pytest.param(100, 8, marks=pytest.mark.slow)])
def test_the_cells_chosen_for_a_surface_narrow_the_interval_more(method, studies, rivals):
    before, chosen, others_, predicted = narrowed_surface(method, studies, rivals)
    assert chosen < 0.85 * before and chosen < np.median([*others_, before])
    assert chosen / before == pytest.approx(predicted, rel=0.25 if rivals else 0.4)


@pytest.mark.parametrize("method", ["isoflop", "varpro", "gadre"])
def test_the_deviation_is_that_of_the_resamples_and_more_cells_lower_it(method):
    runs = ladder(noise=0.005, seed=2, budgets=4, sizes=6)
    fit = METHODS[method](runs, resamples=300)
    limit = 3 * sum(r.flops for r in runs)
    proposal, fewer = (next_cells(fit, runs, 1e22, limit, most=most) for most in (6, 3))
    assert proposal.before == pytest.approx(float(np.std(np.log(fit.draws["N_opt"](1e22)))), rel=0.1)
    assert len(fewer.cells) <= 3 and proposal.after < fewer.after < fewer.before and proposal.cost <= limit
    assert fewer.after == pytest.approx(math.sqrt(make_variance(fit, 1e22)(fewer.cells)))


def test_a_new_budget_of_a_fit_by_budgets_gets_three_sizes_or_more():
    runs, proposal, _ = proposed(0.003)
    old = {r.flops for r in runs}
    for c in {c.flops for c in proposal.cells} - old:
        assert sum(cell.flops == c for cell in proposal.cells) >= 3


def test_where_budgets_scatter_new_ones_are_worth_more_than_more_of_the_old():
    """More runs of an old budget cannot tell where the law passes it, if its minimum is off the law by more than its noise."""
    target, fit = 10 * float(BUDGETS[-1]), fit_isoflop(study(noise=0.001, seed=0, sizes=7, scatter=0.2))
    assert fit.details["tau"] > 0.1
    of_old = tuple(Cell(c, float(N_LAW(c)) * f) for c in BUDGETS.tolist() for f in (0.4, 0.6, 1.7, 2.5))
    of_new = tuple(Cell(c, float(N_LAW(c)) * f) for c in (1.6e11, 2e11) for f in (0.4, 1.0, 2.5))
    worth = {}
    for tau in (0.0, fit.details["tau"]):
        variance = make_variance(replace(fit, details={"tau": tau}), target)
        worth[tau > 0] = [variance(cells) / variance(()) for cells in (of_old, of_new)]
    assert worth[True][0] > 0.95 > 0.9 > worth[True][1] and worth[False][0] < 0.8
    cells = next_cells(fit, fit.runs, target, sum(r.flops for r in fit.runs)).cells
    assert not {c.flops for c in cells} & {p.flops for p in fit.used}


def test_a_fit_of_the_best_sizes_alone_proposes_no_cell():
    runs = ladder(noise=0.002)
    with pytest.raises(UsageError, match="--next_flops: method akima tells the loss of the best size alone"):
        next_cells(fit_akima(runs), runs, 1e22, 1e21)
    with pytest.raises(UsageError, match="--next_flops: the fit has no resamples, expected runs that show their noise"):
        next_cells(fit_isoflop(runs, resamples=0), runs, 1e22, 1e21)
