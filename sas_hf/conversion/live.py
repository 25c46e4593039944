"""A live source must be what its class makes of its configuration: conversions carry weights and fields, no more."""

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .family import ConversionError


STATES = ("training", "gradient_checkpointing")  # change no number that a model gives in evaluation


def check_live_source(source: PreTrainedModel) -> None:
    """Raise a [`ConversionError`] if `source` computes something else than its weights in its class would: for other
    modules (adapters, quantised layers, layers added or taken away), hooks, replaced methods, changed numbers such as
    a norm's epsilon, and weights that are elsewhere."""
    name = type(source).__name__
    with torch.device("meta"):
        expected = type(source)(source.config, **pooler_arguments(type(source), lacks_pooler(source)))
    found, wanted = dict(source.named_modules()), dict(expected.named_modules())
    for path in [*wanted, *(path for path in found if path not in wanted)]:
        if type(found.get(path)) is not type(wanted.get(path)):
            raise ConversionError(
                f"{path} is {_described(found.get(path))}, but {_described(wanted.get(path))} in a {name} of this "
                "configuration. Only what configuration and weights say is converted: merge adapters "
                "(`merge_and_unload`), undo quantisation, and set fields such as `num_hidden_layers` to what is there."
            )
    for path, module in found.items():
        place = f"{path or name} ({type(module).__name__})"
        if _replaces_forward(module) or any(_foreign_hooks(module)):
            raise ConversionError(f"{place} has a hook or another `forward` than its class; remove it before.")
        for field, value in _numbers(module):
            own = vars(wanted[path]).get(field, value)
            if own != value:
                raise ConversionError(f"{place} has {field} = {value}, but {own} in a {name} of this configuration.")
    shapes = {path: weight.shape for path, weight in expected.state_dict().items()}
    for path, weight in source.state_dict().items():
        if path not in shapes or weight.shape != shapes[path]:
            asked = list(shapes[path]) if path in shapes else "no such weight"
            raise ConversionError(f"{path} is {list(weight.shape)}, but the configuration asks for {asked}.")
        if weight.is_meta or not weight.is_floating_point():
            state = "not in memory" if weight.is_meta else f"stored as {weight.dtype}"
            raise ConversionError(f"{path} is {state}; load the source whole, with plain floating-point weights.")
    absent = [path for path in shapes if path not in source.state_dict()]
    if absent:
        raise ConversionError(f"The source lacks {absent[0]}, which a {name} of this configuration has.")
    refuse_own_head(source)


def lacks_pooler(source: PreTrainedModel) -> bool:
    """Whether it is of a class that may have a pooler, and has none."""
    return bool(pooler_arguments(type(source), True)) and getattr(source, "pooler", ...) is None


def pooler_arguments(model_class: type[PreTrainedModel], without: bool) -> dict:
    """What makes a model of this class without a pooler, if it is to be and its class may have one."""
    may_have = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if without and may_have else {}


def refuse_own_head(model: PreTrainedModel) -> None:
    """Raise a [`ConversionError`] if the configuration ties matrices (the head to the embeddings; those of encoder and
    decoder), but the numbers differ.

    Transformers 5 loads such a checkpoint untied, with a warning; other versions and readers tie it.
    """
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    weights = model.state_dict()
    head = model.get_output_embeddings()
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if weights[name] is weights[other] or torch.equal(weights[name], weights[other]):
            continue
        if head is None or head.weight.data_ptr() != weights[name].data_ptr():
            raise ConversionError(
                f"`tie_word_embeddings` is true, by which {name} and {other} are one weight, but their numbers "
                "differ; set it to false in the source's config.json to keep both, or take the former out."
            )
        raise ConversionError(
            "`tie_word_embeddings` is true, but the head has weights of its own that differ from the embeddings'; set "
            "it to false in the source's config.json to keep them, or take the head's weight out."
        )


def _described(module: nn.Module | None) -> str:
    return "absent" if module is None else f"a {type(module).__module__}.{type(module).__qualname__}"


def _replaces_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) or "__call__" in vars(module)


def _foreign_hooks(module: nn.Module) -> Iterator[object]:
    """Hooks that are not Transformers' own, which only look on."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        yield from (hook for hook in hooks.values() if not _module_of(hook).startswith("transformers."))


def _module_of(hook: object) -> str:
    return str(getattr(hook, "__module__", ""))


def _numbers(module: nn.Module) -> Iterator[tuple[str, float | bool]]:
    """A module's own settings that a forward pass may read."""
    for field, value in vars(module).items():
        if type(value) in (float, bool) and not field.startswith("_") and field not in STATES:
            yield field, value
