"""Facts about the study: what cells cost, that it goes on and records once, what its page says of a planted answer."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import planted_study
import pytest
from planted_study import EXPONENT, small

from benchmarks.study import answers, figures, measure
from benchmarks.study.__main__ import columns, command, run
from benchmarks.study.cells import Student, Study, config_of, make_cells
from benchmarks.study.claim import Claim, claims, remade, remakes
from benchmarks.study.decide import deciding_cells, pairs, rows
from benchmarks.study.page import write
from benchmarks.study.records import append, read
from benchmarks.study.select import Data, Family, middle, short, undistilled
from benchmarks.study.table import DIGITS, STUDIES
from benchmarks.study.work import Place, grids, missing, wanted
from dit_jax.diffusion.objective import make_objective
from dit_jax.error import UsageError

QUICK = 10, 1  # resamples, and how often a tenth is left out


@pytest.fixture(scope="module")
def made():
    """The records of a planted study of one budget."""
    return planted_study.records()


@pytest.fixture
def file(made, tmp_path):
    """A file of them, in a folder of its own."""
    path = tmp_path / "study" / "records.jsonl"
    path.parent.mkdir()
    append(str(path), made)
    return path


def test_every_cell_costs_what_it_says():
    for cell in make_cells([dataclasses.replace(DIGITS, seeds=1)]):
        cfg = config_of(cell)
        step = make_objective(cfg).flops() * cfg.train.batch_size
        asked = cell.share * cell.budget if cell.student else cell.budget
        assert abs(cfg.train.steps * step - asked) <= step / 2 or cfg.train.steps == 1, cell.name


def test_cheap_cells_come_first_and_each_has_a_name_of_its_own():
    cells = make_cells([DIGITS])
    names = [(cell.name, cell.rest) for cell in cells]
    assert len({*names}) == len(names)
    first = [cell for cell in cells if cell.rank[:2] == (0, False)]
    assert cells[: len(first)] == first and {cell.budget for cell in first} == set(DIGITS.budgets[:2])
    assert {cell.size for cell in first} == set(DIGITS.sizes)
    assert {cell.share for cell in first} == {0.0, DIGITS.main}


def test_a_teacher_passes_its_budgets_in_one_run():
    column = columns(make_cells([DIGITS]))["digits-w12"]
    low, high = (
        config_of(cell) for cell in column if cell.name in ("digits-w12-C1e11", "digits-w12-C1e12") and not cell.rest
    )
    assert low.train.keep_at == high.train.keep_at[:1] and high.train.steps == high.train.keep_at[-1]
    same = dict(steps=1, keep_at=(), log_every=1, checkpoint_every=1)
    assert dataclasses.replace(low, train=dataclasses.replace(low.train, **same)) == dataclasses.replace(
        high, train=dataclasses.replace(high.train, **same)
    )


def noisy(records, error: float, seed: int = 0, level: float = 0.0):
    """The records with their scores, or `level` if there is one, times exp(error z), and that error."""
    rng, found = np.random.default_rng(seed), json.loads(json.dumps(records))
    for r in found:
        if "samples" in r["protocol"]:
            value = (level or r["metrics"]["fd_digits"]) * float(np.exp(error * rng.standard_normal()))
            ends = {"_low": value * (1 - 2.1 * error), "_high": value * (1 + 2.1 * error)}
            r["metrics"] = {"fd_digits" + end: score for end, score in {"": value, **ends}.items()}
    return found


def change(records, chosen, **values):
    """The records with other scores (`value`) or without those (`gone`) whose study, samples and FLOPs are chosen."""
    found = []
    for r in json.loads(json.dumps(records)):
        if "samples" in r["protocol"] and chosen(r["study"], r["protocol"]["samples"], r["flops_sample"]):
            if values.get("gone"):
                continue
            r["metrics"] = {
                "fd_digits" + end: by * values["value"] for end, by in (("", 1), ("_low", 0.96), ("_high", 1.04))
            }
        found.append(r)
    return found


def test_the_planted_law_of_the_best_size_is_found(made):
    data = Data("digits", made)
    exponent, used = measure.law(data, undistilled(1e11))[1:]
    assert len(used) >= measure.LEAST and abs(middle(exponent)[0] - EXPONENT) < 0.1
    assert len({*used}) == len(used) and {*used} <= {p.flops for p in data.points(undistilled(1e11))}
    ratio = middle(measure.size_ratio(data, undistilled(1e11), Family(1e11, "mean_flow", 0.05)))
    assert ratio[1] > 1.3  # a student behaves as at ten times the cost: 10^0.4, less what the ladder's end cuts off


def test_every_table_names_the_same_best_size(made):
    """That of the points that decide, of the stretches, and of the figures, in noise of which sizes swap."""
    data = Data("digits", noisy(made, 0.1), 4)
    for pair in pairs(data, small()):
        cost = np.array([pair.cost * data.unit])
        table = data.table(pair.family, cost)
        best = int(table.best()[0][0, 0])
        point = data.points(pair.family)[table.at[0, best, 0]]
        assert pair.best == (data.widths[best], point.sampler, point.steps, point.guidance)
        assert measure.best_sizes(data, pair.family, cost)[0, 0] == data.params[best]
        if not pair.family.objective:
            (held,) = [size for size, low, high in answers.stretches(data, pair.family) if low <= cost[0] < high]
            assert held == best


def test_lines_lie_in_their_bands_and_are_sizes_of_the_ladder(made):
    data = Data("digits", noisy(made, 0.1, 3), 40)
    costs = data.costs(undistilled(1e11), sizes=2)
    sizes = measure.best_sizes(data, undistilled(1e11), costs)
    low, high = figures.band(data, sizes)
    assert np.all((low <= sizes[0]) & (sizes[0] <= high)) and np.any(low < high) and {*sizes.flat} <= {*data.params}
    for claim in claims(data):
        assert claim.interval[0] <= claim.value <= claim.interval[1], claim.text


def test_another_sampler_of_some_sizes_changes_no_answer(made):
    other = change(
        made, lambda study, samples, cost: samples["sampler"] == "dpmpp_2m" and study["width"] > 16, gone=True
    )
    better = change(other, lambda study, samples, cost: samples["sampler"] == "dpmpp_2m", value=1e-3)
    one, two = (
        [(c.text, c.value) for c in claims(Data("digits", some, 10)) if "dpmpp" not in c.text]
        for some in (other, better)
    )
    assert one == two


def test_a_score_has_the_same_redraws_in_every_family(made):
    data = Data("digits", made, 10)
    all_, some = undistilled(1e11), undistilled(1e11, guidance=(1.5,))
    one, two = (
        next(p for p in data.points(f) if p.name == "w16" and (p.steps, p.guidance) == (8, 1.5)) for f in (all_, some)
    )
    assert np.array_equal(data.noise(one), data.noise(two)) and np.ptp(data.noise(one)) > 0


def test_the_best_of_equal_scores_is_not_reported_too_low(made):
    """All scores are 2 with errors of 20 %: the lowest is far below, the redraws are not."""
    data = Data("digits", noisy(made, 0.2, level=2.0))
    score = data.table(undistilled(1e11), np.array([50 * data.unit])).best()[1][:, 0]
    value, low, high = np.exp(middle(score))
    assert np.exp(score[0]) < 1.5 and low < 2 < high and abs(np.log(value / 2)) < 0.2
    assert low < np.exp(score[0]) * 1.5


def test_speed_is_of_costs_that_were_run(made):
    data, after = Data("digits", made, 4), Family(1e11, "mean_flow", 0.05)
    gains = measure.speedup(data, after)[0]
    for width, gain in zip(data.widths, gains, strict=True):
        own = [p for p in data.points(after) if p.name == f"w{width}" and p.steps == measure.FEW]
        student = min(own, key=lambda p: p.score)
        teacher = [p for p in data.points(undistilled(1e11)) if p.name == f"w{width}" and p.score <= student.score]
        assert gain == (min(p.flops for p in teacher) / student.flops if teacher else np.inf) and gain > 1.5
    better = change(
        made, lambda study, samples, cost: study["objective"] == "mean_flow" and study["width"] == 12, value=1e-3
    )
    assert measure.speedup(Data("digits", better, 4), after)[0, 0] == np.inf
    worse = change(
        made, lambda study, samples, cost: study["objective"] == "mean_flow" and study["width"] == 12, value=1e3
    )
    assert measure.speedup(Data("digits", worse, 4), after)[0, 0] < 0.25  # below one call of the largest size too


def test_a_ratio_without_one_of_its_scores_is_no_number(made):
    """Reuse beside teachers of which nothing as cheap is recorded, and a largest size that cannot draw: left out, never 0 or infinite."""
    cheap = change(
        made, lambda study, samples, cost: "reuse" not in samples and study["width"] == 12 and cost < 4e6, gone=True
    )
    found = measure.reused(Data("digits", cheap, 10), 1e11)
    assert np.all(np.isfinite(found) & (found > 0.1))
    none = change(
        made, lambda study, samples, cost: "reuse" not in samples and study["objective"] == "" and cost < 1e8, gone=True
    )
    data = Data("digits", none, 10)
    assert (
        np.isnan(measure.reused(data, 1e11)).all() and np.isnan(measure.advantage(data, undistilled(1e11), 1.0)).all()
    )
    assert not any(c.answer == 1 and c.cost == 1.0 for c in claims(data))


def test_a_flow_map_s_guided_step_of_the_largest_size_is_within_cost_1(made):
    data = Data("digits", made, 4)
    table = data.table(Family(1e11, "mean_flow", 0.05), np.array([data.unit]))
    point = data.points(Family(1e11, "mean_flow", 0.05))[table.at[0, -1, 0]]
    assert point.flops > data.unit and point.guidance > 1


def test_claims_about_nothing_are_undecided(made):
    found = [
        c for c in claims(Data("digits", noisy(made, 0.02, 1, level=1.0), 40)) if c.kind == "EMA" or c.who == "both"
    ]
    assert len(found) >= 3 and sum(claim.side != 0 for claim in found) <= 1


def test_verdicts_and_that_only_stable_claims_are_told():
    draws, yes, no, lost = 2 + np.linspace(-0.1, 0.1, 41), (2.0, 1.9, 2.1), (1.0, 0.9, 1.1), (np.nan,) * 3
    told = {}
    for name, again in {"stable": (yes,) * 19 + (no,), "unstable": (yes,) * 17 + (no,) * 3, "lost": (yes,) * 17 + (lost,) * 3,
                         "few": (yes,) * 9 + (lost,) * 11}.items():  # fmt: skip
        told[name] = Claim(2, "size", "", draws, remade=again)
    assert [c.verdict for c in told.values()] == ["stable", "unstable", "stable", "unstable"]
    assert [c.remakes for c in told.values()] == [
        "19 of 20",
        "17 of 20",
        "17 of 17, 3 not computable",
        "9 of 9, 11 not computable",
    ]
    assert [answers.says(c, "above", "below", "open") for c in told.values()] == ["above", "open", "above", "open"]
    assert Claim(2, "size", "", draws - 1, remade=(no,) * 20).verdict == "undecided"


def test_a_claim_is_remade_from_fewer_records(made):
    data = Data("digits", made, 10)
    parts = remakes(data, 2)
    assert all(0.8 < len(part.records) / len(data.records) < 0.98 for part in parts)
    law = next(c for c in remade(data, parts) if (c.kind, c.who) == ("exponent", "euler"))
    assert law.held == 2 and law.stable and law.remade[0] != law.remade[1]
    assert remade(data, parts[:1])[0].remade == remade(data, parts)[0].remade[:1]


@pytest.mark.slow
def test_the_page_is_made_twice_with_the_same_bytes(file):
    def folder():
        return {p.name: p.read_bytes() for p in file.parent.glob("*")}

    page = Path(write(str(file), *QUICK))
    first = page.read_bytes(), folder()
    assert page == file.parent.parent / "study.md"
    write(str(file), *QUICK)
    assert first == (page.read_bytes(), folder())
    text = page.read_text()
    assert "No cell failed." in text and "/tmp" not in text and "nan" not in text
    drawn = {name for name in first[1] if name.endswith(".png")}
    assert len(drawn) >= 5 and drawn == set(re.findall(r"study/(digits_\d\.png)", text))
    assert all(f"Digits {number}." in text for number in range(1, 6)) and "None." not in text


def test_half_a_study_makes_a_page_that_says_what_is_missing(made, tmp_path):
    path = tmp_path / "study" / "records.jsonl"
    path.parent.mkdir()
    some = [r for r in made if r["study"]["width"] < 24 and r["study"]["objective"] in ("", "consistency")]
    some = [
        r for r in some if r["study"]["width"] == 12 or r["protocol"].get("samples", {}).get("sampler") != "dpmpp_2m"
    ]
    gone = make_cells([small()])[0]
    append(str(path), [*some, {"study": gone.note | {"cell": "digits-w99"}, "failed": "the loss is not finite"}])
    text = Path(write(str(path), *QUICK)).read_text()
    assert "* `digits-w99`: the loss is not finite" in text
    assert "| digits | consistency 5% | 1e11: 3 of 6 (without w24, w28, w32);" in text
    assert "| digits | mean flow 5% | 1e11: 0 of 6;" in text
    assert "| digits | teachers | 1e11: 3 of 6 (without w24, w28, w32);" in text
    assert "| digits | teachers, other samplings | 1e11: 1 of 6 (without w16, w20, w24, w28, w32);" in text
    one = [r for r in some if r["study"]["width"] == 12]  # of one size nothing can be said, and the page says so
    path.write_text("".join(json.dumps(r) + "\n" for r in one))
    assert (
        "**Too little is recorded to say: it takes three sizes of a family.**"
        in Path(write(str(path), *QUICK)).read_text()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["study"].update(version=2), ":3: study.version: found 2, expected 1"),
        (lambda r: r["study"].update(budget="1e11"), ":3: study.budget: found '1e11'"),
        (lambda r: r["protocol"].update(features="other"), 'protocol.features: found "other", expected "digits"'),
        (lambda r: r["protocol"]["samples"].update(seed=7), "protocol.seed: found 7, expected 1234"),
    ],
)
def test_records_of_another_study_are_refused(made, tmp_path, capsys, change, said):
    path = tmp_path / "study" / "records.jsonl"
    path.parent.mkdir()
    lines = json.loads(json.dumps(made[1:6]))
    change(lines[2])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(["--page", f"--records={path}"]) == 2
    told = capsys.readouterr().err
    assert said in told and str(path) in told
    assert not (tmp_path / "study.md").exists() and len(list(path.parent.iterdir())) == 1


def test_a_record_is_kept_once_and_takes_the_place_of_a_failure(made, tmp_path):
    path = str(tmp_path / "records.jsonl")
    failed = {"study": made[0]["study"], "failed": "out of memory"}
    append(path, [failed, made[-1]])
    append(path, [failed])
    assert read(path)[1] == {made[0]["study"]["cell"]: "out of memory"} and len(read(path)[0]) == 1
    append(path, [made[0], made[0]])
    records, failed = read(path)
    assert [r["protocol_id"] for r in records] == [made[-1]["protocol_id"], made[0]["protocol_id"]] and not failed


def test_what_is_recorded_is_not_missing(made):
    cells = make_cells([small()])
    assert not any(missing(cell, made) for cell in cells)
    (one,) = [cell for cell in cells if cell.name == "digits-w16-C1e11" and not cell.rest]
    less = [r for r in made if r["study"]["cell"] != one.name or r["protocol"].get("samples", {}).get("steps") != 8]
    assert [len(wanted(cfg)) for cfg in missing(one, less)] == [18]
    assert len(grids(one)) == 2


def test_numbers_are_short():
    assert [short(x) for x in (1e11, 3.5369e6, 0.05, 12.0, 1e-7)] == ["1e11", "3.54e6", "0.05", "12", "1e-7"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only=faces"], "--only: found faces, expected some of digits, scenes"),
        (["--sizes=13"], "--sizes: found 13"),
        (["--budgets=much"], "--budgets: found much"),
        (["--cell=digits-w13"], "--cell: found 'digits-w13'"),
    ],
)
def test_flags_that_name_nothing_are_refused(flags, said, capsys):
    assert command(flags) == 2 and said in capsys.readouterr().err


def test_the_launcher_prints_a_command_for_each_column(capsys):
    assert command(["--only=digits", "--launcher=print"]) == 0
    lines, names = capsys.readouterr().out.splitlines(), list(columns(make_cells([DIGITS])))
    assert [line.rpartition("--cell=")[2] for line in lines] == names and len(names) == len(DIGITS.sizes) + 2
    assert all("-m benchmarks.study --only=digits --processes=1 --cell=" in line for line in lines)


def test_studies_share_no_run_folder():
    cells = make_cells(STUDIES.values())
    assert not {c.run for c in cells if c.study is DIGITS} & {c.run for c in cells if c.study is not DIGITS}


TINY = Study(
    name="digits",
    config="configs/digits_isoflop.py",
    changes={"sample": dict(batch_size=100), "eval": dict(bootstrap=2, max_images=32), "optim": dict(ema_tracks=(0.05, 0.2))},
    sizes=((12, 3, 1), (16, 4, 1)),
    budgets=(4e8,),
    samplings=(dict(samplers=("euler",), steps=(1, 2), guidance=(1.0,)),),
    students={
        "mean_flow": Student(
            dict(name="mean_flow", ratio=0.5), 1e-3, (0.05,), (dict(samplers=("flow_map",), steps=(1,), guidance=(1.0,)),),
            model={"target": "later"},
        ),
        "consistency": Student(
            dict(name="consistency", guidance=1.5), 1e-3, (0.05,), (dict(samplers=("consistency",), steps=(1,), guidance=(2.0,)),)
        ),
    },
    metric="fd_digits",
    samples=100,
    seeds=1,
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_records_and_a_failed_cell_is_left_out(tmp_path, monkeypatch):
    """Students of consistency cannot be scored at guidance 2, which is inside them; then the same with a record and a run lost."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    cells = make_cells([TINY])
    whole, torn = (
        Place(str(tmp_path / name / "runs"), str(tmp_path / name / "records.jsonl")) for name in ("whole", "torn")
    )
    failed = run(cells, whole, 1)
    records = read(whole.records)[0]
    assert failed == ["digits-w12-C4e08-consistency-5%", "digits-w16-C4e08-consistency-5%"]
    assert len(records) == 2 * (1 + 2 + 1)
    run([cell for cell in cells if cell.size[0] == 12], torn, 1)
    lines = Path(torn.records).read_text().splitlines(keepends=True)
    Path(torn.records).write_text("".join(lines[:-2]) + lines[-1][:50])  # a kill cut the last line short
    run(cells, torn, 1)
    free = ("goodput", "seconds_sample")

    def scores(path):
        return sorted(json.dumps({k: v for k, v in r.items() if k not in free}, sort_keys=True) for r in read(path)[0])

    assert scores(torn.records) == scores(whole.records)
    assert "guidance" in read(whole.records)[1][failed[0]]


