"""Reads arrays from untrusted files (safetensors, npz, npy, PyTorch checkpoints) without running anything in them.

Nothing is unpickled here. Only torch's reader of plain tensors sees the pickle in a `.pt` file, after a check of the archive.
Declared sizes are compared with the true size of a file before anything is allocated.
"""

import argparse
import ast
import contextlib
import functools
import io
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO

import ml_dtypes
import numpy as np
import safetensors

from dit_jax.error import UsageError
from dit_jax.files import local, opened, parse_json

MAX_BYTES = 2**36  # of all arrays of a file, by default
EXPANSION = 200, 2**28  # a compressed archive may hold this many times its size, or this many bytes
LISTING = 2**23  # bytes of a zip archive's table of contents, or of a safetensors header
HEADER = 10_000  # bytes of an npy header
CHUNK = 2**20
DTYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16)")
SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "b1", "C64": "<c8", "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
ALIEN = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}  # dtypes that NumPy lacks
NODES, DEEPEST, KEY = 1_000_000, 32, 1000  # values in a .pt file, their nesting, the length of a key
SHARED = 4  # tensors of a .pt file may share memory, but take at most this many times the file


@contextlib.contextmanager
def fetched(path: str) -> Iterator[str]:
    """Yield the name of a file on the disk: `path`, or a copy of a bucket's, whose UsageErrors name `path` all the same."""
    with local(path) as copy:
        try:
            yield copy
        except UsageError as error:
            raise error if copy == path else type(error)(str(error).replace(copy, path)) from error
        except FileNotFoundError as error:
            error.filename = path
            raise


