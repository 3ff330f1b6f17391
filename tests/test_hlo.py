"""Costs read from the text of compiled programs."""

import dataclasses

import jax
import pytest

from geotoken_jax.plan import hlo

PROGRAM = """
HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (p: f32[16,64]) -> f32[1,64] {
  %p = f32[16,64]{1,0} parameter(0)
  %whole = f32[16,64]{1,0} all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add
  %me = s32[] constant(0)
  ROOT %part = f32[1,64]{1,0} dynamic-slice(%whole, %me, %me), dynamic_slice_sizes={1,64}
}

%one_layer (stack: bf16[10,8,8], at: s32[]) -> bf16[8,8] {
  %stack = bf16[10,8,8]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %slice = bf16[1,8,8]{2,1,0} dynamic-slice(%stack, %at, %at, %at), dynamic_slice_sizes={1,8,8}
  ROOT %layer = bf16[8,8]{1,0} bitcast(%slice)
}

%inner.condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(10)
  %turn = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%inner.body (state.1: (s32[], bf16[4,8], /*index=2*/bf16[10,8,8])) -> (s32[], bf16[4,8], bf16[10,8,8]) {
  %state.1 = (s32[], bf16[4,8]{1,0}, /*index=2*/bf16[10,8,8]{2,1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state.1), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %stack.1 = bf16[10,8,8]{2,1,0} get-tuple-element(%state.1), index=2
  %w = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} fusion(%stack.1, %turn.1), kind=kLoop, calls=%one_layer, CYCLES
  %y = bf16[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = bf16[4,8]{1,0} all-reduce(%y), channel_id=2, replica_groups=mesh['a'=4,'b'=4] {'b'}, to_apply=%add
  ROOT %next = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) tuple(%turn.1, %z, %stack.1)
}

%outer.condition (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  ROOT %unknown = pred[] custom-call(%s), custom_call_target="Told"
}

%outer.body (s.1: (s32[], bf16[4,8], bf16[10,8,8])) -> (s32[], bf16[4,8], bf16[10,8,8]) {
  %s.1 = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) while(%s.1), condition=%inner.condition, body=%inner.body
}

ENTRY %main (g: f32[16,64], s.2: (s32[], bf16[4,8], bf16[10,8,8])) -> f32[1,64] {
  %g = f32[16,64]{1,0} parameter(0)
  %s.2 = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) parameter(1)
  %loops = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) while(%s.2), condition=%outer.condition, body=%outer.body, KNOWN
  %gathering = (f32[16,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%g), replica_groups={{0,1,2,3},{4,5,6,7}}
  %gathered = f32[64,64]{1,0} all-gather-done(%gathering)
  ROOT %mine = f32[1,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""
PROGRAM = PROGRAM.replace("CYCLES", 'backend_config={"window_config":{"estimated_cycles":"70","is_mask":false}}')
KNOWN = 'backend_config={"known_trip_count":{"n":"3"},"other":[]}'


def costs(text, turns=True):
    return hlo.Program(text).costs(turns)


NESTED = """
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slice (stack.1: bf16[10,8,128], at.1: s32[]) -> bf16[1,8,128] {
  %stack.1 = bf16[10,8,128]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = bf16[1,8,128]{2,1,0} dynamic-slice(%stack.1, %at.1, %zero, %zero), dynamic_slice_sizes={1,8,128}
}

%store (kept.1: bf16[10,8,128], new.1: bf16[1,8,128], at.2: s32[]) -> bf16[10,8,128] {
  %kept.1 = bf16[10,8,128]{2,1,0} parameter(0)
  %new.1 = bf16[1,8,128]{2,1,0} parameter(1)
  %at.2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %updated = bf16[10,8,128]{2,1,0} dynamic-update-slice(%kept.1, %new.1, %at.2, %zero.1, %zero.1)
}

%outer (stack: bf16[10,8,128], kept: bf16[10,8,128], at: s32[]) -> bf16[10,8,128] {
  %stack = bf16[10,8,128]{2,1,0} parameter(0)
  %kept = bf16[10,8,128]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %read = bf16[1,8,128]{2,1,0} fusion(%stack, %at), kind=kLoop, calls=%slice
  %doubled = bf16[1,8,128]{2,1,0} add(%read, %read)
  ROOT %stored = bf16[10,8,128]{2,1,0} fusion(%kept, %doubled, %at), kind=kLoop, calls=%store
}

