"""Facts about reading other people's arrays: what is right comes back, what is not is refused before it costs anything."""

import builtins
import importlib
import io
import json
import os
import pickle
import stat
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save
from test_hostile import MARK, Bomb, refused, unharmed  # noqa: F401, a fixture

from dit_jax.networks.weights import read_arrays


def npy(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def raw_npy(header: str, data=b"", length=None):
    text = header.encode("latin-1")
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) if length is None else length) + text + data


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def archive(tmp_path, members, name="x.npz", kind=zipfile.ZIP_STORED):
    """A zip archive of (name or ZipInfo, bytes)."""
    path = tmp_path / name
    with zipfile.ZipFile(path, "w", kind) as file:
        for member, content in members:
            file.writestr(member, content)
    return path


# arrays that are what they say


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="<f4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype="<f8").reshape(2, 3)),
        np.arange(6, dtype=">f4").reshape(3, 2),
        np.asfortranarray(np.arange(24, dtype=">i8").reshape(2, 3, 4)),
        np.array(3, ">u2"),
        np.zeros((0, 5), "f2"),
        np.array([True, False]),
        np.array([1j, 2], "c8"),
    ],
    ids=lambda a: f"{a.dtype.str}{a.shape}",
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_come_back_in_native_order(tmp_path, array, version):
    path, packed = put(tmp_path, "x.npy", npy(array, version)), archive(tmp_path, [("a/b.npy", npy(array, version))])
    found = [read_arrays(path)[""], read_arrays(packed)["a/b"]]
    np.savez_compressed(tmp_path / "y.npz", w=array)
    found.append(read_arrays(tmp_path / "y.npz")["w"])
    for a in found:
        np.testing.assert_array_equal(a, array, strict=False)
        assert a.shape == array.shape and a.dtype == array.dtype.newbyteorder("=") and a.dtype.isnative
        assert a.flags.c_contiguous and a.flags.writeable


def test_safetensors_come_back_bfloat16_too(tmp_path):
    arrays = {
        "a.b": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(2, 2),
        "c": np.array(2.5, "f8"),
        "d": np.zeros((0, 3), "i4"),
    }
    found = read_arrays(put(tmp_path, "x.safetensors", save(arrays, {"format": "pt"})))
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


# npy and npz


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("content", [np.array([Bomb()]), np.array([(Bomb(), 1)], dtype=[("a", "O"), ("b", "i4")])])
def test_objects_are_never_unpickled(tmp_path, name, content):
    packed = npy(content)
    path = put(tmp_path, name, packed) if name == "x.npy" else archive(tmp_path, [("a.npy", packed)])
    refused(read_arrays, path, match="expected plain numbers; objects are never unpickled")
    assert not os.path.exists(MARK)
    found = np.load(path, allow_pickle=True)
    if name == "x.npz":
        with found:
            found["a"]
    os.rmdir(MARK)  # the payload works where it is let


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.pt", "x.pth"])
def test_a_bare_pickle_is_refused_by_every_reader(tmp_path, name):
    path = put(tmp_path, name, pickle.dumps(Bomb()))
    message = refused(read_arrays, path)
    assert path in message and ("torch.save(torch.load(OLD, weights_only=True), NEW)" in message) == (".pt" in name)


