"""Facts about what is read out of optimised HLO: loops multiply, fusions count once, bytes are those of the arrays."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax import hlo

# As libtpu prints a module, cut down: a loop of 28, a fused reduce-scatter, an asynchronous gather, groups in all three forms.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.2 = f32[] add(%x, %y), backend_config={"window_config":{"estimated_cycles":"1000000"}}
}

%all-reduce-scatter.3 (input: bf16[128,1152]) -> bf16[128,288] {
  %input = bf16[128,1152]{0,1:T(8,128)(2,1)} parameter(0)
  %all-reduce.4 = bf16[128,1152]{0,1:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  ROOT %dynamic-slice.5 = bf16[128,288]{0,1} dynamic-slice(%all-reduce.4, %c, %d), dynamic_slice_sizes={128,288}
}

%fused.6 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %exp.7 = f32[8]{0} exponential(%p), backend_config={"window_config":{"estimated_cycles":"77"}}
}

%body.8 (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[]{:T(256)}, f32[8]{0}) parameter(0)
  %fusion.9 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused.6, backend_config={"window_config":{"estimated_cycles":"100"}}
  %fusion.10 = bf16[128,288]{0,1} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
  %gather.11 = (f32[2]{0}, f32[8]{0}) all-gather-start(%z), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit/x"}
  %done.12 = f32[8]{0} all-gather-done(%gather.11)
  ROOT %tuple.13 = (s32[], f32[8]{0}) tuple(%i, %done.12)
}

%condition.14 (carry: (s32[], f32[8])) -> pred[] {
  %constant.15 = s32[]{:T(256)} constant(28)
  %carry.1 = (s32[]{:T(256)}, /*index=1*/f32[8]{0}) parameter(0)
  %i.16 = s32[]{:T(256)} get-tuple-element(%carry.1), index=0
  ROOT %lt.17 = pred[]{:T(1024)} compare(%i.16, %constant.15), direction=LT
}

ENTRY %main.18 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %while.19 = (s32[]{:T(256)}, f32[8]{0}) while(%tuple), condition=%condition.14, body=%body.8
  %sum.20 = (f32[4]{0}, bf16[4]{0}) all-reduce(%g, %h), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add.1
  %swap.21 = f32[4]{0} collective-permute(%g), source_target_pairs={{3,1},{7,5}}
  ROOT %copy.22 = f32[8]{0} copy(%w), backend_config={"window_config":{"estimated_cycles":"5"}}
}
"""


def test_cycles_of_a_loop_count_as_often_as_it_runs_and_those_in_a_fusion_not_again():
    assert hlo.estimated_cycles(hlo.parse(TEXT)) == 28 * 100 + 5


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    found = {one.kind: one for one in hlo.collectives(hlo.parse(TEXT), 8)}
    scatter, gather, total, swap = (
        found[k] for k in ("reduce-scatter", "all-gather", "all-reduce", "collective-permute")
    )
    assert (scatter.count, scatter.bytes, scatter.group) == (28, 128 * 1152 * 2, 4)
    assert (gather.count, gather.bytes, gather.group, gather.operation) == (28, 32, 4, "jit/x")
    assert (total.count, total.bytes, total.group) == (1, 16 + 8, 4)
    assert (swap.count, swap.bytes) == (1, 16)
    assert (scatter.sent, total.sent, swap.sent) == (28 * 128 * 1152 * 2 * 3 / 4, 24 * 2 * 3 / 4, 16)


def test_the_edges_of_a_reduce_scatter_are_told_from_other_permutes():
    """Through views and copies; what is computed in between, or comes from elsewhere, is a permute of its own."""
    lines = """
  %slice.30 = bf16[16,288]{0,1} slice(%fusion.10), slice={[0:16], [0:288]}
  %copy.31 = bf16[16,288]{0,1} copy(%slice.30)
  %edge.32 = bf16[16,288]{0,1} collective-permute(%copy.31), source_target_pairs={{3,1},{7,5}}
  %negate.33 = bf16[16,288]{0,1} negate(%slice.30)
  %other.34 = bf16[16,288]{0,1} collective-permute(%negate.33), source_target_pairs={{3,1},{7,5}}
  %gather.11"""
    module = hlo.parse(TEXT.replace("\n  %gather.11", lines))
    found = [(one.count, one.edge) for one in hlo.collectives(module, 8) if one.kind == "collective-permute"]
    assert found == [(28, True), (28, False), (1, False)]


def test_a_known_trip_count_goes_before_the_condition():
    text = TEXT.replace("body=%body.8", 'body=%body.8, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.estimated_cycles(hlo.parse(text)) == 305


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match=r"while\.19: found 0 constants in the loop's condition"):
        hlo.estimated_cycles(hlo.parse(TEXT.replace("constant(28)", "parameter(1)")))
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule x\n")


def test_a_real_scan_of_a_real_mesh_is_counted():
    """Five products of sharded weights, each gathered or its result summed: four bytes of 64 x 64 numbers, five times."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, split = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P(None, "fsdp"))

    def step(x, weights):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, weights)[0]

    x, w = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
    text = jax.jit(step, in_shardings=(rows, split), out_shardings=rows).lower(x, w).compile().as_text()
    (one,) = hlo.collectives(hlo.parse(text), 8)
    assert (one.kind, one.count, one.group, one.bytes) == ("all-gather", 5, 8, 64 * 64 * 4)
