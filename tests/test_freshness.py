"""Machine code of former sources is never run."""

from adaptive_gen.kernels.freshness import forget_stale


def test_machine_code_is_kept_until_any_source_changes(tmp_path):
    caller, called = tmp_path / "caller.py", tmp_path / "called.py"
    caller.write_text("1"), called.write_text("2")
    code = tmp_path / "__pycache__" / "caller.f.nbi"
    forget_stale([caller, called])
    code.write_text("machine code")
    forget_stale([caller, called])
    assert code.exists()
    called.write_text("3")
    forget_stale([caller, called])
    assert not code.exists()


def test_code_from_before_there_were_stamps_is_forgotten(tmp_path):
    source, code = tmp_path / "a.py", tmp_path / "__pycache__" / "a.f.nbi"
    source.write_text("1"), code.parent.mkdir(), code.write_text("machine code")
    forget_stale([source])
    assert not code.exists()


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("1"), (tmp_path / "__pycache__").write_text("no folder")
    forget_stale([source])
