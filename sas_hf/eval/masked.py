"""`evaluate_masked`: a masked language model and texts in; loss and accuracy at masked places out."""

import time
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.masking import MaskingCollator, masked_rows
from ..data.tokenized_text import longest_text
from ..report.files import one_at_a_time
from ..report.progress import bar
from .arguments import check_arguments, check_output, number_of_samples
from .classifiers import find_scored, require_head, require_numbers
from .models import left_as_found
from .perplexity import PerplexityText, read_documents
from .results import EvaluationResult, Metric, TaskResult, digest, one_task_result
from .text_classification import find_tokenizer


AUTO_BATCH_SIZE = 16
LENGTH = 512  # tokens of a row, where the model has positions for more


@one_at_a_time("output")
def evaluate_masked(
    model: str | Path | PreTrainedModel,
    text: PerplexityText,
    *,
    mlm_probability: float = 0.15,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    limit: int | float | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
) -> EvaluationResult:
    """
    Let a masked language model find tokens that are hidden in texts: always the same ones for the same tokenizer, as
    BERT is pre-trained (of those that are chosen 80 % are masked, 10 % are another token, 10 % stay). Code that a
    checkpoint brings along is never run.

    This is no perplexity: all that is masked of a row is hidden at once.

    Args:
        model: a checkpoint's folder, a Hub id, or a live model, of any architecture with a masked language model head.
        text: where the texts are; each is cut into rows of as many tokens as the model has positions for, 512 at
            most. `max_tokens` ends with the row that reaches it.
        mlm_probability: share of the tokens that are hidden.
        tokenizer: the model's own where `None`.
        limit: how many rows to score, from their start, or what share of them if below 1.
        batch_size: rows at a time; "auto": 16.
        device, dtype, output: as of [`~sas_hf.eval.evaluate_texts`].

    Returns:
        the metrics "accuracy" (the share of hidden tokens that are the most likely ones) and "loss" (nats for each),
        with standard errors over rows, which are weighted by their hidden tokens.

    Raises:
        ValueError: for a model without the head, or a tokenizer without a mask token.
        FileNotFoundError: for a missing file.
        BlockingIOError: when another process evaluates to `output`.
    """
    check_arguments(model, limit, batch_size, device, dtype)
    if not 0 < mlm_probability < 1:
        raise ValueError(f"`mlm_probability` is {mlm_probability}; it must be between 0 and 1.")
    if text.context_lengths is not None or text.stride is not None:
        raise ValueError("`context_lengths` and `stride` are of perplexities, but what is masked has none; drop them.")
    if output is not None:
        check_output(output)
    live = isinstance(model, PreTrainedModel)
    name = type(model).__name__ if live else str(model)
    if not live:
        remedy = "score a causal language model with `--perplexity`"
        require_head(name, AutoModelForMaskedLM, "masked language model", remedy)
    documents = read_documents(text)
    of_head = (AutoModelForMaskedLM, "ForMaskedLM", "masked language model")
    scored, origin = find_scored(model, *of_head, dtype, device)
    tokenizer = find_tokenizer(tokenizer, origin, scored)
    if tokenizer.mask_token_id is None:
        raise ValueError("The tokenizer has no mask token; pass the one that the model was trained with.")
    rows = _rows(documents, tokenizer, min(LENGTH, longest_text(scored.config) or LENGTH), text.max_tokens)
    available = len(rows)
    rows = rows[: number_of_samples(limit, available)]
    masked = masked_rows(Dataset.from_dict({"input_ids": rows}), tokenizer, mlm_probability)

    start = time.perf_counter()
    size = min(AUTO_BATCH_SIZE if isinstance(batch_size, str) else batch_size, len(rows))
    losses, hits, counts = _score(scored, tokenizer, masked, size)
    task = TaskResult(
        metrics={"accuracy": _ratio(hits, counts), "loss": _ratio(losses, counts)},
        num_samples=len(rows),
        num_available=available,
        split=text.split or "",
        data=text.name,
        num_fewshot=None,
        version=None,
        # Scaled so that their means are the metrics, whatever each row has hidden.
        scores={
            name: (values * len(rows) / counts.sum()).tolist()
            for name, values in (("accuracy", hits), ("loss", losses))
        },
        questions=digest([str(mlm_probability), *map(str, masked["input_ids"]), *map(str, masked["labels"])]),
        details={"mlm_probability": mlm_probability, "masked_tokens": int(counts.sum()), "masked_by_seed": 0},
    )
    return one_task_result(
        scored,
        "masked_tokens",
        task,
        name=name,
        limit=limit,
        requested=batch_size,
        size=size,
        start=start,
        library="datasets",
        output=output,
    )


def _rows(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None
) -> list[list[int]]:
    """The documents in rows, each between what the tokenizer puts around a text."""
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer is a {type(tokenizer).__name__}, which cannot part texts; pass a fast one.")
    rows, left = [], float("inf") if max_tokens is None else max_tokens
    for document in documents:
        if left <= 0:
            break
        options = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        for row in tokenizer(document, **options)["input_ids"]:
            special = tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
            if not all(special) and left > 0:
                rows.append(row)
                left -= len(row) - sum(special)
    if not rows:
        raise ValueError("The tokenizer makes no token of the texts that could be masked.")
    return rows


@torch.inference_mode()
def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: the summed loss, how many hidden tokens were found, and how many there are."""
    collator, found = MaskingCollator(tokenizer), []
    with left_as_found(model):
        model.eval()
        for first in bar(range(0, len(rows), batch_size), "Finding masked tokens"):
            part = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
            batch = collator.torch_call(part).to(model.device)
            labels = batch.pop("labels").cpu()
            logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.float().cpu()
            hidden = labels != -100
            require_numbers(logits[hidden])
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double()
            hits = (logits.argmax(dim=-1) == labels) & hidden
            found.append((losses.sum(dim=1), hits.sum(dim=1).double(), hidden.sum(dim=1).double()))
    losses, hits, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    return losses, hits, counts


def _ratio(values: torch.Tensor, counts: torch.Tensor) -> Metric:
    """Their sum over the hidden tokens, with the error of a ratio of sums over rows."""
    ratio, rows = (values.sum() / counts.sum()).item(), len(values)
    if rows < 2:
        return Metric(ratio, None)
    error = (rows / (rows - 1) * ((values - ratio * counts) ** 2).sum()).sqrt() / counts.sum()
    return Metric(ratio, error.item())