HEADERS = {
    "an absurd shape": ("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9,)}", "found the header"),
    "a terabyte": (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}",
        "expected at most 68,719,476,736 bytes",
    ),
    "an overflow": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**63}, {2**63})}}", "expected at most"),
    "an overflow times 0": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**63}, 0)}}", "expected at most"),
    "a gigabyte in a small file": (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (268435456,)}",
        "found 16 bytes of data",
    ),
    "a negative size": ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "none below 0"),
    "two negative sizes": ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}", "none below 0"),
    "a truth for a size": ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4)}", "none below 0"),
    "no tuple": ("{'descr': '<f4', 'fortran_order': False, 'shape': 4}", "found the shape 4"),
    "33 dimensions": (f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(1,) * 33}}}", "up to 32 sizes"),
    "a long text": ("{'descr': '|S999999999', 'fortran_order': False, 'shape': (1,)}", "expected plain numbers"),
    "a list of fields": ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", "expected plain numbers"),
    "a platform's long double": ("{'descr': '<f16', 'fortran_order': False, 'shape': (1,)}", "expected plain numbers"),
    "an order that is no truth": ("{'descr': '<f4', 'fortran_order': [], 'shape': (4,)}", "expected True or False"),
    "a call": (f"__import__('os').mkdir('{MARK}')", "found the header"),
    "nesting": ("-" * 9000 + "1", "found the header"),
    "brackets": ("[" * 9000, "found the header"),
    "nothing": ("", "found the header"),
    "an escape code": ("\x1b[31m", r"\\x1b\[31m"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("where", ["x.npy", "x.npz"])
def test_a_hostile_npy_header_is_refused(tmp_path, name, where):
    header, match = HEADERS[name]
    content = raw_npy(header, bytes(16))
    path = put(tmp_path, where, content) if where == "x.npy" else archive(tmp_path, [("a.npy", content)])
    refused(read_arrays, path, match=match)


@pytest.mark.parametrize("length", [9, 20_000, 65_535])
def test_an_oversized_or_cut_npy_header_is_refused(tmp_path, length):
    refused(
        read_arrays, put(tmp_path, "x.npy", raw_npy("{}", length=length)), match="a header cut short or of more than"
    )
    long = b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1)
    refused(read_arrays, put(tmp_path, "y.npy", long + b" " * 100), match="a header cut short or of more than")


def test_truncated_and_trailing_data_are_refused(tmp_path):
    packed = npy(np.arange(100.0))
    for cut in (*range(11), 100, len(packed) - 1):
        refused(read_arrays, put(tmp_path, "x.npy", packed[:cut]))
        refused(read_arrays, archive(tmp_path, [("a.npy", packed[:cut])]))
    refused(read_arrays, put(tmp_path, "x.npy", packed + b"x"), match="found 801 bytes of data, expected 800")
    whole = archive(tmp_path, [("a.npy", packed)]).read_bytes()
    for cut in range(0, len(whole), 37):
        refused(read_arrays, put(tmp_path, "y.npz", whole[:cut]))


def test_damage_inside_a_member_is_found_by_its_checksum(tmp_path):
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = archive(tmp_path, [("a.npy", npy(np.arange(1000.0)))], kind=kind)
        content = bytearray(path.read_bytes())
        content[800] ^= 1
        refused(read_arrays, put(tmp_path, "y.npz", bytes(content)), match="damaged zip archive")


# zip archives


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize(
    "name", ["../a.npy", "a/../../b.npy", "/etc/a.npy", "a\\..\\b.npy", "C:/a.npy", "a\x1b[31m.npy", "a\n.npy"]
)
def test_members_that_lead_out_are_refused(tmp_path, suffix, name):
    path = archive(tmp_path, [(zipfile.ZipInfo(name), npy(np.ones(3))), ("ok/data.pkl", b"")], f"x{suffix}")
    before = sorted(tmp_path.rglob("*"))
    refused(read_arrays, path, match="expected a relative one without")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_hides_behind_a_nul_is_refused(tmp_path):
    path = archive(tmp_path, [("a_evil.npy", npy(np.ones(3)))])
    content = path.read_bytes().replace(b"a_evil", b"a\0evil")
    refused(read_arrays, put(tmp_path, "y.npz", content), match=r"found the name 'a\\x00evil.npy'")


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_links_folders_and_unknown_compression_are_refused(tmp_path, suffix):
    link, folder = zipfile.ZipInfo("a/link.npy"), zipfile.ZipInfo("a/folder/")
    link.external_attr, folder.external_attr = (stat.S_IFLNK | 0o777) << 16, (stat.S_IFDIR | 0o755) << 16
    packed = zipfile.ZipInfo("a/b.npy")
    packed.compress_type = zipfile.ZIP_LZMA
    for member, content in ((link, b"/etc/passwd"), (folder, b""), (packed, npy(np.ones(3)))):
        path = archive(tmp_path, [("a/data.pkl", b""), (member, content)], f"x{suffix}")
        refused(read_arrays, path, match="expected plain files")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path):
    one, two = npy(np.zeros(3)), npy(np.ones(3))
    refused(read_arrays, archive(tmp_path, [("a.npy", one), ("a.npy", two)]), match="twice")


def test_a_member_without_a_name_is_refused(tmp_path):
    empty = b"PK\x01\x02" + bytes(42) + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 46, 0, 0)
    refused(read_arrays, put(tmp_path, "x.npz", empty), match="without a name")


