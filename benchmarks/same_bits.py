"""Same bits: this checkout against another revision, by checkpoints, records, images and fits of tiny runs on 1 and 8 CPU devices.

    python benchmarks/same_bits.py --against=REVISION            # all conditionings and processes
    python benchmarks/same_bits.py --against=REVISION --quick    # adaLN-Zero on 1 device only

For changes that must not change a number. Of a checkpoint parameters, EMA, moments and what else either revision keeps in it (power
EMAs, a student's teacher). Both revisions run here, one after the other, with the installed packages: bits depend
on the CPU and on the versions of the libraries, so there is nothing to commit and compare with. Only the command line and the
layout of run folders are used, so modules may move between the revisions. Uncommitted and new files of the checkout count.
A job is forked from this process, which has the libraries loaded. Both revisions share one cache of compiled programs: its keys
are the programs, so one that changed is compiled anew. Exit code 0: all is equal; 1: something differs, or a job failed.
"""

import argparse
import importlib.util
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
USED = ("dit_jax", "configs")  # what jobs need of a revision
CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
PROCESSES = {
    "ddpm": ("--config.model.learn_sigma=True", "--config.sample.sampler=ddpm"),
    "flow": ("--config.model.learn_sigma=False", "--config.sample.sampler=euler"),
}
MESHES = {1: (), 8: ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")}
STEPS, RESUMED = 20, 30
TINY = (
    "--config.model.depth=2", "--config.model.width=16", "--config.model.heads=2", "--config.train.batch_size=16",
    "--config.optim.warmup_steps=5", f"--config.train.checkpoint_every={STEPS}", "--config.sample.steps=10",
    "--config.eval.max_images=64",
)  # fmt: skip
LADDER = (  # 3 budgets of 3 sizes, whose minima lie inside
    "--config.sweep.budgets=(3e8,6e8,1.2e9)", "--config.sweep.sizes=((4,1,1),(8,2,1),(12,3,1))",
    "--config.sweep.windows=((0,3),(0,3),(0,3))", "--config.sweep.extrapolate=0", "--config.sweep.processes=1",
    "--config.eval.max_images=64",
)  # fmt: skip
LIBRARIES = (
    "flax.linen", "grain", "jax", "matplotlib.figure", "ml_collections.config_flags", "optax", "orbax.checkpoint",
    "PIL.Image", "rich.progress", "scipy.optimize", "scipy.stats", "sklearn.datasets", "tensorflow_datasets",
)  # fmt: skip
ITEMS = ("params", "ema", "opt", "extras", "tracks")  # of a checkpoint; what only one revision keeps is a difference
TRACKS = "--config.optim.ema_tracks=(0.05,0.1)"
STUDENT = "configs/digits_few.py"  # keeps a teacher in extras
# Of a record: timings, and what older revisions did not say.
LEFT_OUT = ("goodput", "seconds_sample", "metric_signs", "task")
Comparison = tuple[str, dict, dict]  # what is compared, and its leaves by path: in this checkout, in the other revision


class JobFailedError(Exception):
    """A job did not exit with 0."""


def git(*arguments: str) -> bytes:
    return subprocess.run(("git", "-C", ROOT, *arguments), check=True, stdout=subprocess.PIPE).stdout


def export(revision: str, folder: Path) -> str:
    """Write a revision's files to a folder; "" is the checkout as it is, without what git ignores. Returns the commit."""
    commit = git("rev-parse", "--short", "--verify", f"{revision or 'HEAD'}^{{commit}}").decode().strip()
    folder.mkdir()
    if revision:
        subprocess.run(("tar", "x", "-C", folder), input=git("archive", commit, *USED), check=True)
        return commit
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *USED).decode()
    for name in listed.strip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return f"{commit} and uncommitted changes" if git("status", "--porcelain", "--", *USED) else commit


def load_libraries(cache: Path) -> None:
    """Import what takes jobs seconds to import, but nothing of dit_jax; no backend of JAX starts."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",  # XLA's threads: as many as cores would deadlock where 8 devices meet
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    for name in LIBRARIES:
        importlib.import_module(name)


def fork(work: Callable[[], None], output: Path) -> None:
    """Run `work()` in a child process; what it prints goes to a file. Raises JobFailedError unless it exits with 0."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise JobFailedError(f"exit code {code}\n" + "\n".join(output.read_text().splitlines()[-5:]))
        return
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(revision: Path, devices: int, job: str, *arguments: str) -> None:
    """`python -m dit_jax.JOB ARGUMENTS` of an exported revision on virtual devices."""

    def work() -> None:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        os.chdir(revision)
        sys.path[0] = str(revision)  # before the dit_jax that is installed
        found = importlib.util.find_spec("dit_jax").origin
        if not Path(found).is_relative_to(revision):
            raise ImportError(f"found dit_jax in {found}, expected it in {revision}")
        sys.argv = [f"dit_jax/{job}.py", *arguments]
        runpy.run_module(f"dit_jax.{job}", run_name="__main__", alter_sys=True)

    try:
        fork(work, revision / "output")
    except JobFailedError as error:
        raise JobFailedError(f"{revision.name}: dit_jax.{job} {' '.join(arguments)}: {error}") from None


