"""What a training shows besides its scalars: traces and grids, which change no bit of the run."""

import re

import numpy as np
import pytest
from job import run
from PIL import Image
from runs import STEPS, assert_same_run, train

from dit_jax.config import resolve, template
from dit_jax.devices.mesh import make_mesh
from dit_jax.error import UsageError
from dit_jax.training import trace
from dit_jax.training.state import abstract_batch, abstract_state
from dit_jax.training.step import make_train_step

WATCHED = ["--config.train.profile=(12,14)", f"--config.train.grid_every={STEPS // 2}"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, data_dir, cache_dir):
    """The small run with a trace and two grids."""
    workdir = tmp_path_factory.mktemp("watched") / "run"
    code, _, err = run("train", *train(workdir, *WATCHED), cache_dir=cache_dir)
    assert code == 0, err
    return workdir


def test_a_run_that_is_watched_ends_in_the_same_bits(watched, uninterrupted):
    assert_same_run(uninterrupted, watched)


def test_a_trace_holds_the_steps_asked_for_and_the_program_s_operations(watched):
    from jax.profiler import ProfileData

    (path,) = [p for p in (watched / "profile").rglob("*") if p.is_file()]
    assert path == watched / "profile/plugins/profile/steps_12_14/process_0.xplane.pb"
    data = ProfileData.from_file(
        str(path)
    )  # which its events do not outlive; jaxlib 0.12 aborts where their stats are read
    names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
    assert names.count("train") == 3
    assert sum("fusion" in name for name in names) >= 3 and not [name for name in names if name.startswith("$")]


def test_a_grid_is_what_sample_draws_from_that_checkpoint(watched, tmp_path, cache_dir):
    assert sorted(p.name for p in (watched / "samples").iterdir()) == ["step_00000030.png", "step_00000060.png"]
    out = tmp_path / "grid.png"
    code, _, err = run("sample", f"--workdir={watched}", "--out=", f"--grid={out}", "--num=64", cache_dir=cache_dir)
    assert code == 0, err
    drawn, shown = np.asarray(Image.open(out)), np.asarray(Image.open(watched / "samples/step_00000060.png"))
    np.testing.assert_array_equal(drawn[-len(shown) :, : shown.shape[1]], shown)  # below its caption
    assert len(np.unique(shown)) > 20


def test_a_trace_that_is_cut_short_is_written(tmp_path):
    with pytest.raises(KeyError), trace.tracing((3, 9), str(tmp_path)) as traced:
        for step in range(1, 6):
            traced(step, np.zeros(3))
            assert list(tmp_path.rglob("*.xplane.pb")) == []
        raise KeyError
    assert [p.parent.name for p in tmp_path.rglob("*.xplane.pb")] == ["steps_3_9"]
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["plugins"]


def test_the_operations_of_a_step_are_named_by_their_scopes():
    values = template().unlock()
    values.model.update(depth=1, width=16, heads=2, input_size=8, channels=1, classes=10)
    cfg = resolve(values)
    mesh = make_mesh(cfg.mesh)
    lowered = make_train_step(cfg, mesh).lower(abstract_state(cfg, mesh), abstract_batch(cfg, mesh))
    names = set(re.findall(r'loc\("([^"]*)"', lowered.as_text(debug_info=True)))
    for scope in ("loss)/DiT/patch_embedding", "blocks/attention/qkv", "blocks/mlp/fc1", "DiT/output", "optimizer"):
        assert any(f"{scope}/" in name for name in names), scope


@pytest.mark.parametrize("found", [(1,), (0, 3), (5, 4), (1.0, 2), (1, 2, 3)])
def test_a_profile_is_a_first_and_a_last_step(found):
    values = template().unlock()
    values.train.profile = found
    with pytest.raises(UsageError, match=r"train.profile: found .*, expected a first and a last step"):
        resolve(values)
