"""Facts about `--help`: what a command does, its own flags and no library's, every key with its text; and all of it at once."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from job import ROOT

from dit_jax.config import Config, ModelConfig
from dit_jax.data import latent_notes, latent_writer
from dit_jax.diffusion.samplers import SAMPLERS
from dit_jax.job.help import comments
from dit_jax.sampling import draw, picture
from dit_jax.scaling import fits, names, options

JOBS = ("train", "sample", "evaluate", "sweep", "encode", "features", "convert", "preflight", "bench")
HEAVY = {
    "jax",
    "orbax",
    "tensorflow_datasets",
    "grain",
    "flax",
    "optax",
    "scipy",
    "matplotlib",
    "numpy",
    "sklearn",
    "rich",
}


def source(job) -> str:
    """The text of the module that `python -m dit_jax.JOB` runs."""
    path = Path(ROOT, "dit_jax", f"{job}.py")
    return (path if path.exists() else path.with_suffix("") / "__main__.py").read_text()


def answer(job, *arguments):
    """(exit code, standard output, which of HEAVY were imported) of a command."""
    code = f"import runpy, sys\nsys.argv[1:] = {list(arguments)}\n"
    code += f"try: runpy.run_module('dit_jax.{job}', run_name='__main__', alter_sys=True)\n"
    code += f"finally: print(*({HEAVY} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1]


def test_these_are_all_jobs():
    found = [
        p for p in Path(ROOT, "dit_jax").rglob("*.py") if re.search(r"^    launch\(main", p.read_text(), re.MULTILINE)
    ]
    assert {p.parent.name if p.stem == "__main__" else p.stem for p in found} == set(JOBS)
    assert all(source(job).count("\n") <= 120 for job in JOBS)


@pytest.mark.parametrize(("job", "ask"), [*((job, "--help") for job in JOBS), ("train", "-h")])
def test_a_job_says_what_it_does_and_what_it_takes_before_it_imports(job, ask):
    code, out, heavy = answer(job, ask, "--workdir=/nowhere")
    assert (code, heavy) == (0, "")
    assert out.startswith(ast.get_docstring(ast.parse(source(job))))
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source(job)))
    shared = {"launcher", "cell"} if "    define_flags()" in source(job) else set()
    shared |= {"check", "slice"} | ({"compilation_cache"} if "compiled.define_flag()" in source(job) else set())
    shared |= {"coordinator", "num_processes", "process_id"} if "hosts.define_flags()" in source(job) else set()
    wants = re.search(r'launch\(main, config="(file|optional)"', source(job))
    own = re.findall(r"^  --(\w+)[ =\n]", out, re.MULTILINE)
    assert set(own) == defined | shared | ({"config"} if wants else set())
    required = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)",[^()]*required=True', source(job)))
    assert set(re.findall(r"^  --(\w+)[^\n]*\(required\)", out, re.MULTILINE)) == required
    keys = re.findall(r"^  --config\.(\w+\.\w+)=", out, re.MULTILINE)
    groups = {f.name: f.type for f in dataclasses.fields(Config)}
    every = [f"{group}.{key.name}" for group, kind in groups.items() for key in dataclasses.fields(kind)]
    assert keys == (every if "config=" in source(job).rpartition("launch(main")[2] else [])


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in options.COMMANDS)])
def test_the_wing_answers_before_it_imports(arguments):
    code, out, heavy = answer("scaling", *arguments)
    assert (code, heavy) == (0, "") and out.startswith("usage: python -m dit_jax.scaling")


def test_every_key_has_a_text_beside_it():
    for kind in (f.type for f in dataclasses.fields(Config)):
        assert set(comments()[kind.__name__]) == {f.name for f in dataclasses.fields(kind)}
        assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), kind
        for key, text in comments()[kind.__name__].items():
            assert 3 < len(text) < 120, f"{kind.__name__}.{key}: {text!r}"


def test_the_text_of_a_key_stands_in_the_help():
    out = answer("train", "--help")[1]
    assert re.search(r"^  --config\.train\.seed=0 {2,}of initial weights, data order, ", out, re.MULTILINE)
    assert re.search(r"^  --config\.sample\.interval='\(0\.0, 1\.0\)' {2,}times in \[0, 1\]", out, re.MULTILINE)


def test_what_help_and_choices_name_is_what_there_is():
    """They are written where nothing heavy is imported, so a second time."""
    assert comments()["SampleConfig"]["sampler"].split(" | ") == list(SAMPLERS)
    assert tuple(fits.METHODS) == names.METHODS
    fewest, most = (draw.rows_of(ModelConfig(patch=patch, input_size=32)) for patch in (2, 32))
    assert f"in multiples of {fewest} to {most} per device" in source("sample")
    assert f"of the first {picture.GRID} if there are more" in source("sample")
    assert str(tuple(latent_notes.DTYPES)).replace("'", '"') in source("encode")
    assert "1 << 30" in source("encode") and latent_writer.SHARD_BYTES == 1 << 30


def test_the_package_lists_its_jobs():
    done = subprocess.run([sys.executable, "-m", "dit_jax"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  (\w+) +\w", done.stdout, re.MULTILINE)) == {*JOBS, "scaling"}
