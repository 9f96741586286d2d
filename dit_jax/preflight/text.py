"""Prints preflight reports as text."""

from collections.abc import Iterator

from dit_jax.preflight.compilation import gib


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def show(report: dict) -> None:
    """Prints a report, one figure a line."""
    for name, text in _evaluation(report) if report["job"] == "evaluate" else _lines(report):
        print(f"{name:12} {text}")


def _slice(report: dict) -> str:
    return f"{report['devices']} devices, {report['chips']} chips, {report['hosts']} hosts"


def _evaluation(report: dict) -> Iterator[tuple[str, str]]:
    yield report["topology"], f"{_slice(report)}; the images are split over all of them"
    yield "parameters", f"{report['parameters']:,}"
    for part in report["parts"]:
        many = f"{part['wanted']:,} images, " if part["wanted"] else ""
        yield part["part"], f"{part['about']}: {many}{part['images']:,} at a time"
        for name, text in (*_memory(part), *_speed(part)):
            yield f"  {name:10}", text
    settings = f" of each of {report['settings']} settings" if report["settings"] > 1 else ""
    if report["run"]:
        yield "run", f"{report['images']:,} images{settings} and all else: {_costs(report['run'])}"
    yield from _remarks(report)


def _lines(report: dict) -> Iterator[tuple[str, str]]:
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    yield report["topology"], _slice(report)
    again = f"; remat {report['remat']}, accumulate {report['accumulate']}" if report["job"] == "train" else ""
    yield "mesh", mesh + again
    yield "parameters", f"{report['parameters']:,}"
    encoder = f"; without the encoder's {report['flops_encoder']:.4e}" if report["flops_encoder"] else ""
    yield "FLOPs", f"{report['flops_step']:.4e} for {report['images']:,} images{encoder}"
    yield from _memory(report)
    for name, one in (report["collectives"] or {}).items():
        moved = f"{one['bytes'] / 1e9:9.3f} GB, sent by a device {one['sent'] / 1e9:9.3f} GB"
        yield f"  {name:18}", f"{one['count']:6,} a step, {moved}"
    yield from _speed(report)
    if other := report.get("precomputed"):
        yield "beside it", "the same step on precomputed latents, without the encoder"
        for name, text in (*_memory(other), *_speed(other)):
            yield f"  {name:10}", text
    yield from _remarks(report)


def _memory(report: dict) -> Iterator[tuple[str, str]]:
    sizes = report["bytes"]
    yield "arguments", f"{gib(sizes['arguments'])} a device"
    if sizes["temporaries"] is not None:
        used = sizes["arguments"] + sizes["temporaries"]
        of = f" of {gib(sizes['memory'])}: {used / sizes['memory']:.0%}" if sizes["memory"] else ""
        yield "temporaries", f"{gib(sizes['temporaries'])}; with the arguments {gib(used)}{of}"
    if sizes["code"] is not None:
        yield "code", gib(sizes["code"])
    if sizes["donated"] is not None and sizes["state"]:
        yield "donated", f"{sizes['donated']:,} bytes of a state of {sizes['state']:,}"
    if report["fits"] is not None:
        spent = f"{report['compile_seconds']:.0f} s, {report['compile_cpu_seconds']:.0f} s of a core"
        yield "fits", f"{'yes' if report['fits'] else 'NO'}; compiled in {spent}"


def _remarks(report: dict) -> Iterator[tuple[str, str]]:
    for name in ("message", "suggestion"):
        if report.get(name):
            yield name, report[name]
    for note in report["notes"]:
        yield "note", note


def _speed(report: dict) -> Iterator[tuple[str, str]]:
    what = "step" if report["job"] == "train" else "batch"
    if seconds := report["estimated_step_seconds"]:
        often = f"{_number(1 / seconds)} a second, {_number(report['images'] / seconds)} images a second"
        mfu = f", MFU {report['estimated_mfu']:.1%}" if report["estimated_mfu"] else ""
        by = "a lower bound" if report["estimated_cycles"] is None else "the compiler's estimate"
        yield what, f"{1e3 * seconds:.1f} ms ({often}){mfu}: {by}"
    elif cycles := report["estimated_cycles"]:
        yield "cycles", f"{cycles:,} a {what}: the compiler's estimate, to compare programs for this kind of TPU only"
    if report["collective_seconds"] is not None:
        beside = " beside it" if seconds else ""
        links = f"{1e3 * report['collective_seconds']:.1f} ms{beside}"
        yield "links", f"{links}, for the collectives at the links' full rate"
    if run := report["run"]:
        what = f"{run['steps']:,} steps" if report["job"] == "train" else f"{run['images']:,} images"
        yield "run", f"{what} {_costs(run)}"


def _costs(run: dict) -> str:
    known = [name for name in ("hours", "chip_hours", "price") if run[name]]
    spans = {name: " to ".join(dict.fromkeys(map(_number, run[name]))) for name in known}
    price = f", price {spans['price']}" if run["price"] else ""
    return f"{spans['hours']} hours, {spans['chip_hours']} chip-hours{price}"


def row(report: dict) -> str:
    """A report as one line of `search`."""
    sizes = report["bytes"]
    used = gib(sizes["arguments"] + sizes["temporaries"]) if sizes["temporaries"] is not None else ""
    layout = f"fsdp {report['mesh']['fsdp']:3}, remat {report['remat']:4}, accumulate {report['accumulate']:2}"
    if not report["fits"]:
        return f"{layout}  does not fit: {used or report['message']}"
    links = f"links {1e3 * (report['collective_seconds'] or 0.0):6.1f} ms"
    if not report["estimated_step_seconds"]:
        cycles = f"{report['estimated_cycles'] / 1e6:8.1f} M cycles, " if report["estimated_cycles"] else ""
        return f"{layout}  {cycles}{links}, {used}"
    step = f"{1e3 * report['estimated_step_seconds']:8.1f} ms + {links}, MFU {report['estimated_mfu']:5.1%}"
    return f"{layout}  {step}, {used}"
