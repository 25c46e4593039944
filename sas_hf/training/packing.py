"""Documents packed into sequences of one length, so that no token is padding and none sees another document."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


BATCH = 1000  # documents that the tokenizer gets at once
LAYOUT = 2  # of the rows; a place in rows, or rows in a cache, of another layout are not these


def pack_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int | None = None
) -> Dataset:
    """
    Documents as sequences of `sequence_length` tokens for language modelling.

    Every document begins with the tokenizer's bos token (eos, where it has none) and ends with its eos token, the
    target of the document's last token, whatever the tokenizer itself would add. Positions restart at each document:
    without an attention mask, Transformers then lets no token attend to another document. The first token of each
    is no target, every other is one once: a sequence that goes on with a document repeats the last token before the
    cut. What fills no sequence at the end is left out.

    Args:
        documents: texts.
        sequence_length: tokens T per sequence.
        seed: shuffles the documents first; `None` keeps their order.

    Returns:
        rows of `input_ids`, `position_ids` and `labels`, `[T]` each; give them to `Trainer` with the default collator.

    Raises:
        ValueError: for a length below 2, a tokenizer without eos, or texts that fill no sequence.
    """
    packer = Packer(tokenizer, sequence_length)
    if any(not isinstance(document, str) for document in documents):
        raise ValueError("`documents` must be texts (strings).")
    dataset = Dataset.from_dict({"text": list(documents)})
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    rows = [row for batch in dataset.iter(BATCH) for row in packer.pack(batch["text"])]
    if not rows:
        raise ValueError(f"`documents` have fewer than `sequence_length` = {sequence_length} tokens in all.")
    return Dataset.from_list(rows)


def one_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Packed rows `[B, T]` as one `[1, B·T]`: as every row begins with position 0, the documents stay apart."""
    return {name: values.reshape(1, -1) for name, values in batch.items()}


class Packer:
    """
    Packs documents as they come, as [`pack_documents`] says.

    Args:
        tokenizer: of the model.
        sequence_length: tokens T per sequence.

    Raises:
        ValueError: for a length below 2, or a tokenizer without eos.
    """

    columns: tuple[str, ...] = ("input_ids", "position_ids", "labels")  # of its rows

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int):
        if sequence_length < 2:
            raise ValueError(f"`sequence_length` is {sequence_length}; it must be at least 2.")
        self.tokenizer = tokenizer
        self.length = sequence_length
        self.start, self.end = self.find_ends(tokenizer)
        self.tokens: list[int] = []  # of the sequence that is not full yet
        self.positions: list[int] = []

    def find_ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
        """The tokens that begin and end a document."""
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no eos token, so that nothing would end a document and the model would never learn "
                "to stop; set its `eos_token` to a token of its vocabulary."
            )
        end = tokenizer.eos_token_id
        return end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, end

    def state_dict(self) -> dict[str, Any]:
        """The sequence that is not full yet; numbers alone, for JSON."""
        return {"tokens": list(self.tokens), "positions": list(self.positions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.positions = list(state["tokens"]), list(state["positions"])

    def pack(self, documents: Sequence[str]) -> Iterator[dict[str, list[int]]]:
        """The sequences that these documents fill, each a row of `input_ids`, `position_ids` and `labels`."""
        for first in range(0, len(documents), BATCH):
            texts = list(documents[first : first + BATCH])
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in filter(None, encoded["input_ids"]):
                # A text that spells them out has them already.
                begin = [] if ids[0] == self.start else [self.start]
                end = [] if ids[1:] and ids[-1] == self.end else [self.end]
                yield from self._pack_tokens([*begin, *ids, *end])

    def _pack_tokens(self, ids: list[int]) -> Iterator[dict[str, list[int]]]:
        place = 0
        while place < len(ids):
            taken = ids[place : place + self.length - len(self.tokens)]
            place += len(taken)
            if place < len(ids):
                place -= 1  # what the next sequence begins with, so that the token after the cut is a target too
            self.tokens += taken
            self.positions += range(len(taken))  # from 0 in each sequence: none needs more positions than its length
            if len(self.tokens) == self.length:
                tokens, positions = self.tokens, self.positions
                self.tokens, self.positions = [], []
                labels = [-100 if position == 0 else token for token, position in zip(tokens, positions, strict=True)]
                yield {"input_ids": tokens, "position_ids": positions, "labels": labels}


class MaskedPacker(Packer):
    """
    Packs documents for a masked language model, as Transformers' own script does: each between the tokens that begin
    and end a text for BERT's kind, cut wherever a sequence is full. Rows are `input_ids` alone: a token sees all
    documents of its sequence, and what is masked is chosen later.

    Args:
        packed: else each document is a row, whose end is cut off where it is longer than a sequence.
    """

    columns: tuple[str, ...] = ("input_ids",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, packed: bool = True):
        super().__init__(tokenizer, sequence_length)
        self.packed = packed

    def find_ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
        pairs = (("cls_token_id", "sep_token_id"), ("bos_token_id", "eos_token_id"))
        for names in pairs:
            start, end = (getattr(tokenizer, name) for name in names)
            if None not in (start, end):
                return start, end
        raise ValueError(
            "The tokenizer has neither a cls and a sep token nor a bos and an eos token to part documents with."
        )

    def _pack_tokens(self, ids: list[int]) -> Iterator[dict[str, list[int]]]:
        if not self.packed:
            yield {"input_ids": ids if len(ids) <= self.length else [*ids[: self.length - 1], self.end]}
            return
        self.tokens += ids
        while len(self.tokens) >= self.length:
            yield {"input_ids": self.tokens[: self.length]}
            self.tokens = self.tokens[self.length :]
