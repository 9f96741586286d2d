"""The command line of the wing: its commands and their options, checked before anything heavy is imported or read."""

import argparse
import math
import os
import sys
from collections.abc import Sequence

from dit_jax.error import UsageError, check_schemes, unknown_flag
from dit_jax.files import bucket_of, introduce, is_file, remote
from dit_jax.files.out import check_json
from dit_jax.hardware import Topology, topology
from dit_jax.scaling import place
from dit_jax.scaling.names import ANSWER, DROPPED, FIGURES, LOSSES, METHODS, RESIDUALS, SAMPLING, SPLITS

COMMANDS = {
    "fit": "Fit the laws and print them with their intervals.",
    "predict": "Predict the best size, data and loss at --flops.",
    "plan": "What to train for --flops or --chip_hours: a real model, its steps and loss, its command, and the runs to train next.",
    "report": "Write a self-contained report.html, with its figures and report.json beside it; or figures alone.",
    "metric": "Fit the law of a metric in training compute, each model at its best guidance; and its relation to the loss.",
    "compare": "Compare two ladders by their laws: which falls faster with compute, and from what compute on it is lower.",
    "table": "List the records of run folders: step, weights, sampling, every metric with its interval, and the best guidances.",
    "frontier": "Find the Pareto front of cost and score, the best model at each cost, and where a smaller model stops winning.",
}
FITTED = ("fit", "predict", "plan", "report")  # those that fit laws of the loss with `--method`
METRIC = "any metric of the records, 1-NAME of a share, or a column of the CSV (default: fid, else the only one that RUNS have)"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser(doc: str) -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dit_jax.scaling", description=doc, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in FITTED:
        one = commands.add_parser(name, help=COMMANDS[name])
        one.add_argument("runs", nargs="+", metavar="RUNS")
        both = ["all"] if name in ("fit", "report") else []
        default = "all" if name == "report" else None
        one.add_argument("--method", default=default, choices=[*METHODS, *both], help="default: the verdict's")
        one.add_argument("--verbose", action="store_true", help="all that was found, not the verdict's findings alone")
        one.add_argument(
            "--residual", choices=RESIDUALS, help="of the parametric methods: log law - log loss, or law - loss"
        )
        one.add_argument(
            "--loss", choices=LOSSES, help="of the parametric methods: summed Huber (delta 1e-3), or squares"
        )
        one.add_argument("--window", type=float, help="isoflop: keep sizes within this factor of a budget's best run")
        _add_quality(one, name)
        _add_convention(one)
        one.add_argument("--protocol", metavar="ID", help="take the records of this protocol_id alone")
        _add_table(one)
        one.add_argument("--resamples", type=int, default=1000)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--json", metavar="OUT", help="write the result here too")
        one.add_argument(
            "--flops",
            type=float,
            action="append",
            default=[],
            required=name == "predict",
            help="training FLOPs; may be repeated",
        )
        if name == "plan":
            _add_plan(one)
        if name == "report":
            what = ".html: the page, with figures and JSON beside it; .png, .svg: the main figure; .pdf: every figure, one a page"
            one.add_argument("--out", default="report.html", help=what)
            one.add_argument("--title", default="Scaling law")
            one.add_argument("--grid", help="PNG of samples to embed")
    _add_commands(commands)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds what `plan` takes besides the fit's own options."""
    budget = parser.add_argument_group("budget", "training FLOPs (--flops), or hours of chips")
    budget.add_argument(
        "--chip_hours", type=float, action="append", default=[], help="chips x hours, with --topology; may be repeated"
    )
    budget.add_argument("--topology", help="v3-256, v4-128, v5p-64, h100x8, ...: dit_jax.hardware")
    budget.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak rate that training reaches (default 0.4, assumed)"
    )
    budget.add_argument("--dtype", default="bfloat16", help="whose peak rate counts: bfloat16, tensorfloat32, float32")
    model = parser.add_argument_group("model", "else that of RUNS' config.json, else DiT-XL/2's")
    model.add_argument("--config", default="", metavar="FILE[:ARG]", help="the config that the run starts from")
    model.add_argument(
        "--model", "--like", default="", metavar="NAME", help="a published model, as DiT-XL/2, in all but its size"
    )
    model.add_argument("--image_size", type=int, default=0, help="pixels, with --model (default 256)")
    model.add_argument("--batch", type=int, default=0, help="images (default: the config's)")
    model.add_argument(
        "--family", choices=("runs", "dit"), help="whose width / depth and heads (default: runs, if they tell)"
    )
    model.add_argument(
        "--unique_images", type=float, help="different images that there are (default: the most that RUNS state)"
    )
    images = parser.add_argument_group("serving", "--flops are then those of training and of all images drawn")
    images.add_argument("--images_served", type=float, metavar="N", help="images that will be drawn from the model")
    images.add_argument(
        "--target_loss", type=float, action="append", default=[], help="reach it for the least total; repeatable"
    )
    images.add_argument(
        "--sampling_steps", type=int, default=0, help="model evaluations an image, unguided (default: the config's)"
    )
    images.add_argument("--guidance", type=float, help="other than 1: two evaluations for one (default: the config's)")
    cells = parser.add_argument_group("next cells", "runs that would narrow the interval of N_opt at the first budget")
    cells.add_argument(
        "--next_flops", type=float, help="what they may cost in all (default: as much as RUNS did; 0: none)"
    )
    cells.add_argument("--next_cells", type=int, default=12, help="how many at most")


