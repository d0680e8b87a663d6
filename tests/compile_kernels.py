"""Compile every Triton kernel for Hopper, which needs no GPU; prints the kernels that did.

A process of its own (see test_kernels.py), because kernels made for the interpreter do not compile.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adaptive_gen.kernels import attention, head, projection, rotary

HOPPER = GPUTarget("cuda", 90, 32)
MODEL = "*bf16"
INTEGERS = {"tokens", "vocab", "blocks", "n0", "n1", "n2", "width", "of_slot", "of_head", "window"}
FLOATS = {"eps", "scale"}
WIDE = {"rstd", "partial", "summary", "lse"}
PLAN = {"slots", "positions", "firsts", "counts", "starts", "skip"}


def type_of(name, kernel):
    if name in INTEGERS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name in PLAN:
        return "*i64"
    is_rstd = kernel is projection._rstd_kernel and name == "out"
    return "*fp32" if name in WIDE or is_rstd else MODEL


def compile_for_hopper(kernel, **constants):
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else type_of(n, kernel) for n in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=values)
    assert "cubin" in triton.compile(source, target=HOPPER).asm
    print(kernel.__name__)


for tokens in (32, 256):
    compile_for_hopper(
        head._partial_kernel, hidden=4096, STORE=True, TOKENS=tokens, VOCAB=64, HIDDEN=64
    )
compile_for_hopper(head._reduce_kernel, BLOCKS=2048)
compile_for_hopper(projection._rstd_kernel, hidden=4096, HIDDEN=1024)
for gated, biased in ((True, False), (False, True)):
    compile_for_hopper(
        projection._project_kernel,
        hidden=4096,
        HAS_BIAS=biased,
        GATED=gated,
        TOKENS=32,
        OUT=32,
        HIDDEN=64,
    )
for query, normed in ((32, True), (0, False)):
    compile_for_hopper(rotary._write_kernel, QUERY=query, KV=8, DIM=128, HALF=64, NORMED=normed)
for limited in (False, True):
    compile_for_hopper(
        attention._split_kernel,
        HEADS=32,
        GROUP=4,
        DIM=128,
        WIDE=128,
        ROWS=64,
        KEYS=64,
        SPLITS=8,
        WINDOWED=limited,
        SKIPS=limited,
    )
compile_for_hopper(attention._join_kernel, DIM=128, WIDE=128, SPLITS=8)
