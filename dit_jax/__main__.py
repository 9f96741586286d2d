"""List of the jobs, printed by `python -m dit_jax`; `python -m dit_jax.JOB --help` describes one."""

import ast
import sys
from pathlib import Path

from dit_jax.error import exit_code

JOBS = ("train", "sample", "evaluate", "sweep", "scaling", "preflight", "convert", "encode", "features", "bench")


def first_line(job: str) -> str:
    """First line of a job's docstring, read without importing it."""
    path = Path(__file__).parent / f"{job}.py"
    text = (path if path.exists() else path.with_suffix("") / "__main__.py").read_text()
    line = (ast.get_docstring(ast.parse(text)) or job).splitlines()[0]
    return line.split(": `")[0].rstrip(".")


def main() -> None:
    print("python -m dit_jax.JOB --help says what a job takes.\n")
    print("\n".join(f"  {job:<12}{first_line(job)}" for job in JOBS))


if __name__ == "__main__":
    sys.exit(exit_code(main))
