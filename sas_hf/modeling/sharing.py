"""Code that travels with a checkpoint, for readers who load it with `trust_remote_code=True`.

A saved checkpoint holds no code. One that is exported or pushed to the Hub holds the files of this folder that its
classes need, and an `auto_map` in its configuration that names the classes.
"""

import json
import os
from pathlib import Path
from typing import cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME, TRANSFORMERS_DYNAMIC_MODULE_NAME

from .annotations import ModelMixin


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type]:
    """The classes that the Auto classes make of such a configuration, by the Auto class's name."""
    found = {"AutoConfig": config_class}
    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None and config_class in mapping:
            found[name] = mapping[config_class]
    return found


def config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """The class of a model's configuration, which only Transformers' base class of all models lacks."""
    return cast(type[PreTrainedConfig], model_class.config_class)


def auto_class_name(model_class: type[PreTrainedModel]) -> str:
    """The name of the Auto class that makes this class; its own where none does.

    Some make one of several classes, as the checkpoint names it.
    """
    for name, made in auto_classes(config_class_of(model_class)).items():
        if made is model_class or (isinstance(made, tuple) and model_class in made):
            return name
    return model_class.__name__


def add_code(folder: str | os.PathLike, instance, named: dict[str, type], file: str = CONFIG_NAME) -> None:
    """Copy the file that defines the class of `instance`, and all it imports from beside it, to a saved checkpoint.

    Args:
        folder: of the checkpoint.
        instance: a model or processor.
        named: what the checkpoint's `auto_map` shall name, by the Auto class's name.
        file: the checkpoint's JSON file that gets the `auto_map`.
    """
    custom_object_save(instance, folder)
    path = Path(folder) / file
    auto_map = {name: f"{made.__module__.rpartition('.')[2]}.{made.__name__}" for name, made in named.items()}
    content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def came_with_its_checkpoint(some_class: type) -> bool:
    """Whether Transformers loaded the class from a checkpoint's own code, not from the installed package."""
    return some_class.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME + ".")


def forget_travelling_code(config: PreTrainedConfig, keywords: dict) -> None:
    """Drop the `auto_map` of a checkpoint with code from its configuration's `keywords`.

    The installed classes do without that code and do not save it: an `auto_map` in what they save would name files
    that are not there.
    """
    if not came_with_its_checkpoint(type(config)):
        keywords.pop("auto_map", None)


class CodeTravelsMixin(ModelMixin):
    """`push_to_hub` of a model takes its code along, so that it loads where its package is not installed."""

    _takes_code_along = False

    def push_to_hub(self, *args, **kwargs) -> str:  # type: ignore[override]  # a decorated function, to mypy
        """As in Transformers, and with the code, if an Auto class knows this class."""
        self._takes_code_along = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            del self._takes_code_along

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in Transformers: no code is saved, unless by `push_to_hub`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # A class that came with its checkpoint writes its code at every save: Transformers sees to it.
        if self._takes_code_along and not came_with_its_checkpoint(type(self)):
            named = auto_classes(type(self.config))
            if type(self) in named.values():
                add_code(save_directory, self, named)