def _add_convention(parser: argparse.ArgumentParser) -> None:
    """Adds what a command may say of a CSV whose columns do not, and `--to`."""
    group = parser.add_argument_group(
        "convention of a CSV", "columns counted, unit, pass, params_kind, data_kind, loss_kind say it too"
    )
    group.add_argument(
        "--counted", metavar="exact|6nd", help="C (default: 6nd where flops is absent or is 6 params tokens)"
    )
    group.add_argument("--unit", metavar="flops|macs", help="of C; MACs are converted to FLOPs")
    group.add_argument("--pass", dest="passes", metavar="train|forward", help="of C; forward is converted to training")
    group.add_argument("--params", metavar="active|total", help="N: active per token, or all trainable")
    group.add_argument("--data", metavar="tokens|images", help="D: what the column tokens counts")
    group.add_argument(
        "--loss_kind", metavar="ema|raw|training", help="L: held out with EMA or raw weights, or the training loss"
    )
    group.add_argument("--tokens_per_image", type=float, default=math.nan, help="for D in images")


def _add_quality(parser: argparse.ArgumentParser, command: str) -> None:
    """The options of one of the commands `fit`, `predict`, `plan` and `report`."""
    parser.add_argument(
        "--unbias",
        action="store_true",
        default=None,
        help="isoflop: subtract the bias that a surface predicts (else: where it is material)",
    )
    kinds = ",".join(DROPPED)
    parser.add_argument("--drop", metavar="KINDS", help=f"leave these runs out: any of {kinds}, or all")
    parser.add_argument(
        "--best_of",
        metavar="COLUMN",
        help="a table's sweep over this column: keep its best value at each size, data and budget",
    )
    if command == "fit":
        what = "predict the largest budget, each budget or each model (size) from the others"
        parser.add_argument("--holdout", choices=SPLITS, help=what)


