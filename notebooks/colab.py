"""Installs dit_jax beside what Colab has: `python notebooks/colab.py` in the checkout, once for each runtime; `--dry_run` only says it.

Colab's own jax fits the driver of its accelerator, so it is kept if setup.py allows its version; else jax comes with the extra for the
accelerator that is there. Everything else that is already installed and recent enough is kept too.
"""

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
JAX = re.search(r'"jax(>=[^"]+)"', (ROOT / "setup.py").read_text())[1]  # the versions that setup.py allows


def accelerator() -> str:
    """The kind that is there, by its device files or tools: tpu, cuda or ""."""
    if glob.glob("/dev/accel*") or os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("COLAB_TPU_ADDR"):
        return "tpu"
    return "cuda" if shutil.which("nvidia-smi") else ""


def plan(versions: dict[str, str], kind: str) -> tuple[str, list[str], str]:
    """What to install: (requirement, versions to keep, what to say). `versions`: of jax and jaxlib, as far as they are there."""
    found, where = versions.get("jax"), kind or "the CPU"
    if found and SpecifierSet(JAX).contains(found, prereleases=True):
        kept = [f"{name}=={version}" for name, version in versions.items()]
        return ".", kept, f"keeping jax {found}, which is here for {where}"
    had = f"jax {found} is here, but dit_jax needs {JAX}" if found else f"there is no jax here; dit_jax needs {JAX}"
    return f".[{kind}]" if kind else ".", [], f"{had}: installing one for {where}"


def main() -> None:
    """Install by pip, with the kept versions as constraints."""
    here = {
        d.metadata["Name"]: d.version for name in ("jax", "jaxlib") for d in importlib.metadata.distributions(name=name)
    }
    wanted, kept, said = plan(here, accelerator())
    print(said, flush=True)
    if "--dry_run" in sys.argv:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept))
        constraints.flush()
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--editable",
            wanted,
            "--constraint",
            constraints.name,
        ]
        sys.exit(subprocess.run(pip, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
