"""What this machine's processor has that kernels are made for, as far as numba uses it.

Its user may keep features from it: NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, NUMBA_ENABLE_AVX.
"""

import platform
import re

from llvmlite import binding
from numba.core import codegen, config

_SAID = getattr(config, "CPU_FEATURES", None)
_FEATURES = {
    feature[1:]
    for feature in (codegen.get_host_cpu_features() if _SAID is None else _SAID).split(",")
    if feature.startswith("+")
}
_X86 = platform.machine().lower() in ("x86_64", "amd64")

NAME = binding.get_host_cpu_name()  # such as "znver4"
AMD = NAME.startswith(("zn", "bd", "bt"))
_ZEN = re.fullmatch(r"znver(\d+)", NAME)
ZEN = int(_ZEN[1]) if _ZEN else 0  # which generation of AMD's, 0 for others
WIDE = "avx512f" in _FEATURES  # registers of 16 float32, and 32 of them
LANES = 16 if WIDE else 8  # float32 of a register
# Whether it adds up products of bytes, four at a time, in one instruction (VNNI).
DOTS = _X86 and ("avx512vnni" if WIDE else "avxvnni") in _FEATURES
# Whether instead it does so two at a time, with 16 bits each.
PAIRS = _X86 and "avx2" in _FEATURES and not WIDE and not DOTS
INTEGERS = DOTS or PAIRS  # in which products with weights in 8 bits are added up
# An x86 processor without F16C would call a library for each float16.
CONVERTS_FLOAT16 = not _X86 or "f16c" in _FEATURES
