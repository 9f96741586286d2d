"""The notebooks: run from their first cell to the last with small settings, and are kept without outputs."""

import base64
import io
import json
import os
import re
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
from job import TINY, environment
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
SMALLER = ("--config.model.", "--config.optim.", "--config.sample.", "--config.train.batch_size")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def figures(notebook):
    """The PNG images that its cells show."""
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    found = [output.data["image/png"] for output in shown if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def printed(notebook) -> str:
    """What its cells wrote to standard output."""
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in shown if output.get("name") == "stdout")


def look(notebook, name: str, count: int) -> None:
    """Its figures are as many as expected, and none is empty; NOTEBOOK_FIGURES keeps them."""
    found = figures(notebook)
    if folder := os.environ.get("NOTEBOOK_FIGURES"):  # to look at them
        for i, picture in enumerate(found):
            Image.fromarray(picture).save(Path(folder) / f"{name}-{i}.png")
    assert len(found) == count
    for picture in found:
        assert min(picture.shape[:2]) > 200 and len(np.unique(picture)) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "def " not in cell.source and "class " not in cell.source  # figures only: code lives in the package


def installer():
    return runpy.run_path(str(FOLDER / "colab.py"))


@pytest.mark.parametrize(
    ("found", "kind", "wanted", "kept", "said"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "tpu", ".", ["jax==0.10.2", "jaxlib==0.10.2"], "keeping jax 0.10.2, which is here for tpu"),
        ({"jax": "0.12.0.1"}, "", ".", ["jax==0.12.0.1"], "keeping jax 0.12.0.1, which is here for the CPU"),
        ({"jax": "0.7.2"}, "cuda", ".[cuda]", [], "jax 0.7.2 is here, but dit_jax needs >=0.10,<0.13: installing one for cuda"),
        ({"jax": "0.13.0"}, "tpu", ".[tpu]", [], "jax 0.13.0 is here, but"),
        ({}, "", ".", [], "there is no jax here; dit_jax needs >=0.10,<0.13: installing one for the CPU"),
    ],
)  # fmt: skip
def test_colab_s_own_jax_is_kept_if_it_will_do(found, kind, wanted, kept, said):
    asked, constraints, words = installer()["plan"](found, kind)
    assert (asked, constraints) == (wanted, kept) and words.startswith(said)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_one_cell_installs_on_colab_and_does_nothing_elsewhere(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    before, _, inside = code[0].partition("if COLAB:\n")
    assert "!python notebooks/colab.py" in inside and all(
        line.startswith("    ") for line in inside.splitlines() if line
    )
    assert not re.search("[!%]", before) and not any(re.search("^ *[!%]", cell, re.M) for cell in code[1:])


@pytest.mark.slow
def test_quickstart_trains_evaluates_and_draws(tmp_path, data_dir, cache_dir):
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source.endswith("cfg = config.resolve(values)")]
    flags = [flag.removeprefix("--config").split("=") for flag in TINY if flag.startswith(SMALLER)]
    small = [f"values{key} = {value if value.isdigit() else repr(value)}" for key, value in flags]
    # a small model, whose programs other tests compile too
    cell.source = "\n".join([*cell.source.splitlines()[:-1], *small, cell.source.splitlines()[-1]])
    environ = environment(cache_dir, devices=2)
    environ |= {"QUICKSTART_STEPS": "15", "QUICKSTART_IMAGES": "50", "QUICKSTART_HELD_OUT": "40"}
    environ |= {"QUICKSTART_WORKDIR": str(tmp_path / "run")}
    environ.pop("MPLBACKEND", None)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environ)
    look(notebook, "quickstart", count=3)
    text = printed(notebook)
    assert "parameters" in text and "MACs" in text
    assert "CpuDevice(id=0), CpuDevice(id=1)" in text and f"the run is kept in {tmp_path}" in text
    assert (tmp_path / "run" / "eval" / "records.jsonl").read_text().count("\n") == 3


@pytest.mark.slow
def test_study_shows_the_page_s_figures(tmp_path):
    from nbclient import NotebookClient
    from planted_study import records

    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records()))
    notebook = nbformat.read(FOLDER / "study.ipynb", as_version=4)
    environ = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    environ |= {"STUDY_RECORDS": str(file), "STUDY_RESAMPLES": "20", "STUDY_REMAKES": "2"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environ)
    look(notebook, "study", count=5)
    assert "widths [12, 16, 20, 24, 28, 32]" in printed(notebook)


@pytest.mark.slow
def test_scaling_derives_published_exponents_and_predicts_a_7b_run(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / "scaling.ipynb", as_version=4)
    environ = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    environ |= {"SCALING_RESAMPLES": "40", "PYTHONPATH": str(FOLDER.parent)}
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environ)
    look(notebook, "scaling", count=7)
    text = printed(notebook)
    assert "the residuals are systematic" in text and "1e+13 FLOPs,  33.3x the data: width" in text
    assert os.listdir(tmp_path) == []
