"""Prints the benchmark's tables: medians, with the lowest and highest of the rounds."""

from dit_jax.bench.measure import shown, verdict
from dit_jax.log import table


def _number(value: float) -> int:
    """Number of decimals that gives a value about three digits."""
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4


def _size(count: int | None) -> str:
    """Bytes as text."""
    if count is None:
        return "not measured"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _rates(side: dict) -> list[str]:
    """Cells of a side's column."""
    cells = [shown(side[name], _number(side[name]["median"])) for name in ("step_ms", "images_per_second", "tflops")]
    cells += [shown(side["mfu"], 1, True), _size(side["memory_bytes"])]
    return [*cells, f"{side['compile_seconds']:.1f}", str(side["recompiles"])]


def show_speed(title: str, found: dict) -> None:
    """Prints training or sampling, one column a side."""
    model, sides = found["model"], found["sides"]
    about = f"width {model['width']}, depth {model['depth']}, {model['tokens']} tokens, {model['dtype']}"
    drawn = found["sampling"]
    how = f", {drawn['sampler']} {drawn['steps']}, guidance {drawn['guidance']:g}" if drawn else ""
    calls = "a call" if found["calls"] == 1 else f"{found['calls']} calls"
    print(f"{title}: {about}, {found['images']} images a call{how}; {calls} a round")
    rows = ("a call, ms", "images/s", "model TFLOP/s", "MFU", "peak memory", "compilation, s", "recompilations")
    table(("", *sides), zip(rows, *map(_rates, sides.values()), strict=True))
    peak = shown(found["peak_tflops"], _number(found["peak_tflops"]["median"]))
    print(f"MFU is of {peak} TFLOP/s: {found['peak_source']}")
    if work := found["flops_encoder"]:
        print(f"model TFLOP/s and MFU leave out the encoder in the step, {work / 1e12:.3g} TFLOP a call")
    if found.get("target"):
        reached = verdict(sides["jax"]["mfu"]["median"] >= found["target"])
        print(f"MFU of jax, target >= {found['target']:.0%}: {reached}")
    for name, side in sides.items():
        print(f"peak memory of {name}: {side['memory_source']}")
    if found["ratio"]:
        way = sides["torch"]
        failed = "".join(f"; {name} did not work: {why}" for name, why in way["did_not_work"].items())
        print(f"torch {way['version']} ({way['way']}) takes {shown(found['ratio'], 2)} times as long as jax{failed}")
    print()


def show(found: dict) -> None:
    """Prints all parts that were measured."""
    for part, title in (("train", "training"), ("sample", "sampling")):
        if part in found:
            show_speed(title, found[part])
