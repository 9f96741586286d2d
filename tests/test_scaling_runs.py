"""Facts about reading runs: every road in, and every bad input named."""

import json
import os

import pytest

from dit_jax.error import UsageError
from dit_jax.scaling.runs import load_runs
from dit_jax.scaling.runs.columns import parse_names

PROTOCOL = {"data": {"name": "digits", "split": "test"}, "held_out": {"seed": 1234}, "weights": "ema"}


def record(run="a", step=10, loss=0.5, **changes) -> dict:
    base = {
        "run": run,
        "step": step,
        "images_seen": step * 8,
        "tokens_seen": step * 128,
        "params": 2000,
        "params_active": 1000,
        "flops_train": 6e3 * step * 128,
        "flops_image": 4e4,
        "metrics": {"loss": loss, "loss_se": 0.002, "loss_t0": 0.9, "fd_digits": 4.0},
        "protocol": PROTOCOL,
        "protocol_id": "ab",
    }
    return {**base, **changes}


def workdir(path, *records) -> str:
    os.makedirs(path / "eval")
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (path / "eval" / "records.jsonl").write_text("\n".join(lines) + "\n")
    return str(path)


def table(path, text) -> str:
    (path / "runs.csv").write_text(text)
    return str(path / "runs.csv")


def test_a_workdir_gives_its_last_step(tmp_path):
    (run,) = load_runs([workdir(tmp_path / "w", record(step=20, loss=0.4), record(step=10))])
    assert (run.loss, run.loss_se, run.params, run.params_total) == (0.4, 0.002, 1000, 2000)
    assert (run.images, run.tokens, run.flops) == (160, 2560, 6e3 * 2560)
    assert run.metrics["fd_digits"] == 4.0 and run.protocol == PROTOCOL | {"task": "labels"}


def test_the_last_step_without_the_loss_does_not_count(tmp_path):
    (run,) = load_runs(workdir(tmp_path / "w", record(step=10), record(step=20, metrics={"fd_digits": 3.0})))
    assert run.images == 80


def test_a_sweep_folder_is_searched_but_not_its_extrapolation(tmp_path):
    for name in ("cells/a", "cells/b", "extrapolation"):
        workdir(tmp_path / name, record(run=name))
    assert [r.name for r in load_runs([tmp_path])] == ["cells/a", "cells/b"]
    assert [r.name for r in load_runs([tmp_path / "extrapolation"])] == ["extrapolation"]


def test_a_folder_given_twice_counts_once(tmp_path):
    path = workdir(tmp_path / "w", record())
    assert len(load_runs([path, path, str(tmp_path)])) == 1


def test_csv_flops_default_to_6nd(tmp_path):
    one, two = load_runs(table(tmp_path, "params,tokens,loss,run,flops\n10,20,3,x,\n10,20,2.5,y,1200\n"))
    assert (one.flops, two.flops, one.name, one.loss) == (1200, 1200, "x", 3)
    assert one.convention.counted == "6ND"
    with pytest.raises(UsageError, match=r"runs.csv:2: flops is absent, .* but counted is 'exact' in the other rows"):
        load_runs(table(tmp_path, "params,tokens,loss,run,flops\n10,20,3,x,\n10,20,2.5,y,999\n"))


def test_mixed_protocols_are_refused_naming_the_field(tmp_path):
    other = {**PROTOCOL, "held_out": {"seed": 7}}
    workdir(tmp_path / "a", record())
    workdir(tmp_path / "b", record(run="b", protocol=other))
    with pytest.raises(UsageError, match=r"b/eval/records.jsonl:1: .*'held_out.seed' is 7, but 1234 in .*a/eval"):
        load_runs([tmp_path])


def test_labels_and_words_do_not_mix(tmp_path):
    """By the record's own task; an older record's is that of the run's config, else labels."""
    workdir(tmp_path / "a", record())
    words = workdir(tmp_path / "b", record(run="b"))
    assert len(load_runs([tmp_path])) == 2
    (tmp_path / "c").mkdir()
    for name, changes, config in (
        ("c/text", {"task": "text"}, {}),
        ("c/older", {}, {"text": "bytes", "classes": 0}),
        ("c/none", {"task": "unconditional"}, {}),
        ("c/superres", {"task": "labels, superres 2"}, {}),
    ):
        path = workdir(tmp_path / name, record(run=name, **changes))
        (tmp_path / name / "config.json").write_text(json.dumps({"model": config}))
        found = changes.get("task", "text")
        with pytest.raises(UsageError, match=rf"protocol field 'task' is '{found}', but 'labels' in .*b/eval"):
            load_runs([words, path])
    assert [run.name for run in load_runs([tmp_path], where=["task=text"])] == ["c/older", "c/text"]
    with pytest.raises(UsageError, match=r"task is 'speech', expected one of labels, text, unconditional"):
        load_runs([workdir(tmp_path / "d", record(task="speech"))])


