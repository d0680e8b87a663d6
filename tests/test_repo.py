"""The repository keeps its promises: the wheel, who imports whom, what the README says."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import adaptive_gen
import adaptive_gen.calibrate.cli
import adaptive_gen.cli
import adaptive_gen.train.cli

ROOT = Path(__file__).parents[1]
HOMES = {  # folder of the clone -> package once installed
    "adaptive_gen": "adaptive_gen",
    "train": "adaptive_gen.train",
    "calibrate": "adaptive_gen.calibrate",
}
COMMANDS = {
    "adaptive-gen": adaptive_gen.cli,
    "calibrate": adaptive_gen.calibrate.cli,
    "adaptive-train": adaptive_gen.train.cli,
}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sources(folder):
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in p.parts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that no stale build folder can add to it."""
    copy = tmp_path_factory.mktemp("clone")
    for name in HOMES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    program = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    built = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=True
    )
    return copy / built.stdout.splitlines()[-1]


def test_the_wheel_claims_one_name_in_site_packages(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"adaptive_gen", f"adaptive_gen-{adaptive_gen.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_three_packages(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in HOMES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT / folder).as_posix()
                assert f"{package.replace('.', '/')}/{inside}" in held


def test_the_three_programs_start_from_the_wheel_and_show_help_without_torch(wheel, tmp_path):
    program = """
        import sys
        sys.path.insert(0, sys.argv.pop())
        from adaptive_gen import __file__ as home
        from adaptive_gen.calibrate import cli as calibrate
        from adaptive_gen.cli import main
        from adaptive_gen.train import cli as train
        assert ".whl" in home, home
        starts = {"chat": main, "bench": main, "run": calibrate.main, "soft": train.main}
        for command, start in starts.items():
            sys.argv = ["program", command, "--help"]
            try:
                start()
            except SystemExit as stop:
                assert not stop.code, stop.code
        heavy = {"torch", "transformers", "numpy", "scipy"} & set(sys.modules)
        assert not heavy, heavy
    """
    lines = "\n".join(line.removeprefix(" " * 8) for line in program.splitlines())
    shown = subprocess.run(
        [sys.executable, "-c", lines, str(wheel)], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("Usage:") == 4


def test_one_version_is_stated():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == adaptive_gen.__version__
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_constraints_lie_within_the_ranges_and_cover_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for requirement in project["dependencies"]:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        as_numbers = [tuple(map(int, v.split("."))) for v in (least, pinned[name])]
        assert as_numbers[0] <= as_numbers[1], requirement


def imports(path, package):
    """Absolute names of all modules that a file imports, at whatever depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def all_imports():
    for folder, home in HOMES.items():
        for path in sources(folder):
            inside = path.relative_to(ROOT / folder).parent.parts
            for name in imports(path, ".".join([home, *inside])):
                yield path.relative_to(ROOT), name


def test_the_library_imports_neither_program_and_no_program_the_other():
    forbidden = {
        "adaptive_gen": ("adaptive_gen.train", "adaptive_gen.calibrate", "train", "calibrate"),
        "train": ("adaptive_gen.calibrate", "train", "calibrate"),
        "calibrate": ("adaptive_gen.train", "train", "calibrate"),
    }
    for path, name in all_imports():
        for module in forbidden[path.parts[0]]:
            assert name != module and not name.startswith(f"{module}."), f"{path} imports {name}"


def test_only_ui_imports_rich_and_nothing_imports_click():
    users = {name.split(".")[0]: set() for _, name in all_imports()}
    for path, name in all_imports():
        users[name.split(".")[0]].add(path.as_posix())
    assert users["rich"] == {"adaptive_gen/ui.py"}
    assert "click" not in users


def test_only_ui_prints():
    for folder in HOMES:
        for path in sources(folder):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
            assert "print" not in names or path.name == "ui.py", path


def test_the_built_in_model_is_small_and_complete():
    folder = ROOT / "adaptive_gen/builtin"
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 16 * 2**20
    needed = {"config.json", "model.safetensors", "tokenizer.json", "calibration.json", "README.md"}
    assert needed <= set(files)
    assert json.loads((folder / "config.json").read_text())["exit_layers"]


def commands(page):
    """(program, command, options) of every command line in a page's fenced code."""
    page = re.sub(r"^## Files.*?^## ", "", page, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.removeprefix("$ ").split("#")[0].split()
        if "|" in words and words[-1] != "|":
            words = words[words.index("|") + 1 :]
        if words and words[0] in COMMANDS:
            command = words[1] if len(words) > 1 and not words[1].startswith("-") else None
            yield words[0], command, [w.split("=")[0] for w in words if w.startswith("--")]


PAGES = README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize(
    ("program", "command", "options"), [each for page in PAGES for each in commands(page)]
)
def test_commands_of_the_documents_exist(program, command, options):
    arguments = [command, "--help"] if command else ["--help"]
    shown = CliRunner().invoke(COMMANDS[program].app, arguments)
    assert shown.exit_code == 0, shown.output
    for option in options:
        assert re.search(rf"(^|\W){option}(\W|$)", shown.output), f"{program} {command} {option}"


def test_the_readme_shows_every_program_and_only_make_targets_that_exist():
    assert {program for program, _, _ in commands(README)} == set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_named_by_the_readme_exist():
    tree = README.split("## Files")[1].split("```")[1]
    for line in tree.splitlines():
        for name in line.split("  ")[0].split():
            assert (ROOT / name).exists(), name


def test_the_python_of_the_readme_runs(capsys):
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out
