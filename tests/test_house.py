"""The floors of the house: imports go down only, and what belongs to one room stays there."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dit_jax.__main__ import JOBS as listed

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dit_jax"
WING = PACKAGE / "scaling"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("findings/*.md"))]
# A room imports rooms of lower floors only.
FLOORS = (
    {"error", "metrics", "log"},
    {"__init__", "files", "hardware", "config", "__main__"},
    {"workdir", "flops", "data"},
    {"devices", "models", "diffusion"},
    {"job"},
    {"scaling", "checkpoint", "bind"},
    {"networks"},
    {"sampling", "encode", "convert"},
    {"training"},
    {"evaluation", "program", "sample", "features"},
    {"preflight"},
    {"sweep", "evaluate", "train", "bench"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
WING_ROOMS = {"runs", "fits", "verdicts", "plans", "frontier", "report"}
MATHEMATICS = {"models", "diffusion", "metrics"}
GROUND = {"error", "log", "files", "hardware", "config", "flops", "workdir", "job"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path, house=PACKAGE):
    """The first name below the package, `models`, `train`, ..., or below the wing: `fits`, `options`, ..."""
    return path.relative_to(house).parts[0].removesuffix(".py")


JOBS = {room(path) for path in FILES if '__name__ == "__main__"' in path.read_text()} - {"__main__"}


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """Names of all imported modules, dotted; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(path, house=PACKAGE):
    """The rooms of the package, or of the wing, that a file imports."""
    start = ".".join(house.relative_to(ROOT).parts) + "."
    names = {name.removeprefix(start).split(".")[0] for name in imports(path) if name.startswith(start)}
    return {name for name in names if (house / name).is_dir() or (house / f"{name}.py").exists()}


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOOR)


def test_imports_go_down_only():
    wrong = []
    for path in FILES:
        here = room(path)
        for other in rooms_used(path) - {here}:
            if FLOOR[other] >= FLOOR[here]:
                wrong.append(f"{path}: {other} is no floor below")
            if here in MATHEMATICS and other not in {"error", "config", "flops"}:
                wrong.append(f"{path}: the mathematics knows no {other}")
            if here == "scaling" and other not in GROUND:
                wrong.append(f"{path}: the wing reads records and tables, it knows no {other}")
    assert wrong == []


def test_jobs_import_no_job():
    """Nor does any other file. The rooms of the wing are a library too, with which a sweep fits its laws; its command line is the job."""
    assert set(listed) == JOBS
    wrong = []
    for path in FILES:
        used = rooms_used(path) & JOBS - {room(path)}
        library = {"scaling"} if rooms_used(path, WING) <= WING_ROOMS else set()
        wrong += [f"{path}: {other} is a job" for other in used - library]
    assert wrong == []


def longest_chain(house):
    """Rooms in the longest chain of imports. Fails if rooms import each other in a circle."""
    files = [path for path in FILES if path.is_relative_to(house)]
    graph, length = {room(path, house): set() for path in files}, {}
    for path in files:
        graph[room(path, house)] |= rooms_used(path, house) - {room(path, house)}
    try:
        for name in graphlib.TopologicalSorter(graph).static_order():
            length[name] = 1 + max((length[other] for other in graph[name]), default=0)
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' is imported by '.join(error.args[1])}")
    return max(length.values())


def test_no_long_chain_and_no_circle_among_rooms():
    assert {path.name for path in WING.iterdir() if path.is_dir()} - {"__pycache__"} == WING_ROOMS
    assert longest_chain(PACKAGE) <= 10
    assert longest_chain(WING) <= 7


