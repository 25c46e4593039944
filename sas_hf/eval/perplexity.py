"""Perplexity and bits per byte of a text at several context lengths, in the harness's rolling windows."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from ..data.text_files import COLUMN, TABLES, TEXT_SUFFIXES, documents_in, kind_of
from .harness import SASHFLM, refuse_not_numbers
from .results import Metric, TaskResult, digest


# The context lengths of the SAS paper's perplexity tables and figures.
CONTEXT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class PerplexityText:
    """
    A text to be predicted.

    Args:
        source: a text file or table (CSV, JSON lines, parquet), several, or the id of a dataset on the Hub (or its
            folder).
        context_lengths: tokens that the model sees at once; `None`: of 512, 1,024, ... 16,384 those that the model
            has positions and the text tokens for, else the model's own.
        stride: tokens that a window predicts. `None`: as many as it holds, windows are disjoint. Smaller: every
            window but the first sees `context_length - stride` tokens before the ones it predicts.
        max_tokens: only so many from the start.
        config, split: of a dataset; by default its only configuration, and "test".
        column: of a dataset or table; by default "text".
    """

    source: str | Path | tuple[str | Path, ...]
    context_lengths: tuple[int, ...] | None = None
    stride: int | None = None
    max_tokens: int | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None

    def __post_init__(self):
        for field in ("stride", "max_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"`{field}` is {value}; it must be positive.")
        if self.context_lengths is not None:
            if not self.context_lengths:
                raise ValueError("`context_lengths` is empty; name at least one, or leave it out.")
            for length in self.context_lengths:
                if length < 2:
                    raise ValueError(f"`context_lengths` has {length}; a context has at least 2 tokens.")
                if self.stride is not None and self.stride > length:
                    raise ValueError(f"`stride` is {self.stride}, more than the context length {length}.")

    @property
    def name(self) -> str:
        """Of the text in results and tables: its sources."""
        sources = self.source if isinstance(self.source, tuple) else (self.source,)
        return ", ".join(map(str, sources))


def read_documents(text: PerplexityText) -> list[str]:
    """
    The documents of a text: a text file's content each, or the rows of tables or of a dataset.

    Raises:
        FileNotFoundError: missing file.
        ValueError: nothing in it, a file that is not text in UTF-8, or a table or dataset without the split or column.
    """
    sources = text.source if isinstance(text.source, tuple) else (text.source,)
    paths = [Path(source).expanduser() for source in sources]
    if any(path.is_file() for path in paths) or len(paths) > 1:
        tables = any(kind_of(path) != "text" for path in paths)
        for field in ("config", "split") if tables else ("config", "split", "column"):
            if getattr(text, field) is not None:
                kind = "a table" if tables else "a text file"
                raise ValueError(f"`{field}` is {getattr(text, field)!r}, of a dataset, but {text.name} is {kind}.")
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"`perplexity` names {str(path)!r}: there is no such file.")
        found = [document for path in paths for document in documents_in(path, text.column or COLUMN)]
    else:
        found = _read_dataset(str(sources[0]), text)
    documents = [document for document in found if document and document.strip()]
    if not documents:
        raise ValueError(f"`perplexity`: there is no text in {text.name}.")
    return documents


def _read_dataset(source: str, text: PerplexityText) -> list[str | None]:
    from datasets import load_dataset

    is_a_file = source.startswith((".", "~", "/")) or source.lower().endswith((*TEXT_SUFFIXES, *TABLES))
    if is_a_file and not Path(source).is_dir():
        raise FileNotFoundError(f"`perplexity` names {source!r}: there is no such file.")
    dataset = load_dataset(source, text.config)
    split, column = text.split or "test", text.column or COLUMN
    if split not in dataset:
        raise ValueError(f"`split` is {split!r}; {source} has {', '.join(dataset)}.")
    if column not in dataset[split].column_names:
        raise ValueError(f"`column` is {column!r}; {source} has {', '.join(dataset[split].column_names)}.")
    return list(dataset[split][column])


def choose_lengths(text: PerplexityText, max_length: int) -> list[int]:
    """The context lengths for a model of so many positions; a `ValueError` for one beyond them."""
    if text.context_lengths is None:
        lengths = [length for length in CONTEXT_LENGTHS if length <= max_length] or [max_length]
        if text.stride is not None and text.stride > lengths[0]:
            raise ValueError(f"`stride` is {text.stride}, more than the context length {lengths[0]}.")
        return lengths
    for length in text.context_lengths:
        if length > max_length:
            raise ValueError(
                f"`context_lengths` has {length}, but the model's context is {max_length} tokens; leave it out."
            )
    return sorted(set(text.context_lengths))


def score_text(text: PerplexityText, documents: list[str], model: SASHFLM) -> dict[str, TaskResult]:
    """
    Score the documents at each context length.

    They are joined to one stream with the token between them that ends a text in training (the tokenizer's eos, else
    bos), which is predicted like any other; the first token is predicted from the one that begins a text (bos, else
    eos). Every token is predicted once. Bytes are those of the tokens predicted, as UTF-8. The standard error is that
    of a mean over windows, weighted by their tokens.

    Returns:
        by "perplexity@512" and so on: "perplexity" per token, "bits_per_byte", and "nll", nats per token.
    """
    end = model.tokenizer.eos_token_id
    tokens: list[int] = []
    for document in documents:
        if tokens:
            tokens.append(model.prefix_token_id if end is None else end)
        tokens += model.tokenizer.encode(document, add_special_tokens=False)
    num_bytes = sum(len(document.encode()) for document in documents)
    if text.max_tokens is not None and text.max_tokens < len(tokens):
        tokens = tokens[: text.max_tokens]
        num_bytes = _bytes_of(len(tokens), documents, model.tokenizer)
    lengths = choose_lengths(text, model.max_length)
    if text.context_lengths is None:
        lengths = [length for length in lengths if length <= len(tokens)] or lengths[:1]
    elif lengths[-1] > len(tokens):
        raise ValueError(f"`context_lengths` has {lengths[-1]}, but {text.name} has {len(tokens)} tokens.")

    results = {}
    # Sums over thousands of tokens need more than bfloat16, whatever the model computes in.
    softmax_dtype, model.softmax_dtype = model.softmax_dtype, torch.float32
    try:
        for length in lengths:
            stride = text.stride or length
            windows = list(
                get_rolling_token_windows(
                    tokens, model.prefix_token_id, max_seq_len=length, context_len=length - stride + 1
                )
            )
            requests = [(None, *make_disjoint_window(window)) for window in windows]
            answers = model._loglikelihood_tokens(requests)
            refuse_not_numbers((f"perplexity@{length}", value) for value, _ in answers)
            counts = [len(predicted) for _, predicted in windows]
            losses = [-value for value, _ in answers]
            bits = len(windows) / num_bytes / math.log(2)  # scales a window's loss so that the mean is bits per byte
            results[f"perplexity@{length}"] = TaskResult(
                metrics=_metrics(losses, counts, num_bytes),
                num_samples=len(windows),
                num_available=len(windows),
                split=text.split or "test" if _is_dataset(text) else "",
                data=text.name,
                num_fewshot=None,
                version=None,
                notes=_unknown(tokens, model.tokenizer),
                scores={"bits_per_byte": [loss * bits for loss in losses]},
                questions=digest(map(str, requests)),
                details={
                    "context_length": length,
                    "stride": stride,
                    "windows": "disjoint" if stride == length else "sliding",
                    "tokens": len(tokens),
                    "bytes": num_bytes,
                    "documents": len(documents),
                },
            )
    finally:
        model.softmax_dtype = softmax_dtype
    return results


def _bytes_of(count: int, documents: list[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the first so many tokens of the stream, by where each token lies in its document: what they decode to
    may be another text (without what a tokenizer normalises, with marks for halves of characters)."""
    num_bytes = 0
    for document in documents:
        spans = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if count <= len(spans):
            return num_bytes + len(document[: spans[count - 1][1]].encode()) if count > 0 else num_bytes
        num_bytes += len(document.encode())
        count -= len(spans) + 1  # and the one that parts it from the next
    return num_bytes


