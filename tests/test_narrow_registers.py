"""The kernels as processors without AVX-512 get them: registers of eight, tiles of four."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RUN = """
import sys
from llvmlite import binding

known = binding.get_host_cpu_features


def without_avx512():
    found = known()
    found.update({name: False for name in found if name.startswith("avx512")})
    return found


binding.get_host_cpu_features = without_avx512
import pytest
from adaptive_gen.kernels import lanes, panels

assert (lanes.LANES, panels.TILE) == (8, 4)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_registers_of_eight_give_the_same(tmp_path):
    """Code for them is compiled anew, and kept apart."""
    files = [str(TESTS / name) for name in ("test_attending.py", "test_compiled.py")]
    ran = subprocess.run(
        [sys.executable, "-c", RUN, *files],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout
