"""`sas-hf info`: [`~sas_hf.hub.info.describe`]."""

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .shared import check_places, console, explain_errors


CONVERTIBLE = "sas-hf convert takes it"


@explain_errors
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            callback=check_places,
            help="Name of a configuration, or checkpoint folder or Hub id: SAS, or what can be converted.",
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens. By default the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the cache.")] = "bfloat16",
) -> None:
    """Show what a model costs: parameters, cache and operations; of a Llama, say, before and after a conversion.

    Of an adapter, or of what cannot be converted, what it is and why. Without MODEL, all named configurations.
    """
    from ..configurations import NAMED_CONFIGS, named_config
    from ..conversion import ConversionError
    from ..hub.dtypes import parse_dtype
    from ..hub.info import describe, describe_adapter

    if context is not None and model is None:
        raise ValueError(f"`--context` is {context}, but no MODEL is named; the table is of each model's own context.")
    cache_dtype = parse_dtype(dtype)
    # Only what is counted in full has a context.
    if model is not None and context is None and (adapter := describe_adapter(model)) is not None:
        refused = f"no, adapters alone: `sas-hf merge {model} OUT` makes a whole model first"
        console.print(short_table(model, adapter | {CONVERTIBLE: refused}))
        return
    try:
        configs = {name: named_config(name) for name in NAMED_CONFIGS} if model is None else configs_of(model)
    except ConversionError as error:
        if model is None or context is not None or (found := foreign(model)) is None:
            raise
        console.print(short_table(model, found | {CONVERTIBLE: f"no: {error}"}))
        return
    rows = {name: (config, describe(config, context, cache_dtype)) for name, config in configs.items()}
    console.print(info_table(rows, dtype) if model is None else info_details(model, rows, dtype))


def configs_of(model: str) -> dict:
    """The configuration of a SAS model, or those before and after the conversion of another, by what they are."""
    from ..conversion.checkpoint import before_and_after
    from ..hub.info import find_config, is_described

    return {"value": find_config(model)} if is_described(model) else before_and_after(model)


def foreign(model: str) -> dict[str, str] | None:
    """What a model is that cannot be converted; `None` if Transformers cannot build it."""
    from ..hub.info import describe_foreign

    try:
        return describe_foreign(model)
    except Exception:  # of any class of Transformers; then the refusal says more
        return None


def short_table(name: str, figures: dict[str, str]) -> Table:
    table = Table(title=escape(name), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for figure, value in figures.items():
        table.add_row(figure, escape(value))
    return table


def info_table(rows: dict, dtype: str) -> Table:
    """Models in rows: configuration and [`describe`] by name."""
    # As narrow as can be, and never cut off: a figure has to be read on a terminal of 80.
    table = Table(title="Named configurations", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    cache = f"cached bytes per token ({dtype})"
    for column in ("name", "layers", "heads", "parameters (M)", "attention (M)", "simulation", cache):
        table.add_column(
            column, justify="left" if column == "name" else "right", no_wrap=column == "name", overflow="fold"
        )
    for name, (config, costs) in rows.items():
        table.add_row(
            name,
            layer_text(config),
            head_text(config),
            f"{costs.parameters / 1e6:,.2f}",
            f"{costs.attention_parameters / 1e6:,.2f}",
            f"{costs.simulation_overhead:.3%}" if costs.simulation_parameters else "-",
            f"{costs.cache_bytes:,}",
        )
    return table


def info_details(name: str, columns: dict, dtype: str) -> Table:
    """One model with every figure, or one before and after: configuration and [`describe`] by title."""
    table = Table(title=escape(name))
    table.add_column("figure")
    figures: dict[str, dict[str, str]] = {}
    for title, (config, costs) in columns.items():
        table.add_column(title, justify="right")
        for figure, value in detailed(config, costs, dtype).items():
            figures.setdefault(figure, {})[title] = value
    for figure, values in figures.items():
        table.add_row(figure, *(values.get(title, "-") for title in columns))
    return table


def detailed(config, costs, dtype: str) -> dict[str, str]:
    simulation = f"{costs.simulation_parameters:,} ({costs.simulation_overhead:+.3%})"
    rows = {
        "layers": layer_text(config),
        **attention_rows(config),
        "hidden size": f"{config.hidden_size:,}",
        "parameters": f"{costs.parameters:,}",
        "of these attention": f"{costs.attention_parameters:,}",
        "of these simulation": simulation if costs.simulation_parameters else "-",
        "cached numbers per token and layer": f"{costs.cache_numbers:,}",
        f"cache per token, {dtype}": f"{costs.cache_bytes:,} B",
        f"forward FLOPs per token, context {costs.context:,}": f"{costs.forward_flops:,}",
    }
    if costs.equation_24:
        rows[f"operations by equation 24 of arXiv:2403.01643, one layer, context {costs.context:,}"] = (
            f"{costs.equation_24:,}"
        )
    return rows


def attention_rows(config) -> dict[str, str]:
    """Kind and heads; of an encoder–decoder whose places have their own, of each."""
    if not config.is_encoder_decoder or not (
        config.encoder_attention or config.decoder_attention or config.cross_attention
    ):
        return {"attention": config.attention_type, "heads": head_text(config)}
    rows = {}
    for name, title in {"encoder": "encoder", "decoder": "decoder", "cross": "cross-attention"}.items():
        place = config.place(name)
        rows[title] = f"{place.attention_type}, {head_text(place)}"
    return rows


def layer_text(config) -> str:
    """ "12", or of encoder and decoder "6 + 6"."""
    layers = str(config.num_hidden_layers)
    return f"{layers} + {config.decoder_layers}" if config.is_encoder_decoder else layers


def head_text(config) -> str:
    """ "22 (2 kv)" or "12 -> 36", with the head size, and what is not the paper's."""
    text = str(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        text += f" ({config.num_key_value_heads} kv)"
    if config.num_simulated_heads:
        text += f" -> {config.num_simulated_heads}"
    text += f" of {config.query_head_dim}"
    text += f" -> {config.simulated_head_dim}" if config.simulated_head_dim else ""
    text += " (values', too)" if config.simulate_value_features else ""
    text += ", W^O for each group" if config.head_aggregation == "concat" else ""
    return text + (f", {config.simulation_act}" if config.simulates and config.simulation_act != "relu" else "")
