"""How the repository is laid out: which module may import which, what lies at the top, what no file may name."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from modules before it. A folder counts as one module. What a type hint alone needs (below
# `if TYPE_CHECKING:`) may come from anywhere: nothing of it runs.
ORDER = """
    config plan tokenizer linear embedding rope attention feedforward norm model loss world data download shards corpus
    quantize checkpoint parallel parallel_load trainer cache generation roofline finetune evaluate visualize course
    __init__ cli __main__
""".split()

TOP = {
    "README.md", "pyproject.toml", "Makefile", "LICENSE",
    "chapters", "exercises", "minillama", "data", "tests",
    ".ci", ".editorconfig", ".gitattributes", ".gitignore",
}  # fmt: skip


def module_of(path: Path, package: Path) -> str:
    """The name in ORDER of a file of the package."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports_of(path: Path, package: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside a function, by their names in ORDER."""
    here = (package.name, *path.relative_to(package).parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for first, *rest in names:
            if first == package.name:
                known = rest and ((package / rest[0]).is_dir() or (package / f"{rest[0]}.py").is_file())
                found.add(rest[0] if known else "__init__")  # `from minillama import load` takes it from __init__
    return found


def faults(package: Path) -> list[str]:
    """One sentence for every file that has no place in ORDER, or that imports what comes after it."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name, file = module_of(path, package), path.relative_to(package.parent).as_posix()
        if name not in ORDER:
            found.append(f"{file} is in no line of ORDER: give it a place there, or its content a place in a module.")
            continue
        for other in sorted(imports_of(path, package) - {name}):
            if other not in ORDER or ORDER.index(other) > ORDER.index(name):
                found.append(f"{file} imports {other}, which comes after {name}: imports only point upward.")
    return found


def tracked_files() -> list[str]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_imports_only_point_upward() -> None:
    assert faults(ROOT / "minillama") == []


def test_config_needs_no_torch() -> None:
    text = (ROOT / "minillama" / "config.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from)\s+torch\b", text, re.MULTILINE)


@pytest.mark.parametrize(
    "file, text, fault",
    [
        ("rope.py", "from minillama.config import ModelConfig", None),
        ("rope.py", "from .config import ModelConfig", None),
        ("rope.py", "import torch", None),
        ("rope.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model import Llama", None),
        ("checkpoint/gguf.py", "from .names import TABLE\nfrom ..model import Llama", None),
        ("cli.py", "from minillama import load", None),
        ("rope.py", "from minillama.model import Llama", "minillama/rope.py imports model"),
        ("rope.py", "import minillama.model", "minillama/rope.py imports model"),
        ("rope.py", "from . import model", "minillama/rope.py imports model"),
        ("rope.py", "def f():\n    from .model import Llama", "minillama/rope.py imports model"),
        ("rope.py", "from minillama import load", "minillama/rope.py imports __init__"),
        ("model.py", "from .checkpoint.gguf import read", "minillama/model.py imports checkpoint"),
        ("checkpoint/gguf.py", "from ..cli import app", "minillama/checkpoint/gguf.py imports cli"),
        ("utils.py", "", "minillama/utils.py is in no line of ORDER"),
    ],
)
def test_downward_import_or_homeless_file_is_found(tmp_path: Path, file: str, text: str, fault: str | None) -> None:
    package = tmp_path / "minillama"
    (package / "checkpoint").mkdir(parents=True)
    for name in ("__init__.py", "config.py", "model.py", "cli.py", "checkpoint/names.py", file):
        (package / name).write_text("")
    (package / file).write_text(text)
    found = faults(package)
    assert found == [] if fault is None else len(found) == 1 and found[0].startswith(fault)


def test_top_level_holds_what_the_design_names() -> None:
    assert {name.split("/")[0] for name in tracked_files()} - TOP == set()


# Written in pieces, so that this file does not name them either.
FOLDERS = "|".join("work root tmp opt mnt home Users".split())
MACHINE_PATH = re.compile(rf"(?<![\w.+~$/-])/(?:{FOLDERS})(?=/|$|[\s'\"`),:;])|[A-Z]:\\+Users")
REGISTRY = re.compile(
    "|".join(re.escape(".".join(host)) for host in (
        ("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"), ("download", "pytorch", "org"),
        ("anaconda", "org"), ("deb", "debian", "org"),
    ))
)  # fmt: skip


def test_no_file_names_a_path_of_a_machine_or_the_host_of_a_registry() -> None:
    found = []
    for name in tracked_files():
        content = (ROOT / name).read_bytes()
        if b"\0" in content:
            continue  # not text
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if match := MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{name}:{number}: {match[0]}")
    assert found == []


@pytest.mark.parametrize("folder", ["work", "root", "tmp", "home"])
def test_paths_of_a_machine_are_recognised(folder: str) -> None:
    assert MACHINE_PATH.search(f"see /{folder}/x") and MACHINE_PATH.search(f'"/{folder}"')
    assert not MACHINE_PATH.search(f"{folder}/x, see ./{folder}/x, https://example.com/{folder}/x, a/{folder}/b")
