"""Grading and the commands around it: honest notebooks pass, tricks fail, nothing of the learner's is lost."""

import copy
import csv
import io
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.cli import learn, main
from minillama.course import exchange, notebooks, progress
from minillama.course.check import Mistake, case, check, hint
from minillama.course.grade import Limits, grade

ROOT = Path(__file__).parents[1]
LEARNER, SOLUTION = (ROOT / "exercises" / part / "06_normalization.ipynb" for part in (".", "solutions"))


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINILLAMA_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


def written(path: Path, source: Path = LEARNER, **cells: str) -> Path:
    """A copy of a notebook in which some stubs are replaced: `_06_3="def rms_norm…"`; `first` is put in front."""
    notebook = notebooks.read(source)
    first = cells.pop("first", "")
    for name, text in cells.items():
        cell = next(c for c in notebook["cells"] if c["id"] == name.strip("_").replace("_", "-") + "-stub")
        cell["source"] = textwrap.dedent(text)
    if first:
        code = {"cell_type": "code", "id": "x", "metadata": {}, "outputs": [], "execution_count": None}
        notebook["cells"].insert(0, {**code, "source": textwrap.dedent(first)})
    notebooks.write(notebook, path)
    return path


def results(path: Path, **limits) -> dict[str, tuple[bool, str]]:
    return {task.number: (v.passed, v.message) for task, v in grade(path, "06", seed=2, limits=Limits(**limits))}


def test_the_solution_passes_and_the_untouched_notebook_does_not():
    assert all(passed for passed, _ in results(SOLUTION).values())
    assert set(results(LEARNER).values()) == {(False, "not attempted yet.")}


def test_a_known_mistake_is_named_and_the_other_exercises_are_graded_all_the_same(tmp_path):
    sums = """
        def rms_norm(x, weight, eps):
            wide = x.float()
            return (wide / ((wide * wide).sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight
    """
    found = results(written(tmp_path / "06_x.ipynb", SOLUTION, _06_3=sums))
    assert not found["06.3"][0] and "summed, not averaged" in found["06.3"][1]
    assert all(found[number][0] for number in ("06.1", "06.2", "06.4", "06.5"))


