"""The figures that `plan` reads from compiled programs, against hand counts and the compiler's."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.planning.flops import flops
from moe_jax.planning.hlo import Program, tuple_parts, type_bytes
from moe_jax.planning.traffic import accesses, collectives

# ------------------------------------------------------------------------------ text, by hand

TPU = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%start (p: bf16[100,4]) -> (bf16[100,4], bf16[100,64]) {
  %p = bf16[100,4]{0,1:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[100,64]{0,1:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %mark = (bf16[100,4]{0,1}, bf16[100,64]{0,1}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[100,64]) -> bf16[100,64] {
  %p.1 = bf16[100,64]{0,1:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[100,64]{0,1:T(8,128)(2,1)} all-gather(%p.1), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %mark.1 = bf16[100,64]{0,1} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%condition (state: (s32[], f32[16,2])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  %state = (s32[]{:T(128)}, f32[16,2]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %twelve), direction=LT
}

%body (state.1: (s32[], f32[16,2])) -> (s32[], f32[16,2]) {
  %state.1 = (s32[]{:T(128)}, f32[16,2]{1,0:T(8,128)}) parameter(0)
  %x = f32[16,2]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %all_to_all.3 = f32[16,2]{1,0:T(8,128)S(1)} all-to-all(%x), replica_groups={}, dimensions={0}
  ROOT %out = (s32[]{:T(128)}, f32[16,2]{1,0:T(8,128)}) tuple(%i.1, %all_to_all.3)
}

ENTRY %main (arg: bf16[100,4], x: f32[16,2]) -> f32[16,2] {
  %arg = bf16[100,4]{0,1:T(8,128)(2,1)} parameter(0)
  %begun = (bf16[100,4]{0,1}, bf16[100,64]{0,1}) fusion(%arg), kind=kCustom, calls=%start
  %part = bf16[100,64]{0,1} get-tuple-element(%begun), index=1
  %ended = bf16[100,64]{0,1} fusion(%part), kind=kCustom, calls=%done
  %initial = (s32[], f32[16,2]) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, f32[16,2]{1,0:T(8,128)}) while(%initial), condition=%condition, body=%body
  %reduced = (f32[10]{0:T(128)}, f32[]{:T(128)}) all-reduce(%u, %v), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%sum
  %scattered = f32[5]{0:T(128)} reduce-scatter(%w), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %y = f32[16,2]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501

ASYNC = """
ENTRY main {
  p = f32[8]{0} parameter(0)
  gs = (f32[8]{0}, f32[32]{0}) all-gather-start(p), replica_groups={{0,1,2,3}}
  gd = f32[32]{0} all-gather-done(gs)
  ps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(p), source_target_pairs={{0,1}}
  pd = f32[8]{0} collective-permute-done(ps)
  rs = f32[8]{0} all-reduce-start(p), replica_groups={}, to_apply=sum
  rd = f32[8]{0} all-reduce-done(rs)
  ss = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(p), replica_groups={{0,1,2,3}}
  ROOT sd = f32[2]{0} reduce-scatter-done(ss)
}
"""


def summary(text, devices):
    actual = collectives(Program(text), devices)
    return {kind: (c.count, c.bytes, c.largest_bytes, c.wire_bytes) for kind, c in actual.items()}


def test_collectives_of_a_tpu_program():
    """A chain of fusions is one all-gather; the loop's condition tells how often it runs."""
    assert summary(TPU, 8) == {
        "all-gather": (1, 12800, 12800, 12800 * 3 / 4),
        "all-reduce": (1, 44, 44, 2 * 44 * 3 / 4),
        "all-to-all": (12, 12 * 128, 128, 12 * 128 * 7 / 8),
        "reduce-scatter": (1, 80, 80, 80 * 3 / 4),
    }


def test_collectives_that_start_and_end():
    assert summary(ASYNC, 4) == {
        "all-gather": (1, 128, 128, 96),
        "all-reduce": (1, 32, 32, 2 * 32 * 3 / 4),
        "collective-permute": (1, 32, 32, 32),
        "reduce-scatter": (1, 32, 32, 24),
    }


@pytest.mark.parametrize(("groups", "size"), [
    ("{}", 8),
    ("{{0,1},{2,3},{4,5},{6,7}}", 2),
    ("[2,4]<=[8]", 4),
    ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['data'=4,'fsdp'=2] {'fsdp'}", 2),
    ("mesh['data'=2,'fsdp'=2,'model'=2] {'data','model'}", 4),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
    ("mesh['x'=8] {'x':(2)4}", 4),
])  # fmt: skip
def test_devices_of_a_group(groups, size):
    """Each of n devices sends all but an nth of what is exchanged."""
    text = "ENTRY main {\n  ROOT r = f32[64]{0} all-to-all(p), replica_groups=%s, dimensions={0}\n}"
    assert summary(text % groups, 8) == {"all-to-all": (1, 256, 256, 256 * (size - 1) / size)}


