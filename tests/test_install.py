"""Installs take what the locks name and nothing else: every file by its hash, from no address of their own."""

import importlib.metadata
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = sorted(ROOT.glob("requirements*.lock"))
HASH = r"--hash=sha256:([0-9a-f]{64})"
DEV = ("requirements-bootstrap", "requirements", "requirements-dev")  # what `make dev` installs
PURE = "absl-py"  # a small package of Python alone


def requirements(lock):
    """The requirements of a lock, each with its hashes on one line."""
    text = re.sub(r" *\\\n *", " ", lock.read_text())
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def installs():
    """Every install that `make dev` runs from nothing, as a list of words."""
    text = subprocess.run(
        ["make", "--dry-run", "--always-make", "dev"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in text.stdout.splitlines() if re.search(r"\bpip install\b", line)]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.stem)
def test_every_requirement_is_pinned_and_hashed(lock):
    found = requirements(lock)
    assert found
    for line in found:
        assert re.fullmatch(rf"[A-Za-z0-9._-]+(\[[a-z0-9,._-]+\])?==[^\s;]+( ;.*?)?( {HASH})+", line), line[:200]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.stem)
def test_a_lock_names_no_index_and_no_other_file(lock):
    for line in requirements(lock):
        assert not line.startswith("-") and "://" not in line and " @ " not in line, line[:200]


def test_make_dev_installs_by_hash_only():
    found = installs()
    assert {words[-1] for words in found} == {lock.name for lock in LOCKS if lock.stem in DEV} | {"."}
    for words in found:
        own = words[-2:] == ["--editable", "."] and "--no-deps" in words
        assert own or ("--require-hashes" in words and words[-2] == "-r"), words


def test_no_other_target_of_make_installs_otherwise():
    for line in (ROOT / "Makefile").read_text().splitlines():
        if re.search(r"\bpip3? install\b", line):
            assert "--require-hashes" in line or "--no-deps --no-build-isolation --editable ." in line, line


def locked(lock):
    """{name: version} of a lock's requirements for this Python."""
    lines = [Requirement(line.split(" --hash")[0]) for line in requirements(ROOT / lock)]
    return {r.name: next(iter(r.specifier)).version for r in lines if r.marker is None or r.marker.evaluate()}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_locks_pin_what_setup_py_asks_for_once_for_each_python(python):
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    here = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    extras = setup["EXTRAS"]
    gpu = [r for r in extras["gpu-compiler"] if not r.startswith("jax[")]  # jax itself is in requirements.lock
    locks = (
        ("requirements.lock", setup["CORE"]),
        ("requirements-dev.lock", extras["dev"]),
        ("requirements-gpu.lock", gpu),
        ("requirements-text.lock", extras["text"]),
    )
    for lock, asked in locks:
        lines = [Requirement(line.split(" --hash")[0]) for line in requirements(ROOT / lock)]
        pins = [r for r in lines if r.marker is None or r.marker.evaluate(here)]
        assert len({canonicalize_name(r.name) for r in pins}) == len(pins), "two versions of one package"
        found = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in pins}
        for requirement in map(Requirement, asked):
            assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_the_gpu_compiler_is_locked_for_the_locked_jax():
    core, gpu = locked("requirements.lock"), locked("requirements-gpu.lock")
    assert {gpu[f"jax-cuda13-{part}"] for part in ("plugin", "pjrt")} == {core["jax"]} and not set(core) & set(gpu)
    versions = [len(re.findall(rf"(?m)^{name}==", (ROOT / lock).read_text())) for name, lock in
                (("jax", "requirements.lock"), ("jax-cuda13-plugin", "requirements-gpu.lock"))]  # fmt: skip
    assert versions[0] == versions[1]  # one for each Python that has its own jax


def test_what_jax_tpu_adds_is_locked_for_the_locked_jax():
    """The launchers install it beside requirements.lock, on a machine that has nothing else."""
    core, tpu = locked("requirements.lock"), locked("requirements-tpu.lock")
    asked = [Requirement(text) for text in importlib.metadata.requires("jax")]
    asked = [
        r for r in asked if r.marker and r.marker.evaluate({"extra": "tpu"}) and not r.marker.evaluate({"extra": ""})
    ]
    assert {r.name for r in asked} >= {"jaxlib", "libtpu"} and importlib.metadata.version("jax") == core["jax"]
    for requirement in asked:
        assert requirement.specifier.contains((core | tpu)[requirement.name]), requirement
    assert not set(core) & set(tpu)
    versions = [len(re.findall(rf"(?m)^{name}==", (ROOT / lock).read_text())) for name, lock in
                (("jax", "requirements.lock"), ("libtpu", "requirements-tpu.lock"))]  # fmt: skip
    assert versions[0] == versions[1]  # one for each Python that has its own jax
    assert "-r requirements-tpu.lock" in (ROOT / "launch" / "functions.bash").read_text()


