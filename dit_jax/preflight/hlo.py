"""Reads from an optimised HLO module which instructions a step runs, how often, their cycles, and the collectives.

XLA prints a module as computations, each a list of `name = shape opcode(operands), attributes`. The body of a `while` loop runs
trip-count times, so counts are multiplied on the way down from the entry computation. The TPU compiler writes `estimated_cycles`
on most instructions; the cycles of a fusion include those of the instructions inside it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions whose called computation works on single numbers and is not counted.
SCALAR = ("all-reduce", "reduce", "reduce-scatter", "scatter", "sort", "map", "select-and-scatter")
REUSED = '/reuse/cond"'  # ends the op_name of a conditional of `sample.reuse`, see models/dit.py
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # other dtypes are letters and bits: f32, s8, u4, ...

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_LAID_OUT = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shape` and `attributes` as XLA prints them."""

    name: str
    opcode: str
    shape: str
    attributes: str  # operands included


@dataclass(frozen=True)
class Module:
    entry: str
    computations: dict[str, tuple[Instruction, ...]]


@dataclass(frozen=True)
class Collective:
    """A collective of one step. `bytes`: size of the whole array that one execution gathers, reduces or moves."""

    kind: str
    bytes: int
    group: int  # devices that take part
    count: int  # executions in a step
    operation: str  # op_name in the program
    edge: bool = False  # a collective-permute that moves the edges of a reduce-scatter's output

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step by ring algorithms (Patarasu & Yuan 2009)."""
        share = {"all-reduce": 2 * (self.group - 1) / self.group, "collective-permute": 1.0}
        return self.count * self.bytes * share.get(self.kind, (self.group - 1) / self.group)


def parse(text: str) -> Module:
    """Parses a printed module. Raises ValueError if it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith("HloModule"):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif lines is not None and (found := _INSTRUCTION.match(line)):
            lines.append(Instruction(found[1], *_parts(found[2])))
    if not entry:
        raise ValueError("found no ENTRY computation, expected the text of an HLO module")
    return Module(entry, {name: tuple(found) for name, found in computations.items()})


def _parts(text: str) -> tuple[str, str, str]:
    """Splits `shape opcode(rest` into opcode, shape, rest. The shape of a tuple is in parentheses."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    return opcode, text[:end], rest


def _closing(text: str) -> int:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def executed(module: Module) -> Iterator[tuple[Instruction, int, bool]]:
    """Yields (instruction, executions in a step, whether it is inside a fusion), with all branches of a conditional."""
    yield from _walk(module, module.entry, 1, False)


def _walk(module: Module, name: str, times: int, fused: bool) -> Iterator[tuple[Instruction, int, bool]]:
    for instruction in module.computations.get(name, ()):
        yield instruction, times, fused
        if instruction.opcode in SCALAR:
            continue
        inner = fused or instruction.opcode == "fusion"
        trips = trip_count(module, instruction) if instruction.opcode == "while" else 1
        for called in _called(instruction):
            yield from _walk(module, called, times * trips, inner)


def _called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    return re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(instruction.attributes)


def trip_count(module: Module, loop: Instruction) -> int:
    """Trip count of a `while`: as XLA notes it, else the constant in its condition, as `lax.scan` counts from 0 by 1.

    Raises ValueError unless the condition has exactly one such constant.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    inside = module.computations.get(condition[1], ()) if condition else ()
    ends = {int(i.attributes.rstrip(")").split(")")[0]) for i in inside if _is_counter(i)}
    if len(ends) != 1:
        raise ValueError(f"{loop.name}: found {len(ends)} constants in the loop's condition, expected one")
    return ends.pop()


def _is_counter(instruction: Instruction) -> bool:
    return instruction.opcode == "constant" and bool(re.match(r"[su](32|64)\[\]", instruction.shape))


def estimated_cycles(module: Module, computed: float = 1.0) -> int:
    """The compiler's estimate of the cycles of a step; 0 if it writes none. Most collectives have no estimate.

    Of a conditional every branch counts. `computed`: how often one that computes or reuses an output of a block computes it.
    """
    found = 0.0
    for instruction, times, fused in executed(module):
        found += 0 if fused else times * cycles(instruction)
        if computed < 1 and instruction.opcode == "conditional" and REUSED in instruction.attributes:
            inside = [one for name in _called(instruction) for one in _walk(module, name, times, fused)]
            found -= (1 - computed) * sum(n * cycles(one) for one, n, within in inside if not within)
    return round(found)


def cycles(instruction: Instruction) -> int:
    """`estimated_cycles` of one execution; 0 if there is none."""
    found = _CYCLES.search(instruction.attributes)
    return int(found[1]) if found else 0


