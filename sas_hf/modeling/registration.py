"""Makes an architecture known to Transformers: to its Auto classes, and in its tables of class names.

The Trainer, pipelines, model cards and lm-evaluation-harness ask those tables what a model is, by the name of its
class or its model type. The Trainer, for one, shifts the labels of a smoothed loss for classes named there alone.
Others ask the module `transformers` itself for the class that a checkpoint names: its server, its pipelines, TRL.
"""

import sys
from types import ModuleType

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from .sharing import came_with_its_checkpoint, config_class_of


def register(relative: str, classes: dict[type[_BaseAutoModelClass], type[PreTrainedModel]]) -> None:
    """
    Args:
        relative: the model type of Transformers that these classes are the like of, such as "llama". In every table
            where it has a class, its counterpart of `classes` gets its place: `SASGPTForX` for `LlamaForX`.
        classes: the model class for each Auto class, the base model first: Transformers' generic heads look it up.
    """
    config_class = config_class_of(next(iter(classes.values())))
    if came_with_its_checkpoint(config_class):
        # Transformers itself registers such classes, each for its checkpoint; what they save shall hold their code.
        for auto_class, model_class in classes.items():
            model_class.register_for_auto_class(auto_class.__name__)
    else:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)
        for module in _modules_of_transformers():
            vars(module).update({model_class.__name__: model_class for model_class in classes.values()})

    prefix = config_class.__name__.removesuffix("Config")
    of_relative = modeling_auto.CONFIG_MAPPING_NAMES[relative].removesuffix("Config")
    counterparts = {made.__name__.replace(prefix, of_relative): made.__name__ for made in classes.values()}
    for name, table in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and table.get(relative) in counterparts:
            table[config_class.model_type] = counterparts[table[relative]]


def _modules_of_transformers() -> list[ModuleType]:
    """The module `transformers`, and those of its name that were: importing the first model class puts another in its
    place, and whoever wrote `import transformers` before holds the one that was."""
    named = [getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())]
    held = [module for module in named if isinstance(module, ModuleType) and module.__name__ == "transformers"]
    return [sys.modules["transformers"], *held]
