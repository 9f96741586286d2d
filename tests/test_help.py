"""Facts about `--help`: every job says what it does, its own flags and no library's, and the config's keys with their defaults."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from job import ROOT, run

from dit_jax.config import template

JOBS = ("train", "sample", "evaluate", "sweep", "encode", "convert", "preflight", "bench", "costs", "features")


def source(job) -> str:
    """The text of the module that `python -m dit_jax.JOB` runs."""
    path = Path(ROOT, "dit_jax", f"{job}.py")
    return (path if path.exists() else path.with_suffix("") / "__main__.py").read_text()


def test_these_are_all_jobs():
    found = [
        p for p in Path(ROOT, "dit_jax").rglob("*.py") if re.search(r"^    launch\(main", p.read_text(), re.MULTILINE)
    ]
    assert {p.parent.name if p.stem == "__main__" else p.stem for p in found} == set(JOBS)


@pytest.mark.parametrize(("job", "ask"), [*((job, "--help") for job in JOBS), ("train", "-h")])
def test_a_job_says_what_it_does_and_what_it_takes(job, ask, cache_dir):
    code, out, err = run(job, ask, "--workdir=/nowhere", cache_dir=cache_dir)
    assert code == 0, err
    assert out.startswith(ast.get_docstring(ast.parse(source(job))))
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source(job)))
    shared = {"launcher", "cell"} if "define_flags()" in source(job) else set()
    wants = re.search(r'launch\(main, config="(file|optional)"\)', source(job))
    assert set(re.findall(r"^  --(\w+)", out, re.MULTILINE)) == defined | shared | ({"config"} if wants else set())
    required = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)",[^()]*required=True', source(job)))
    assert set(re.findall(r"^  --(\w+)[^\n]*\(required\)", out, re.MULTILINE)) == required
    if "config=" in source(job).rpartition("launch(main")[2]:
        for group, values in template().to_dict().items():
            (block,) = re.findall(rf"^  {group}\.( [^\n]*(?:\n {{10,}}[^\n]*)*)", out, re.MULTILINE)
            assert re.findall(r"(\w+)=", block) == list(values)


def test_the_package_lists_its_jobs():
    done = subprocess.run([sys.executable, "-m", "dit_jax"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  (\w+) +\w", done.stdout, re.MULTILINE)) == {*JOBS, "scaling"}
