"""The command `sas-hf`: thin, every command is one public function."""

import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from ..report.files import one_at_a_time, unwritable_cache, writing


class Commands(TyperGroup):
    """Tells what is wrong with a command's arguments in one line, with the value; exit status 2."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.meta["given"] = list(args)
        for before, value in itertools.pairwise(["", *args]):
            option, equals, text = value.partition("=") if value.startswith("--") else (value, "", value)
            if value == "" or (equals and not text):
                name = option or (before if before.startswith("--") else "An argument")
                show_error(f"{name} is ''; give it a value, or leave it out. Was a variable of the shell not set?")
                sys.exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context):
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            names = getattr(getattr(error, "param", None), "opts", [])
            given = itertools.chain.from_iterable(
                value.split("=", 1) if value.startswith("--") else [value] for value in ctx.meta["given"]
            )
            values = [f" It is {value!r}." for name, value in itertools.pairwise(given) if name in names]
            message, command = error.format_message().rstrip("."), f"{ctx.invoked_subcommand} " if names else ""
            show_error(f"{message}.{''.join(values[:1])} See sas-hf {command}--help.")
            sys.exit(2)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False)
console = Console()
USAGE_ERROR = typer.BadParameter.__base__  # of typer's own click
# How long a process waits with an error that the first one may have too.
SECONDS_FOR_THE_FIRST = 10


def show_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        console.print(f"sas_hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show and exit.")
    ] = False,
) -> None:
    """Simulated Attention Score for Hugging Face Transformers."""
    # So that what a command writes aside is removed when it is told to stop, as it is on Ctrl-C.
    for name in ("SIGTERM", "SIGHUP"):
        told = getattr(signal, name, None)
        if told is not None and signal.getsignal(told) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(told, lambda number, frame: sys.exit(128 + number))


TextToVerify = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Text or table to verify on; by default the Python reference."),
]
ImagesToVerify = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder of images to verify on; by default random ones."),
]


def show_progress(message: str) -> None:
    console.print(f"[cyan]{message}[/cyan] ...")


def show_error(message: str) -> None:
    """On one line; messages may hold brackets, which are not meant as markup."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")


def explain_errors(command: Callable) -> Callable:
    """Show what the user can mend as one line instead of a traceback, and exit with status 1; 130 after Ctrl-C.

    Of several processes that fail alike, the launcher ends the others once the first of a machine has spoken.
    """

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            with writing():
                return command(*args, **kwargs)
        except Exception as error:
            cache = unwritable_cache(error)
            known = (ValueError, OSError, ImportError, FloatingPointError, StrictDataclassError)
            if cache is None and not isinstance(error, known):
                raise
            if not first:
                time.sleep(SECONDS_FOR_THE_FIRST)  # then it did not fail, and this is the reason
            show_error(f"{type(error).__name__}: {cache or error}")
            sys.exit(1)
        except KeyboardInterrupt as error:
            if first:
                message = escape(str(error)) or "Nothing half-written is left; what was whole stays."
                Console(stderr=True, soft_wrap=True).print(f"[yellow]interrupted:[/yellow] {message}")
            sys.exit(130)

    return wrapped


@app.command()
@explain_errors
def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint folder or Hub id: Llama, GPT-2, GPT-NeoX, Mistral, Qwen2, Qwen3, ...")
    ],
    output: Annotated[Path, typer.Argument(help="New checkpoint folder; must not exist.")],
    num_simulated_heads: Annotated[
        int | None, typer.Option(help="Simulated heads: a multiple of the heads; 0: none. By default 3 x heads.")
    ] = None,
    simulated_head_dim: Annotated[
        int | None, typer.Option(help="Simulated features per head; 0: none. By default 1.5 x head size.")
    ] = None,
    kernel_size: Annotated[int, typer.Option(help="Kernel of the head convolutions, odd.")] = 1,
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
            num_simulated_heads,
            simulated_head_dim,
            kernel_size,
            perturbation,
            seed,
            lossy,
            num_key_value_heads,
            kv_lora_rank,
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


@app.command()
@explain_errors
def restore(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="New checkpoint folder; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    text: TextToVerify = None,
    images: ImagesToVerify = None,
) -> None:
    """Bring a conversion whose simulation is untrained back to its source's architecture, and verify it."""
    from ..conversion import restore_checkpoint

    report = restore_checkpoint(
        checkpoint,
        output,
        revision=revision,
        text=text_in(text),
        images=images,
        progress=show_progress,
    )
    console.print(conversion_table(report))
    console.print(f"[green]Saved[/green] {output}, a {report['architecture']}")


