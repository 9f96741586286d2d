"""Prints preflight reports as text."""

from collections.abc import Iterator

from dit_jax.preflight.compilation import gib


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def show(report: dict) -> None:
    """Prints a report, one figure a line."""
    for name, text in _lines(report):
        print(f"{name:12} {text}")


def _lines(report: dict) -> Iterator[tuple[str, str]]:
    sizes, mesh = report["bytes"], " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    yield report["topology"], f"{report['devices']} devices, {report['chips']} chips, {report['hosts']} hosts"
    again = f"; remat {report['remat']}, accumulate {report['accumulate']}" if report["job"] == "train" else ""
    yield "mesh", mesh + again
    yield "parameters", f"{report['parameters']:,}"
    yield "FLOPs", f"{report['flops_step']:.4e} for {report['images']:,} images"
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
    for name, one in (report["collectives"] or {}).items():
        moved = f"{one['bytes'] / 1e9:9.3f} GB, sent by a device {one['sent'] / 1e9:9.3f} GB"
        yield f"  {name:18}", f"{one['count']:6,} a step, {moved}"
    yield from _speed(report)
    for name in ("message", "suggestion"):
        if report[name]:
            yield name, report[name]
    for note in report["notes"]:
        yield "note", note


def _speed(report: dict) -> Iterator[tuple[str, str]]:
    if seconds := report["estimated_step_seconds"]:
        often = f"{_number(1 / seconds)} a second, {_number(report['images'] / seconds)} images a second"
        what = "step" if report["job"] == "train" else "batch"
        yield what, f"{1e3 * seconds:.1f} ms ({often}), MFU {report['estimated_mfu']:.1%}: the compiler's estimate"
    if report["collective_seconds"] is not None:
        beside = " beside it" if seconds else ""
        links = f"{1e3 * report['collective_seconds']:.1f} ms{beside}"
        yield "links", f"{links}, for the collectives at the links' full rate"
    if run := report["run"]:
        known = [name for name in ("hours", "chip_hours", "price") if run[name]]
        spans = {name: " to ".join(dict.fromkeys(map(_number, run[name]))) for name in known}
        what = f"{run['steps']:,} steps" if report["job"] == "train" else f"{run['images']:,} images"
        price = f", price {spans['price']}" if run["price"] else ""
        yield "run", f"{what} {spans['hours']} hours, {spans['chip_hours']} chip-hours{price}"


def row(report: dict) -> str:
    """A report as one line of `search`."""
    sizes = report["bytes"]
    used = gib(sizes["arguments"] + sizes["temporaries"]) if sizes["temporaries"] is not None else ""
    layout = f"fsdp {report['mesh']['fsdp']:3}, remat {report['remat']:4}, accumulate {report['accumulate']:2}"
    if not report["fits"]:
        return f"{layout}  does not fit: {used or report['message']}"
    links = f"links {1e3 * (report['collective_seconds'] or 0.0):6.1f} ms"
    if not report["estimated_step_seconds"]:
        return f"{layout}  {links}, {used}"
    step = f"{1e3 * report['estimated_step_seconds']:8.1f} ms + {links}, MFU {report['estimated_mfu']:5.1%}"
    return f"{layout}  {step}, {used}"
