"""`make site`: the course as a web site in build/site, which needs neither a kernel nor a network.

The files are copied first, in the folders where they lie, so that the links between them hold. The pages show what
is stored in the notebooks; what runs is only what the live views need.
"""

import io
import re
import shutil
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from sphinx.application import Sphinx

from chapters.site.live import add_views
from chapters.site.reference import page
from tests.test_architecture import ORDER, module_of

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site"
HERE = "*Here nothing runs: in the notebook, this cell draws controls, and what they change is shown at once.*"
MENU = """

```{toctree}
:hidden:
:caption: Chapters
:glob:
chapters/*
```

```{toctree}
:hidden:
:caption: Exercises
:glob:
exercises/*
```

```{toctree}
:hidden:
:caption: The package
%s
```

```{toctree}
:hidden:
:caption: Data and measurements
data/README
data/MODEL_CARD
tests/benchmarks/RESULTS
tests/benchmarks/TASKS
tests/benchmarks/LOG
```
"""

CONFIG = {
    "project": "minillama",
    "extensions": ["myst_nb", "sphinx.ext.mathjax"],
    "root_doc": "index",
    "nb_execution_mode": "off",
    "nb_render_markdown_format": "myst",
    "myst_enable_extensions": ["dollarmath", "amsmath"],
    "myst_heading_anchors": 3,
    "nitpicky": True,
    "nitpick_ignore_regex": [("py:.*", ".*")],  # the types in signatures: most are not ours
    "add_module_names": False,
    "html_theme": "sphinx_book_theme",
    "html_title": "minillama",
    "html_copy_source": False,
    "html_show_search_summary": False,  # a page opened from a file may not read other files
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_css_files": ["site.css"],
    "html_js_files": ["site.js", "live.js"],
    "html_context": {"default_mode": "auto"},  # light or dark, as the reader's system is
    "html_theme_options": {
        "use_download_button": False,
        "use_fullscreen_button": False,
        "show_toc_level": 2,
        "navigation_with_keys": False,
        "footer_content_items": [],
    },
    # One file, without fonts. Its menu would make each formula a stop of the Tab key.
    "mathjax_path": "tex-svg.js",
    "mathjax3_config": {"options": {"enableMenu": False}},
}


def prepare(notebook: Path) -> str:
    """A notebook for the site: its live views, descriptions of pictures, a sentence where controls would be dead."""
    content = nbformat.read(notebook, as_version=4)
    add_views(content, notebook)
    for cell in content.cells:
        if cell.cell_type != "code":
            # Sphinx sees to links that are Markdown, not to those that are HTML.
            cell.source = re.sub(r'(href="[^":]+)\.ipynb', r"\1.html", cell.source)
            continue
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
        if "@interact(" in cell.source:
            cell.outputs.append(nbformat.v4.new_output("display_data", {"text/markdown": HERE}))
    return nbformat.writes(content)


def collect(source: Path) -> None:
    """Copy and make all that the site is made from."""
    for pattern in ("chapters/*.ipynb", "exercises/*.ipynb", "chapters/*.svg", "data/*.md", "tests/benchmarks/*.md"):
        for path in sorted(ROOT.glob(pattern)):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ipynb":
                target.write_text(prepare(path), encoding="utf-8")
            else:
                shutil.copy(path, target)
    shutil.copy(ROOT / "LICENSE", source)
    package, reference = ROOT / "minillama", source / "reference"
    reference.mkdir()
    there = {module_of(path, package) for path in package.rglob("*.py")} - {"__init__", "__main__"}
    modules = ["__init__", *(name for name in ORDER if name in there)]
    for name in modules:
        (reference / f"{name}.md").write_text(page(package, name), encoding="utf-8")
    menu = MENU % "\n".join(f"reference/{name}" for name in modules)
    (source / "index.md").write_text((ROOT / "README.md").read_text(encoding="utf-8") + menu, encoding="utf-8")
    static = source / "static"
    static.mkdir()
    for path in Path(__file__).parent.glob("*.[cj]s*"):
        shutil.copy(path, static)
    (mathjax,) = [path for path in files("sphinx-mathjax-offline") or [] if path.name == "tex-svg.js"]
    shutil.copy(str(mathjax.locate()), static)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "source", Path(folder) / "site"
        source.mkdir()
        try:
            collect(source)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"The site was not built, for a notebook with a live view failed: {error}", file=sys.stderr)
            return 1
        config = {**CONFIG, "html_static_path": [str(source / "static")]}
        doctrees = Path(folder) / "doctrees"
        app = Sphinx(source, None, built, doctrees, "html", config, status=io.StringIO(), warningiserror=True)
        app.build()
        if app.statuscode:
            return app.statuscode
        for path in built.rglob("*.html"):
            # The older theme, that of Python 3.10, asks early for fonts, which a page opened from a file may not read.
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub('<link rel="preload" as="font".*?>', "", text), encoding="utf-8")
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.copytree(built, SITE, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv"))
    print(f"Open {SITE.relative_to(ROOT) / 'index.html'} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
