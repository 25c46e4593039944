"""`sas-hf eval`: [`~sas_hf.eval.evaluate`], and `evaluate_images`, `evaluate_texts`, `evaluate_masked` and
`evaluate_translation` beside it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..report.files import one_at_a_time
from .shared import PaperSizes, check_places, console, explain_errors, parse_numbers, show_report, split_names


@explain_errors
@one_at_a_time("report", in_place=True)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            callback=check_places,
            help="Checkpoint folders, Hub ids or peft adapters of causal language models or translators, or "
            "classifiers of images or texts, or masked language models.",
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Suites (sas_table1, sas_table8) or tasks of lm-evaluation-harness, with commas.")
    ] = "",
    images: Annotated[
        str | None, typer.Option(help="Labelled images for image classifiers: a folder or a Hub id.")
    ] = None,
    image_split: Annotated[str | None, typer.Option(help="For --images. By default test, or validation.")] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(help="Labelled texts for classifiers: a table (may be repeated) or a Hub dataset."),
    ] = None,
    second_text_column: Annotated[str | None, typer.Option(help="For --texts that are pairs.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="For --texts; several with commas, of 0 and 1 each. By default label.")
    ] = None,
    masked_text: Annotated[
        list[str] | None,
        typer.Option(help="Text file or table (may be repeated) or Hub dataset for masked language models."),
    ] = None,
    mlm_probability: Annotated[
        float | None, typer.Option(help="For --masked-text: share of tokens that are hidden. By default 0.15.")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="Texts and their translations: a table (may be repeated) or a Hub dataset."),
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="For --pairs. Also the language inside of a column `translation`.")
    ] = None,
    target_column: Annotated[str | None, typer.Option(help="For --pairs, likewise.")] = None,
    source_language: Annotated[
        str | None, typer.Option(help="For --pairs, as a multilingual tokenizer writes it: en_XX.")
    ] = None,
    target_language: Annotated[str | None, typer.Option(help="For --pairs, likewise.")] = None,
    pairs_config: Annotated[str | None, typer.Option(help="For --pairs: configuration of the dataset.")] = None,
    pairs_split: Annotated[str | None, typer.Option(help="For --pairs: of the dataset. By default test.")] = None,
    beams: Annotated[
        int | None, typer.Option(help="For --pairs; 1 is greedy. By default as the model's generation configuration.")
    ] = None,
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
    max_tokens: Annotated[
        int | None, typer.Option(help="For --perplexity and --masked-text: only so many from the start.")
    ] = None,
    text_config: Annotated[
        str | None, typer.Option(help="For --perplexity and the other texts: configuration of the dataset.")
    ] = None,
    text_split: Annotated[
        str | None, typer.Option(help="For --perplexity and the other texts: split of the dataset. By default test.")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="For --perplexity and the other texts: column of dataset or table. By default text."),
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Samples per task, or their share if below 1.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. By default the task's.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto: from the memory at hand; 64 images.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... By default the accelerator, if any.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ... By default the checkpoint's.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(callback=check_places, help="Folder or Hub id. By default the model's own.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(callback=check_places, help="peft adapter to put on MODEL.")] = None,
    add_bos_token: Annotated[
        bool | None, typer.Option(help="Begin texts with the tokenizer's bos. By default as the tokenizer does.")
    ] = None,
    truncation: Annotated[bool, typer.Option(help="Cut requests longer than the context, as hf does.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for answers as they come; a killed run goes on from there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result of one model.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the report: Markdown, JSON, plots.")] = None,
    paper_sizes: PaperSizes = None,
    log_samples: Annotated[bool, typer.Option(help="Keep each request's log-likelihood in the result.")] = False,
) -> None:
    """Score models on the papers' suites, harness tasks and texts, on labelled images or texts, masked tokens or
    translations; shows and writes a report."""
    from .. import eval as evaluation
    from ..eval.arguments import check_folder, refuse_unused
    from ..eval.report import check_paper_sizes
    from ..report.figures import require_matplotlib

    sources = {"--tasks": tasks, "--perplexity": perplexity, "--images": images, "--texts": texts}
    sources |= {"--masked-text": masked_text, "--pairs": pairs}
    given = {name for name, value in sources.items() if value}
    if not given or (len(given) > 1 and given != {"--tasks", "--perplexity"}):
        raise ValueError(
            "Give either `--tasks` or `--perplexity`, for language models, or one of `--images` and `--texts`, for "
            "classifiers, `--masked-text`, for masked language models, and `--pairs`, for translators."
        )
    language, any_text = {"--tasks", "--perplexity"}, {"--perplexity", "--texts", "--masked-text"}
    heeded = {  # by which sources
        "--image-split": (image_split, {"--images"}),
        "--source-column": (source_column, {"--pairs"}),
        "--target-column": (target_column, {"--pairs"}),
        "--beams": (beams, {"--pairs"}),
        "--source-language": (source_language, {"--pairs"}),
        "--target-language": (target_language, {"--pairs"}),
        "--pairs-config": (pairs_config, {"--pairs"}),
        "--pairs-split": (pairs_split, {"--pairs"}),
        "--second-text-column": (second_text_column, {"--texts"}),
        "--label-column": (label_column, {"--texts"}),
        "--mlm-probability": (mlm_probability, {"--masked-text"}),
        "--context-lengths": (context_lengths, {"--perplexity"}),
        "--stride": (stride, {"--perplexity"}),
        "--max-tokens": (max_tokens, {"--perplexity", "--masked-text"}),
        "--text-config": (text_config, any_text),
        "--text-split": (text_split, any_text),
        "--text-column": (text_column, any_text),
        "--data": (data, language),
        "--columns": (columns, language),
        "--num-fewshot": (num_fewshot, language),
        "--tokenizer": (tokenizer, sources.keys() - {"--images"}),
        "--adapter": (adapter, language),
        "--truncation": (truncation, language),
        "--cache": (cache, language),
        "--add-bos-token": (add_bos_token, language),
        "--no-add-bos-token": (add_bos_token is False, language),
        "--log-samples": (log_samples, language),
        "--paper-sizes": (paper_sizes, {"--tasks"}),
    }
    for name, (value, by) in heeded.items():
        if not by & given:
            refuse_unused({name: value}, _reason(given, by))
    if report is not None:
        require_matplotlib()
        check_folder("report", report)
    if not given & language:
        if output is not None and len(models) > 1:
            raise ValueError("`--output` is for one model; several go into a `--report`.")
        options: dict[str, Any] = {"limit": limit, "batch_size": parse_batch_size(batch_size)}
        options |= {"device": device, "dtype": dtype, "output": output}
    if texts:
        labels = split_names(label_column or "label")
        options |= {"label_column": labels if len(labels) > 1 else labels[0], "tokenizer": tokenizer}
        options |= {"text_column": text_column or "text", "second_text_column": second_text_column}
        options |= {"config": text_config, "split": text_split}
        place = texts[0] if len(texts) == 1 else texts
        show_report(
            evaluation.Report([evaluation.evaluate_texts(model, place, **options) for model in models]), report
        )
        return
    if pairs:
        if not (source_column and target_column):
            raise ValueError("`--pairs` needs `--source-column` and `--target-column`; name the two columns.")
        options |= {"source_column": source_column, "target_column": target_column, "tokenizer": tokenizer}
        options |= {"source_language": source_language, "target_language": target_language, "num_beams": beams}
        options |= {"config": pairs_config, "split": pairs_split or "test"}
        place = pairs[0] if len(pairs) == 1 else pairs
        show_report(
            evaluation.Report([evaluation.evaluate_translation(model, place, **options) for model in models]), report
        )
        return
    if images is not None:
        options |= {"split": image_split}
        found = [evaluation.evaluate_images(model, images, **options) for model in models]
        show_report(evaluation.Report(found), report)
        return
    text, files = None, perplexity or masked_text
    if files:
        text = evaluation.PerplexityText(
            files[0] if len(files) == 1 else tuple(files),
            context_lengths=None
            if context_lengths is None
            else tuple(parse_numbers(context_lengths, "--context-lengths", "512,1024")),
            stride=stride,
            max_tokens=max_tokens,
            config=text_config,
            split=text_split,
            column=text_column,
        )
    if masked_text and text is not None:
        options |= {"tokenizer": tokenizer} | ({} if mlm_probability is None else {"mlm_probability": mlm_probability})
        show_report(
            evaluation.Report([evaluation.evaluate_masked(model, text, **options) for model in models]), report
        )
        return
    sizes = split_names(paper_sizes or "")
    check_paper_sizes(sizes, split_names(tasks))
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
    show_report(evaluation.Report(results if isinstance(results, list) else [results], sizes), report)
    if output is not None:
        console.print(f"[green]Saved[/green] {output}")


def _reason(given: set[str], heeded_by: set[str]) -> str:
    """Why an option is refused that only these sources heed."""
    if len(heeded_by) == 1 and not heeded_by & {"--perplexity"}:
        return f"there are no `{next(iter(heeded_by))}`".replace("are no `--masked", "is no `--masked")
    scored = {
        "--images": "images",
        "--texts": "labelled texts",
        "--masked-text": "masked texts",
        "--pairs": "translations",
    }
    for name, what in scored.items():
        if name in given:
            return f"{what} are scored without it"
    return "there is no text (`--perplexity`)"


def parse_batch_size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
