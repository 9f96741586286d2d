"""The floors of the house: imports go down only, and what belongs to one room stays there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dit_jax"
JOBS = {"train", "sample", "evaluate", "sweep", "features", "bench", "costs", "convert", "encode", "preflight"}
GROUND = {"error", "checks", "config", "flops", "hardware", "hlo", "layout", "command", "help", "__init__", "__main__"}
FIRST = {"models", "diffusion", "metrics", "scaling"}
MEZZANINE = {
    "mesh",
    "hosts",
    "foreign",
    "records",
    "samples",
    "launcher",
    "ledger",
    "workers",
    "optim",
    "log",
    "weights",
    "data",
    "manifest",
    "networks",
}
SECOND = {"measure", "autoencoder", "scores", "heldout", "guard", "state", "step", "diagnose", "checkpoint"}
FLOOR = {**dict.fromkeys(GROUND, 0), **dict.fromkeys(FIRST, 1), **dict.fromkeys(MEZZANINE, 2)}
FLOOR |= {**dict.fromkeys(SECOND, 3), **dict.fromkeys(JOBS, 4)}
FILES = sorted(PACKAGE.rglob("*.py"))
# A job may use another job's functions where running it as a process would cost more than the work itself.
ALLOWED_JOBS = {
    "evaluate": {"sample"},
    "sweep": {"train", "evaluate", "sample"},
    "bench": {"train", "sample", "sweep", "evaluate", "preflight"},
    "costs": {"train"},
    "preflight": {"sample"},
}


def room(path):
    """The first name below the package: `models`, `train`, ..."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Names of all imported modules, dotted; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(path):
    """The project's rooms that a file imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("dit_jax.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = room(path)
    for other in rooms_used(path) - {here}:
        if here in FIRST:
            assert FLOOR[other] == 0, f"{path}: first floor rooms know the ground only, found {other}"
        elif here in JOBS and other in JOBS:
            assert other in ALLOWED_JOBS.get(here, set()), f"{path}: a job that imports the job {other}"
        else:
            assert FLOOR[other] <= FLOOR[here], f"{path}: {other} is a floor above"


def longest_chain(module, graph, seen=()):
    assert module not in seen, f"cycle: {' -> '.join([*seen, module])}"
    return 1 + max((longest_chain(m, graph, (*seen, module)) for m in graph[module]), default=0)


def test_no_cycle_among_rooms():
    graph = {name: set() for name in FLOOR}
    for path in FILES:
        graph[room(path)] |= rooms_used(path) - {room(path)}
    assert max(longest_chain(name, graph) for name in graph) <= 13  # six of them jobs that use each other


def only_in(name, rooms):
    users = {room(path) for path in FILES if any(m == name or m.startswith(f"{name}.") for m in imports(path))}
    assert users <= rooms, f"{name} is imported in {users - rooms}"


def test_rooms_keep_their_libraries():
    only_in("flax", {"models"})
    only_in("jax.sharding", {"mesh"})
    only_in("optax", {"optim", "step", "features"})
    only_in("orbax", {"checkpoint"})
    only_in("grain", {"data"})
    only_in("tensorflow_datasets", {"data"})
    only_in("matplotlib", {"scaling"})
    only_in("torch", {"weights"})
    only_in("jax", set(FLOOR) - GROUND - {"scaling", "metrics", "log"})


def test_devices_are_named_in_the_mesh_only():
    for path in FILES:
        text = path.read_text()
        for word in (
            "jax.devices(",
            "PartitionSpec",
            "NamedSharding",
            "with_sharding_constraint",
            "local_devices(",
            "jax.sharding.",
        ):
            assert word not in text or room(path) in {"mesh", "bench"}, f"{path}: {word}"


@pytest.mark.parametrize(
    "module",
    [
        "dit_jax.models.dit",
        "dit_jax.diffusion.samplers",
        "dit_jax.scaling.fit",
        "dit_jax.data.pipeline",
        "dit_jax.train",
    ],
)
def test_imports_without_tensorflow_and_torch(module):
    unwanted = ["tensorflow", "torch"] + (["flax", "jax", "tensorflow_datasets"] if "scaling" in module else [])
    code = f"import sys, {module}\nassert not [m for m in {unwanted} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def sizes(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), f"{path}: a module opens with a sentence that says what the room is for"
    for node in sizes(path):
        assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        assert len(arguments) <= 10, f"{path}: {node.name} takes {len(arguments)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_functions_of_the_mathematics_have_docstrings(path):
    if room(path) not in FIRST | {"flops", "mesh", "optim"}:
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def test_no_file_is_called_utils():
    assert not [p for p in FILES if p.stem in {"utils", "common", "helpers", "base", "lib", "misc"}]


def test_the_locks_are_hashed_and_name_no_index():
    for lock in ROOT.glob("requirements*.lock"):
        text = lock.read_text()
        assert "://" not in text and "--index" not in text and "--find-links" not in text
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith((" ", "#"))]
        assert pins and text.count("--hash=sha256:") >= len(pins)
        assert all(line.rstrip().endswith("\\") for line in pins), f"{lock}: a pin without a hash"