def _add_commands(commands) -> None:
    """Adds `metric`, `compare` and `frontier`."""
    one = commands.add_parser("metric", help=COMMANDS["metric"])
    one.add_argument("runs", nargs="+", metavar="RUNS")
    one.add_argument("--metric", help=METRIC)
    one.add_argument(
        "--irreducible", action="store_true", help="E + k C^x (default: if the scores bend towards a floor)"
    )
    one.add_argument("--pure", action="store_true", help="k C^x, even if the scores bend")
    one.add_argument("--each", action="store_true", help="every model is a point, not the best of each budget")
    one.add_argument(
        "--flops", type=float, action="append", default=[], help="training FLOPs to predict at; repeatable"
    )
    _add_choice(one)
    two = commands.add_parser("compare", help=COMMANDS["compare"])
    two.add_argument("runs_a", metavar="RUNS_A")
    two.add_argument("runs_b", metavar="RUNS_B")
    for side in ("a", "b"):
        of = f"of RUNS_{side.upper()} alone, added to"
        two.add_argument(f"--{side}_column", metavar="OURS=THEIRS", action="append", default=[], help=f"{of} --column")
        two.add_argument(f"--{side}_where", metavar="FIELD=VALUE", action="append", default=[], help=f"{of} --where")
    two.add_argument("--metric", default="loss")
    two.add_argument("--law", choices=("pure", "irreducible"), default="", help="form of both loss laws")
    two.add_argument(
        "--through", choices=("vertices", "best"), default="vertices", help="of each budget: parabola, or best run"
    )
    two.add_argument("--window", type=float, help="as of fit")
    two.add_argument("--method", choices=ANSWER, default=ANSWER[0], help="of the laws of the loss, on both sides")
    _add_choice(two)
    three = commands.add_parser("frontier", help=COMMANDS["frontier"])
    three.add_argument("runs", nargs="+", metavar="RUNS")
    three.add_argument("--metric", help=METRIC)
    three.add_argument("--cost", default="flops", choices=("flops", "seconds"), help="of one image")
    three.add_argument(
        "--at", type=float, action="append", default=[], help="name the best model at this cost; repeatable"
    )
    three.add_argument("--images_served", type=float, metavar="N", help="add training: total = training + N images")
    three.add_argument("--out", metavar="FILE", help="write the figure here, as its ending says: .png, .svg or .pdf")
    _add_choice(three, choose=False)
    four = commands.add_parser("table", help=COMMANDS["table"])
    four.add_argument("runs", nargs="+", metavar="RUNS")
    form = four.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="every number in full; the protocol goes to standard error")
    form.add_argument("--md", action="store_true", help="as Markdown")
    four.add_argument("--where", metavar="FIELD=VALUE", action="append", default=[], help="take the records that agree")
    four.add_argument("--out", metavar="FILE", help="draw --metric over guidances and steps: .png, .svg or .pdf")
    four.add_argument("--metric", help=METRIC)
    four.add_argument("--json", metavar="OUT", help="write the result here too")


def _add_table(parser: argparse.ArgumentParser) -> None:
    """Adds what names the columns of a table, and what takes some of its rows or records."""
    parser.add_argument(
        "--curves", action="store_true", help="every evaluated step of a run counts, not the last alone (sweep.curves)"
    )
    what = "name of a table's column, with a factor if it counts in other units ('params=1e6*Size (M)'); repeatable"
    parser.add_argument("--column", metavar="OURS=THEIRS", action="append", default=[], help=f"another {what}")
    what = "take what agrees: a column of the table, or a field of the protocol (FIELD=* is any value); repeatable"
    parser.add_argument("--where", metavar="FIELD=VALUE", action="append", default=[], help=what)


def _add_choice(parser: argparse.ArgumentParser, choose: bool = True) -> None:
    _add_table(parser)
    if choose:
        parser.add_argument(
            "--choose", default="guidance", help="best per model over these, comma-separated: steps, ..."
        )
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="OUT", help="write the result here too")


def parse(argv: Sequence[str] | None, doc: str) -> argparse.Namespace:
    """The arguments of a command line; `doc` is the text above the help. Raises UsageError, before anything is read."""
    argv, parser = sys.argv[1:] if argv is None else argv, _parser(doc)
    args, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("--"):
        raise unknown_flag(rest[0][2:].partition("=")[0], sorted({"help", *vars(args)} - {"command", "runs"}))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    check_schemes(argv)
    _check(args)
    return args


