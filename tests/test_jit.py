"""How kernels are compiled: once for all numbers of a type, and some for other kernels only."""

import numba
import pytest

from adaptive_gen.kernels import jit


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """One that Python calls, and the one that it calls with constants; none compiled before."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @jit.inner
    def plus(number, by):
        return number + by

    @jit.entry
    def more(number):
        return plus(number, 1) + plus(number, 2) + plus(number, number)

    return more, plus


def test_a_kernel_is_compiled_once_for_all_constants(kernels):
    more, plus = kernels
    assert more(3) == (3 + 1) + (3 + 2) + (3 + 3)
    assert len(plus.overloads) == 1
    assert more(1.5) == (1.5 + 1) + (1.5 + 2) + (1.5 + 1.5)


def test_what_kernels_call_is_refused_to_python_before_and_after_it_is_compiled(kernels):
    more, plus = kernels
    for _ in range(2):
        with pytest.raises(TypeError, match="plus is called by kernels only"):
            plus(3, 1)
        assert more(1) == 7


def test_a_function_that_is_exact_stays_so_whoever_calls_it(tmp_path, monkeypatch):
    """numba hands the caller's freedoms on to what it calls, where nothing else is said."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @jit.exact
    def difference(a, b):
        return (a + b) - a

    @jit.entry
    def ask(a, b):
        return difference(a, b)

    assert ask(1e16, 1.0) == (1e16 + 1.0) - 1e16 == 0.0
    (code,) = difference.inspect_llvm().values()
    assert "fadd double" in code and "reassoc" not in code