def test_what_stays_on_the_chip_is_not_accessed():
    program = Program(
        """
ENTRY main {
  a = f32[100]{0:T(128)} parameter(0)
  c = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(a)
  d = f32[100]{0:T(128)S(1)} copy-done(c)
  e = f32[100]{0:T(128)S(1)} negate(d)
  ROOT f = f32[100]{0:T(128)} add(e, a)
}
"""
    )
    assert accesses(program) == (400 + 0 + 800, 2)


def test_known_trip_counts_win_and_unknown_ones_are_told():
    loop = """
c {
  s = (s32[]) parameter(0)
  ROOT l = pred[] compare(s, n), direction=LT
}

b {
  s = (s32[]) parameter(0)
  ROOT r = f32[4] all-gather(s), replica_groups={}
}

ENTRY main {
  p = (s32[]) parameter(0)
  ROOT w = (s32[]) while(p), condition=c, body=b%s
}
"""
    known = Program(loop % ', backend_config={"known_trip_count":{"n":"7"}}')
    assert (known.runs["b"], known.unknown_loops) == (7, set())
    unknown = Program(loop % "")
    assert (unknown.runs["b"], unknown.unknown_loops) == (1, {"w"})


@pytest.mark.parametrize(("text", "size"), [
    ("f32[8,4]{1,0}", 128), ("(bf16[3], s8[2]{0})", 8), ("pred[5]", 5), ("s4[3]", 2),
    ("f8e4m3fn[6]", 6), ("token[]", 0), ("c64[2]", 16), ("f32[]", 4),
])  # fmt: skip
def test_bytes_of_a_type(text, size):
    assert type_bytes(text) == size