ENTRY %main (s: bf16[10,8,128], k: bf16[10,8,128], n: s32[]) -> f32[10] {
  %s = bf16[10,8,128]{2,1,0} parameter(0)
  %k = bf16[10,8,128]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %both = bf16[10,8,128]{2,1,0} fusion(%s, %k, %n), kind=kLoop, calls=%outer
  %kernel = bf16[10,8,128]{2,1,0} custom-call(%both), custom_call_target="tpu_custom_call", ESTIMATE
  %token = token[] after-all()
  %send = (bf16[10,8,128]{2,1,0}, u32[], token[]) send(%kernel, %token), channel_id=2, is_host_transfer=true, SLICES
  %zero.2 = f32[] constant(0)
  ROOT %sums = f32[10]{0} reduce(%kernel, %zero.2), dimensions={1,2}, to_apply=%add
}
"""
NESTED = NESTED.replace(
    "SLICES",
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1:3,4}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}',
)
ESTIMATE = (
    'backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"5000","transcendentals":"7",'
    '"bytes_accessed":"900","remote_bytes_transferred":"0"}}}'
)


def test_loops_within_loops_are_multiplied_out():
    found = costs(PROGRAM.replace("KNOWN", KNOWN))
    assert found.flops == 3 * 10 * 2 * 4 * 8 * 8 and found.unknown_loops == 0
    assert found.payload["all-reduce"] == 3 * 10 * (4 * 8 * 2)
    assert found.sent["all-reduce"] == 3 * 10 * (4 * 8 * 2) * 2 * 3 / 4
    once = costs(PROGRAM.replace("KNOWN", KNOWN), turns=False)
    assert once.flops == found.flops / 30 and once.payload["all-gather"] == found.payload["all-gather"]


def test_a_loop_of_unknown_turns_is_counted_once_and_told():
    found = costs(PROGRAM.replace(", KNOWN", ""))
    assert found.flops == 10 * 2 * 4 * 8 * 8 and found.unknown_loops == 1


def test_gathers_and_scatters_are_told_from_reductions():
    found = costs(PROGRAM)
    assert found.payload["all-gather"] == 4 * 16 * 64 * 4 and found.sent["all-gather"] == 3 * 16 * 64 * 4
    assert found.payload["reduce-scatter"] == 16 * 64 * 4 and found.sent["reduce-scatter"] == 15 * 64 * 4


def test_a_fusion_that_slices_reads_the_slice():
    program = hlo.Program(PROGRAM)
    body = program.computations["inner.body"]
    # Reads the layer's 8 x 8 slice of ten. The output, in S(1), and the loop counter's space are on the chip.
    assert program._traffic(body["w"], body) == 2 * 8 * 8 + 4
    assert program._traffic(body["y"], body) == 2 * (4 * 8 + 4 * 8)


def test_products_written_as_convolutions():
    # A product of 6 matrices [5, 7] x [7, 3] in a program for a TPU is a convolution with the batch as dilated window,
    # in which all but one position is padding.
    line = (
        "  %c = f32[6,5,3]{2,1,0} convolution(%l, %r), window={size=6 stride=5 pad=0_0 lhs_dilate=6}, "
        "dim_labels=0bf_0io->0bf"
    )
    product = hlo._instruction(line)
    assert product.operands == ("l", "r")
    known = {"l": dataclasses.replace(product, type="f32[6,5,7]"), "r": dataclasses.replace(product, type="f32[6,7,3]")}
    assert hlo._product_flops(product, known) == 2 * 6 * 5 * 7 * 3


@pytest.mark.parametrize(
    "text, size",
    [
        ("replica_groups={{0,1},{2,3}}, x", 2),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,4]<=[4,2,2]T(0,2,1)", 4),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}, y", 4),
        ("replica_groups={}", 16),
    ],
)
def test_groups(text, size):
    assert hlo._group_size(text, 16) == size


def test_the_program_of_a_real_scan():
    """Compares the parser with this machine's compiler, which has known trip counts and may unroll all loops."""

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((16, 32), (5, 32, 32))]
    text = jax.jit(layers).lower(*shapes).compile().as_text()
    found = costs(text)
    assert found.unknown_loops == 0
    assert found.flops in (0, 5 * 2 * 16 * 32 * 32)  # 0 for a library call, whose operations are not in the text


def test_slices_in_nested_fusions_count_as_slices():
    program = hlo.Program(NESTED)
    main = program.computations["main"]
    # Reads one of ten layers of the first stack, and writes one of ten layers of the second in place; 4 bytes of index.
    assert program._traffic(main["both"], main) == 2 * (8 * 128 * 2) + 4


def test_kernels_have_their_own_estimates_or_their_operands():
    found = costs(NESTED.replace("ESTIMATE", ESTIMATE))
    assert found.kernels == [(1.0, 5000.0, 900.0)] and found.flops == 5000
    assert costs(NESTED.replace(", ESTIMATE", "")).kernels == [(1.0, 0.0, 2 * 10 * 8 * 128 * 2)]


def test_element_wise_operations_of_fusions_and_reductions_are_counted():
    assert costs(NESTED).vector == 8 * 128 + 10 * 8 * 128  # an addition of one layer, and a sum of ten


def test_sums_between_slices_go_around_in_a_ring():
    assert costs(NESTED).between_slices == 10 * 8 * 128 * 2 * 2 * 3 / 4


def test_estimated_cycles_count_per_iteration():
    assert costs(PROGRAM.replace("KNOWN", KNOWN)).cycles == 3 * 10 * 70
    assert costs(PROGRAM.replace("KNOWN", KNOWN), turns=False).cycles == 70
