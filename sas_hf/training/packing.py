"""Documents packed into sequences of one length, so that no token is padding and none sees another document."""

from collections.abc import Iterator, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def pack_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int | None = None
) -> Dataset:
    """
    Documents as sequences of `sequence_length` tokens for language modelling.

    Every document begins with the tokenizer's bos token (eos, where it has none). Positions restart at each document:
    without an attention mask, Transformers then lets no token attend to another document. The first token of each
    is no target. What fills no sequence at the end is left out.

    Args:
        documents: texts.
        sequence_length: tokens T per sequence.
        seed: shuffles the documents first; `None` keeps their order.

    Returns:
        rows of `input_ids`, `position_ids` and `labels`, `[T]` each; give them to `Trainer` with the default collator.

    Raises:
        ValueError: for a length below 2, a tokenizer without bos and eos, or texts that fill no sequence.
    """
    if sequence_length < 2:
        raise ValueError(f"`sequence_length` is {sequence_length}; it must be at least 2.")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("`tokenizer` has neither a bos nor an eos token to begin documents with.")
    if any(not isinstance(document, str) for document in documents):
        raise ValueError("`documents` must be texts (strings).")
    dataset = Dataset.from_dict({"text": list(documents)})
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    rows = list(_rows(dataset["text"], tokenizer, start, sequence_length))
    if not rows:
        raise ValueError(f"`documents` have fewer than `sequence_length` = {sequence_length} tokens in all.")
    return Dataset.from_list(rows)


def _rows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, start: int, length: int
) -> Iterator[dict[str, list[int]]]:
    tokens: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids = [start, *tokenizer.encode(document, add_special_tokens=False)]
        while ids:
            taken = ids[: length - len(tokens)]
            tokens += taken
            positions += range(len(taken))  # from 0 in each sequence: none needs more positions than its length
            ids = ids[len(taken) :]
            if len(tokens) == length:
                labels = [-100 if position == 0 else token for token, position in zip(tokens, positions, strict=True)]
                yield {"input_ids": tokens, "position_ids": positions, "labels": labels}
                tokens, positions = [], []