def test_parts_of_a_tuple():
    assert tuple_parts("((f32[2,3]{1,0}, s32[]), u8[4])") == ["(f32[2,3]{1,0}, s32[])", "u8[4]"]
    assert tuple_parts("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]


# ------------------------------------------------------------------------------ text of GPUs

GPU = """
%slice (stack.1: f32[12,100], i.1: s32[]) -> f32[1,100] {
  %stack.1 = f32[12,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %layer.1 = f32[1,100]{1,0} dynamic-slice(%stack.1, %i.1, %zero.1), dynamic_slice_sizes={1,100}
}

%product (a.1: bf16[40,30], b.1: bf16[30,20]) -> bf16[40,20] {
  %a.1 = bf16[40,30]{1,0} parameter(0)
  %b.1 = bf16[30,20]{1,0} parameter(1)
  ROOT %dot.1 = bf16[40,20]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add_rows (sum.1: f32[50,10], rows.1: s32[3,1], values.1: bf16[3,1,10]) -> f32[50,10] {
  %sum.1 = f32[50,10]{1,0} parameter(0)
  %rows.1 = s32[3,1]{1,0} parameter(1)
  %values.1 = bf16[3,1,10]{2,1,0} parameter(2)
  %updates.1 = f32[3,1,10]{2,1,0} convert(%values.1)
  ROOT %scatter.1 = f32[50,10]{1,0} scatter(%sum.1, %rows.1, %updates.1), update_window_dims={1,2}, inserted_window_dims={}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%sum
}

%add_to_zeros (rows.2: s32[3,1], updates.2: f32[3,1,10]) -> f32[50,10] {
  %rows.2 = s32[3,1]{1,0} parameter(0)
  %updates.2 = f32[3,1,10]{2,1,0} parameter(1)
  %zeros = f32[50,10]{1,0} broadcast(%zero), dimensions={}
  ROOT %scatter.2 = f32[50,10]{1,0} scatter(%zeros, %rows.2, %updates.2), update_window_dims={1,2}, inserted_window_dims={}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%sum
}

%reduced (part: f32[80]) -> f32[10] {
  %part = f32[80]{0} parameter(0)
  ROOT %scattered = f32[10]{0} reduce-scatter(%part), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%sum
}

ENTRY %main (stack: f32[12,100], i: s32[], a: bf16[40,30], b: bf16[30,20]) -> f32[1,100] {
  %stack = f32[12,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %a = bf16[40,30]{1,0} parameter(2)
  %b = bf16[30,20]{1,0} parameter(3)
  %sum = f32[50,10]{1,0} parameter(4)
  %rows = s32[3,1]{1,0} parameter(5)
  %values = bf16[3,1,10]{2,1,0} parameter(6)
  %part.1 = f32[80]{0} parameter(7)
  %updates = f32[3,1,10]{2,1,0} parameter(8)
  LINE
}
"""  # noqa: E501


@pytest.mark.parametrize(("line", "size"), [
    # A copy of one layer beside other work; the index is read, too.
    (
        "%s = ((f32[12,100]{1,0}, s32[]), f32[1,100]{1,0}, u32[]) fusion-start(%stack, %i), "
        "kind=kLoop, calls=%slice\n  ROOT %d = f32[1,100]{1,0} fusion-done(%s)",
        400 + 4 + 400,
    ),
    (
        'ROOT %y = bf16[40,20]{1,0} fusion(%a, %b), kind=kCustom, calls=%product, '
        'backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}',
        2 * (40 * 30 + 30 * 20 + 40 * 20),
    ),
    # cuBLAS asks for memory that it need not use; a kernel of our own does not.
    (
        "%y = (bf16[40,20]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul"',
        2 * (40 * 30 + 30 * 20 + 40 * 20),
    ),
    (
        "%y = (bf16[40,20]{1,0}, s8[7]{0}) custom-call(%a, %b), "
        'custom_call_target="__gpu$xla.gpu.triton"',
        2 * (40 * 30 + 30 * 20 + 40 * 20) + 7,
    ),
    # One operand twice, and one that becomes the result.
    (
        "%y = bf16[40,20]{1,0} custom-call(%a, %a, %b, %stack), "
        'custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (3, {})}',
        2 * (40 * 30 + 30 * 20 + 40 * 20),
    ),
    (
        "%y = (f32[12,100]{1,0}, s8[7]{0}) custom-call(%a, %b, %stack), "
        'custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (2, {})}',
        2 * (40 * 30 + 30 * 20) + 2 * 4 * 12 * 100,
    ),
    # Rows are read, added to and written where they are.
    (
        "ROOT %y = f32[50,10]{1,0} fusion(%sum, %rows, %values), kind=kInput, calls=%add_rows",
        2 * 3 * 10 * 4 + 3 * 4 + 3 * 10 * 2,
    ),
    (
        "ROOT %y = f32[50,10]{1,0} scatter(%sum, %rows, %updates), to_apply=%sum",
        3 * 3 * 10 * 4,
    ),
    # An array that the fusion makes is written whole.
    (
        "ROOT %y = f32[50,10]{1,0} fusion(%rows, %updates), kind=kInput, calls=%add_to_zeros",
        3 * 4 + 3 * 10 * 4 + 50 * 10 * 4,
    ),
    (
        "%s = ((f32[80]{0}), f32[10]{0}) async-start(%part.1), calls=%reduced\n"
        "  ROOT %d = f32[10]{0} async-done(%s)",
        320 + 40,
    ),
])  # fmt: skip
def test_bytes_accessed_of_a_gpu_program(line, size):
    assert accesses(Program(GPU.replace("LINE", line))).bytes == size


def test_an_asynchronous_computation_is_counted_once():
    line = "%s = ((f32[80]{0}), f32[10]{0}) async-start(%part.1), calls=%reduced"
    assert summary(GPU.replace("LINE", line), 8) == {"reduce-scatter": (1, 320, 320, 320 * 7 / 8)}


# ------------------------------------------------------------------------------ compiled here


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def test_collectives_of_a_compiled_program():
    """Once before and three times in a loop, on 8 devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def local(x_N, y_Nx4):
        whole = jax.lax.all_gather(x_N, "x", tiled=True)

        def add(total, _):
            return jax.lax.psum(total, "x") * 0.5, None

        total, _ = jax.lax.scan(add, y_Nx4, None, length=3)
        return whole.sum() + jax.lax.psum_scatter(total, "x", tiled=True)

    function = jax.shard_map(
        local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False
    )
    actual = summary(compiled(function, (64,), (16, 4)).as_text(), 8)
    assert actual == {
        "all-gather": (1, 256, 256, 256 * 7 / 8),
        "all-reduce": (3, 3 * 256, 256, 3 * 2 * 256 * 7 / 8),
        "reduce-scatter": (1, 256, 256, 256 * 7 / 8),
    }


def test_collectives_over_an_axis_of_a_compiled_program():
    """The partitioner names the axes of its mesh; a group has 4 or 2 of the 8 devices."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for axis, size in (("x", 4), ("y", 2)):
        part, whole = NamedSharding(mesh, P(axis)), NamedSharding(mesh, P())
        x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=part)
        text = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text()
        assert summary(text, 8) == {"all-gather": (1, 256, 256, 256 * (size - 1) / size)}


