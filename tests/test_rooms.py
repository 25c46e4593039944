"""The house: no circle of imports, dependencies point one way, and the examples need nothing that is not public."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = "sas_hf"
# What lies at the top of the package, and what of it each may import; "" is the package itself, with its public names.
SMALL = {"importing", "version"}
LOW = SMALL | {"modeling", "configurations", "report", "data", "hub"}
MAY_KNOW = {
    "importing": set(),
    "companions": {"importing"},
    "version": set(),
    "modeling": set(),
    "configurations": {"modeling"},
    "report": SMALL,
    "data": SMALL | {"modeling", "report"},
    "hub": LOW,
    "conversion": LOW,
    "serve": LOW | {"companions"},
    "looking": LOW,
    "eval": LOW,
    "training": LOW | {"conversion", "eval"},
    "papers": LOW | {"conversion", "eval", "training"},
    "capacity": LOW | {"training"},
    "cli": LOW | {"conversion", "serve", "looking", "eval", "training", "papers", "capacity"},
    "": SMALL | {"companions", "modeling", "configurations", "looking"},
    "__main__": {"cli"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported(module: str, path: Path) -> set[str]:
    """The modules of the package that a file imports by name, be it in a function or for type checkers alone."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return {name for name in found if name.split(".")[0] == PACKAGE}


IMPORTS = {module: imported(module, path) for module, path in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_import_is_found():
    """The reader above sees what there is: relative imports of all depths, in functions, for type checkers."""
    assert IMPORTS["sas_hf.report.printed"] == {"sas_hf.report.tables"}
    assert {"sas_hf.modeling", "sas_hf.hub.card", "sas_hf.report.files"} <= IMPORTS["sas_hf.hub.export"]
    assert "sas_hf.eval.plots" in IMPORTS["sas_hf.eval.report"]
    assert "sas_hf.configurations" in IMPORTS["sas_hf"]
    assert all(module in FILES for modules in IMPORTS.values() for module in modules)


def test_no_circle_of_imports():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"modules that import each other: {' <- '.join(error.args[1])}")


def test_dependencies_point_one_way():
    assert {room(module) for module in FILES} <= set(MAY_KNOW), "a new room: say what it may know"
    against = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(other) != room(module) and room(other) not in MAY_KNOW[room(module)]
    ]
    assert not against


@pytest.mark.parametrize("name", ["sas_hf", "sas_hf.hub", "sas_hf.data", "sas_hf.report"])
def test_public_names_are_there(name):
    package = importlib.import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing_of_this_name'"):
        _ = package.nothing_of_this_name


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names(example):
    """Those that a package lists, and modules that a document names."""
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    named = "".join(document.read_text() for document in documents)
    for node in ast.walk(ast.parse(example.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE:
            public = getattr(importlib.import_module(node.module), "__all__", ())
            for alias in node.names:
                assert alias.name in public or f"`{node.module}`" in named, f"{node.module}.{alias.name}"