# What opens, makes, renames or deletes a path itself: of `os` these, all of `shutil` and `tempfile`, and methods of `Path`.
OS = "link makedirs mkdir open remove removedirs rename renames replace rmdir symlink truncate unlink utime listdir scandir walk"
DIRECT = {"open", "io.open", *(f"os.{name}" for name in OS.split())}
OF_PATHS = {"mkdir", "touch", "unlink", "rmdir", "symlink_to", "hardlink_to", "iterdir"}
OF_PATHS |= {f"{verb}_{kind}" for verb in ("read", "write") for kind in ("text", "bytes")}
# Places that are local by nature, whatever the paths that a user gives.
LOCAL = {
    "__main__.py first_line: read_text": "the source of a job, in the package",
    "bench/measure.py machine: open": "/proc, of the system",
    "checkpoint/__init__.py write_weights: shutil.copytree": "in a folder of `new_folder`, which lies on a disk until it is whole",
    "checkpoint/saver.py _remove_unfinished: shutil.rmtree": "beside threads that may write there; a bucket's are removed by `delete`",
    "data/emoji/__init__.py read_all: read_bytes": "the pictures, in the package",
    "data/tfds.py _build: tempfile.TemporaryDirectory": "TFDS writes to a disk what then goes into a bucket",
    "error.py _unread: os.open": "/dev/null, of the system",
    "job/launcher.py check_launcher: shutil.which": "a command of this machine",
    "scaling/place.py write: open": "a name of `whole`, which lies on a disk until it is whole",
    "scaling/report/page.py page: read_text": "the template, in the package",
    "scaling/runs/load.py _on_disk: os.walk": "beside `_in_bucket`, which lists a bucket",
    "training/trace.py tracing: tempfile.gettempdir": "JAX writes to a disk what then goes into a bucket",
    "workdir/goodput.py process_start: open": "/proc, of the system",
    "workdir/manifest.py write_manifest: os.walk": "names in folders to flush, which a bucket has not",
    "workdir/scalars.py _file: open": "appends, which a bucket cannot: its writer is `_segments`",
    "workdir/scalars.py _tensorboard: tempfile.TemporaryDirectory": "tensorboardX writes to a disk what then goes into a bucket",
    "workdir/scalars.py _wandb: tempfile.gettempdir": "what W&B keeps of its own, beside what it sends",
    "workdir/scalars.py drop_events_after: open": "a name of `whole`, which lies on a disk until it is whole",
}


def direct(node):
    """The name by which an expression or import reaches paths without `files`; "" if it does not."""
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        names = [ast.unparse(node)]
    else:
        return ""
    found = [name for name in names if name in DIRECT or name.startswith(("shutil.", "tempfile."))]
    return found[0] if found else node.attr if getattr(node, "attr", "") in OF_PATHS else ""


def test_paths_are_reached_through_one_door():
    """A path may be in a bucket: what opens it is `files`, but in places that are local by nature."""
    found = {
        f"{path.relative_to(PACKAGE)} {getattr(part, 'name', '')}: {name}"
        for path in FILES
        if room(path) != "files"
        for part in parsed(path).body
        for node in ast.walk(part)
        if (name := direct(node))
    }
    assert found == set(LOCAL)


def only_in(name, rooms):
    users = {room(path) for path in FILES if any(m == name or m.startswith(f"{name}.") for m in imports(path))}
    assert users <= rooms, f"{name} is imported in {users - rooms}"


def test_rooms_keep_their_libraries():
    only_in("flax", {"models"})
    only_in("jax.sharding", {"devices"})
    only_in("optax", {"training"})
    only_in("orbax", {"checkpoint"})
    only_in("grain", {"data"})
    only_in("tensorflow_datasets", {"data"})
    only_in("matplotlib", {"scaling"})
    only_in("torch", {"networks"})
    only_in("tokenizers", {"networks"})
    only_in("sentencepiece", {"networks"})
    only_in("filelock", {"files"})
    only_in("fcntl", set())
    only_in("google", {"files"})
    only_in("gcsfs", set())
    only_in("fsspec", {"files"})
    only_in("difflib", {"error"})
    only_in("rich", {"log"})
    only_in("jax", set(FLOOR) - GROUND - {"scaling", "metrics"} | {"job"})


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
            assert word not in text or room(path) in {"devices", "bench"}, f"{path}: {word}"


