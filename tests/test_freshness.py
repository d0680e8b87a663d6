"""Machine code of former sources is never run."""

import numba

from adaptive_gen.kernels.freshness import SOURCES, digest, stamped
from adaptive_gen.kernels.products import add_product
from adaptive_gen.kernels.team import spin


def test_any_change_of_any_source_is_another_digest(tmp_path):
    caller, called = tmp_path / "caller.py", tmp_path / "called.py"
    caller.write_text("1"), called.write_text("2")
    first = digest([caller, called])
    assert digest([caller, called]) == first
    called.write_text("3")
    assert digest([caller, called]) != first


def made(tmp_path, monkeypatch, sources):
    """A function compiled by a process with these sources: how often it had to compile."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def double(x):
        return 2 * x

    function = stamped(numba.njit(double, cache=True), sources)
    assert function(2) == 4
    return sum(function.stats.cache_misses.values())


def test_machine_code_is_kept_for_the_same_sources_alone(tmp_path, monkeypatch):
    assert made(tmp_path, monkeypatch, "before") == 1
    assert made(tmp_path, monkeypatch, "before") == 0
    assert made(tmp_path, monkeypatch, "after") == 1
    assert made(tmp_path, monkeypatch, "after") == 0


def test_nothing_is_kept_where_numba_keeps_it_in_another_way():
    function = numba.njit(lambda x: 2 * x)  # without a cache on disk at all
    assert stamped(function)(2) == 4


def test_the_kernels_are_stamped():
    for kernel in (add_product, spin):
        assert SOURCES in kernel._cache._cache_file._source_stamp