def test_a_wheel_holds_the_package_with_its_data_and_the_configs(tmp_path):
    """What setuptools takes into a wheel runs from any folder: `convert` needs the paper's configs."""
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        f"--build-base={tmp_path}/b",
        "build_py",
        f"--build-lib={tmp_path}/lib",
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    tracked = subprocess.run(
        ["git", "ls-files", "dit_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert [name for name in tracked if not (tmp_path / "lib" / name).is_file()] == []
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}/lib", "PYTHONSAFEPATH": "1"}
    code = "import dit_jax; from dit_jax.config import model_config; from dit_jax.networks.notes import apply\n"
    code += "print(dit_jax.__file__, apply(None, model_config('DiT-XL/2', 512), True, 'F').train.steps)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.split() == [f"{tmp_path}/lib/dit_jax/__init__.py", "3000000"], found.stderr
    train = [sys.executable, "-m", "dit_jax.train", "--config=configs/digits.py", "--workdir=w"]
    found = subprocess.run(train, cwd=tmp_path, env=env, capture_output=True, text=True)
    own = f"{tmp_path}/lib/dit_jax/configs/digits.py"
    assert (found.returncode, found.stderr) == (
        2,
        f"error: --config: no file 'configs/digits.py'; expected perhaps '{own}'\n",
    )


def test_ci_installs_through_make_alone():
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert "make test" in lines
    assert not [line for line in lines if re.search(r"\b(pip|uv|conda|curl|wget)\b", line) and not line.startswith("#")]


def small_lock(folder, change):
    """A lock of one package, cut from the project's, with its text changed."""
    lock = next(line for line in requirements(ROOT / "requirements.lock") if line.startswith(f"{PURE}=="))
    path = folder / "requirements.lock"
    path.write_text(change(lock) + "\n")
    return path


def install(words, lock, folder):
    """Run an install of the Makefile with another lock, into a folder of its own."""
    changed = [*words[:-1], str(lock), "--no-deps", "--target", str(folder / "installed")]
    done = subprocess.run(changed, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, " ".join(done.stderr.split())  # uv breaks lines where the terminal ends


def other_digit(lock):
    return re.sub(HASH, lambda m: f"--hash=sha256:{int(m[1][0], 16) ^ 1:x}{m[1][1:]}", lock)


def one_hash_less(lock):
    return re.sub(f" {HASH}", "", lock)


def locked_command():
    """The very command by which `make setup` installs requirements.lock."""
    return next(words for words in installs() if words[-1] == "requirements.lock")


def test_the_command_of_make_takes_an_intact_lock(tmp_path):
    code, said = install(locked_command(), small_lock(tmp_path, str), tmp_path)
    assert code == 0, said
    assert (tmp_path / "installed" / "absl").is_dir()


@pytest.mark.parametrize(
    ("change", "reason"), [(one_hash_less, "must have a hash"), (other_digit, "Hash mismatch")], ids=["none", "wrong"]
)
def test_the_command_of_make_refuses_a_bad_hash(tmp_path, change, reason):
    code, said = install(locked_command(), small_lock(tmp_path, change), tmp_path)
    assert code != 0 and reason in said, said
    assert not (tmp_path / "installed" / "absl").exists()


def test_a_whole_lock_with_one_hash_missing_is_refused(tmp_path):
    lock = tmp_path / "requirements.lock"
    shutil.copy(ROOT / "requirements.lock", lock)
    block = re.search(rf"^{PURE}==(?:.*\\\n)+.*\n", lock.read_text(), re.M)[0]
    lock.write_text(lock.read_text().replace(block, re.sub(rf" \\\n +{HASH}", "", block)))
    code, said = install(locked_command(), lock, tmp_path)
    assert code != 0 and f"none were provided for: {PURE}==" in said, said
    assert not list((tmp_path / "installed").glob("*/__init__.py"))


def test_the_bootstrap_refuses_a_missing_hash_too(tmp_path):
    words = next(words for words in installs() if words[-1] == "requirements-bootstrap.lock")
    changed = [sys.executable, "-m", *words[0].rpartition("/")[2:], *words[1:]]
    code, said = install(changed, small_lock(tmp_path, one_hash_less), tmp_path)
    assert code != 0 and "--require-hashes" in said, said
    assert not (tmp_path / "installed" / "absl").exists()
