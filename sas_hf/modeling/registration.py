"""Makes an architecture known to Transformers: to its Auto classes, and in its tables of class names.

The Trainer, pipelines, model cards and lm-evaluation-harness ask those tables what a model is, by the name of its
class or its model type. The Trainer, for one, shifts the labels of a smoothed loss for classes named there alone.
"""

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .sharing import came_with_its_checkpoint


def register(relative: str, classes: dict[type, type[PreTrainedModel]]) -> None:
    """
    Args:
        relative: the model type of Transformers that these classes are the like of, such as "llama". In every table
            where it has a class, its counterpart of `classes` gets its place: `SASGPTForX` for `LlamaForX`.
        classes: the model class for each Auto class, the base model first: Transformers' generic heads look it up.
    """
    config_class = next(iter(classes.values())).config_class
    if came_with_its_checkpoint(config_class):
        # Transformers itself registers such classes, each for its checkpoint; what they save shall hold their code.
        for auto_class, model_class in classes.items():
            model_class.register_for_auto_class(auto_class.__name__)
    else:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)

    prefix = config_class.__name__.removesuffix("Config")
    of_relative = modeling_auto.CONFIG_MAPPING_NAMES[relative].removesuffix("Config")
    counterparts = {made.__name__.replace(prefix, of_relative): made.__name__ for made in classes.values()}
    for name, table in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and table.get(relative) in counterparts:
            table[config_class.model_type] = counterparts[table[relative]]
