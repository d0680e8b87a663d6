"""What this machine's processor has that kernels are made for."""

import platform

from llvmlite import binding

NAME = binding.get_host_cpu_name()  # such as "znver4"
_HAS = binding.get_host_cpu_features().get
_X86 = platform.machine().lower() in ("x86_64", "amd64")

AMD = NAME.startswith(("zn", "bd", "bt"))
ZEN_5 = NAME.startswith("znver") and int(NAME[5:] or 0) >= 5  # or a later one
WIDE = bool(_HAS("avx512f"))  # registers of 16 float32, and 32 of them
LANES = 16 if WIDE else 8  # float32 of a register
# Whether it adds up products of bytes, four at a time, in one instruction (VNNI).
DOTS = _X86 and bool(_HAS("avx512vnni") if WIDE else _HAS("avxvnni"))
# An x86 processor without F16C would call a library for each float16.
CONVERTS_FLOAT16 = not _X86 or bool(_HAS("f16c"))