def test_a_member_that_is_no_array_is_refused(tmp_path):
    refused(read_arrays, archive(tmp_path, [("a.npy", npy(np.ones(3))), ("run.py", b"x")]), match="expected arrays")


def test_a_zip_bomb_allocates_nothing(tmp_path):
    zeros = raw_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (536870912,)}")
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w") as member:
        member.write(zeros)
        for _ in range(512):
            member.write(bytes(2**20))
    path = str(tmp_path / "x.npz")
    assert os.path.getsize(path) < 2**21
    refused(read_arrays, path, match=r"declares 536,870,\d+ bytes in 5\d\d,\d+, expected at most 268,435,456")


def test_members_over_each_other_are_refused(tmp_path):
    content = npy(np.ones(3))
    path = archive(tmp_path, [("a.npy", content), ("b.npy", content)])
    packed = path.read_bytes()
    second = packed.rindex(b"PK\x01\x02")  # its entry in the table of contents, pointed at the first member
    moved = packed[: second + 42] + struct.pack("<I", 0) + packed[second + 46 :]
    refused(read_arrays, put(tmp_path, "y.npz", moved), match="lies over another")


def test_a_lying_size_and_a_lying_table_are_refused(tmp_path):
    packed = archive(tmp_path, [("a.npy", npy(np.ones(3)))]).read_bytes()
    entry, end = packed.rindex(b"PK\x01\x02"), packed.rindex(b"PK\x05\x06")
    lie = packed[: entry + 24] + struct.pack("<I", 2**31) + packed[entry + 28 :]
    refused(read_arrays, put(tmp_path, "y.npz", lie), match="its two sizes differ")
    path = tmp_path / "z.npz"
    with open(path, "wb") as file:  # a table of contents that says it is most of a sparse gigabyte
        file.truncate(2**30)
        file.seek(2**30)
        file.write(packed[end : end + 12] + struct.pack("<II", 2**30 - 100, 100) + b"\0\0")
    refused(read_arrays, str(path), match="its table of contents takes more than")


def test_a_file_beyond_the_callers_bound_is_refused(tmp_path):
    path = put(tmp_path, "x.npy", npy(np.zeros(1000)))
    refused(read_arrays, path, 4096, match="expected at most 4,096")
    refused(
        read_arrays, archive(tmp_path, [("a.npy", npy(np.zeros(1000)))], kind=zipfile.ZIP_DEFLATED), 4096, match="4,096"
    )


@pytest.mark.parametrize("name", ["gone.npy", "x.pkl", "x.ckpt", "x", "folder.npz"])
def test_other_paths_are_refused(tmp_path, name):
    (tmp_path / "folder.npz").mkdir()
    put(tmp_path, "x.pkl", pickle.dumps(Bomb()))
    refused(read_arrays, str(tmp_path / name), match="no such file|expected one of .safetensors, .npz, .npy, .pt, .pth")


# safetensors


