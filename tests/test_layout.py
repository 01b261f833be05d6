"""What lies where: the direction of imports, and nothing in the repository that belongs to one machine."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = {".py", ".yaml", ".yml", ".toml", ".md", ".j2", ".sh", ".cfg", ".txt", ""}
# Folders that only exist on somebody's machine. `/home/me` is nobody's, and any Linux has /tmp and /usr.
OF_ONE_MACHINE = re.compile(r"(?<![\w.>}])/(?:work|home|root|Users|mnt|scratch|workspace)/(?!me\b)[\w.-]+")


def tracked() -> list[Path]:
    """The repository's files; without git (a source distribution), those of its folders."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]
    folders = ("fedssl", "strategies", "conf", "tests", "scripts")
    return [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc"]


TRACKED = tracked()
MODULES = sorted(
    path for path in TRACKED if path.suffix == ".py" and path.parts[len(ROOT.parts)] in ("fedssl", "strategies")
)


def test_no_file_is_larger_than_a_megabyte() -> None:
    assert [path for path in TRACKED if path.stat().st_size > 1_000_000] == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    texts = [path for path in TRACKED if path.suffix in TEXT and path != Path(__file__)]
    places = {path.relative_to(ROOT): OF_ONE_MACHINE.findall(path.read_text(errors="replace")) for path in texts}
    assert {path: found for path, found in places.items() if found} == {}


def test_that_would_be_noticed() -> None:
    assert OF_ONE_MACHINE.findall("root: /home/ada/data") == ["/home/ada"]
    folder = "work"  # as part of a longer path it is nobody's machine
    assert OF_ONE_MACHINE.findall(f"see https://hydra.cc/{folder}/it, <root>/home/x and runs/{folder}/a") == []


def test_outputs_caches_and_environments_are_not_tracked() -> None:
    outputs = {"runs", "multirun", "__pycache__", ".venv", "dist", "build", ".mypy_cache", ".ruff_cache", "data"}
    folders = {part for path in TRACKED for part in path.relative_to(ROOT).parts[:-1]} - {
        "data"
    }  # fedssl/data, conf/data
    assert not folders & outputs
    assert not (ROOT / "data").is_dir() or not [path for path in TRACKED if path.is_relative_to(ROOT / "data")]
    assert not [path for path in TRACKED if path.suffix in {".safetensors", ".npz", ".pt", ".parquet", ".whl", ".log"}]


def test_the_imports_keep_their_direction() -> None:
    """The contracts in pyproject.toml: the library knows no strategy; Ray and Hydra stay in their corners."""
    command = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [str(command), "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 broken" in ended.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_stay_checkable(path: Path) -> None:
    """`from __future__ import annotations` would turn the shapes into text that no checker reads."""
    imported = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert "__future__" not in imported


def test_a_strategy_is_one_file_that_imports_no_other() -> None:
    for path in (ROOT / "strategies").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "strategies"], path


def test_every_strategy_has_a_yaml_and_every_yaml_a_strategy() -> None:
    targets = set()
    for path in (ROOT / "conf" / "strategy").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        named = [node["_target_"].split(".") for node in config.values() if isinstance(node, dict)]
        targets |= {module for package, module, *_ in named if package == "strategies"}  # else Flower's, by the library
    files = {path.stem for path in (ROOT / "strategies").glob("*.py")} - {"__init__"}
    assert targets == files


def test_scripts_are_executable_and_python_files_elsewhere_are_not() -> None:
    for path in TRACKED:
        if path.parent == ROOT / "scripts" and path.suffix == "":
            assert os.access(path, os.X_OK), path
        if path.is_relative_to(ROOT / "fedssl"):
            assert not os.access(path, os.X_OK), path
