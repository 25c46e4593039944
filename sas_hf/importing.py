"""What `import sas_hf` puts off, so that it is light, and where modules are found that have moved since."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_first_used(package: str, places: dict[str, str]) -> Callable[[str], object]:
    """
    The `__getattr__` of a package whose names are imported when they are first used.

    Args:
        places: the module in the package that each name is from.
    """

    def get(name: str):
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return get


class FormerPaths(MetaPathFinder, Loader):
    """Imports a module by a path that it had before: the same object, not a second one. Goes first in `sys.meta_path`.

    Args:
        moved: the full name of each module by its former one.
    """

    def __init__(self, moved: dict[str, str]):
        self.moved = moved

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.moved else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # a usual one, which stands in until the module itself is there

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(self.moved[name])


class AfterImport(MetaPathFinder):
    """Does something right after a module has been imported, by whomever. Goes first in `sys.meta_path`.

    Args:
        name: of the module, which is not imported yet.
        then: what to do; it meets the module as its importer will. What it raises, the import raises.
    """

    def __init__(self, name: str, then: Callable[[], object]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != self.name:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]  # whoever stands before was asked before
        found = (finder.find_spec(name, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = LoaderWithSequel(spec.loader, self.then)
        return spec


class LoaderWithSequel(Loader):
    """A loader that does something after its work; in all else it is `loader`, which the module names as its own."""

    def __init__(self, loader: Loader, sequel: Callable[[], object]):
        self.loader, self.sequel = loader, sequel

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.sequel()