TRICKS = {
    "loops": ("def l2_norm(x):\n    while True: pass", "06.1", "ran for more than"),
    "eats memory": ("def l2_norm(x):\n    return torch.ones(10**12)", "06.1", "memory|alloc"),
    "exits": ("import os\ndef l2_norm(x):\n    os._exit(0)", "06.1", "ended Python itself"),
    "prints a tick": ("def l2_norm(x):\n    print('✓ 06.1 L2 norm')", "06.1", "None"),
    "returns a model": ("def l2_norm(x):\n    return torch.nn.Linear(1, 1)", "06.1", "Linear"),
    "says it is equal to all": (
        "class Yes(torch.Tensor):\n    def __eq__(self, other): return True\ndef l2_norm(x):\n    return Yes()",
        "06.1",
        "expected",
    ),
    "takes the one-liner": (
        "def l2_norm(x):\n    return torch.nn.functional.normalize(x, dim=-1)",
        "06.1",
        "normalize does the whole exercise",
    ),
    "takes the package's": (
        "from minillama.norm import l2_norm as theirs\ndef l2_norm(x):\n    return theirs(x)",
        "06.1",
        "minillama.norm.l2_norm does the whole exercise",
    ),
    "takes the reference": (
        "def l2_norm(x):\n    from minillama.course.chapters.c06 import L2\n    return L2.reference(x)",
        "06.1",
        "No module named",
    ),
    "deletes its name": ("del l2_norm\nif True: 'l2_norm'", "06.1", "not there any more"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_fails_and_is_named(trick, tmp_path):
    source, number, message = TRICKS[trick]
    path = written(tmp_path / "06_x.ipynb", _06_1=source)
    passed, said = results(path, seconds=8)[number]
    assert not passed
    assert re.search(message, said), said


def test_replacing_check_in_the_notebook_changes_nothing(tmp_path):
    patched = """
        import minillama.course, minillama.course.judge
        minillama.course.judge.judge = lambda *a, **k: minillama.course.judge.Verdict(True)
        check = lambda *a, **k: print("✓")
    """
    found = results(written(tmp_path / "06_x.ipynb", first=patched))
    assert not any(passed for passed, _ in found.values())


def test_a_notebook_that_edits_the_course_fails_as_a_whole(tmp_path):
    target = ROOT / "exercises" / "source" / "zz_left_by_a_notebook.txt"
    try:
        path = written(tmp_path / "06_x.ipynb", SOLUTION, first=f"open({str(target)!r}, 'w').write('x')")
        found = results(path)
        assert all(not passed and "zz_left_by_a_notebook" in message for passed, message in found.values())
    finally:
        target.unlink(missing_ok=True)


def test_cells_that_end_python_fail_every_exercise(tmp_path):
    path = written(tmp_path / "06_x.ipynb", SOLUTION, first="import os; os._exit(3)")
    assert all("exit code 3" in message for _, message in results(path).values())


def test_check_prints_a_tick_or_raises_one_line(work, capsys):
    assert check("06.1", lambda x: torch.nn.functional.normalize(x, dim=-1)) is None
    assert capsys.readouterr().out == "✓ 06.1 L2 norm\n"
    with pytest.raises(Mistake, match=r"^✗ 06\.1 L2 norm: the sum of the absolute .*case\(\"06\.1\", 0\)") as found:
        check("06.1", lambda x: x / x.abs().sum(-1, keepdim=True).clamp_min(1e-12))
    assert found.value._render_traceback_() == [str(found.value)]
    with pytest.raises(Mistake, match="expected the function l2_norm itself"):
        check("06.1", 3)
    assert case("06.1", 0)[0].shape == (2, 5, 7)
    assert progress.read()["06.1"]["passed"]


@pytest.mark.parametrize("number", ["6.1", "06.99", "99.1", "", "06", "../06.1"])
def test_an_unknown_exercise_is_a_clear_error(number, work):
    with pytest.raises(ValueError, match="there (is|are) no exercises?"):
        check(number, print)


def test_the_next_hint_comes_after_another_try(work, capsys):
    said = []
    for _ in range(3):
        hint("06.2")
        hint("06.2")
        said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("Hint")]
        with pytest.raises(Mistake):
            check("06.2", lambda x, weight, bias, eps: x)
    assert [line[5] for line in said] == ["1", "1", "2", "2", "3", "3"]


def test_start_leaves_what_is_there_alone_and_reset_keeps_what_was_written(work):
    path, new = notebooks.start("06")
    assert new and path.read_text() == LEARNER.read_text()
    written(path, path, _06_3="def rms_norm(): mine")
    mine = path.read_text()
    assert notebooks.start("06") == (path, False) and path.read_text() == mine
    kept = notebooks.reset("06.3")
    assert kept.read_text() == "def rms_norm(): mine\n"
    assert notebooks.read(path)["cells"] == notebooks.read(LEARNER)["cells"]
    assert notebooks.reset("06.3") != kept and kept.read_text() == "def rms_norm(): mine\n"


def test_changed_and_deleted_checks_are_put_back(work):
    path, _ = notebooks.start("06")
    notebook = notebooks.read(path)
    cells = notebook["cells"]
    cells[:] = [cell for cell in cells if cell["id"] not in ("06-1-check", "06-2-check", "06-2-stub")]
    next(cell for cell in cells if cell["id"] == "06-3-check")["source"] = "print('✓')"
    found = [cell["source"] for cell in notebooks.restored(copy.deepcopy(notebook), "06")["cells"]]
    theirs = [cell["source"] for cell in notebooks.read(LEARNER)["cells"] if cell["id"].endswith("-check")]
    assert sorted(source for source in found if source.startswith("check(")) == sorted(theirs)
    assert found.index('check("06.1", l2_norm)') < found.index('check("06.3", rms_norm)')


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def test_the_command_checks_a_copy_from_start_to_end(work, capsys):
    assert run("check", "06") == 2 and "minillama start 06" in capsys.readouterr().err
    assert run("start", "06") == 0
    assert run("check", "06") == 1
    out = capsys.readouterr().out
    assert out.count("✗") == 5 and out.count("not attempted yet") == 5
    (work / SOLUTION.name).write_text(SOLUTION.read_text())
    assert run("check", "06") == 0
    assert capsys.readouterr().out.splitlines()[0] == "✓ 06.1 L2 norm"
    assert run("report") == 0
    assert "✓ ✓ ✓ ✓ ✓" in capsys.readouterr().out


def test_settings_of_a_folder_above_do_not_count(work, tmp_path, capsys, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = ['--no-such-option']\n")
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "inside"))
    notebooks.start("06")
    written(work / SOLUTION.name, SOLUTION)
    assert run("check", "06") == 0, capsys.readouterr().out


