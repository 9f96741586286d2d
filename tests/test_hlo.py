"""Facts about what is read out of optimised HLO: loops multiply, fusions count once, bytes are those of the arrays."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.preflight import hlo

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
    """Through views and copies, asynchronous ones too (v5p-256); what is computed in between, or comes from elsewhere, is no edge."""
    lines = """
  %slice.30 = bf16[16,288]{0,1} slice(%fusion.10), slice={[0:16], [0:288]}
  %copy.31 = bf16[16,288]{0,1} copy(%slice.30)
  %edge.32 = bf16[16,288]{0,1} collective-permute(%copy.31), source_target_pairs={{3,1},{7,5}}
  %copy-start.35 = (bf16[16,288]{0,1}, bf16[16,288]{0,1}, u32[]) copy-start(%slice.30)
  %copy-done.36 = bf16[16,288]{0,1} copy-done(%copy-start.35)
  %edge.37 = bf16[16,288]{0,1} collective-permute(%copy-done.36), source_target_pairs={{3,1},{7,5}}
  %negate.33 = bf16[16,288]{0,1} negate(%slice.30)
  %other.34 = bf16[16,288]{0,1} collective-permute(%negate.33), source_target_pairs={{3,1},{7,5}}
  %gather.11"""
    module = hlo.parse(TEXT.replace("\n  %gather.11", lines))
    found = [(one.count, one.edge) for one in hlo.collectives(module, 8) if one.kind == "collective-permute"]
    assert found == [(28, True), (28, True), (28, False), (1, False)]


# A gather of v5e's compiler in a loop of 28, cut down: begun in one fusion, gone on with in a product, awaited in a third; beside it
# a gather in a fusion of its own, and one on the same channel as a plain instruction.
ASYNC = """\
HloModule jit_step, is_scheduled=true