def _unknown(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is to be said of tokens that stand for any text."""
    number = tokenizer.unk_token_id
    count = 0 if number in (None, tokenizer.bos_token_id, tokenizer.eos_token_id) else tokens.count(number)
    if not count:
        return []
    return [f"{count:,} tokens are {tokenizer.unk_token}, which stands for any text: the bits per byte are too few"]


def _is_dataset(text: PerplexityText) -> bool:
    return not isinstance(text.source, tuple) and not Path(text.source).is_file()


def _metrics(losses: list[float], counts: list[int], num_bytes: int) -> dict[str, Metric]:
    """From each window's negative log-likelihood (nats) and number of tokens predicted."""
    tokens, windows = sum(counts), len(counts)
    nll = math.fsum(losses) / tokens
    stderr = None
    if windows > 1:  # of a ratio of sums over windows
        squares = math.fsum((loss - nll * count) ** 2 for loss, count in zip(losses, counts, strict=True))
        stderr = math.sqrt(windows / (windows - 1) * squares) / tokens
    per_byte = tokens / num_bytes / math.log(2)
    perplexity = math.exp(min(nll, 700.0))  # finite, however bad the model
    return {
        "perplexity": Metric(perplexity, stderr and perplexity * stderr),
        "bits_per_byte": Metric(nll * per_byte, stderr and stderr * per_byte),
        "nll": Metric(nll, stderr),
    }
