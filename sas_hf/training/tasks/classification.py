"""What the tasks of classifiers share, of texts and of images: their configuration for the data's classes."""

import warnings
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from ...hub.checkpoints import AutoClass, classes_made_by
from ..models import check_overrides, config_loader
from ..recipe_fields import ModelRecipe, TrainingRecipe


def chance(classes: int) -> float:
    """The accuracy of who guesses."""
    return 1 / classes


def check_classifier_recipe(recipe: TrainingRecipe) -> None:
    """Raise a ValueError for fields that no classifier is trained with."""
    training, conversion = recipe.training, recipe.model.conversion
    if conversion is not None:
        raise ValueError(f"`model.conversion` is {conversion!r}, for language models; run `sas-hf convert` before.")
    if not training.get("eval_do_concat_batches", True):
        raise ValueError("`training.eval_do_concat_batches` is false, but accuracy is of all batches; leave it out.")
    for name in ("num_labels", "id2label", "label2id"):
        if name in recipe.model.overrides:
            raise ValueError(
                f"`model.overrides.{name}` is {recipe.model.overrides[name]!r}, but the data say which labels there "
                "are; leave it out (`data.class_names` names them)."
            )


def classifier_config(
    recipe: ModelRecipe, labels: list[str], auto_class: AutoClass, what: str, problem_type: str | None = None
) -> tuple[PreTrainedConfig, bool]:
    """
    The configuration of a model for these labels, and whether the checkpoint has no classifier of as many, so that
    it begins anew; warned of, as are other classes of the same number. Of a checkpoint with the same classes in
    another order theirs is kept, as are its names for classes that are numbered from 0.

    Args:
        labels: of the data, in their order; none in a regression.
        auto_class: that loads the model.
        what: is classified, such as "images".
        problem_type: of the configuration, where it must be said.

    Raises:
        ValueError: for a model that has no classifier, or an override that is no field of it.
    """
    load, mapping = config_loader(recipe), classes_made_by(auto_class)
    config = load()
    if type(config) not in mapping:
        name, kind = recipe.config or recipe.checkpoint, what.removesuffix("s")
        raise ValueError(f"{name} is a {config.model_type} that is no {kind} classifier; the task needs one.")
    check_overrides(recipe.overrides, config)
    saved = [label for _, label in sorted((config.id2label or {}).items())]
    if recipe.checkpoint is not None and len(saved) == len(labels):
        numbered = labels == [str(number) for number in range(len(labels))]
        if sorted(saved) == sorted(labels) or (numbered and not _nameless(saved)):
            labels = saved
    count = len(labels) or 1  # of a regression
    fields: dict[str, Any] = {"num_labels": count}
    if labels:
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    if problem_type is not None:
        fields["problem_type"] = problem_type
    found = load(**fields | recipe.overrides)
    if recipe.checkpoint is None:
        return found, False
    class_name = mapping[type(config)].__name__
    architecture = (config.architectures or [class_name])[0]
    known, was = config.num_labels, config.problem_type
    other_kind = None not in (was, problem_type) and was != problem_type
    new_head = known != count or architecture != class_name or other_kind
    if new_head:
        kinds = (f" ({was})", f" ({problem_type})") if other_kind else ("", "")
        warnings.warn(
            f"The classifier begins anew: {recipe.checkpoint} is a {architecture} of {known} classes{kinds[0]}, the "
            f"{what} have {count}{kinds[1]}.",
            stacklevel=2,
        )
    elif saved != labels and not _nameless(saved):
        warnings.warn(
            f"The classifier of {recipe.checkpoint} was trained on the classes {', '.join(saved[:5])}, ...; it goes "
            f"on with {', '.join(labels[:5])}, ... in their order.",
            stacklevel=2,
        )
    return found, new_head


def _nameless(names: list[str]) -> bool:
    return names == [f"LABEL_{number}" for number in range(len(names))]


def check_head_trains(model: PreTrainedModel | PeftModel, recipe: ModelRecipe) -> None:
    """Raise a ValueError where a classifier that begins anew is not trained."""
    inside = f".{model.base_model_prefix}."
    if not any(weight.requires_grad for name, weight in model.named_parameters() if inside not in f".{name}"):
        remedy = "add it to `model.lora.modules_to_save`" if recipe.lora else "let `model.trainable` match it"
        raise ValueError(
            f"The classifier begins anew, as {recipe.checkpoint} has none of this many classes, but it is not "
            f"trained: {remedy}."
        )