def tensors(header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


TENSORS = {
    "a header beyond the file": tensors({"a": entry(0, 16)}, length=2**62),
    "a long header": tensors(b" " * 2**23 + b"{}"),
    "a cut header": b"\x05\0\0",
    "overlap": tensors({"a": entry(0, 16), "b": entry(8, 16)}),
    "a hole": tensors({"a": entry(0, 4), "b": entry(8, 16)}),
    "trailing bytes": tensors({"a": entry(0, 8)}),
    "cut data": tensors({"a": entry(0, 32)}),
    "an absurd shape": tensors({"a": entry(0, 16, shape=[2**62])}),
    "an overflowing shape": tensors({"a": entry(0, 16, shape=[2**33, 2**33])}),
    "an absurd empty shape": tensors({"a": entry(0, 0, shape=[0, 2**60])}, b""),
    "a negative shape": tensors({"a": entry(0, 16, shape=[-2, -2])}),
    "an unknown dtype": tensors({"a": entry(0, 16, "O8")}),
    "a dtype not read here": tensors({"a": entry(0, 16, "F8_E8M0", [16])}),
    "a key twice": tensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2)),
    "nesting": tensors(b"[" * 100_000),
    "no object": tensors(b"[1, 2]"),
    "a name that leads out": tensors({"../../a": entry(0, 16)}),
    "bytes that are no text": tensors(b'{"\xff\xfe": 1}'),
    "metadata that is no text": tensors({"__metadata__": {"a": [1]}, "a": entry(0, 16)}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_safetensors_are_refused(tmp_path, name):
    refused(read_arrays, put(tmp_path, "x.safetensors", TENSORS[name]), match=r"x\.safetensors")


# PyTorch


def test_archives_that_torch_never_wrote_are_refused_before_torch(tmp_path, monkeypatch):
    def no_torch(name, *rest, real=builtins.__import__):
        assert name != "torch"
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    bomb = pickle.dumps(Bomb(), 2)
    for members, match in (
        ([("a/data", bomb)], "found no data.pkl"),
        ([("a/data.pkl", bomb), ("b/data/0", b"")], "found no data.pkl in one folder"),
        ([("a/data.pkl", bomb), ("a/code/m.py", b"import os")], "TorchScript archive, which holds code"),
        ([("a/data.pkl", bomb), ("a/constants.pkl", bomb)], "TorchScript archive, which holds code"),
        ([("a/data.pkl", b"." * (2**23 + 1))], "found more than 8,388,608 bytes in a/data.pkl"),
    ):
        refused(read_arrays, archive(tmp_path, members, "x.pt"), match=match)
    refused(read_arrays, archive(tmp_path, [("a/data.pkl", bomb)], "x.pt", zipfile.ZIP_DEFLATED), match="plain files")


def test_without_torch_a_checkpoint_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = archive(tmp_path, [("a/data.pkl", pickle.dumps(Bomb(), 2)), ("a/version", b"3\n")], "x.pt")
    refused(read_arrays, path, match=r"needs torch; pip install torch==2\.13\.0 \(the extra `torch`\)")


@pytest.fixture
def torch():
    """PyTorch, from the extra of that name; the tests that take it fail without."""
    return importlib.import_module("torch")


@pytest.mark.parity
def test_plain_checkpoints_come_back(tmp_path, torch):
    path, tied = str(tmp_path / "x.pt"), torch.arange(5.0)
    half = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    values = {
        "ema": {"x": torch.arange(12.0).reshape(3, 4).t(), "y": torch.tensor(3)},
        "all": [half, {7: tied}],
        "tied": tied,
    }
    torch.save({**values, "step": 3, "lr": None, "f8": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    found = read_arrays(path)
    assert list(found) == ["ema.x", "ema.y", "all.0", "all.1.7", "tied", "f8"]
    np.testing.assert_array_equal(found["ema.x"], np.arange(12.0).reshape(3, 4).T)
    np.testing.assert_array_equal(found["all.0"], np.array([1, -2], ml_dtypes.bfloat16))
    assert found["ema.y"].shape == () and found["f8"].dtype == ml_dtypes.float8_e4m3fn
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    assert {k: v.shape for k, v in read_arrays(path).items()} == {"weight": (2, 3), "bias": (2,)}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_that_are_more_than_tensors_are_refused(tmp_path, torch):
    path, one = str(tmp_path / "x.pt"), torch.zeros(1)
    cycle: dict = {"a": one}
    cycle["b"] = cycle
    laughs: list = [3]
    for _ in range(25):
        laughs = [laughs] * 10
    for value, match in (
        ({"a": one, "b": Bomb()}, "Trying to load unsupported GLOBAL posix.mkdir"),
        ({"a": one, "b": stat.filemode}, "Unsupported global: GLOBAL _stat.filemode"),
        (cycle, "nested without end"),
        ({"a": one, "b": laughs}, "nested without end, or over 1,000,000"),
        ({"a": one.expand(2**40)}, "take more than"),
        ([torch.zeros(10**6)] * 100, "take more than"),
        ({"a": torch.zeros(300).as_strided((20, 20), (1, 1))}, "repeating"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
        ({"a": torch.zeros(3, device="meta")}, "expected plain ones"),
        ({"a.b": one, "a": {"b": one}}, "'a.b' twice"),
        ({"../a": one}, "without '..'"),
        ({"a": one, (1, 2): 3}, "a key that is no name or number"),
        ({"a": 1, "b": "text"}, "found no tensor"),
    ):
        torch.save(value, path)
        refused(read_arrays, path, match=match, peak=2**28)
    torch.save({"a": one}, path, _use_new_zipfile_serialization=False)
    refused(read_arrays, path, match="bare pickle")