def test_bytes_accessed_without_loops_are_what_the_compiler_counts():
    program = compiled(lambda x, w, v: jnp.tanh(x @ w) @ v, (64, 128), (128, 256), (256, 32))
    wanted = program.cost_analysis()["bytes accessed"]
    assert accesses(Program(program.as_text())).bytes == pytest.approx(wanted, rel=0.05)


def test_bytes_accessed_of_a_loop_are_those_of_its_slices():
    """Ten matrices of a stack are read, one in each iteration, and ten rows are written."""

    def function(x, w_L):
        return jax.lax.scan(lambda x, w: (x @ w, x @ w), x, w_L)[1]

    program = compiled(function, (1, 256), (10, 256, 256))
    matrices = 10 * 256 * 256 * 4
    actual = accesses(Program(program.as_text())).bytes
    # A slice may be copied before it is multiplied with: read, written, read.
    assert matrices <= actual <= 3.2 * matrices
    # The compiler counts the loop's body once.
    assert program.cost_analysis()["bytes accessed"] < matrices


def test_flops_count_loops_and_what_is_computed_again():
    def layers(x, w_L, remat):
        def body(x, w):
            return jnp.sin(x @ w), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, w_L)[0].sum()

    x, w_L = jnp.zeros((4, 8)), jnp.zeros((5, 8, 8))
    one = 5 * 2 * 4 * 8 * 8  # forward; backward takes two more
    assert flops(lambda x, w: layers(x, w, False), x, w_L) == one
    assert flops(jax.grad(lambda x, w: layers(x, w, False), (0, 1)), x, w_L) == 3 * one
    assert flops(jax.grad(lambda x, w: layers(x, w, True), (0, 1)), x, w_L) == 4 * one


def test_flops_are_one_devices():
    mesh = jax.make_mesh((4, 2), ("x", "model"), axis_types=(AxisType.Auto,) * 2)
    function = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"),
        axis_names={"x"}, check_vma=False,
    )  # fmt: skip
    assert flops(jax.jit(function), jnp.zeros((8, 6)), jnp.zeros((6, 10))) == 2 * 8 * 6 * 10 / 8


ON_GPUS = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from moe_jax.planning.devices import topology_devices
from moe_jax.planning.hlo import Program
from moe_jax.planning.traffic import accesses, collectives

mesh = jax.make_mesh((8,), ("x",), devices=topology_devices("h100:8"))
psum = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())

def compiled(function, *shapes, dtype=jnp.bfloat16, spec=P()):
    place = NamedSharding(mesh, spec)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    with jax.set_mesh(mesh):
        return Program(jax.jit(function).lower(*arguments).compile().as_text())

def rows(x, i):
    return jnp.zeros_like(x).at[i[:, 0].astype(int)].add(i)

def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), x, w)[0]

print(json.dumps({
    "product": accesses(compiled(lambda a, b: a @ b, (4096, 4096), (4096, 4096))).bytes,
    "softmax": accesses(compiled(lambda x: jax.nn.softmax(x, -1), (8192, 4096))).bytes,
    "rows": accesses(compiled(rows, (50000, 1024), (2048, 1024), dtype=jnp.float32)).bytes,
    "loop": accesses(compiled(layers, (1024, 1024), (12, 1024, 1024))).bytes,
    "sum": [vars(c) for c in collectives(
        compiled(psum, (8, 1024, 1024), dtype=jnp.float32, spec=P("x")), 8).values()],
}))
"""


@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's plugin for CUDA is not installed",
)
def test_bytes_accessed_of_programs_compiled_for_gpus():
    done = subprocess.run([sys.executable, "-c", ON_GPUS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout)
    assert actual["product"] == 3 * 4096 * 4096 * 2
    assert actual["softmax"] == 2 * 8192 * 4096 * 2
    # Zeros are written; 2048 rows are read, and read and written where they go.
    assert actual["rows"] == pytest.approx((50000 + 3 * 2048) * 1024 * 4, rel=0.01)
    # Twelve layers read the state and their slice, and write the state. Slices may be copied.
    layer = 1024 * 1024 * 2
    assert 12 * 3 * layer <= actual["loop"] <= (12 * 5 + 2) * layer * 1.01
    size = 4 * 1024 * 1024
    assert actual["sum"] == [
        {"count": 1, "bytes": size, "largest_bytes": size, "wire_bytes": 2 * size * 7 / 8}
    ]