%fused_computation.1 (p: bf16[16,384]) -> (bf16[16,384], bf16[256,384], u32[]) {
  %p = bf16[16,384]{1,0} parameter(0)
  %all-gather.2 = bf16[256,384]{1,0} all-gather(%p), channel_id=33, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %start.3 = (bf16[16,384]{1,0}, bf16[256,384]{1,0}, u32[]) custom-call(%all-gather.2), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.4 (p: bf16[16,384], w: bf16[8,16]) -> (bf16[8,384], bf16[256,384]) {
  %p.1 = bf16[16,384]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  %all-gather.5 = bf16[256,384]{1,0:S(1)} all-gather(%p.1), channel_id=33, replica_groups=[1,16]<=[16], dimensions={0}
  %dot.6 = bf16[8,384]{1,0} convolution(%w, %p.1), dim_labels=bf_io->bf
  ROOT %tuple.7 = (bf16[8,384]{1,0}, bf16[256,384]{1,0}) tuple(%dot.6, %all-gather.5)
}

%fused_computation.8 (p: bf16[16,384], s: u32[]) -> bf16[256,384] {
  %p.2 = bf16[16,384]{1,0} parameter(0)
  %s = u32[]{:S(2)} parameter(1)
  %all-gather.9 = bf16[256,384]{1,0} all-gather(%p.2), channel_id=33, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %done.10 = bf16[256,384]{1,0} custom-call(%all-gather.9, %s), custom_call_target="AsyncCollectiveDone"
}

%fused_computation.11 (p: bf16[2,384]) -> bf16[32,384] {
  %p.3 = bf16[2,384]{1,0} parameter(0)
  ROOT %all-gather.12 = bf16[32,384]{1,0} all-gather(%p.3), channel_id=34, replica_groups=[1,16]<=[16], dimensions={0}
}

%body.13 (carry: (s32[], bf16[16,384])) -> (s32[], bf16[16,384]) {
  %carry = (s32[], bf16[16,384]{1,0}) parameter(0)
  %start.14 = (bf16[16,384]{1,0}, bf16[256,384]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %fusion.15 = (bf16[8,384]{1,0}, bf16[256,384]{1,0}) fusion(%x, %y), kind=kOutput, calls=%async_collective_fusion.4
  %done.16 = bf16[256,384]{1,0} fusion(%x, %z), kind=kCustom, calls=%fused_computation.8
  %fusion.17 = bf16[32,384]{1,0} fusion(%v), kind=kCustom, calls=%fused_computation.11
  ROOT %tuple.18 = (s32[], bf16[16,384]{1,0}) tuple(%i, %x)
}

ENTRY %main.19 (a: bf16[16,384]) -> bf16[16,384] {
  %a = bf16[16,384]{1,0} parameter(0)
  %while.20 = (s32[], bf16[16,384]{1,0}) while(%t), condition=%c, body=%body.13, backend_config={"known_trip_count":{"n":"28"}}
  %all-gather.21 = bf16[4,384]{1,0} all-gather(%b), channel_id=33, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %copy.22 = bf16[16,384]{1,0} copy(%a)
}
"""


def test_a_collective_spread_over_fusions_counts_once_a_trip_where_it_begins():
    found = [(one.kind, one.count, one.bytes) for one in hlo.collectives(hlo.parse(ASYNC), 16)]
    size = 384 * 2
    assert found == [("all-gather", 28, 256 * size), ("all-gather", 28, 32 * size), ("all-gather", 1, 4 * size)]


def test_a_known_trip_count_goes_before_the_condition():
    text = TEXT.replace("body=%body.8", 'body=%body.8, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.estimated_cycles(hlo.parse(text)) == 305


def test_outputs_that_are_reused_take_no_cycles():
    """28 times a conditional of 100 cycles or 1 of a block's output, with a fusion; another conditional counts whole."""
    text = """HloModule jit_sample
%inside.1 (p: f32[8]) -> f32[8] {
  ROOT %add.2 = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}
%compute.3 (p: f32[8]) -> f32[8] {
  ROOT %fusion.4 = f32[8]{0} fusion(%p), kind=kLoop, calls=%inside.1, backend_config={"estimated_cycles":"100"}
}
%keep.5 (p: f32[8]) -> f32[8] {
  ROOT %copy.6 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1"}
}
%body.7 (p: f32[8]) -> f32[8] {
  %chosen.8 = f32[8]{0} conditional(%i, %p, %p), branch_computations={%keep.5, %compute.3}, metadata={op_name="jit(x)/reuse/cond" id=7}
  ROOT %other.9 = f32[8]{0} conditional(%b, %p, %p), branch_computations={%keep.5, %compute.3}, metadata={op_name="jit(x)/cond"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %while.9 = f32[8]{0} while(%a), condition=%unknown, body=%body.7, backend_config={"known_trip_count":{"n":"28"}}
}
"""
    module = hlo.parse(text)
    assert hlo.estimated_cycles(module) == 28 * 2 * 101
    assert hlo.estimated_cycles(module, 0.25) == round(28 * 1.25 * 101)


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


def test_collectives_that_the_gpu_compiler_joins_count_every_array():
    text = """HloModule jit_step
ENTRY %main (a: f32[8]) -> f32[8] {
  %gather.1 = ((f32[2]{0}, f32[3,2]{1,0}), (f32[8]{0}, f32[3,8]{0,1})) all-gather-start(%a, %b), replica_groups=[1,4]<=[4]
  %done.1 = (f32[8]{0}, f32[3,8]{0,1}) all-gather-done(%gather.1)
  %scatter.2 = ((f32[8]{0}, f32[16]{0}), (f32[2]{0}, f32[4]{0})) reduce-scatter-start(%a, %b), replica_groups=[1,4]<=[4]
  %one.3 = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%a), replica_groups=[1,4]<=[4]
  %sum.4 = (f32[8]{0}, f32[16]{0}) all-reduce-start(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
  %whole.5 = (f32[2]{0}, f32[4]{0}) reduce-scatter(%a, %b), replica_groups=[1,4]<=[4]
  ROOT %sum.6 = f32[8]{0} all-reduce-start(%a), replica_groups=[1,4]<=[4], to_apply=%add
}
"""
    found = [(one.kind, one.bytes // 4) for one in hlo.collectives(hlo.parse(text), 4)]
    assert found[:3] == [("all-gather", 8 + 24), ("reduce-scatter", 8 + 16), ("reduce-scatter", 8)]
    assert found[3:] == [("all-reduce", 8 + 16), ("reduce-scatter", 8 + 16), ("all-reduce", 8)]
