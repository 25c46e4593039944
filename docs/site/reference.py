"""The public names of the package, as its files say, and the pages of the reference; imports nothing of it."""

import ast
import functools
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
# What is not in an `__all__`, but where public classes have most of their fields.
BESIDE = {
    "sas_hf.modeling": {
        "SASAttentionConfig": "sas_hf.modeling.configuration_attention",
        "SASTextConfig": "sas_hf.modeling.configuration_text",
    }
}


class Name(NamedTuple):
    """A public name: where it is imported from, where it is defined, and what its docstring says."""

    module: str
    name: str
    home: str
    doc: str | None


def path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def modules() -> list[str]:
    found = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sas_hf").rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in found if path.stem != "__main__")


@functools.cache
def declared(module: str) -> list[str]:
    """What its `__all__` holds, with what is added to it."""
    found = []
    for node in ast.walk(tree_of(module)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign) and any(getattr(at, "id", "") == "__all__" for at in targets):
            found += ast.literal_eval(node.value)
    return found


def find(module: str, name: str) -> tuple[str, str | None]:
    """Where a name is defined, and its docstring there: of a variable the string behind it."""
    body = tree_of(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, ast.get_docstring(node)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(getattr(at, "id", "") == name for at in targets):
                text = getattr(getattr(after, "value", None), "value", None) if isinstance(after, ast.Expr) else None
                return module, text if isinstance(text, str) else None
    package = module if path_of(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            if base.startswith("sas_hf"):
                for alias in node.names:
                    if alias.name == "*" and name in declared(base):
                        return find(base, name)
                    if (alias.asname or alias.name) == name:
                        return find(base, alias.name)
    raise LookupError(f"{module} has {name!r} in `__all__`, but does not say where it comes from")


@functools.cache
def public_names() -> list[Name]:
    """All, package by package; one that several offer stands once for each."""
    return [Name(module, name, *find(module, name)) for module in modules() for name in sorted(declared(module))]


def pages() -> dict[str, str]:
    """The pages of the reference, by name: one a module, and each name in full on the first page that offers it."""
    shown, found = {}, {}
    for module in sorted({name.module for name in public_names()} | set(BESIDE), key=lambda module: module.split(".")):
        page = "sas_hf.modeling" if module.startswith("sas_hf.modeling") else module
        parts = found.setdefault(page, [f"# {page}", ast.get_docstring(tree_of(page)) or ""])
        for name in (name for name in public_names() if name.module == module):
            if (name.home, name.name) in shown:
                where = shown[name.home, name.name]
                parts.append(f"`{name.name}`: [`{where}`][{where}]")
            else:
                shown[name.home, name.name] = f"{module}.{name.name}"
                parts.append(f"::: {module}.{name.name}")
        parts += [f"::: {home}.{name}" for name, home in BESIDE.get(module, {}).items()]
    return {name: "\n\n".join(parts) + "\n" for name, parts in found.items()}