def read_arrays(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Read {name: array} from a .safetensors, .npz, .npy (its one array is "") or .pt/.pth/.bin/.ckpt file.

    Arrays have native byte order and C order. Nested dicts and lists of a .pt file give names joined by dots ("ema.x");
    values that are not tensors are left out. Raises UsageError naming the file and the problem.
    """
    return read_file(path, max_bytes)[0]


def read_file(path: str | os.PathLike, max_bytes: int = MAX_BYTES, choose=None) -> tuple[dict[str, np.ndarray], dict]:
    """Read as `read_arrays` does, and the file's own notes: safetensors' metadata, or {"args": ...} of a PyTorch checkpoint.

    `choose(names) -> {name: new name}` says which arrays are kept; the others of a safetensors or PyTorch file take no memory.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in READERS:
        raise UsageError(f"{path}: found the ending {suffix!r}, expected one of {', '.join(READERS)}")
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file")
    if os.path.getsize(path) > max_bytes:
        raise UsageError(f"{path}: found {os.path.getsize(path):,} bytes, expected at most {max_bytes:,}")
    try:
        found, notes = READERS[suffix](path, max_bytes)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    for name in found:
        _check_name(name, path)
    kept = choose(list(found)) if choose else dict(zip(found, found, strict=True))
    return {new: found[name]() if callable(found[name]) else found[name] for name, new in kept.items()}, notes


def _check_name(name: str, where: str) -> None:
    """Raises UsageError if a file named after an array would lie outside its folder."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ".." in parts or name.startswith("/") or re.match("[A-Za-z]:", name):
        raise UsageError(f"{where}: found the name {name!r}, expected a relative one without '..' and backslashes")


def _check_shape(shape, itemsize: int, most: int, where: str) -> int:
    """Return the bytes of an array. Raises UsageError above `most`, with sizes of 0 counted as 1."""
    if not isinstance(shape, (tuple, list)) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise UsageError(f"{where}: found the shape {str(shape)[:200]}, expected up to 32 sizes, none below 0")
    if math.prod(max(n, 1) for n in shape) * itemsize > most:
        raise UsageError(f"{where}: found the shape {tuple(shape)}, expected at most {most:,} bytes")
    return math.prod(shape) * itemsize


def _bytes(file: IO[bytes], count: int, where: str) -> np.ndarray:
    flat = np.empty(count, np.uint8)
    filled, view = 0, memoryview(flat)
    while filled < count:
        got = file.readinto(view[filled : filled + CHUNK])
        if not got:
            raise UsageError(f"{where}: found {filled:,} bytes of data, expected {count:,}; the file is cut short")
        filled += got
    return flat


def _native(flat: np.ndarray, dtype, shape, order: str = "C") -> np.ndarray:
    """Turn raw bytes into an array in native byte order and C order."""
    array = flat.view(dtype).reshape(shape, order=order)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(shape)


# npy and npz


def _read_npy(path: str, max_bytes: int) -> tuple[dict, dict]:
    with opened(path) as file:
        return {"": _array(file, os.path.getsize(path), max_bytes, path)}, {}


def _read_npz(path: str, max_bytes: int) -> tuple[dict, dict]:
    arrays = {}
    with _archive(path) as archive:
        members = _members(archive, path, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        size, (times, floor) = os.path.getsize(path), EXPANSION
        declared, most = sum(m.file_size for m in members), min(max_bytes, max(times * size, floor))
        if declared > most:
            raise UsageError(f"{path}: declares {declared:,} bytes in {size:,}, expected at most {most:,}")
        for member in members:
            if not member.filename.endswith(".npy"):
                raise UsageError(f"{path}: found the member {member.filename!r}, expected arrays (.npy) only")
            with archive.open(member) as file:
                name = member.filename.removesuffix(".npy")
                arrays[name] = _array(file, member.file_size, max_bytes, f"{path}: {member.filename}")
    return arrays, {}


def _array(file: IO[bytes], size: int, max_bytes: int, where: str) -> np.ndarray:
    """Read the npy array that fills a file of `size` bytes. Raises UsageError before anything large is allocated."""
    start, (descr, fortran, shape) = _npy_header(file, where)
    if not isinstance(descr, str) or not DTYPE.fullmatch(descr):
        expected = "expected plain numbers; objects are never unpickled"
        raise UsageError(f"{where}: found the dtype {str(descr)[:200]!r}, {expected}")
    if not isinstance(fortran, bool):
        raise UsageError(f"{where}: found fortran_order {str(fortran)[:200]!r}, expected True or False")
    dtype = np.dtype(descr)
    count = _check_shape(shape, dtype.itemsize, max_bytes, where)
    if count != size - start:
        raise UsageError(f"{where}: found {size - start:,} bytes of data, expected {count:,} for {descr} {shape}")
    return _native(_bytes(file, count, where), dtype, shape, "F" if fortran else "C")


def _npy_header(file: IO[bytes], where: str) -> tuple[int, tuple]:
    """Read (bytes of the header, (descr, fortran_order, shape)), the latter unchecked."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\x01\0", b"\x02\0", b"\x03\0"):
        raise UsageError(f"{where}: found {start!r} at its start, expected an array in npy format, version 1 to 3")
    form = "<H" if start[6] == 1 else "<I"
    packed = file.read(struct.calcsize(form))
    length = struct.unpack(form, packed)[0] if len(packed) == struct.calcsize(form) else HEADER + 1
    text = file.read(length) if length <= HEADER else b""
    if len(text) < length:
        raise UsageError(f"{where}: found a header cut short or of more than {HEADER:,} bytes")
    try:
        found = ast.literal_eval(text.decode("utf-8" if start[6] == 3 else "latin-1").strip())
        return 8 + len(packed) + length, tuple(found[name] for name in ("descr", "fortran_order", "shape"))
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise UsageError(f"{where}: found the header {text[:200]!r}, expected descr, fortran_order and shape") from None


# zip archives


class _Bounded(io.BufferedReader):
    """A file with bounded reads, because zipfile reads a table of contents of any declared length."""

    def read(self, size: int | None = -1) -> bytes:
        asked = size if size is not None and size >= 0 else LISTING + 1
        found = super().read(min(asked, LISTING + 1))
        if len(found) > LISTING:
            raise zipfile.BadZipFile(f"its table of contents takes more than {LISTING:,} bytes")
        return found


