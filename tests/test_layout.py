"""Facts about layouts: those of the shipped slices can train, and what else may fit is ordered by what it costs."""

import pytest

from dit_jax.config import Config, MeshConfig, model_config, resolve
from dit_jax.devices.layout import (
    FSDP,
    REMATS,
    SPARE,
    Layout,
    argument,
    memory,
    options,
    seconds,
    shipped,
    size_of,
    state_bytes,
)
from dit_jax.devices.mesh import abstract_mesh, check_batch
from dit_jax.error import UsageError
from dit_jax.hardware import topology
from dit_jax.job.launch import load_config

XL = model_config("DiT-XL/2")


@pytest.mark.parametrize("name", FSDP)
@pytest.mark.parametrize("pixels", [256, 512])
def test_every_size_can_train_on_every_slice(name, pixels):
    slice = topology(name)
    for size in FSDP[name]:
        model = model_config(f"DiT-{size}/2", pixels)
        layout = shipped(name, model, 256)
        assert layout.data * layout.fsdp * layout.tensor == slice.devices
        mesh = abstract_mesh(MeshConfig(layout.data, layout.fsdp, layout.tensor), slice.devices)
        check_batch(mesh, 256, layout.accumulate, slice.devices // slice.hosts)
        assert not memory(model, layout, 256) > SPARE * slice.memory_bytes


def test_a_config_takes_slice_and_batch():
    cfg = resolve(load_config("configs/imagenet256.py:DiT-XL/2,v4-256,4096"))
    layout = shipped("v4-256", cfg.model, 4096)
    assert (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor) == (layout.data, layout.fsdp, layout.tensor)
    assert (cfg.model.remat, cfg.optim.accumulate) == (layout.remat, layout.accumulate)
    assert (cfg.train.batch_size, cfg.train.steps) == (4096, 7_000_000)
    plain = resolve(load_config("configs/imagenet256.py:DiT-XL/2"))
    assert resolve(load_config("configs/imagenet256.py:,v3-8")).model.depth == 28
    for group in ("data", "diffusion", "sample", "eval"):
        assert getattr(cfg, group) == getattr(plain, group)
    looped = [resolve(load_config(f"configs/imagenet256.py:DiT-B/2,{slice}")) for slice in ("h100x8", "cpux8")]
    assert cfg.model.unroll == 28 and {one.model.unroll for one in (plain, *looped)} == {1}
    assert resolve(load_config("configs/digits.py:cpux8")).mesh == MeshConfig(4, 2, 1)
    assert resolve(load_config("configs/digits.py")).mesh == Config().mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DiT-XL/2,v3-265", "slice: found 'v3-265', expected one of v3-8.*did you mean 'v3-256'"),
        ("DiT-XL/2,v5e-32", "slice: found 'v5e-32'.*did you mean 'v5e-16'"),
        ("DiT-XL/2,v5p-32", "slice: found 'v5p-32'.*did you mean 'v5p-64'"),
        ("DiT-XL/2,h100x16", "slice: found 'h100x16'.*did you mean 'h100x8'"),
        ("DiT-XL/2,v3-256,300", "train.batch_size: found 300, expected a multiple of the 256 devices of v3-256"),
        ("DiT-XL/2,v3-8,many", r"found 'DiT-XL/2,v3-8,many', expected MODEL\[,SLICE\[,BATCH\]\]"),
        ("DiT-XL/2,v3-8,0", "found 'DiT-XL/2,v3-8,0', expected a batch of at least 1"),
        ("DiT-XL/2,v3-8,256,1", "expected MODEL"),
        ("v3-8", "model name: found 'v3-8'"),
    ],
)
def test_an_argument_that_cannot_be_is_named(text, message):
    with pytest.raises(UsageError, match=message):
        load_config(f"configs/imagenet256.py:{text}")


def test_an_argument_may_leave_out_its_end():
    assert argument("", "DiT-B/2") == ("DiT-B/2", "", 0) == argument(",", "DiT-B/2")
    assert argument("DiT-S/8,v3-8", "") == ("DiT-S/8", "v3-8", 0)
    assert argument("DiT-S/8,,64", "") == ("DiT-S/8", "", 64)


def test_sizes_are_told_by_their_parameters():
    names = [size_of(model_config(f"DiT-{size}/{patch}")) for size in ("S", "B", "L", "XL") for patch in (2, 8)]
    assert names == ["S", "S", "B", "B", "L", "L", "XL", "XL"]
    assert size_of(resolve(load_config("configs/digits.py")).model) == "S"
    assert size_of(model_config("DiT-XL/2", depth=99)) == "XL"


def test_memory_falls_and_time_grows_with_each_remedy():
    slice, plain = topology("v3-32"), Layout(8, 4, 1, "dots", 1)

    def both(layout):
        return memory(XL, layout, 1024), seconds(XL, layout, 1024, slice)

    for remedy in (Layout(8, 4, 1, "full", 1), Layout(8, 4, 1, "dots", 2)):
        assert both(remedy)[0] < both(plain)[0] and both(remedy)[1] > both(plain)[1]
    found = [memory(XL, Layout(8, 4, 1, remat, 1), 256) for remat in REMATS]
    assert found == sorted(found, reverse=True)
    assert state_bytes(XL, Layout(2, 16, 1, "dots", 1)) == state_bytes(XL, plain) / 4
    assert memory(XL, Layout(2, 16, 1, "dots", 1), 256) < memory(XL, plain, 256)


def test_options_are_stronger_and_the_fastest_comes_first():
    slice, least = topology("v3-8"), Layout(2, 4, 1, "dots", 2)
    found = options(XL, 512, slice, least)
    assert least in found and len(found) == len(set(found))
    assert {o.fsdp for o in found} == {4, 8} and {o.remat for o in found} == {"dots", "full"}
    assert {o.accumulate for o in found} == {2, 4, 8, 16, 32, 64}
    assert all(o.data * o.fsdp == 8 and o.rows(512) * 8 * o.accumulate == 512 for o in found)
    costs = [seconds(XL, o, 512, slice) for o in found]
    assert costs == sorted(costs)
    assert options(XL, 250, slice, least) == [] == options(XL, 4, slice, least)