def test_a_study_without_records_has_no_page(tmp_path):
    with pytest.raises(UsageError, match="found no records"):
        write(str(tmp_path / "records.jsonl"))


def test_the_points_that_decide_are_scored_again(made):
    cells = make_cells([small()])
    found = deciding_cells([small()], made, cells)
    assert {cell.student for cell in found} == {"", "consistency", "mean_flow"} and not any(cell.rest for cell in found)
    assert all(missing(cell, made) for cell in found)
    more = planted_study.records(found)
    assert {r["protocol"]["samples"]["num"] for r in more} == {5000}
    assert not any(missing(cell, [*made, *more]) for cell in found)
    told = rows(Data("digits", [*made, *more]), small())
    assert len(told) == 9 and {row[-1] for row in told} <= {"holds", "undecided"} and told[0][-1] == "holds"
    assert {row[-1] for row in rows(Data("digits", made), small())} == {"to be scored again"}
    law = [measure.law(Data("digits", records), undistilled(1e11))[1][0] for records in (made, [*made, *more])]
    assert law[0] == law[1]  # other numbers of images are not mixed


def test_a_sentence_of_the_largest_budget_takes_no_claim_of_a_smaller_one():
    """Half a study has claims at one budget that the next one still lacks."""
    draws = np.array([2.0, 2.0, 2.1])
    low, high = Claim(3, "guided", "a", draws, who="inside", budget=1e11), Claim(1, "size", "b", draws, budget=3e11)
    assert answers.find([low], 3, "guided", "inside") is low
    assert answers.find([low, high], 3, "guided", "inside") is None and answers.find([low, high], 1, "size") is high
