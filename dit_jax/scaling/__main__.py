"""Fit scaling laws to runs: `python -m dit_jax.scaling COMMAND RUNS`.

RUNS is one or more workdirs, folders of workdirs, or a table with columns params,tokens,loss (optional flops,images,run,group);
`--column params='1e6*Size (M)'` names a column that is called something else, `--where study=A` takes some of its rows.
`fit --method=all` puts the methods side by side and says why they disagree; `report`, by default of all of them, shows it.
Exit codes: 0 done, 1 error, 2 usage or bad input (nothing is written).
"""

import os
import sys

from dit_jax.error import exit_code
from dit_jax.files import absolute, make_folder
from dit_jax.files.out import write_report
from dit_jax.scaling import options


def main(argv=None) -> int:
    """Runs a command line; returns the exit code."""
    return exit_code(lambda: _run(argv))


def _run(argv) -> None:
    args = options.parse(argv, __doc__)
    from dit_jax.scaling import commands  # numpy and scipy take a second
    from dit_jax.scaling.frontier import commands as frontier
    from dit_jax.scaling.frontier import table

    run = commands.run if args.command in options.FITTED else table.run if args.command == "table" else frontier.run
    result = run(args)
    if args.json:
        make_folder(os.path.dirname(absolute(args.json)))
        write_report(args.json, result)


if __name__ == "__main__":
    sys.exit(main())