def conversion_table(report: dict) -> Table:
    """The report of `convert_checkpoint` or `restore_checkpoint` as a table for the terminal."""
    fidelity, simulation = report["fidelity"], report.get("simulation")
    lossy, unrounded, own = report.get("lossy"), report["fidelity_unrounded"], report["in_saved_dtype"]
    unknown, absent, recomputed = (
        report.get(name) for name in ("fields_unknown", "files_left_out", "weights_recomputed")
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
        "max |difference| of the outputs": f"{fidelity['max_abs_difference']:.2e}",
        "allowed (1e-5 of max |output|)": None if lossy else f"{fidelity['tolerance']:.2e}",
        "max |output|": f"{fidelity['max_abs_output']:.4g}",
        "source's own difference, eager against SDPA": f"{fidelity['source_eager_sdpa_difference']:.2e}",
        "mean KL divergence": "-" if fidelity["mean_kl"] is None else f"{fidelity['mean_kl']:.2e}",
        "arg-max agreement": f"{fidelity['argmax_agreement']:.2%}",
        "perplexity before, after": (
            f"{fidelity['perplexity_source']:.4g}, {fidelity['perplexity']:.4g}" if fidelity["perplexity"] else None
        ),
        "against the source as it is: max |difference|": (
            f"{unrounded['max_abs_difference']:.2e}, arg-max agreement {unrounded['argmax_agreement']:.2%}"
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
        "parameters": f"{report['parameters']:,} ({growth:+.2%})",
        "computed anew, not read": ", ".join(recomputed[:5]) + ", ..." * (len(recomputed) > 5) if recomputed else None,
        "fields that Transformers ignores": ", ".join(unknown) if unknown else None,
        "files left out": ", ".join(absent) if absent else None,
        "seconds": f"{report['seconds']}",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(value))
    return table


@app.command()
@explain_errors
def export(
    model: Annotated[str, typer.Argument(help="SAS checkpoint folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="New folder; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
) -> None:
    """Write a folder for the Hub, with code: it loads without sas_hf too, with trust_remote_code=True."""
    from ..hub.export import export_model

    export_model(model, output, revision=revision, progress=show_progress)
    console.print(f"[green]Saved[/green] {output}; share it with: hf upload OWNER/NAME {output}")


@app.command()
@explain_errors
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a recipe of the package. Without it: their list.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE ...]", help="Fields to change, such as training.max_steps=100."),
    ] = None,
) -> None:
    """Train or fine-tune a model as a recipe says; the same command again goes on where a killed run stopped."""
    from ..training.recipe import load_recipe, recipe_names

    if recipe is None:
        console.print(recipe_table({name: load_recipe(name) for name in recipe_names()}))
        return
    chosen = load_recipe(recipe, fields or ())
    from ..training.run import train as run_training

    metrics = run_training(chosen)
    if os.environ.get("RANK", "0") != "0":  # one of several processes, and not the first
        return
    console.print(metrics_table(metrics))
    console.print(f"[green]Saved[/green] {chosen.training['output_dir']}")


@app.command()
@explain_errors
def study(
    name: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a study of the package. Without it: their list.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE ...]", help="Fields of every recipe to change, such as data.train=a.txt."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study. By default as it says.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2. By default as the study says.")] = None,
) -> None:
    """Train a grid of variants, data and seeds, and compare them; the same command again goes on where it stopped."""
    from ..training.study import load_study, run_study, study_names

    if name is None:
        table = Table(title="Studies: sas-hf study NAME [FIELD=VALUE ...]")
        for column in ("name", "variants", "seeds", "figure"):
            table.add_column(column)
        for known in study_names():
            chosen = load_study(known)
            table.add_row(known, ", ".join(chosen.variants), ", ".join(map(str, chosen.seeds)), chosen.figure)
        console.print(table)
        return
    chosen = load_study(name, output, None if seeds is None else parse_numbers(seeds, "--seeds", "0,1,2"))
    report = run_study(chosen, fields or (), progress=show_progress)
    for grid in report.grids():
        console.print(grid.rich())
    console.print(f"[green]Saved[/green] {chosen.output}")


def recipe_table(recipes: dict) -> Table:
    """The package's recipes, by name."""
    table = Table(title="Recipes: sas-hf train NAME [FIELD=VALUE ...]")
    table.add_column("name", no_wrap=True)
    for column in ("task", "model", "data"):
        table.add_column(column, overflow="fold")
    for name, recipe in recipes.items():
        model = recipe.model.config or recipe.model.checkpoint
        table.add_row(name, recipe.task.replace("_", " "), model, str(recipe.data.train))
    return table


def metrics_table(metrics: dict[str, float]) -> Table:
    table = Table(title="The saved model's numbers")
    table.add_column("number")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.5g}")
    return table


