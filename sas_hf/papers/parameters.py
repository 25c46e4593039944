"""Items that are counted: the configurations that a table prints, and how many parameters they have."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..configurations import named_config
from ..modeling.attention import SASAttention
from ..report.tables import Grid
from .comparison import Comparison, ItemResult, comparison_grid, result_at
from .items import Place


def parameters(
    place: Place, folder: Path, command: str, progress: Callable[[str], None], models: dict[str, dict[str, Any]]
) -> ItemResult:
    """
    The shapes and parameters of configurations, each beside the printed row of its model and size.

    Args:
        models: by name of the configuration, what the printed row must have.
    """
    rows, comparisons, begun = [], [], time.perf_counter()
    numbers: dict[str, dict[str, int]] = {}
    for name, wanted in models.items():
        progress(f"counting {name}")
        config = named_config(name)
        shape = shape_of(config)
        model = meta_model(config)
        layer, whole = attention_parameters(model), sum(parameter.numel() for parameter in model.parameters())
        row = place.match(wanted)
        for column, ours in shape.items():
            printed = row.values[place.table.columns.index(column)]
            if printed is not None:
                comparisons.append(Comparison(f"{name}, {column}", "", ours, printed, neutral=None))
        first = numbers.setdefault(cast(str, row.size), {"layer": layer, "whole": whole})
        more = 100 * (layer / first["layer"] - 1)
        shown = [str(value) for value in shape.values()]
        rows.append([name, row.model, *shown, f"{layer:,}", f"{whole:,}", f"{more:+.2f} %"])
        numbers[name] = shape | {"attention parameters of a layer": layer, "parameters": whole}
    header = ["configuration", "printed as", "width", "heads", "head", "group", "a layer", "model", "attention"]
    caption = (
        "Attention parameters of a layer, and beside those of MHA; head: features of a head; SAS: simulated ones."
    )
    grids = [Grid("Configurations", header, rows, caption, text_columns=2)]
    other = [comparison for comparison in comparisons if comparison.agreement == "differs"]
    grids += [comparison_grid("What is printed otherwise", other)] if other else []
    told = f"{len(comparisons) - len(other)} of {len(comparisons)} printed numbers are those of the configurations."
    return result_at(
        place,
        None,
        command,
        seconds=time.perf_counter() - begun,
        grids=grids,
        comparisons=comparisons,
        numbers=numbers,
        notes=[told, *([place.at.note] if place.at.note else [])],
    )


def shape_of(config: PreTrainedConfig) -> dict[str, int]:
    """As SAS's Table 2 prints a configuration; the group size is that of heads that share their keys and values."""
    simulated = config.num_simulated_heads is not None
    heads = config.num_simulated_heads if simulated else config.num_attention_heads
    head_size = config.simulated_head_dim if simulated else config.head_dim
    if config.attention_type == "mla":
        head_size = config.v_head_dim
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group = config.num_attention_heads // shared
    return {"hidden size": config.hidden_size, "heads": heads, "head size": head_size, "group size": group}


def attention_parameters(model: PreTrainedModel) -> int:
    """Of the first attention layer."""
    layer = next(module for module in model.modules() if isinstance(module, SASAttention))
    return sum(parameter.numel() for parameter in layer.parameters())


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Without a head, and without memory for its weights."""
    with torch.device("meta"):
        return AutoModel.from_config(config)
