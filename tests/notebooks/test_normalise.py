"""The stored form of a notebook, and that every committed notebook has it."""

import configparser
import copy
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tests.notebooks import normalise as module
from tests.notebooks.normalise import ROOT, committed_notebooks, execute, is_exercise, main, normalise


def a_notebook(*outputs: nbformat.NotebookNode, source: str = "1 + 1") -> nbformat.NotebookNode:
    return v4.new_notebook(cells=[v4.new_code_cell(source, execution_count=7, outputs=list(outputs))])


def stored_cell(notebook: nbformat.NotebookNode, **options: bool) -> nbformat.NotebookNode:
    return nbformat.reads(normalise(notebook, **options), as_version=4).cells[-1]


@pytest.mark.parametrize("path", committed_notebooks(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_notebook_is_stored_as_make_notebooks_stores_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == normalise(nbformat.reads(text, as_version=4), results=not is_exercise(path)), (
        f"{path.relative_to(ROOT)} was saved by hand: type make notebooks NOTEBOOKS={path.relative_to(ROOT)}"
    )


def test_ids_kernel_versions_and_times_do_not_reach_the_file() -> None:
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), v4.new_code_cell("2", metadata={"tags": ["a"]})])
    other = copy.deepcopy(notebook)
    other.metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "language_info": {"version": "3.99"}}
    other.cells[0].id, other.cells[1].id = "xxxx", "yyyy"
    other.cells[1].metadata["execution"] = {"iopub.execute_input": "2030-01-01T00:00:00Z"}
    assert normalise(notebook) == normalise(other)
    assert stored_cell(other).metadata == {"tags": ["a"]}


def test_normalise_leaves_its_argument_alone_and_is_idempotent() -> None:
    notebook = a_notebook(v4.new_output("execute_result", {"text/plain": "<object at 0x7f0011223344>"}))
    before = copy.deepcopy(notebook)
    text = normalise(notebook)
    assert notebook == before
    assert normalise(nbformat.reads(text, as_version=4)) == text
    assert "<object at 0x000000000000>" in text


def test_cells_count_in_order_and_empty_cells_do_not() -> None:
    result = v4.new_output("execute_result", {"text/plain": "2"}, execution_count=9)
    cells = [v4.new_code_cell("1"), v4.new_code_cell(" "), v4.new_code_cell("2", outputs=[result])]
    stored = nbformat.reads(normalise(v4.new_notebook(cells=cells)), as_version=4).cells
    assert [cell.execution_count for cell in stored] == [1, None, 2]
    assert stored[2].outputs[0].execution_count == 2


def test_widgets_are_dropped_and_pictures_stay() -> None:
    slider = v4.new_output("display_data", {module.WIDGET: {"model_id": "f00"}, "text/plain": "IntSlider(value=0)"})
    picture = v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"})
    outputs = stored_cell(a_notebook(slider, picture)).outputs
    assert [set(output.data) for output in outputs] == [{"image/png", "text/plain"}]


def test_error_keeps_its_last_line_only() -> None:
    error = v4.new_output("error", ename="ValueError", evalue="too long", traceback=[f"File {ROOT}/x.py", "line 3"])
    assert stored_cell(a_notebook(error)).outputs[0].traceback == ["ValueError: too long"]


def test_exercise_is_stored_without_results() -> None:
    cell = stored_cell(a_notebook(v4.new_output("stream", text="secret")), results=False)
    assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("place", [ROOT / "data", Path.home() / "x.txt", Path(sys.prefix) / "lib"])
def test_path_of_this_machine_is_refused(place: Path) -> None:
    for output in (
        v4.new_output("stream", name="stderr", text=f"{place}:3: UserWarning: old\n"),
        v4.new_output("display_data", {"text/html": f"<b>{place}</b>"}),
    ):
        with pytest.raises(ValueError, match=f"cell 1 shows '{re.escape(str(place))}.*a path of this machine"):
            normalise(a_notebook(output))


def test_words_that_only_contain_a_path_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/learner"))
    normalise(a_notebook(v4.new_output("stream", text="a/learner and /learners")))


def test_cell_that_ends_with_a_semicolon_is_refused() -> None:
    with pytest.raises(ValueError, match="cell 1 ends with ';'.*plt.show"):
        normalise(a_notebook(source="plt.plot([1, 2]);\n"))


def test_execute_runs_this_python_in_the_given_folder(tmp_path: Path) -> None:
    source = "import sys, os; print(sys.prefix); print(os.getcwd())"
    notebook = a_notebook(source=source)
    execute(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text.splitlines() == [sys.prefix, str(tmp_path.resolve())]


def test_second_run_changes_nothing_and_a_failing_notebook_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    nbformat.write(a_notebook(source="import sys\nprint(1); print(2, file=sys.stderr)\nobject()"), good)
    nbformat.write(a_notebook(source="1 / 0"), bad)
    before = bad.read_bytes()

    assert main([str(good), str(bad)]) == 1
    first = good.read_bytes()
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert bad.read_bytes() == before
    assert main([str(good)]) == 0
    assert good.read_bytes() == first
    assert "unchanged" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.ipynb", "good.ipynb"]


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("<Tap at 0x7f8a11223344>", "<Tap at 0x7f0000000001>", True),
        ("took 0.53 s", "took 12.1 s", True),
        ("3 ms a token", "41 ms a token", True),
        ("18.2 tokens/s", "9.75 tokens/s", True),
        ("1.5k tokens/s", "999 tokens/s", True),
        ("loss 2.31", "loss 2.32", False),
        ("3 stories", "4 stories", False),
        ("12 steps", "13 steps", False),
        ("0x10", "0x11", False),
    ],
)
def test_only_addresses_durations_and_speeds_are_taken_for_equal(one: str, other: str, alike: bool) -> None:
    patterns = configparser.RawConfigParser()
    patterns.read(ROOT / "tests" / "notebooks" / "sanitize.cfg", encoding="utf-8")

    def clean(text: str) -> str:
        for name in patterns.sections():
            text = re.sub(patterns[name]["regex"], patterns[name]["replace"], text)
        return text

    assert (clean(one) == clean(other)) is alike