def test_records_and_a_csv_do_not_mix(tmp_path):
    path = table(tmp_path, "params,tokens,loss\n1,2,3\n")
    with pytest.raises(UsageError, match=r"'data.name' is '\(absent\)', but 'digits'"):
        load_runs([workdir(tmp_path / "w", record()), path])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", r"records.jsonl:2: not a JSON line"),
        ("[1]", r"records.jsonl:2: found list, expected a JSON object"),
        (json.dumps({k: v for k, v in record().items() if k != "flops_train"}), r":2: no field 'flops_train'; nearest"),
        (record(step=99, loss=-1.0), r":2: metrics.loss is -1.0, expected a finite number above 0"),
        (record(step=99, params_active=0), r":2: params_active is 0"),
        (record(step=99, flops_train="many"), r":2: flops_train is 'many', a str"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path, bad, message):
    with pytest.raises(UsageError, match=message):
        load_runs(workdir(tmp_path / "w", record(), bad))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,token,loss\n1,2,3\n", r"runs.csv: no column 'tokens' or 'flops'; nearest found 'token'"),
        ("params,token,loss,flops\n1,2,3,4\n", r"unknown column 'token'; did you mean 'tokens'"),
        ("x,y\n1,2\n", r"runs.csv: no column 'params'; found x, y"),
        ("", r"no column 'params'; found nothing"),
        ("params,tokens,loss,flop\n1,2,3,4\n", r"unknown column 'flop'; did you mean 'flops'"),
        ("params,tokens,loss\n", r"found a header and no run"),
        ("params,tokens,loss\n1,2,3\n1,-2,3\n", r"runs.csv:3: tokens is -2, expected a finite number above 0"),
        ("params,tokens,loss\n1,2,nan\n", r"runs.csv:2: loss is blank, nan or a word in 1 of 1 rows"),
        ("params,tokens,loss\n1,two,3\n", r"runs.csv:2: tokens is 'two', expected a number"),
        ("params,tokens,loss\n1,2\n", r"runs.csv:2: loss is blank, nan or a word"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load_runs(table(tmp_path, text))


def test_paths_without_runs_are_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        load_runs([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match=r"found no eval/records.jsonl"):
        load_runs([tmp_path])
    with pytest.raises(UsageError, match=r"no record has metrics.loss; found fd_digits"):
        load_runs(workdir(tmp_path / "w", record(metrics={"fd_digits": 1.0})))


PUBLISHED = "model,dataset,n,t,loss\nm1,a,1e6,2e7,3.5\nm2,b,1e6,2e7,3.6\nm3,a,2e6,4e7,3.2\n"
COLUMNS = {"run": "model", "params": "n", "tokens": "t"}


def published(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED)
    return path


def test_columns_of_other_names_are_runs(tmp_path):
    path = published(tmp_path)
    one, two = load_runs(path, columns=COLUMNS, where=["dataset=a"])
    assert (one.name, one.params, one.tokens, one.loss, one.flops) == ("m1", 1e6, 2e7, 3.5, 6 * 1e6 * 2e7)
    assert (two.name, two.source) == ("m3", f"{path}:4")
    assert [run.name for run in load_runs(path, columns={"params": "n", "tokens": "t"})] == ["row1", "row2", "row3"]


def test_a_name_that_is_given_away_hides_the_column_that_had_it(tmp_path):
    (run,) = load_runs(table(tmp_path, "params,tokens,loss,val loss\n1,2,3,4\n"), columns={"loss": "val loss"})
    assert run.loss == 4


def test_tokens_that_are_absent_are_those_of_6nd(tmp_path):
    path = table(tmp_path, "params,flops,loss\n10,1200,3\n")
    (run,) = load_runs(path)
    assert (run.tokens, run.flops, run.convention.counted) == (20, 1200, "6ND") and "counted" in run.convention.assumed
    assert "counted" not in load_runs(path, stated={"counted": "6ND"})[0].convention.assumed
    for stated, found in {"counted": "exact", "unit": "MACs", "passes": "forward", "data": "images"}.items():
        with pytest.raises(
            UsageError, match=rf"runs.csv:2: tokens is absent, .* but {stated} is '{found}'; give tokens"
        ):
            load_runs(path, stated={stated: found})
    with pytest.raises(UsageError, match=r"runs.csv:2: tokens is '', expected a number"):
        load_runs(table(tmp_path, "params,tokens,flops,loss\n10,,1200,3\n"))


def test_records_are_chosen_by_a_field_of_their_protocol(tmp_path):
    workdir(tmp_path / "a", record())
    workdir(tmp_path / "b", record(run="b", protocol={**PROTOCOL, "held_out": {"seed": 7}}))
    assert [run.name for run in load_runs(tmp_path, where=["held_out.seed=7"])] == ["b"]
    with pytest.raises(UsageError, match=r"found no run in .* with held_out.seed=8"):
        load_runs(tmp_path, where=["held_out.seed=8"])
    with pytest.raises(UsageError, match=r"--where: no field 'heldout.seed'; nearest found 'held_out.seed'"):
        load_runs(tmp_path, where=["heldout.seed=7"])


@pytest.mark.parametrize(
    ("columns", "where", "message"),
    [
        (COLUMNS | {"params": "N"}, [], "no column 'N', which --column names; "),
        (COLUMNS, ["datset=a"], "no field 'datset'; nearest found 'dataset'"),
        (COLUMNS, ["dataset=c"], "found no run in .*published.csv with dataset=c"),
        (COLUMNS, ["dataset"], "--where: found 'dataset', expected FIELD=VALUE"),
        ({"params": "n"}, [], "no column 'tokens' or 'flops'; .*; --column tokens=NAME says that another one is it"),
        (COLUMNS | {"depth": "n"}, [], "--column: no column 'depth' is known, expected one of params, loss, "),
        (COLUMNS | {"params": "t"}, [], "--column: found one column under two names"),
        (
            COLUMNS | {"loss": "dataset"},
            [],
            "published.csv:2, 3.*loss is blank, nan or a word.*name another --column loss=NAME",
        ),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, columns, where, message):
    with pytest.raises(UsageError, match=message):
        load_runs(published(tmp_path), columns=columns, where=where)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["params"], "--column: found 'params', expected OURS=THEIRS"),
        (["=n"], "--column: found '=n', expected OURS=THEIRS"),
        (["params=n", "params=m"], "--column: found 'params' twice"),
    ],
)
def test_names_of_columns_that_are_none_are_refused(texts, message):
    assert parse_names(["params=Model Size", "loss=a=b"]) == {"params": "Model Size", "loss": "a=b"}
    with pytest.raises(UsageError, match=message):
        parse_names(texts)


