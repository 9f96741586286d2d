"""What the commands say beside the laws: the bias of the parabolas, the quality of the runs, and errors on what was held out."""

import argparse

from dit_jax.error import UsageError
from dit_jax.scaling import bias
from dit_jax.scaling.table import print_table


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """The options of one of the commands `fit`, `predict`, `plan` and `report`."""
    parser.add_argument(
        "--unbias", action="store_true", default=None, help="isoflop: subtract the bias that a surface predicts"
    )


def tell_bias(runs, fit) -> dict:
    """Prints the bias of an isoFLOP fit's parabolas; returns {"bias": its JSON, null where none can be predicted}."""
    try:
        found = fit.bias or bias.estimate(bias.surface_of(runs), fit.used)
    except UsageError as error:
        print(f"Bias of the parabolas: not predicted: {str(error).removeprefix('RUNS: ')}\n")
        return {"bias": None}
    print_table(
        "Bias of the parabolas, as a surface through the same runs predicts it", bias.BIAS_HEAD, bias.rows(found)
    )
    if not found.corrected:
        print(bias.text(found) + "\n")
    return {"bias": bias.to_json(found)}
