"""The machine that executes PTX computes what PTX specifies, and refuses faulty programs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from ptx_arithmetic import convert, find_operation
from ptx_machine import Machine
from ptx_memory import Memory, ProgramError
from ptx_text import parse

BEFORE = """
ld.param.b64 %rd1, [run_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
shl.b32 %r3, %r1, 2;
shr.u32 %r4, %r1, 5;
setp.eq.s32 %p1, %r1, 0;
setp.eq.s32 %p2, %r4, 0;
setp.lt.s32 %p3, %r1, 8;
"""


def run(
    body: str,
    *,
    ctas: int = 1,
    threads: int = 64,
    shared: int = 256,
    size: int = 256,
    order: random.Random | None = None,
    defined: bool = True,
) -> np.ndarray:
    """Global memory of `size` bytes after a program; before, its words count up.

    %rd1 is its address, %rd3 each thread's word, %r1 the thread, %r2 the CTA, %r3 its offset in
    shared memory, %r4 the warp; %p1 is thread 0, %p2 warp 0, %p3 the first 8 threads.
    """
    text = f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry run(
\t.param .u64 .ptr .global .align 1 run_param_0
)
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<29>;
.reg .b64 %rd<19>;
{BEFORE}{body}
ret;
}}
"""
    data = np.arange(size // 4, dtype=np.uint32)
    start = 1 << 20
    known = None if defined else np.zeros(size // 4, bool)

    def buffers(clock: Any) -> list[tuple[int, Memory]]:
        return [(start, Memory(data.view(np.uint8), 4, clock, defined=known, name="memory"))]

    arguments = {"run_param_0": np.array([start], np.uint64)}
    Machine(parse(text), ctas, threads, arguments, buffers, shared, order).run()
    return data


# Each thread writes its own word of shared memory; another one may read it behind a barrier.
WRITE = "st.shared.b32 [%r3], %r1;"
READ_OTHER_WARP = "xor.b32 %r5, %r3, 128; ld.shared.b32 %r6, [%r5];"
READ_OTHER_LANE = "xor.b32 %r5, %r3, 4; ld.shared.b32 %r6, [%r5];"
KEEP = "st.global.b32 [%rd3], %r6;"
FIRST_READS = "@%p2 ld.shared.b32 %r6, [global_smem+128];"

RIGHT = {
    "a barrier between warps": WRITE + "bar.sync 0;" + READ_OTHER_WARP + KEEP,
    "a barrier between lanes": WRITE + "bar.warp.sync -1;" + READ_OTHER_LANE + KEEP,
    "shared memory named in full": WRITE.replace("shared", "shared::cta")
    + READ_OTHER_WARP.replace(";", "; bar.sync 0;", 1).replace("shared", "shared::cta")
    + KEEP,
    "a thread's own word": WRITE + "ld.shared.b32 %r6, [%r3];" + KEEP,
    "many read": "@%p1 st.shared.b32 [global_smem], %r1; bar.sync 0;"
    + "ld.shared.b32 %r6, [global_smem];",
    "lanes write the same": "@%p2 st.shared.b32 [global_smem], %r4;",
    "warps write the same": "st.shared.b32 [global_smem], %r2; bar.sync 0;"
    + "ld.shared.b32 %r6, [global_smem]; bar.sync 0; st.shared.b32 [global_smem], 2;",
    "read, barrier, write": WRITE
    + "bar.sync 0;"
    + READ_OTHER_WARP
    + "bar.sync 0;"
    + WRITE
    + "bar.sync 0;"
    + READ_OTHER_WARP
    + KEEP,
    "bytes that do not matter": "@%p1 st.shared.b32 [global_smem], %r1; bar.sync 0;"
    + '.pragma "used_bytes_mask 0x0f"; ld.shared.v2.b32 { %r6, %r7 }, [global_smem];',
    "a branch before a barrier": "@%p2 bra $A; mov.b32 %r6, 1; bra.uni $B;"
    + "$A: mov.b32 %r6, 2; $B: bar.sync 0;"
    + KEEP,
    "each CTA its own": "mad.lo.s32 %r5, %r2, 64, %r1; mul.wide.u32 %rd2, %r5, 4;"
    + "add.s64 %rd3, %rd1, %rd2; ld.global.b32 %r6, [%rd3]; st.global.b32 [%rd3], %r6;",
}
WRONG = {
    "warps, write then read": ("race", WRITE + "bar.sync 0;" + WRITE + READ_OTHER_WARP),
    "warps, read then write": (
        "race",
        WRITE + "bar.sync 0;" + READ_OTHER_WARP + WRITE,
    ),
    "warps, one of many readers": (
        "race",
        WRITE + "bar.sync 0; ld.shared.b32 %r6, [global_smem];"
        "@%p1 st.shared.b32 [global_smem], %r1;",
    ),
    "warps, behind the barrier of a warp": (
        "race",
        WRITE + "bar.sync 0;" + WRITE + "bar.warp.sync -1;" + READ_OTHER_WARP,
    ),
    "warps, other values": ("race", "st.shared.b32 [global_smem], %r4;"),
    "warps, one after the other": (
        "race",
        "@%p2 st.shared.b32 [global_smem], %r4; @!%p2 st.shared.b32 [global_smem], %r4;",
    ),
    "warps, the same value, then read": (
        "race",
        "st.shared.b32 [global_smem], %r2; ld.shared.b32 %r6, [global_smem];",
    ),
    "warps, the same value, then another": (
        "race",
        "st.shared.b32 [global_smem], %r2; @%p1 st.shared.b32 [global_smem], 3;",
    ),
    "warps, the same value, in global memory": ("race", "st.global.b32 [%rd1], %r2;"),
    "lanes, write then read": ("race", WRITE + READ_OTHER_LANE),
    "lanes, read then write": (
        "race",
        WRITE + "bar.sync 0;" + READ_OTHER_LANE + WRITE,
    ),
    "lanes, other values at once": ("race", "@%p2 st.shared.b32 [global_smem], %r1;"),
    "part of a word": (
        "race",
        WRITE
        + "bar.sync 0; mov.b16 %rs1, 1; @%p1 st.shared.b8 [global_smem+131], %rs1;"
        + "@!%p2 ld.shared.b32 %r6, [global_smem+128];",
    ),
    "warps, in global memory": ("race", "st.global.b32 [%rd3], %r1; ld.global.b32 %r6, [%rd1+8];"),
    "warps, global, read then write": (
        "race",
        "ld.global.b32 %r6, [%rd1+8]; st.global.b32 [%rd3], %r1;",
    ),
    "undefined shared memory": ("undefined", "ld.shared.b32 %r6, [%r3];"),
    "undefined part of a vector": (
        "undefined",
        "@%p1 st.shared.b32 [global_smem], %r1; bar.sync 0;"
        + "ld.shared.v2.b32 { %r6, %r7 }, [global_smem];",
    ),
    "undefined register": ("undefined", "st.global.b32 [%rd3], %r9;"),
    "beyond shared memory": ("out of bounds", "st.shared.b32 [%r3+4], %r1;"),
    "before shared memory": ("out of bounds", "sub.s32 %r5, %r3, 4; st.shared.b32 [%r5], %r1;"),
    "beyond an array": ("out of bounds", "st.global.b32 [%rd3+4], %r1;"),
    "before an array": ("out of bounds", "ld.global.b32 %r6, [%rd3+-4];"),
    "nowhere": ("out of bounds", "ld.global.b32 %r6, [%rd2];"),
    "misaligned word": ("misaligned", "@%p1 ld.global.b32 %r6, [%rd1+2];"),
    "misaligned vector": (
        "misaligned",
        "@%p1 ld.global.v4.b32 { %r6, %r7, %r8, %r9 }, [%rd1+8];",
    ),
    "misaligned shared vector": (
        "misaligned",
        "@%p1 st.shared.v2.b32 [global_smem+4], { %r1, %r2 };",
    ),
    "a barrier in a branch of warps": ("barrier", "@%p2 bra $A; bar.sync 0; $A: mov.b32 %r6, 0;"),
    "a barrier in a branch of lanes": (
        "divergence",
        "@%p3 bra $A; bar.sync 0; $A: mov.b32 %r6, 0;",
    ),
    "two barriers at once": (
        "barrier",
        "@%p2 bra $A; bar.sync 0; bra.uni $B; $A: bar.sync 0; $B: mov.b32 %r6, 0;",
    ),
    "a shuffle of some lanes": (
        "divergence",
        "@%p3 bra $A; shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1; $A: mov.b32 %r6, 0;",
    ),
}
ORDERS = [None, 1]


def draw(seed: int | None) -> random.Random | None:
    return None if seed is None else random.Random(seed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_runs(name: str, order: int | None) -> None:
    run(RIGHT[name], order=draw(order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_refused(name: str, order: int | None) -> None:
    kind, body = WRONG[name]
    with pytest.raises(ProgramError, match=f"^{kind}"):
        run(body, order=draw(order))


@pytest.mark.parametrize(
    "body",
    [
        "@%p1 st.global.b32 [%rd1], %r2;",
        "@%p1 st.global.b32 [%rd1], 7;",
        "setp.eq.s32 %p4, %r2, 0; and.pred %p5, %p1, %p4; @%p5 st.global.b32 [%rd1], 0;"
        "bar.sync 0; xor.pred %p5, %p1, %p5; @%p5 ld.global.b32 %r6, [%rd1];",
        "@%p1 ld.global.b32 %r6, [%rd1]; bar.sync 0;"
        "setp.eq.s32 %p4, %r2, 0; and.pred %p5, %p1, %p4; @%p5 st.global.b32 [%rd1], 0;",
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_ctas_share_what_they_only_read(body: str, order: int | None) -> None:
    run("ld.global.b32 %r6, [%rd1];", ctas=3, order=draw(order))
    run(body, order=draw(order))  # of one CTA
    with pytest.raises(ProgramError, match=r"^race"):
        run(body, ctas=3, order=draw(order))


def test_new_memory_is_read_after_it_is_written() -> None:
    run("st.global.b32 [%rd3], %r1; ld.global.b32 %r6, [%rd3];", defined=False)
    with pytest.raises(ProgramError, match=r"^undefined"):
        run("ld.global.b32 %r6, [%rd3];", defined=False)


@pytest.mark.parametrize(
    "line",
    [
        "div.full.f32 %r6, %r1, %r2;",
        "div.approx.f32 %r6, %r1, %r2;",
        "sqrt.approx.f32 %r6, %r1;",
        "rcp.approx.ftz.f32 %r6, %r1;",
        "ex2.approx.f32 %r6, %r1;",
        "fma.rn.f32 %r6, %r1, %r2, %r3;",
        "mad.rn.f64 %rd4, %rd1, %rd2, %rd3;",
        "add.f32 %r6, %r1, %r2;",  # without .rn ptxas may fuse it
        "add.rn.ftz.f32 %r6, %r1, %r2;",
        "cvt.f32.f64 %r6, %rd1;",
        "cvt.rn.ftz.f32.f64 %r6, %rd1;",
        "atom.global.add.u32 %r6, [%rd1], %r1;",
        "red.global.add.f32 [%rd1], %r1;",
        "bar.sync 1;",
        "barrier.sync 0;",
        "shfl.sync.idx.b32 %r6, %r1, 0, 31, 65535;",
        "ld.global.v8.b32 { %r6 }, [%rd1];",
        "ld.local.b32 %r6, [%rd1];",
    ],
)
def test_what_is_not_exact_or_not_known_is_refused(line: str) -> None:
    with pytest.raises(NotImplementedError):
        run(line)


def of(name: str, *values: Any) -> np.ndarray:
    found = find_operation(name)
    assert found is not None
    with np.errstate(all="ignore"):
        return found[0](*values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    bits = np.random.default_rng(0).integers(0, 2**32, 100000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    halves = (bits & 0xFFFFE000) | 0x1000
    for values in (bits.view(np.float32), ties.view(np.float32), halves.view(np.float32)):
        expected = torch.from_numpy(values).to(dtype)
        found = of(f"cvt.rn.{kind}.f32", values)
        known = ~np.isnan(values)
        assert (found.view(np.int16) == expected.view(torch.int16).numpy())[known].all()
        assert torch.from_numpy(found.view(np.int16)).view(dtype).isnan()[~known].all()
        back = of(f"cvt.f32.{kind}", found)
        assert np.array_equal(back[known], expected.float().numpy()[known])


def test_integers_follow_the_manual() -> None:
    a, b = np.array([-7, 7, -7, 6], np.int32), np.array([2, -2, -2, 3], np.int32)
    assert of("div.s32", a, b).tolist() == [-3, -3, 3, 2]
    assert of("rem.s32", a, b).tolist() == [-1, 1, -1, 0]
    assert of("mul.wide.s32", a, np.array([2**30], np.int32))[0] == -7 * 2**30
    assert of("mad.wide.u32", *np.array([[2**31], [4]], np.uint32), np.uint64(1))[0] == 2**33 + 1
    word = np.array([0x80C0FF12], np.uint32)
    assert of("prmt.b32", word, word * 0, np.uint32(0x7770))[0] == 0x12
    assert of("prmt.b32", word, word * 0 + 0xAB, np.uint32(0x4B10))[0] == 0xABFFFF12
    assert of("bfe.u32", word, np.uint32(8), np.uint32(8))[0] == 0xFF
    assert of("bfe.s32", word.view(np.int32), np.uint32(24), np.uint32(8))[0] == -128
    assert of("shl.b32", word, np.uint32(32))[0] == 0
    assert of("shr.s32", word.view(np.int32), np.uint32(40))[0] == -1
    assert convert(np.array([-1], np.int32), "s32", "s64")[0] == -1
    assert convert(np.array([-1], np.int32).view(np.uint32), "u32", "u64")[0] == 2**32 - 1


def test_comparisons_and_extremes_know_nan_and_signed_zero() -> None:
    nan, one = np.array([np.nan], np.float32), np.array([1], np.float32)
    for name, expected in (("lt", False), ("ne", False), ("ltu", True), ("neu", True)):
        assert of(f"setp.{name}.f32", nan, one)[0] == expected
    assert of("max.f32", nan, one)[0] == 1
    assert np.signbit(of("min.f32", one * 0, one * -0.0))[0]
    assert not np.signbit(of("max.f32", one * -0.0, one * 0))[0]
    pair = np.array([1.0, np.nan], np.float16).view(np.uint32)
    assert of("setp.le.f16x2", pair, np.zeros_like(pair)).tolist() == [[False, False]]
    assert of("setp.geu.f16x2", pair, np.zeros_like(pair)).tolist() == [[True, True]]
    half = torch.tensor([-1.0, 2.0]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    pair = half.view(np.uint32)
    assert of("setp.le.bf16", half, np.zeros_like(half)).ravel().tolist() == [True, False]
    assert of("setp.le.bf16x2", pair, np.zeros_like(pair)).tolist() == [[True, False]]


def test_lanes_exchange_values() -> None:
    body = "shfl.sync.{} %r6, %r1, {}, 31, -1; st.global.b32 [%rd3], %r6;"
    lanes = np.arange(64)
    assert (run(body.format("bfly.b32", 5)) == (lanes ^ 5)).all()
    assert (run(body.format("idx.b32", 3)) == lanes // 32 * 32 + 3).all()
    body = "mov.b32 %r5, -1; redux.sync.max.s32 %r6, %r1, %r5; st.global.b32 [%rd3], %r6;"
    assert (run(body) == lanes // 32 * 32 + 31).all()


def test_a_matrix_is_loaded_by_rows() -> None:
    body = """
    st.shared.b32 [%r3], %r1;
    bar.sync 0;
    and.b32 %r5, %r1, 7; xor.b32 %r5, %r5, 1; shl.b32 %r5, %r5, 4;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r5];
    st.global.b32 [%rd3], %r6;
    """
    lanes = np.arange(64) % 32
    assert (run(body) == lanes ^ 4).all()  # rows of four words; each pair of rows is exchanged


def test_matrices_are_loaded_one_register_each() -> None:
    body = """
    st.shared.b32 [%r3], %r1;
    bar.sync 0;
    and.b32 %r5, %r1, 15; shl.b32 %r5, %r5, 4;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r6, %r7}, [%r5];
    shl.b32 %r7, %r7, 8; or.b32 %r6, %r6, %r7;
    st.global.b32 [%rd3], %r6;
    """
    lanes = np.arange(64) % 32
    assert (run(body) == lanes + (lanes + 32) * 256).all()


STORE_MATRICES = """
    and.b32 %r5, %r1, 15; shl.b32 %r5, %r5, 4; and.b32 %r6, %r1, 32; shl.b32 %r6, %r6, 3;
    add.s32 %r5, %r5, %r6; shl.b32 %r7, %r1, 8;
    stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r5], {%r1, %r7};
"""


def test_matrices_are_stored_by_rows() -> None:
    """Each warp stores two matrices of 32 words; lanes then load words one by one."""
    body = (
        STORE_MATRICES
        + """
    bar.sync 0;
    and.b32 %r8, %r1, 31; shl.b32 %r8, %r8, 2; add.s32 %r8, %r8, %r6;
    ld.shared.b32 %r9, [%r8]; ld.shared.b32 %r10, [%r8+128];
    add.s32 %r9, %r9, %r10;
    st.global.b32 [%rd3], %r9;
    """
    )
    threads = np.arange(64)
    assert (run(body, shared=512) == threads + threads * 256).all()


def test_a_stored_matrix_is_another_lane_s_behind_a_barrier_alone() -> None:
    body = STORE_MATRICES + "ld.shared.b32 %r9, [%r5]; st.global.b32 [%rd3], %r9;"
    with pytest.raises(ProgramError, match=r"^race"):
        run(body, shared=512)


def test_threads_go_through_loops_and_meet_again() -> None:
    body = """
    mov.b32 %r5, 0; mov.b32 %r6, 0;
    $A: add.s32 %r6, %r6, %r5; add.s32 %r5, %r5, 1;
    setp.le.s32 %p4, %r5, %r1;
    @%p4 bra $A;
    bar.sync 0;
    st.global.b32 [%rd3], %r6;
    """
    lanes = np.arange(64)
    for order in ORDERS:
        assert (run(body, order=draw(order)) == lanes * (lanes + 1) // 2).all()
