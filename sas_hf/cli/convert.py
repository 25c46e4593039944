"""`sas-hf convert`: [`~sas_hf.conversion.convert_checkpoint`]."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .shared import check_places, console, explain_errors, show_progress


TextToVerify = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Text or table to verify on; by default the Python reference."),
]
ImagesToVerify = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder of images to verify on; by default random ones."),
]


@explain_errors
def convert(
    source: Annotated[
        str,
        typer.Argument(
            callback=check_places,
            help="Checkpoint folder or Hub id: Llama, GPT-2, Qwen3, BERT, RoBERTa, BART, Marian, ViT, ...",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="New checkpoint folder; must not exist.")],
    num_simulated_heads: Annotated[
        int | None, typer.Option(help="Simulated heads: a multiple of the heads; 0: none. By default 3 x heads.")
    ] = None,
    simulated_head_dim: Annotated[
        int | None, typer.Option(help="Simulated features per head; 0: none. By default 1.5 x head size.")
    ] = None,
    kernel_size: Annotated[int, typer.Option(help="Kernel of the head convolutions, odd.")] = 1,
    value_features: Annotated[bool, typer.Option("--value-features", help="Simulate values' features, too.")] = False,
    head_aggregation: Annotated[
        str, typer.Option(help="Of simulated heads: mean (PEAA), or concat: an output projection for each group.")
    ] = "mean",
    simulation_act: Annotated[
        str, typer.Option(help="Within the simulation: relu (the paper's), identity (sas-hf fold takes it), gelu, ...")
    ] = "relu",
    perturbation: Annotated[float, typer.Option(help="How far the copies of a head start apart.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random part of the start.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Saved dtype. By default the source's.")] = None,
    text: TextToVerify = None,
    images: ImagesToVerify = None,
    lossy: Annotated[
        str | None,
        typer.Option(help="Another attention near the source's, not equal: optimised, efficient, gqa or mla."),
    ] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="Of --lossy gqa: how many remain.")] = None,
    kv_lora_rank: Annotated[int | None, typer.Option(help="Of --lossy mla. By default hidden size / 3.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text to fit --lossy on; by default 9/10 of the other text."),
    ] = None,
) -> None:
    """Make a SAS checkpoint that computes what SOURCE computes, verify it and write a fidelity report."""
    from ..conversion import ConversionOptions, convert_checkpoint

    report = convert_checkpoint(
        source,
        output,
        ConversionOptions(
            num_simulated_heads=num_simulated_heads,
            simulated_head_dim=simulated_head_dim,
            simulation_kernel_size=kernel_size,
            perturbation=perturbation,
            seed=seed,
            lossy=lossy,
            num_key_value_heads=num_key_value_heads,
            kv_lora_rank=kv_lora_rank,
            simulate_value_features=value_features,
            head_aggregation=head_aggregation,
            simulation_act=simulation_act,
        ),
        revision=revision,
        dtype=dtype,
        text=text_in(text),
        images=images,
        calibration=text_in(calibration),
        progress=show_progress,
    )
    console.print(conversion_table(report))
    console.print(f"[green]Saved[/green] {output}")


def text_in(file: Path | None) -> str | None:
    from ..data.text_files import read_whole

    return None if file is None else read_whole(file)


def conversion_table(report: dict) -> Table:
    """A report of [`convert_checkpoint`], [`restore_checkpoint`] or [`fold_checkpoint`] as a table on the terminal."""
    fidelity, simulation, folded = report["fidelity"], report.get("simulation"), report.get("folded")
    lossy, unrounded, own = report.get("lossy"), report["fidelity_unrounded"], report["in_saved_dtype"]
    unknown, absent, recomputed, left_out = (
        report.get(name) for name in ("fields_unknown", "files_left_out", "weights_recomputed", "weights_left_out")
    )
    growth = report["parameters"] / report["parameters_source"] - 1
    amount = f"{fidelity['images']} images" if fidelity["images"] else f"{fidelity['tokens']} tokens"
    table = Table(title=f"{report['source']}: verified on {amount} ({report['verified_on']})")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {
        "source": report["source"] + (f" ({report['commit'][:12]})" if report["commit"] else ""),
        "lossy conversion to, fitted on": f"{lossy}, {report['fitted_on']}" if lossy else None,
        "saved in": report["dtype_saved"],
        "compared with": None if lossy else report["exact_to"],
        "compared": ", ".join(fidelity["compared"]),
        "max |difference| of the outputs": f"{fidelity['max_abs_difference']:.2e}",
        "allowed (1e-5 of max |output|)": None if lossy else f"{fidelity['tolerance']:.2e}",
        "max |output|": f"{fidelity['max_abs_output']:.4g}",
        "source's own difference, eager against SDPA": f"{fidelity['source_eager_sdpa_difference']:.2e}",
        "mean KL divergence": "-" if fidelity["mean_kl"] is None else f"{fidelity['mean_kl']:.2e}",
        "arg-max agreement": _share(fidelity["argmax_agreement"]),
        "perplexity before, after": (
            f"{fidelity['perplexity_source']:.4g}, {fidelity['perplexity']:.4g}" if fidelity["perplexity"] else None
        ),
        "against the source as it is: max |difference|": (
            f"{unrounded['max_abs_difference']:.2e}, arg-max agreement {_share(unrounded['argmax_agreement'])}"
            if unrounded
            else None
        ),
        f"computing in {report['dtype_saved']}: max |difference|": (
            f"{own['max_abs_difference']:.2e}" if own and own["max_abs_difference"] is not None else None
        ),
        "simulated heads, features per head": (
            f"{simulation['num_simulated_heads'] or '-'}, {simulation['simulated_head_dim'] or '-'}"
            if simulation
            else None
        ),
        "heads, features per head": f"{folded['num_attention_heads']}, {folded['head_dim']}" if folded else None,
        "numbers cached per token and layer before, after": (
            f"{report['cached_numbers_source']:,}, {report['cached_numbers']:,}" if folded else None
        ),
        "parameters": f"{report['parameters']:,} ({growth:+.2%})",
        "computed anew, not read": ", ".join(recomputed[:5]) + ", ..." * (len(recomputed) > 5) if recomputed else None,
        "weights left out": ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5) if left_out else None,
        "fields that Transformers ignores": ", ".join(unknown) if unknown else None,
        "files left out": ", ".join(absent) if absent else None,
        "seconds": f"{report['seconds']}",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(value))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
