"""The kernels as processors get them that lack what the newest have, with code of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding

TESTS = Path(__file__).parent
RUN = """
import sys
from llvmlite import binding

known, hidden = binding.get_host_cpu_features, tuple(sys.argv[1].split(","))


def without():
    found = known()
    found.update({name: False for name in found if name.startswith(hidden)})
    return found


binding.get_host_cpu_features = without
import pytest
from adaptive_gen.kernels import lanes, panels, processor

if "avx512" in hidden:
    assert (lanes.LANES, panels.TILE) == (8, 4)
assert processor.DOTS == (hidden == ("avx512",) and bool(known().get("avxvnni")))
if "avxvnni" in hidden:
    avx2 = known().get("avx2", False) and "avx2" not in hidden
    assert processor.PAIRS == (avx2 and not processor.WIDE)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "files"),
    [
        ("avx512", ["test_attending.py", "test_compiled.py", "test_logits.py", "test_team.py"]),
        ("avx512,avxvnni", ["test_compiled.py", "test_screen.py", "test_team.py"]),
        ("avx512,avxvnni,avx2", ["test_compiled.py", "test_screen.py", "test_team.py"]),
        ("avx512vnni,avxvnni,f16c", ["test_compiled.py", "test_team.py"]),
    ],
    ids=["registers of eight", "bytes in pairs", "bytes as floats", "no dots of bytes, no float16"],
)
def test_they_give_the_same(hidden, files, tmp_path):
    """Code for them is compiled anew, and kept apart."""
    features, names = binding.get_host_cpu_features(), tuple(hidden.split(","))
    if not any(has and name.startswith(names) for name, has in features.items()):
        pytest.skip("this processor has none of it: all other tests run that code")
    ran = subprocess.run(
        [sys.executable, "-c", RUN, hidden, *(str(TESTS / name) for name in files)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout
