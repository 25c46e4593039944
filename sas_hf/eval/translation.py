"""`evaluate_translation`: an encoder-decoder and pairs of texts in; BLEU, chrF, loss and the translations out."""

import copy
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.languages import begin_with_language, set_languages
from ..data.text_pairs import PairColumns, encode_side, read_pairs
from ..hub.checkpoints import (
    check_vocabulary,
    classes_made_by,
    load_config,
    load_model,
    load_tokenizer,
    read_adapter,
    read_settings,
)
from ..hub.merge import merge
from ..report.files import one_at_a_time
from ..report.progress import bar
from ..report.translation import corpus_metrics, measured_scores
from .arguments import check_arguments, check_output, number_of_samples, refuse_named_configuration
from .harness import to_device
from .models import left_as_found
from .results import EvaluationResult, Metric, TaskResult, digest, one_task_result


TASK = "translation"
AUTO_BATCH_SIZE = 32
LONGEST = 256  # tokens of a translation, where neither the model nor its generation configuration has a limit
FIELDS = {"columns": ("source_column", "target_column"), "languages": ("source_language", "target_language")}


@one_at_a_time("output")
def evaluate_translation(
    model: str | Path | PreTrainedModel,
    pairs: str | Path | list[str],
    *,
    source_column: str,
    target_column: str,
    source_language: str | None = None,
    target_language: str | None = None,
    split: str = "test",
    config: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    num_beams: int | None = None,
    limit: int | float | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
) -> EvaluationResult:
    """
    Score the translations of an encoder-decoder. Code that a checkpoint brings along is never run.

    Args:
        model: a checkpoint's folder, a Hub id, a peft adapter's, or a live model.
        pairs: see [`~sas_hf.data.text_pairs.read_pairs`].
        source_column, target_column: of the pairs.
        source_language, target_language: as a multilingual tokenizer writes them; by default what it was saved with.
        split, config: of a Hub dataset.
        tokenizer: the model's own where `None`: beside its weights.
        num_beams: 1 is greedy; `None`: what the model's generation configuration says, else greedy.
        limit: how many pairs to score from their start, or what share of them if below 1.
        batch_size: pairs at a time; "auto": 32.
        device: "cpu", "cuda", ...; `None`: the accelerator if there is one. Not for a live model.
        dtype: as in `from_pretrained`; `None`: what the checkpoint holds. Not for a live model.
        output: JSON file to write the result to.

    Returns:
        the task "translation" with the metrics "bleu" and "chrf" (from 0 to 100; standard errors over resamples),
        "token_accuracy" and "loss" (mean over the references' tokens, in nats), and each pair's translation in
        `samples`. `details` has sacrebleu's signatures.

    Raises:
        ValueError: for what is no encoder-decoder or has no tokenizer, a column or language that is missing, empty
            texts, or logits that are not numbers.
        FileNotFoundError: for a missing folder or file.
        ImportError: without sacrebleu.
        BlockingIOError: when another process evaluates to `output`.

    All but the last of a ValueError come before the first forward pass.
    """
    check_arguments(model, limit, batch_size, device, dtype)
    if num_beams is not None and num_beams < 1:
        raise ValueError(f"`num_beams` is {num_beams}; it must be at least 1, which is greedy.")
    if output is not None:
        check_output(output)
    language = target_language or target_column
    corpus_metrics(language)
    columns = PairColumns(source_column, target_column, FIELDS["columns"])
    live = isinstance(model, PreTrainedModel)
    name = type(model).__name__ if live else str(model)
    if not live:
        _require_translator(name)
    rows = read_pairs(pairs if isinstance(pairs, list) else str(pairs), columns, "pairs", config=config, split=split)
    available = len(rows)
    rows = rows.take(number_of_samples(limit, available))
    tokenizer = _find_tokenizer(
        tokenizer or (model.name_or_path or "" if isinstance(model, PreTrainedModel) else name)
    )
    set_languages(tokenizer, (source_language, target_language), FIELDS["languages"], keep=True)
    scored = model if isinstance(model, PreTrainedModel) else to_device(_load_translator(name, dtype), device)
    check_vocabulary(tokenizer, _vocabulary(scored.config), name)

    start = time.perf_counter()
    size = min(AUTO_BATCH_SIZE if isinstance(batch_size, str) else batch_size, available)
    longest = getattr(scored.config, "max_position_embeddings", None) or tokenizer.model_max_length
    sources, cut_sources = encode_side(tokenizer, rows["source"][:], longest, target=False)
    targets, cut_targets = encode_side(tokenizer, rows["target"][:], longest, target=True)
    settings = _generation(scored, tokenizer, num_beams, longest)
    hypotheses, losses, right = _translate(scored, tokenizer, sources, targets, settings, size)
    counts = torch.tensor([len(target) for target in targets], dtype=torch.float64)
    scores = measured_scores(hypotheses, rows["target"][:], language)
    task = TaskResult(
        metrics={
            metric: Metric(found.value, found.stderr if len(rows) > 1 else None) for metric, found in scores.items()
        }
        | {"token_accuracy": _per_token(right, counts), "loss": _per_token(losses, counts)},
        num_samples=len(rows),
        num_available=available,
        split=split,
        data=str(pairs),
        num_fewshot=None,
        version=None,
        notes=[
            f"{cut:,} {side} longer than the model's {longest:,} positions are cut off there"
            for cut, side in ((cut_sources, "sources"), (cut_targets, "references, for the loss alone,"))
            if cut
        ],
        # So that their means are the metrics: a long pair weighs more.
        scores={
            metric: (values / counts.mean()).tolist()
            for metric, values in (("token_accuracy", right), ("loss", losses))
        },
        questions=digest([*rows["source"], *rows["target"]]),
        details={
            "signatures": {metric: found.signature for metric, found in scores.items()},
            "language": language,
            "num_beams": settings.num_beams or 1,
            "max_length": settings.max_length,
            "max_new_tokens": settings.max_new_tokens,
            "tokens": digest(str(target) for target in targets),
        },
        samples=[
            {"source": source, "reference": reference, "hypothesis": hypothesis, "loss": loss}
            for source, reference, hypothesis, loss in zip(
                rows["source"], rows["target"], hypotheses, (losses / counts).tolist(), strict=True
            )
        ],
    )
    return one_task_result(
        scored,
        TASK,
        task,
        name=name,
        limit=limit,
        requested=batch_size,
        size=size,
        start=start,
        library="sacrebleu",
        output=output,
        num_truncated=cut_sources,
    )


def _require_translator(name: str) -> None:
    """Refuse what is no encoder-decoder, or cannot be one, before pairs or weights are read."""
    refuse_named_configuration(name)
    adapter = read_adapter(name)
    place, revision = adapter or (name, None)
    settings = read_settings(place, revision)
    model_type = settings.get("model_type")
    classes = classes_made_by(AutoModelForSeq2SeqLM)
    known = {config.model_type: config for config in classes}
    if model_type not in known:
        raise ValueError(
            f"{name} has `model_type` {model_type!r}, which is no encoder-decoder of texts; score a language model "
            "with `--tasks` or `--perplexity`."
        )
    wanted = classes[known[model_type]].__name__
    saved = settings.get("architectures") or []
    if saved and not any(architecture in (wanted, wanted.partition("For")[0] + "Model") for architecture in saved):
        raise ValueError(f"{name} holds a {', '.join(saved)}, which does not translate; it must be a {wanted}.")


def _load_translator(name: str, dtype: str | torch.dtype | None) -> PreTrainedModel:
    adapter = read_adapter(name)
    place, revision = adapter or (name, None)
    config = load_config(place, revision)
    options: dict[str, Any] = {"config": config, "dtype": dtype or "auto", "use_safetensors": None}
    model = load_model(AutoModelForSeq2SeqLM, place, revision, **options)[0]
    if adapter is not None:
        model = merge(model, name, None)
    return model.eval()


def _find_tokenizer(given: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One to be changed: that of this place, or a copy of one that is given."""
    if isinstance(given, PreTrainedTokenizerBase):
        tokenizer, place = copy.deepcopy(given), type(given).__name__
    else:
        place = str(given)
        found = load_tokenizer(place, None) if place else None
        if found is None and (adapter := read_adapter(place)) is not None:
            found = load_tokenizer(*adapter)
        if found is None:
            raise ValueError(f"There is no tokenizer in {place!r}; pass one as `tokenizer`.")
        tokenizer = found
    if tokenizer.pad_token is None or tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer ({place}) has no pad or no eos token, by which translations are batched and end."
        )
    tokenizer.padding_side = "right"
    return tokenizer


def _vocabulary(config: PreTrainedConfig) -> int:
    return min(config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size)


def _generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_beams: int | None, longest: int
) -> GenerationConfig:
    """The model's own, with the language, the beams and a length, where it says none: Transformers' would be 20."""
    settings = copy.deepcopy(model.generation_config)
    if num_beams is not None:
        settings.num_beams = num_beams
        if num_beams == 1:
            settings.early_stopping = settings.length_penalty = None  # of beams
    if settings.max_length is None and settings.max_new_tokens is None:
        settings.max_length = min(longest, LONGEST)
    settings.do_sample = False
    begin_with_language(settings, tokenizer)
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        if getattr(settings, name, None) is None:
            setattr(settings, name, getattr(model.config, name, None))
    if settings.decoder_start_token_id is None:
        raise ValueError(
            "The model has no `decoder_start_token_id`, so that no translation could begin; set it in its config.json."
        )
    return settings


@torch.inference_mode()
def _translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[list[int]],
    targets: list[list[int]],
    settings: GenerationConfig,
    batch_size: int,
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Of each pair: the translation, the summed loss of the reference's tokens, and how many were the likeliest."""
    count = len(sources)
    hypotheses, losses, right = (
        [""] * count,
        torch.zeros(count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.float64),
    )
    order = sorted(range(count), key=lambda place: len(sources[place]), reverse=True)  # least padding; longest first
    with left_as_found(model):
        model.eval()
        for first in bar(range(0, count, batch_size), "Translating"):
            places = order[first : first + batch_size]
            batch = tokenizer.pad({"input_ids": [sources[place] for place in places]}, return_tensors="pt")
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            longest = max(len(targets[place]) for place in places)
            labels = torch.tensor(
                [targets[place] + [-100] * (longest - len(targets[place])) for place in places], device=model.device
            )
            logits = model(**inputs, labels=labels).logits.float()
            if not logits.isfinite().all():
                raise ValueError("Logits are not numbers (NaN or infinite): the weights are broken or overflow.")
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses[places] = each.double().sum(dim=1).cpu()
            right[places] = logits.argmax(dim=-1).eq(labels).sum(dim=1).double().cpu()
            tokens = cast(GenerationMixin, model).generate(**inputs, generation_config=settings)
            for place, text in zip(places, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                hypotheses[place] = text.strip()
    return hypotheses, losses, right


def _per_token(values: torch.Tensor, counts: torch.Tensor) -> Metric:
    """Their sum over all tokens, and its standard error over pairs."""
    mean = values.sum() / counts.sum()
    if len(values) == 1:
        return Metric(mean.item(), None)
    error = (values - mean * counts).std() / counts.mean() / len(values) ** 0.5
    return Metric(mean.item(), error.item())
