"""Machine code of former sources is never run."""

import numba

from adaptive_gen.kernels.freshness import SOURCES, CodeFiles, digest, stamped
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


def test_code_of_former_sources_is_not_found_while_new_code_is_being_written(tmp_path, monkeypatch):
    CodeFiles(str(tmp_path), "kernel", "before").save("types", "old code")
    ours, theirs = (CodeFiles(str(tmp_path), "kernel", "after") for _ in range(2))
    write, found = ours._save_data, []

    def slowly(name, data):
        found.append(theirs.load("types"))
        write(name, data)
        found.append(theirs.load("types"))

    monkeypatch.setattr(ours, "_save_data", slowly)
    ours.save("types", "new code")
    assert found == [None, None]
    assert theirs.load("types") == "new code"


def test_two_processes_that_compile_at_once_do_not_find_each_others_code(tmp_path, monkeypatch):
    """One for integers while the other, which read the index before, writes for floats."""
    one, other = (CodeFiles(str(tmp_path), "kernel", "same") for _ in range(2))
    write, before = other._save_data, one._load_index()

    def meanwhile(name, data):
        monkeypatch.setattr(one, "_load_index", lambda: dict(before))
        one.save("integers", "code for integers")
        write(name, data)

    monkeypatch.setattr(other, "_save_data", meanwhile)
    other.save("floats", "code for floats")
    third = CodeFiles(str(tmp_path), "kernel", "same")
    assert third.load("integers") in (None, "code for integers")
    assert third.load("floats") in (None, "code for floats")
    assert third._load_index()


def test_nothing_is_kept_where_numba_keeps_it_in_another_way():
    function = numba.njit(lambda x: 2 * x)  # without a cache on disk at all
    assert stamped(function)(2) == 4


def test_the_kernels_are_stamped():
    for kernel in (add_product, spin):
        assert SOURCES in kernel._cache._cache_file._source_stamp