@app.command(name="eval")
@explain_errors
@one_at_a_time("report", in_place=True)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint folders, Hub ids or peft adapters of causal language models, or image classifiers.",
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Suites (sas_table1, sas_table8) or tasks of lm-evaluation-harness, with commas.")
    ] = "",
    images: Annotated[
        str | None, typer.Option(help="Labelled images for image classifiers: a folder or a Hub id.")
    ] = None,
    image_split: Annotated[str | None, typer.Option(help="For --images. By default test, or validation.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of <dataset>/<config>/<split>.parquet to read instead of the Hub.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Of a suite, for instance ARC-E,PIQA. By default all.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="Text file or table (may be repeated) or Hub dataset to predict.")
    ] = None,
    context_lengths: Annotated[
        str | None, typer.Option(help="For --perplexity. By default 512,1024,...,16384 as the model allows.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="For --perplexity: slide windows by so many tokens. By default disjoint.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="For --perplexity: only so many from the start.")] = None,
    text_config: Annotated[str | None, typer.Option(help="For --perplexity: configuration of the dataset.")] = None,
    text_split: Annotated[
        str | None, typer.Option(help="For --perplexity: split of the dataset. By default test.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="For --perplexity: column of the dataset or table. By default text.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Samples per task, or their share if below 1.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. By default the task's.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto: from the memory at hand; 64 images.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... By default the accelerator, if any.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... By default the checkpoint's.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id. By default the model's own.")] = None,
    adapter: Annotated[str | None, typer.Option(help="peft adapter to put on MODEL.")] = None,
    add_bos_token: Annotated[
        bool | None, typer.Option(help="Begin texts with the tokenizer's bos. By default as the tokenizer does.")
    ] = None,
    truncation: Annotated[bool, typer.Option(help="Cut requests longer than the context, as hf does.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for answers as they come; a killed run goes on from there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result of one model.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the report: Markdown, JSON, plots.")] = None,
    log_samples: Annotated[bool, typer.Option(help="Keep each request's log-likelihood in the result.")] = False,
) -> None:
    """Score models on the papers' suites, harness tasks and texts, or on images; shows and writes a report."""
    from .. import eval as evaluation
    from ..eval.arguments import check_folder, refuse_unused
    from ..report.figures import require_matplotlib

    if (images is not None) == bool(tasks or perplexity):
        raise ValueError(
            "Give either `--tasks` or `--perplexity`, for language models, or `--images`, for classifiers of images."
        )
    of_texts = {"--context-lengths": context_lengths, "--stride": stride, "--max-tokens": max_tokens}
    of_texts |= {"--text-config": text_config, "--text-split": text_split, "--text-column": text_column}
    if images is not None:
        of_language = {"--data": data, "--columns": columns, "--num-fewshot": num_fewshot, "--tokenizer": tokenizer}
        of_language |= {"--adapter": adapter, "--truncation": truncation, "--cache": cache}
        of_language |= {"--add-bos-token": add_bos_token, "--no-add-bos-token": add_bos_token is False}
        of_language |= {"--log-samples": log_samples}
        refuse_unused(of_texts | of_language, "images are scored without it")
    else:
        refuse_unused({"--image-split": image_split}, "there are no `--images`")
        if not perplexity:
            refuse_unused(of_texts, "there is no text (`--perplexity`)")
    if report is not None:
        require_matplotlib()
        check_folder("report", report)
    if images is not None:
        if output is not None and len(models) > 1:
            raise ValueError("`--output` is for one model; several go into a `--report`.")
        options = {"split": image_split, "limit": limit, "batch_size": parse_batch_size(batch_size)}
        options |= {"device": device, "dtype": dtype, "output": output}
        found = [evaluation.evaluate_images(model, images, **options) for model in models]
        show_report(evaluation.Report(found), report)
        return
    text = None
    if perplexity:
        text = evaluation.PerplexityText(
            perplexity[0] if len(perplexity) == 1 else tuple(perplexity),
            context_lengths=None
            if context_lengths is None
            else tuple(parse_numbers(context_lengths, "--context-lengths", "512,1024")),
            stride=stride,
            max_tokens=max_tokens,
            config=text_config,
            split=text_split,
            column=text_column,
        )
    results = evaluation.evaluate(
        models[0] if len(models) == 1 else models,
        split_names(tasks),
        tokenizer=tokenizer,
        adapter=adapter,
        data=data,
        columns=None if columns is None else split_names(columns),
        perplexity=text,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=parse_batch_size(batch_size),
        device=device,
        dtype=dtype,
        add_bos_token=add_bos_token,
        truncation=truncation,
        cache=cache,
        output=output,
        log_samples=log_samples,
    )
    if not results:  # one of several processes, and not the first
        return
    show_report(evaluation.Report(results if isinstance(results, list) else [results]), report)
    if output is not None:
        console.print(f"[green]Saved[/green] {output}")


@app.command(name="eval-report")
@explain_errors
@one_at_a_time("report", in_place=True)
def eval_report(
    results: Annotated[list[Path], typer.Argument(help="JSON files that `sas-hf eval --output` wrote.")],
    report: Annotated[Path, typer.Option(help="Folder for the report: Markdown, JSON, plots.")],
) -> None:
    """Put saved results into one report, for instance of the checkpoints of a training."""
    from .. import eval as evaluation

    show_report(evaluation.Report([evaluation.EvaluationResult.load(path) for path in results]), report)


@app.command(name="eval-data")
@explain_errors
def eval_data(
    folder: Annotated[Path, typer.Argument(help="For `sas-hf eval --data`; is made where it is missing.")],
    tasks: Annotated[str, typer.Option(help="Suites or tasks whose datasets to fetch, separated by commas.")],
) -> None:
    """Fetch the datasets of suites or tasks from the Hub, for evaluations without a network."""
    from .. import eval as evaluation

    paths = evaluation.prepare_data(folder, split_names(tasks), progress=lambda message: console.print(message))
    console.print(f"[green]{len(paths)} files[/green] below {folder}")


def parse_batch_size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def parse_numbers(text: str, option: str, example: str) -> list[int]:
    try:
        return [int(name) for name in split_names(text)]
    except ValueError as error:
        raise ValueError(f"`{option}` is {text!r}; it must be numbers with commas, such as {example}.") from error


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def show_report(report, folder: Path | None) -> None:
    console.print(report.rich())
    for path in report.save(folder) if folder is not None else []:
        console.print(f"[green]Saved[/green] {path}")


@app.command()
@explain_errors
def info(
    model: Annotated[str | None, typer.Argument(help="Name of a configuration, checkpoint folder or Hub id.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens. By default the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the cache.")] = "bfloat16",
) -> None:
    """Show what a model costs: parameters, cache and operations; without MODEL, all named configurations."""
    from ..configurations import NAMED_CONFIGS
    from ..hub.dtypes import parse_dtype
    from ..hub.info import describe, find_config

    if context is not None and model is None:
        raise ValueError(f"`--context` is {context}, but no MODEL is named; the table is of each model's own context.")
    cache_dtype, names = parse_dtype(dtype), [model] if model else list(NAMED_CONFIGS)
    rows = {
        name: (config := find_config(name), describe(config, context if model else None, cache_dtype))
        for name in names
    }
    if model is None:
        console.print(info_table(rows, dtype))
    else:
        console.print(info_details(model, *rows[model], dtype))


def info_table(rows: dict, dtype: str) -> Table:
    """Models in rows: [`find_config`] and [`describe`] by name."""
    table = Table(title="Named configurations")
    for column in ("name", "layers", "heads", "parameters", "attention", "simulation", f"cache/token ({dtype})"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=column == "name")
    for name, (config, costs) in rows.items():
        table.add_row(
            name,
            str(config.num_hidden_layers),
            head_text(config),
            f"{costs.parameters / 1e6:,.2f} M",
            f"{costs.attention_parameters / 1e6:,.2f} M",
            f"{costs.simulation_overhead:.3%}" if costs.simulation_parameters else "-",
            f"{costs.cache_bytes:,} B",
        )
    return table


def info_details(name: str, config, costs, dtype: str) -> Table:
    """One model, with every figure."""
    table = Table(title=name)
    table.add_column("figure")
    table.add_column("value", justify="right")
    simulation = f"{costs.simulation_parameters:,} ({costs.simulation_overhead:+.3%})"
    for figure, value in {
        "attention": config.attention_type,
        "layers": str(config.num_hidden_layers),
        "heads": head_text(config),
        "hidden size": f"{config.hidden_size:,}",
        "parameters": f"{costs.parameters:,}",
        "of these attention": f"{costs.attention_parameters:,}",
        "of these simulation": simulation if costs.simulation_parameters else "-",
        "cached numbers per token and layer": f"{costs.cache_numbers:,}",
        f"cache per token, {dtype}": f"{costs.cache_bytes:,} B",
        f"forward FLOPs per token, context {costs.context:,}": f"{costs.forward_flops:,}",
        f"equation 24, one layer, context {costs.context:,}": f"{costs.equation_24:,}" if costs.equation_24 else "-",
    }.items():
        table.add_row(figure, value)
    return table


def head_text(config) -> str:
    """ "22 (2 kv)" or "12 -> 36", with the head size."""
    text = str(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        text += f" ({config.num_key_value_heads} kv)"
    if config.num_simulated_heads:
        text += f" -> {config.num_simulated_heads}"
    text += f" of {config.query_head_dim}"
    return text + (f" -> {config.simulated_head_dim}" if config.simulated_head_dim else "")