def collectives(module: Module, devices: int) -> list[Collective]:
    """Every collective of a step. The TPU compiler's fusion of an all-reduce with a slice counts as a reduce-scatter.

    The compiler of v5e and v6e may spread a collective over several fusions to overlap it with compute; it counts once, at its start.
    """
    found, started = [], _started(module)
    prefixes = ("all-reduce-scatter", "reduce-scatter", "_reduce_scatter")
    scatters = {name for name in module.computations if name.startswith(prefixes)}
    inside = {i.name for name in scatters for i in module.computations[name]}
    for instruction, times, fused in executed(module):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if fused and instruction.name not in started.get(_channel(instruction), (instruction.name,)):
            continue
        group = _group(instruction.attributes, devices)
        size = _whole(instruction, kind, group)
        if kind == "all-reduce" and instruction.name in inside:
            kind = "reduce-scatter"
        operation = re.search(r'op_name="([^"]*)"', instruction.attributes)
        edge = kind == "collective-permute" and _scattered(instruction, module, scatters)
        found.append(Collective(kind, size, group, times, operation[1] if operation else "", edge))
    return found


def _whole(instruction: Instruction, kind: str, group: int) -> int:
    """Bytes of the whole arrays of a collective, which may be several in one. An asynchronous one lists operands, then results."""
    sizes, count = _sizes(instruction.shape), max(len(_operands(instruction)), 1)
    if instruction.opcode.endswith("-start") and len(sizes) >= 2 * count:
        return max(sum(sizes[:count]), sum(sizes[count : 2 * count]))
    return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _started(module: Module) -> dict[str, set[str]]:
    """Channel -> names of the first instruction of each collective that is spread over fusions; every fusion repeats it."""
    lines = [line for lines in module.computations.values() for line in lines]
    starts = (line for line in lines if 'custom_call_target="AsyncCollectiveStart"' in line.attributes)
    names = {name for line in starts for name in _operands(line)}
    found: dict[str, set[str]] = {}
    for line in lines:
        if line.name in names and (channel := _channel(line)):
            found.setdefault(channel, set()).add(line.name)
    return found


def _channel(instruction: Instruction) -> str:
    """The collective's channel; "" if it has none."""
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found[1] if found else ""


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.attributes.partition(")")[0])


def _scattered(instruction: Instruction, module: Module, scatters: set[str]) -> bool:
    """Whether an instruction's operand comes from a reduce-scatter through slices, copies (asynchronous ones too) and views only."""
    lines = next(lines for lines in module.computations.values() if instruction in lines)
    by_name = {line.name: line for line in lines}
    while True:
        operands = _operands(instruction)
        if len(operands) != 1 or operands[0] not in by_name:
            return False
        instruction = by_name[operands[0]]
        if instruction.opcode == "reduce-scatter" or scatters & set(_CALLED.findall(instruction.attributes)):
            return True
        if instruction.opcode not in (
            "slice",
            "get-tuple-element",
            "bitcast",
            "copy",
            "copy-start",
            "copy-done",
            "reshape",
        ):
            return False


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in a printed shape."""
    found = []
    for dtype, sides in _ARRAY.findall(shape):
        numbers = [int(side.removeprefix("<=")) for side in sides.split(",") if side]
        found.append(math.prod(numbers) * _bits(dtype) // 8)
    return found


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])


def _group(attributes: str, devices: int) -> int:
    """Devices in one replica group, which XLA writes in three ways; all devices if it writes none."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
    mesh = re.search(r"replica_groups=@?mesh\S*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sides = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sides[name]) for name, part in named)
    return devices


def argument_bytes(text: str) -> list[int]:
    """Bytes of each argument of a printed module in memory, padded to whole tiles."""
    head = text.partition("\n")[0]
    layout = head.partition("entry_computation_layout={(")[2].partition(")->")[0]
    return [_laid_out(*found) for found in _LAID_OUT.findall(layout)]


def _laid_out(dtype: str, sides: str, layout: str) -> int:
    """Bytes of an array such as `f32[28,72]{1,0:T(8,128)}`. Tile sides belong to the fastest-varying axes."""
    order, _, tiles = layout.partition(":")
    lengths = [int(side) for side in sides.split(",") if side]
    found = re.match(r"T\(([\d,]+)\)", tiles)
    if found:
        tile = [int(side) for side in found[1].split(",")]
        fastest = [lengths[int(axis)] for axis in order.split(",") if axis]  # the fastest axis first
        fastest += [1] * (len(tile) - len(fastest))
        whole = [-(-length // side) * side for length, side in zip(fastest, reversed(tile), strict=False)]
        lengths = [*whole, *fastest[len(tile) :]]
    return math.prod(lengths) * _bits(dtype) // 8