def knows(revision: Path, key: str) -> bool:
    """Whether a revision has a config key."""
    return any(key in path.read_text() for path in (revision / "dit_jax").rglob("*.py"))


def data(revision: Path) -> str:
    """The flag for the images, which every revision builds for itself."""
    return f"--config.data.data_dir={revision / 'data'}"


def run_jobs(revision: Path, workdir: Path, devices: int, *flags: str) -> None:
    """Train, or resume, then evaluate, then sample."""
    folder = f"--workdir={workdir}"
    run(revision, devices, "train", "--config=configs/digits.py", folder, data(revision), *flags)
    run(revision, devices, "evaluate", folder, data(revision))
    run(revision, devices, "sample", folder, "--num=64", "--guidance=2", f"--out={workdir / 'samples.npz'}")


def flatten(tree: object, path: str = "") -> dict:
    """{path: leaf} of nested dicts and lists."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in flatten(value, f"{path}/{key}").items()}


def read_checkpoint(folder: Path) -> dict:
    """Every array of a checkpoint. Plain Orbax reads it in a child process: it starts threads, which would not be forked."""
    arrays = folder.parent / f"{folder.name}.pickle"

    def work() -> None:
        import jax
        import orbax.checkpoint as ocp

        found = {}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for name in (item for item in ITEMS if (folder / item).exists()):
                tree = reader.metadata(folder / name).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                found[name] = reader.restore(folder / name, ocp.args.PyTreeRestore(restore_args=as_numpy))
        arrays.write_bytes(pickle.dumps(flatten(found)))

    fork(work, folder.parent / "output")
    return pickle.loads(arrays.read_bytes())


def read_records(workdir: Path) -> dict:
    """All fields of a run's records but LEFT_OUT, by step and by what they measure."""
    found = {}
    for line in (workdir / "eval" / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        kind = "samples" if "samples" in record["protocol"] else "loss"
        found[f"{record['step']} {kind}"] = {key: value for key, value in record.items() if key not in LEFT_OUT}
    return flatten(found)


def read_images(path: Path) -> dict:
    """Images, labels, and the job that the npz names in its comment."""
    with zipfile.ZipFile(path) as archive, np.load(path) as arrays:
        return flatten({"job": json.loads(archive.comment), **arrays})


def compare_runs(name: str, workdirs: list[Path], step: int) -> Iterator[Comparison]:
    """A checkpoint's arrays, the records and the images of two run folders."""
    yield f"{name}: checkpoint {step}", *(read_checkpoint(w / "checkpoints" / str(step)) for w in workdirs)
    yield f"{name}: records", *map(read_records, workdirs)
    yield f"{name}: images", *(read_images(w / "samples.npz") for w in workdirs)


def compare_case(revisions: list[Path], devices: int, process: str, conditioning: str) -> Iterator[Comparison]:
    """A run by each revision; for the first conditioning also tracks, sample metrics, the other's run resumed by each, and a student."""
    name = f"{devices} device{'s'[: devices > 1]}, {conditioning}, {process}"
    kind = (f"--config.model.conditioning={conditioning}", f"--config.diffusion.process={process}")
    first = conditioning == CONDITIONINGS[0]
    samples = f"--config.eval.samples={96 if first else 0}"
    tracks = (TRACKS,) if first and all(knows(revision, "ema_tracks") for revision in revisions) else ()
    flags = (*TINY, *MESHES[devices], *PROCESSES[process], *kind, samples, *tracks)
    workdirs = [revision / "runs" / name / "run" for revision in revisions]
    for revision, workdir in zip(revisions, workdirs, strict=True):
        run_jobs(revision, workdir, devices, *flags, f"--config.train.steps={STEPS}")
    yield from compare_runs(name, workdirs, STEPS)
    if not first:
        return
    copies = [workdir.parent / "resumed" / "run" for workdir in workdirs]
    for revision, copy in zip(revisions, copies, strict=True):
        shutil.copytree(workdirs[1], copy, ignore=shutil.ignore_patterns("eval", "samples.npz"))
        run_jobs(revision, copy, devices, *flags, f"--config.train.steps={RESUMED}")
    yield from compare_runs(f"{name}, the other's run resumed", copies, RESUMED)
    if process == "flow" and all((revision / STUDENT).exists() for revision in revisions):
        students = [workdir.parent / "student" for workdir in workdirs]
        for revision, student in zip(revisions, students, strict=True):
            what = (f"--config={STUDENT}:consistency", f"--init={workdirs[1]}", f"--workdir={student}", data(revision))
            run(revision, devices, "train", *what, *TINY, *MESHES[devices], f"--config.train.steps={STEPS}")
        yield f"{name}: student {STEPS}", *(read_checkpoint(w / "checkpoints" / str(STEPS)) for w in students)


def compare_sweeps(revisions: list[Path]) -> Iterator[Comparison]:
    """A sweep's records, and that each revision fits the other one's; laws and intervals may change, so only what was read is compared."""
    sweeps = [revision / "runs" / "sweep" for revision in revisions]
    for revision, sweep in zip(revisions, sweeps, strict=True):
        run(revision, 1, "sweep", "--config=configs/digits_isoflop.py", f"--workdir={sweep}", data(revision), *LADDER)
    records = [{p.parts[-3]: read_records(p.parents[1]) for p in s.rglob("eval/records.jsonl")} for s in sweeps]
    leaves = [{at: leaf for at, leaf in flatten(some).items() if not at.endswith("/unique_images")} for some in records]
    yield f"sweep: records of {len(records[1])} runs", *leaves  # unique_images: new since f941e80
    curves = (
        ["--curves"] if len(records[1]) < 9 else []
    )  # one run a size instead of one a size and budget, as in f941e80
    for revision in revisions:
        run(
            revision,
            1,
            "scaling",
            "fit",
            str(sweeps[1]),
            "--method=isoflop",
            *curves,
            f"--json={revision / 'law.json'}",
        )
    laws = [flatten(json.loads((revision / "law.json").read_text())) for revision in revisions]
    yield "scaling fit: runs read", *({"n_runs": law["n_runs"]} for law in laws)


def differences(found: dict, expected: dict) -> list[str]:
    """Leaves that are not the same to the bit, and by how much."""
    wrong = [f"{path} is {'new' if path in found else 'missing'}" for path in sorted(found.keys() ^ expected.keys())]
    for path in filter(found.__contains__, expected):
        a, b = found[path], expected[path]
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
            wrong += [] if repr(a) == repr(b) else [f"{path}: {a!r:.60} here, {b!r:.60} there"]
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            wrong.append(f"{path}: {a.dtype} {a.shape} here, {b.dtype} {b.shape} there")
        elif a.tobytes() != b.tobytes():
            wrong.append(f"{path} by up to {np.max(np.abs(a.astype(float) - b.astype(float))):.3g}")
    return wrong if expected else ["nothing to compare"]


def count_differing(comparisons: Iterator[Comparison], since: float) -> int:
    """Say of each comparison whether it is equal; returns how many are not, with a job that failed."""
    count = 0
    try:
        for what, found, expected in comparisons:
            wrong = differences(found, expected)
            said = f"DIFFERS in {len(wrong)} of {len(expected)}: {'; '.join(wrong[:3])}" if wrong else "equal"
            print(f"{time.monotonic() - since:5.0f} s  {what}: {len(expected)} leaves, {said}", flush=True)
            count += bool(wrong)
    except (JobFailedError, OSError) as error:
        print(f"{time.monotonic() - since:5.0f} s  FAILED: {error}", flush=True)
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", required=True, metavar="REVISION", help="a commit, tag or branch")
    parser.add_argument("--quick", action="store_true", help="adaLN-Zero on 1 device only, and no sweep")
    args, since = parser.parse_args(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    revisions = [folder / "here", folder / "there"]
    here, there = export("", revisions[0]), export(args.against, revisions[1])
    print(f"{here} (here) against {there} (there)", flush=True)
    load_libraries(folder / "compiled")
    count = 0
    for devices in (1,) if args.quick else MESHES:
        for conditioning in CONDITIONINGS[:1] if args.quick else CONDITIONINGS:
            for process in PROCESSES:
                count += count_differing(compare_case(revisions, devices, process, conditioning), since)
    count += 0 if args.quick else count_differing(compare_sweeps(revisions), since)
    if count:
        print(f"{count} comparisons differ or failed; the runs are in {folder}")
        return 1
    shutil.rmtree(folder)
    print("all equal, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