def _check(args) -> None:
    for flops in getattr(args, "flops", []):
        if not 0 < flops < float("inf"):
            raise UsageError(f"--flops: found {flops}, expected a number above 0")
    window = getattr(args, "window", None)
    if window is not None and not window > 1:
        raise UsageError(f"--window: found {args.window}, expected a factor above 1")
    if getattr(args, "resamples", 0) < 0 or getattr(args, "seed", 0) < 0:
        raise UsageError(f"--resamples, --seed: found {args.resamples}, {args.seed}, expected at least 0")
    if args.command == "plan":
        _check_plan(args)
    if args.command == "table" and args.metric and not args.out:
        raise UsageError("--metric: found it without --out, expected both: a table has every metric")
    if args.command not in FITTED:
        _check_numbers(args)
    _introduce_buckets(args)
    if getattr(args, "grid", None) and not is_file(args.grid):
        raise UsageError(f"--grid: {args.grid}: no such file")
    check_json(args.json or "", makes_folders=True)
    if getattr(args, "out", None):
        _check_out(args.out, (".html", *FIGURES) if args.command == "report" else FIGURES)


def _introduce_buckets(args) -> None:
    """Raises StorageError now if a bucket that the command names refuses; warns if it is in another region."""
    given = [getattr(args, name, None) for name in ("runs_a", "runs_b", "out", "json", "grid")]
    for bucket in dict.fromkeys(bucket_of(p) for p in (*getattr(args, "runs", ()), *given) if p and remote(p)):
        introduce(bucket)


def _check_out(path: str, endings: tuple) -> None:
    """Raises UsageError on a file that has no such ending, or is there and was not written by the report at `path`."""
    check_json(path, "--out", makes_folders=True)
    if os.path.splitext(path)[1].lower() not in endings:
        raise UsageError(f"--out: found {path!r}, expected a file that ends in {', '.join(endings)}")
    place.check(path)


def _check_plan(args) -> None:
    """Raises UsageError on arguments that do not go together, before anything is fitted."""
    if not (args.flops or args.chip_hours or args.target_loss):
        raise UsageError("plan: found no budget, expected --flops, or --chip_hours with --topology")
    if args.chip_hours and not args.topology:
        raise UsageError("--chip_hours: found it without --topology, expected both (v3-256, h100x8, ...)")
    if args.chip_hours and args.images_served:
        raise UsageError("--images_served: found it with --chip_hours, expected --flops or --target_loss")
    if args.target_loss and not args.images_served:
        raise UsageError("--target_loss: found it without --images_served, expected both")
    for name in ("chip_hours", "mfu", "unique_images", "images_served", "target_loss", "guidance"):
        _above_0(args, name)
    if args.mfu > 1:
        raise UsageError(f"--mfu: found {args.mfu:g}, expected a share of the peak, at most 1")
    if args.next_flops is not None and not 0 <= args.next_flops < math.inf:
        raise UsageError(f"--next_flops: found {args.next_flops:g}, expected at least 0")
    for name in ("image_size", "batch", "next_cells", "sampling_steps"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name}: found {getattr(args, name)}, expected at least 1")
    if args.topology:
        chip_rate(args)


def _above_0(args, name: str) -> None:
    """Raises UsageError if the option, or one of its values, is not a number above 0; None is not given."""
    found = getattr(args, name, None)
    for value in found if isinstance(found, list) else [] if found is None else [found]:
        if not 0 < value < math.inf:
            raise UsageError(f"--{name}: found {value:g}, expected a number above 0")


def chip_rate(args) -> tuple[Topology, float]:
    """The slice, and the FLOP/s of one of its chips at the MFU assumed."""
    found = topology(args.topology)
    rate = found.peak(args.dtype) * found.chip.devices * args.mfu
    if math.isnan(rate):
        raise UsageError(f"--topology: no peak rate is published for {args.dtype} on {args.topology}")
    return found, rate


def _check_numbers(args) -> None:
    """Raises UsageError on numbers that cannot be, and on options that do not go together."""
    if getattr(args, "pure", False) and args.irreducible:
        raise UsageError("--pure: found it with --irreducible, expected one of them")
    for name in ("flops", "at", "images_served"):
        _above_0(args, name)
    unknown = [name for name in getattr(args, "choose", "guidance").split(",") if name not in SAMPLING]
    if unknown:
        raise UsageError(f"--choose: found {unknown[0]!r}, expected names among {', '.join(SAMPLING)}")