def test_what_passes_only_out_of_order_is_said_so(work, capsys):
    notebooks.start("06")
    path = written(work / SOLUTION.name, SOLUTION)
    notebook = notebooks.read(path)
    stub = next(cell for cell in notebook["cells"] if cell["id"] == "06-1-stub")
    notebook["cells"].remove(stub)
    notebook["cells"].append(stub)
    notebooks.write(notebook, path)
    assert run("check", "06") == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert "fails when the notebook runs from top to bottom" in first and all(line[0] == "✓" for line in others)


def test_a_notebook_that_nbval_cannot_run_is_no_pass(work, capsys, monkeypatch):
    work.mkdir()
    (work / SOLUTION.name).write_text(SOLUTION.read_text())
    monkeypatch.setattr(learn.ElementTree, "parse", lambda path: open(path / "nothing"))
    assert run("check", "06") == 2
    assert "could not be run under nbval" in capsys.readouterr().err


def test_an_instructor_gets_a_row_for_each_exercise(tmp_path, capsys):
    for who, source in (("ada", SOLUTION), ("ben", LEARNER)):
        (tmp_path / who).mkdir()
        (tmp_path / who / "06_normalization.ipynb").write_text(source.read_text())
    (tmp_path / "cy").mkdir()
    (tmp_path / "cy" / "06_normalization.ipynb").write_text("{not a notebook")
    assert run("report", tmp_path, "--csv", "--seed", 5) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [sum(int(row["passed"]) for row in rows if row["who"] == who) for who in ("ada", "ben", "cy")] == [5, 0, 0]
    assert run("report", tmp_path / "nowhere") == 2


def test_a_solution_is_shown_after_it_was_passed_or_released(work, capsys, tmp_path, monkeypatch):
    assert run("solution", "06.1") == 2 and "not passed yet" in capsys.readouterr().err
    progress.note("06.1", passed=True)
    assert run("solution", "06.1") == 0 and "def l2_norm" in capsys.readouterr().out
    monkeypatch.setattr(notebooks, "released", lambda: ["06"])
    assert run("solution", "06.2") == 0


def test_unsolved_notebooks_fail_under_nbval_in_exactly_their_checks(work, tmp_path):
    checks = set()
    for path in sorted(LEARNER.parent.glob("*.ipynb")):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        code = [cell for cell in notebooks.read(path)["cells"] if cell["cell_type"] == "code"]
        checks |= {(path.name, i) for i, cell in enumerate(code) if cell["id"].endswith("-check")}
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--rootdir={tmp_path}", tmp_path], cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r"^FAILED (\S+)::Cell (\d+)", done.stdout, re.MULTILINE)
    assert {(name, int(number)) for name, number in found} == checks, done.stdout[-2000:]


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    leaves,
    lambda inside: st.lists(inside) | st.lists(inside).map(tuple) | st.dictionaries(st.text() | st.integers(), inside),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=values)
def test_data_comes_through_the_exchange_as_it_was(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("exchange") / "x"
    exchange.write(value, path)
    assert exchange.read(path) == value and type(exchange.read(path)) is type(value)


def test_tensors_come_through_the_exchange_in_their_dtype(tmp_path):
    given_ = [torch.randn(2, 0, 3), torch.tensor(True), torch.randn(3, 4).bfloat16().mT, torch.tensor([1, -2])]
    exchange.write({"all": given_}, tmp_path / "x")
    found = exchange.read(tmp_path / "x")["all"]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(given_, found, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_a_forged_answer_file_is_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("exchange") / "x"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="holds no answer"):
        exchange.read(path)


@pytest.mark.parametrize("value", [print, torch.nn.Linear(1, 1), object(), {1, 2}])
def test_only_data_is_handed_over(value, tmp_path):
    with pytest.raises(TypeError, match="expected data"):
        exchange.write([value], tmp_path / "x")