def test_imports_without_tensorflow_and_torch():
    """Nor, in the wing, JAX."""
    rooms = "dit_jax.models.dit, dit_jax.diffusion.samplers, dit_jax.data.pipeline, dit_jax.train"
    unwanted, code = ["tensorflow", "torch"], "import sys"
    for modules, more in (("dit_jax.scaling.fits", ["flax", "jax", "tensorflow_datasets"]), (rooms, [])):
        code += f"\nimport {modules}\nassert not [m for m in {unwanted + more} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def sizes(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_files_and_functions_stay_small():
    wrong = []
    for path in FILES:
        if (lines := path.read_text().count("\n")) > 400:
            wrong.append(f"{path}: {lines} lines")
        if not ast.get_docstring(parsed(path)):
            wrong.append(f"{path}: a module opens with a sentence that says what the room is for")
        for node in sizes(path):
            if node.end_lineno - node.lineno >= 60:
                wrong.append(f"{path}: {node.name} is long")
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if len(arguments) > 10:
                wrong.append(f"{path}: {node.name} takes {len(arguments)}")
    assert wrong == []


def test_files_of_tests_are_short_and_those_that_pages_name_are_there():
    assert [f"{p}: {n}" for p in ROOT.glob("tests/**/*.py") if (n := p.read_text().count("\n")) > 500] == []
    named = {name for page in (*PAGES, ROOT / "Makefile") for name in re.findall(r"tests/[\w/]+\.py", page.read_text())}
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_public_functions_of_the_mathematics_have_docstrings():
    paths = [path for path in FILES if room(path) in MATHEMATICS | {"scaling", "flops", "devices"}]
    nodes = [(path, node) for path in paths for node in parsed(path).body]
    public = [
        (path, node)
        for path, node in nodes
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert public and [f"{path}: {node.name}" for path, node in public if not ast.get_docstring(node)] == []


def test_no_file_is_called_utils():
    assert not [p for p in FILES if p.stem in {"utils", "common", "helpers", "base", "lib", "misc"}]


def test_the_locks_are_hashed_and_name_no_index():
    for lock in ROOT.glob("requirements*.lock"):
        text = lock.read_text()
        assert "://" not in text and "--index" not in text and "--find-links" not in text
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith((" ", "#"))]
        assert pins and text.count("--hash=sha256:") >= len(pins)
        assert all(line.rstrip().endswith("\\") for line in pins), f"{lock}: a pin without a hash"


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in page.read_text().splitlines()
        if line[:1] == "#"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_front_page_is_short_and_the_index_is_whole():
    assert len(PAGES[0].read_text().splitlines()) <= 150
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        p.name for p in PAGES[1:] if p.parent.name == "docs" and p.name != "README.md" and f"({p.name})" not in index
    ] == []


# Of the product without the wing, before the rooms were made: what is added has to be taken away elsewhere.
MOST_LINES = 26_200


def test_the_product_does_not_grow():
    lines = sum(path.read_text().count("\n") for path in FILES if room(path) != "scaling")
    assert lines <= MOST_LINES


def test_jobs_are_short():
    """Options, what they bind, one call."""
    for job in JOBS:
        path = PACKAGE / f"{job}.py"
        path = path if path.exists() else PACKAGE / job / "__main__.py"
        assert path.read_text().count("\n") <= 120, path


def test_each_thing_is_wired_in_one_place():
    """Where a model, a process, a task, a mesh axis or a kind of data would otherwise be told apart again and again."""

    def users(*words):
        return {str(p.relative_to(PACKAGE)) for p in FILES if any(word in p.read_text() for word in words)}

    assert users("make_process(") == {f"diffusion/{name}.py" for name in ("process", "task", "objective/denoising")}
    assert users("dit.init(", "dit.apply(") == {"bind.py", "checkpoint/__init__.py"}
    assert users("attention_implementation(") == {"bind.py", "devices/mesh.py"}
    assert users('shape["data"]', 'shape["fsdp"]', 'shape["tensor"]') == set()
    assert not {name for name in users("isinstance(source", "isinstance(a, ") if name.startswith(("data", "training"))}
    assert users("conditioning.FIELDS", "FIELDS = {") <= {"flops.py", "models/conditioning.py"}