@contextlib.contextmanager
def _archive(path: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive. Raises UsageError if it is damaged."""
    try:
        with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except UsageError:
        raise
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error, zlib.error) as error:
        raise UsageError(f"{path}: damaged zip archive, or of a kind that is not read here: {error}") from None


def _members(archive: zipfile.ZipFile, path: str, methods: tuple) -> list[zipfile.ZipInfo]:
    """Return the checked members of an archive: unique safe names, plain files, no overlaps, known compression."""
    seen, end = set(), 0
    members = sorted(archive.infolist(), key=lambda m: m.header_offset)
    for m in members:
        if m.filename in seen or not m.filename:
            raise UsageError(f"{path}: found the member {m.filename!r} twice or without a name, expected names once")
        _check_name(m.orig_filename, path)
        kind = stat.S_IFMT(m.external_attr >> 16)
        if m.is_dir() or kind not in (0, stat.S_IFREG) or m.flag_bits & 1 or m.compress_type not in methods:
            raise UsageError(
                f"{path}: the member {m.filename!r} is a folder, a link, encrypted or compressed otherwise than "
                f"expected; expected plain files, {' or '.join(zipfile.compressor_names[n] for n in methods)}"
            )
        if m.header_offset < end or m.header_offset + 30 + m.compress_size > archive.start_dir:
            raise UsageError(f"{path}: the member {m.filename!r} lies over another or beyond the end of the data")
        if m.compress_type == zipfile.ZIP_STORED and m.file_size != m.compress_size:
            raise UsageError(f"{path}: the member {m.filename!r} is stored, but its two sizes differ")
        seen.add(m.filename)
        end = m.header_offset + 30 + m.compress_size
    return members


# safetensors


def _read_safetensors(path: str, max_bytes: int) -> tuple[dict, dict]:
    size = os.path.getsize(path)
    with opened(path) as file:
        packed = file.read(8)
        length = struct.unpack("<Q", packed)[0] if len(packed) == 8 else size
        if length > min(size - 8, LISTING):
            raise UsageError(
                f"{path}: found a header of {length:,} bytes in a file of {size:,}; damaged or no safetensors"
            )
        try:
            header = parse_json(file.read(length), LISTING)
            with safetensors.safe_open(path, "numpy"):  # refuses offsets with overlaps, holes or wrong sizes
                pass
        except (ValueError, safetensors.SafetensorError) as error:
            raise UsageError(f"{path}: damaged or no safetensors: {error}") from None
    notes = header.pop("__metadata__", None) or {}
    arrays = {n: functools.partial(_tensor, path, 8 + length, entry, max_bytes, n) for n, entry in header.items()}
    return arrays, notes


def _tensor(path: str, start: int, entry: dict, max_bytes: int, name: str) -> np.ndarray:
    where = f"{path}: {name}"
    if entry["dtype"] not in SAFETENSORS:
        raise UsageError(f"{where}: found the dtype {entry['dtype']!r}, expected one of {', '.join(SAFETENSORS)}")
    dtype = np.dtype(SAFETENSORS[entry["dtype"]])
    count = _check_shape(entry["shape"], dtype.itemsize, max_bytes, where)
    with opened(path) as file:
        file.seek(start + entry["data_offsets"][0])
        return _native(_bytes(file, count, where), dtype, entry["shape"])


# PyTorch


def _read_torch(path: str, max_bytes: int) -> tuple[dict, dict]:
    _check_torch_archive(path)
    try:
        import torch  # an extra, because it is large and only these files need it
    except ImportError:
        advice = "pip install torch==2.13.0 (the extra `torch`), or convert the file to .safetensors"
        raise UsageError(f"{path}: found a PyTorch checkpoint, which needs torch; {advice}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training script, nothing else
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler follows the file, so any error is possible
        found = re.search(r"(Unsupported|Trying to)[^\n]*?\.(?= |$)", str(error), re.M)
        what = found[0] if found else str(error).split("\n")[0] or type(error).__name__
        advice = "expected tensors in dicts and lists only; where the file is trusted, save its tensors alone"
        raise UsageError(f"{path}: refused by torch.load(weights_only=True): {what}; {advice}") from None
    arrays, total, most = {}, 0, min(max_bytes, SHARED * os.path.getsize(path))
    for name, tensor in _tensors(torch, loaded, path):
        total += tensor.numel() * tensor.element_size()
        if total > most:
            raise UsageError(f"{path}: its tensors take more than {most:,} bytes, expected fewer for its size")
        if name in arrays:
            raise UsageError(f"{path}: found the name {name!r} twice, expected it once")
        arrays[name] = functools.partial(_from_torch, torch, tensor, f"{path}: {name}")
    if not arrays:
        raise UsageError(f"{path}: found no tensor in it, expected a state dict")
    args = loaded.get("args") if isinstance(loaded, Mapping) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return arrays, {"args": dict(args)} if isinstance(args, Mapping) else {}


def _check_torch_archive(path: str) -> None:
    """Raises UsageError unless the file is a zip archive of torch.save."""
    with opened(path) as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        advice = "where the file is trusted, convert it: torch.save(torch.load(OLD, weights_only=True), NEW)"
        raise UsageError(f"{path}: found no zip archive but perhaps a bare pickle, which is not read here; {advice}")
    with _archive(path) as archive:
        sizes = {m.filename: m.file_size for m in _members(archive, path, (zipfile.ZIP_STORED,))}
    roots = {name.split("/")[0] for name in sizes}
    root = next(iter(roots), "")
    if len(roots) != 1 or f"{root}/data.pkl" not in sizes:
        raise UsageError(f"{path}: found no data.pkl in one folder of the archive, expected a file of torch.save")
    if any(name.startswith((f"{root}/code/", f"{root}/constants.pkl")) for name in sizes):
        raise UsageError(f"{path}: found a TorchScript archive, which holds code; expected a state dict of torch.save")
    if sizes[f"{root}/data.pkl"] > LISTING:
        raise UsageError(f"{path}: found more than {LISTING:,} bytes in {root}/data.pkl, expected fewer")


def _tensors(torch, loaded, path: str) -> Iterator[tuple]:
    """Yield (name, tensor) of nested dicts and lists, which may contain themselves, in order."""
    stack, nodes = [("", 0, loaded)], 1
    while stack:
        name, depth, value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield name.removeprefix("."), value
        if not isinstance(value, (Mapping, list, tuple)):
            continue
        nodes += len(value)
        if nodes > NODES or depth > DEEPEST:
            raise UsageError(f"{path}: found values nested without end, or over {NODES:,}, in {name[:200]!r}")
        inside = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        if not all(_is_key(key) for key, _ in inside):
            raise UsageError(f"{path}: found a key that is no name or number, in {name[:200]!r}")
        stack += [(f"{name}.{key}", depth + 1, item) for key, item in reversed(inside)]


def _is_key(key) -> bool:
    return len(key) <= KEY if isinstance(key, str) else type(key) is int and abs(key) < 2**63


def _from_torch(torch, tensor, where: str) -> np.ndarray:
    """Copy a tensor, whose memory is mapped from the file, to NumPy."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UsageError(f"{where}: found a sparse, quantized or repeating tensor, expected plain ones")
    tensor, name = tensor.detach().resolve_conj().resolve_neg().contiguous(), str(tensor.dtype).removeprefix("torch.")
    try:
        if name in ALIEN:
            return tensor.view(getattr(torch, ALIEN[name])).numpy().view(getattr(ml_dtypes, name)).copy()
        return tensor.numpy().copy()
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"{where}: found the dtype {name}, which is not read here ({error})") from None


READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".npy": _read_npy,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _read_torch),  # .bin in diffusers
}