PLAIN = "params,tokens,loss\n10,20,3.5\n20,40,2.5\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace("\n", "\n,,\n"),
        PLAIN.replace("params", "Params"),
    ],
    ids=["semicolons", "tabs", "blank rows", "capitals"],
)
def test_what_spreadsheets_make_of_a_table_is_read_alike(tmp_path, text):
    assert [(r.params, r.tokens, r.loss) for r in load_runs(table(tmp_path, text))] == [(10, 20, 3.5), (20, 40, 2.5)]


def test_numbers_and_encodings_of_spreadsheets_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"runs.csv:2: params is '1,000', expected a number such as"):
        load_runs(table(tmp_path, 'params,tokens,loss\n"1,000",20,3\n'))
    path = tmp_path / "wide.csv"
    path.write_bytes(PLAIN.encode("utf-16"))
    with pytest.raises(UsageError, match=r"wide.csv: found UTF-16, expected UTF-8"):
        load_runs(path)


def test_a_metric_that_is_no_number_is_named_and_the_rest_is_read(tmp_path, capsys):
    """As older versions wrote for a held-out split of one image; null as this one does."""
    broken = record(step=10, metrics={"loss": 0.5, "loss_se": float("nan"), "fd_digits": None})
    folder = workdir(tmp_path / "w", broken, record(step=20, loss=None), record(run="b"))
    a, b = load_runs(folder)
    assert (a.name, a.loss, a.loss_se, a.metrics) == ("a", 0.5, 0.0, {"loss": 0.5}) and b.loss_se == 0.002
    said = capsys.readouterr().err
    assert "records.jsonl:1: metrics.loss_se is nan, which is no number; it counts as not recorded" in said
    assert "records.jsonl:1: metrics.fd_digits is None" in said and "records.jsonl:2: metrics.loss is None" in said
