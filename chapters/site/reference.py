"""The package's reference: a page of Markdown for each module, from its docstrings, in the order of its source.

The docstrings are Markdown already, and the source is read, not run: so a page shows signatures as they were written.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


class _Plain(ast.NodeTransformer):
    """`Annotated[int, …]`, as the command line's parameters have it, without what is not for a reader."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
            return self.visit(node.slice.elts[0])
        return self.generic_visit(node)


def page(package: Path, name: str) -> str:
    """The page of one module, by its name in the package's order; a folder is one page with a section for each file."""
    if name == "__init__":
        return _head(package.name, _parse(package / "__init__.py"))
    if (package / f"{name}.py").is_file():
        return "\n".join(_module(package / f"{name}.py", f"{package.name}.{name}", "#"))
    parts = [_head(f"{package.name}.{name}", _parse(package / name / "__init__.py"))]
    for path in sorted((package / name).glob("[!_]*.py")):
        parts += _module(path, f"{package.name}.{name}.{path.stem}", "##")
    return "\n".join(parts)


def _parse(path: Path) -> ast.Module:
    return _Plain().visit(ast.parse(path.read_text(encoding="utf-8")))


def _head(title: str, tree: ast.Module, level: str = "#") -> str:
    return f"{level} {title}\n\n{_text(tree)}\n"


def _module(path: Path, dotted: str, level: str) -> Iterator[str]:
    tree = _parse(path)
    yield _head(dotted, tree, level)
    yield f"```{{py:currentmodule}} {dotted}\n```\n"
    for node in _public(tree):
        if isinstance(node, ast.ClassDef):
            members = [part for part in _public(node) if isinstance(part, FUNCTION)]
            yield _entry("class", node.name + _bases(node), node, [_method(part) for part in members])
        else:
            yield _entry("function", f"{node.name}{_signature(node)}", node)


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | FUNCTION]:
    """What has a docstring and no underscore in front."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | FUNCTION) and not node.name.startswith("_") and ast.get_docstring(node):
            yield node


def _method(node: FUNCTION) -> str:
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return _entry("property", node.name, node)
    drop = "staticmethod" not in decorators  # self, or cls
    return _entry("method", f"{node.name}{_signature(node, drop)}", node)


def _bases(node: ast.ClassDef) -> str:
    """What makes an object: the parameters of `__init__`, or a dataclass's fields."""
    for part in node.body:
        if isinstance(part, FUNCTION) and part.name == "__init__":
            return _signature(part, drop_first=True)
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return ""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return "(" + ", ".join(ast.unparse(field) for field in fields) + ")"


def _signature(node: FUNCTION, drop_first: bool = False) -> str:
    arguments = node.args
    if drop_first:
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"({ast.unparse(arguments)}){returns}"


def _entry(kind: str, signature: str, node: ast.ClassDef | FUNCTION, inner: list[str] | None = None) -> str:
    body = "\n".join([_text(node), *(inner or [])])
    fence = "`" * (6 if kind in ("class", "function") else 5)
    return f"{fence}{{py:{kind}}} {signature}\n\n{body}\n{fence}\n"


def _text(node: ast.Module | ast.ClassDef | FUNCTION) -> str:
    """A docstring as Markdown, with its examples as code: those of Python, and those of the command line."""
    text = ast.get_docstring(node) or ""
    text = re.sub(r"^\[bold\](.*)\[/bold\]\n((?:  .*\n?)+)", r"**\1**\n\n```text\n\2\n```\n", text, flags=re.MULTILINE)
    return re.sub(r"((?:^ *(?:>>>|\.\.\.).*\n?)+)", r"```pycon\n\1\n```\n", text, flags=re.MULTILINE)
