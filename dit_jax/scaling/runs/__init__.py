"""Where runs come from: records and tables, one `Run` a row, in one convention of the numbers."""

from dit_jax.scaling.runs.load import flatten, load_runs
from dit_jax.scaling.runs.run import ROUNDING, Run, budgets, require_varied, scattered

__all__ = ["ROUNDING", "Run", "budgets", "flatten", "load_runs", "require_varied", "scattered"]
