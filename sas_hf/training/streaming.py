"""Packed sequences from documents that are read as they come, and their place, to go on from after a kill."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from .packing import LAYOUT, Packer


BEGINNING: dict[str, Any] = {
    "layout": LAYOUT,
    "rows": 0,
    "rows_to_skip": 0,
    "pass": 0,
    "block": 0,
    "place": None,
    "packer": {"tokens": [], "positions": []},
}


class PackedStream(torch.utils.data.IterableDataset):
    """
    Documents read, shuffled, tokenised and packed on the fly, over and over: a training ends by `max_steps`.

    Each pass takes the files in another order. `shuffle_buffer` documents at a time are shuffled among each other,
    packed and followed by the next ones: unlike a buffer that is refilled while it is drawn from, this needs no more
    than a place in the files to be taken up again.

    [`DurableTrainer`] writes the state into each checkpoint and restores it: a resumed run tokenises at most
    `shuffle_buffer` documents twice and opens none of the files that were passed but the last. The documents of one
    file that come before the place are stepped over by `datasets`.

    Every process of a distributed run sees other sequences: accelerate lets the first one read and deals the batches
    out (`dispatch_batches`, its default for streams); without that, each process reads all and keeps its share.

    Args:
        documents: with the one column `column`.
        column: of the texts.
        tokenizer: of the model.
        sequence_length: tokens T per sequence.
        shuffle_buffer: documents that are shuffled together.
        seed: of the shuffling.

    Yields:
        rows of `input_ids`, `position_ids` and `labels`, `[T]` each, as [`pack_documents`] makes them.

    Raises:
        ValueError: from the first row on: for documents without any text, or inside a worker process
            (`dataloader_num_workers` above 0), where the place is out of reach.
    """

    def __init__(
        self,
        documents: IterableDataset,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        shuffle_buffer: int,
        seed: int,
    ):
        self.documents = documents
        self.column = column
        self.packer = Packer(tokenizer, sequence_length)
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        # Where recent blocks of documents begin. A DataLoader reads ahead of the training: the place to save is never
        # the newest.
        self._blocks: deque[dict[str, Any]] = deque()
        self._given = 0  # rows, those before the place of the start included
        self._start: dict[str, Any] | None = None

    def state_dict(self, rows: int) -> dict[str, Any]:
        """
        The place after the first `rows` rows, counted from the very first of the whole training; plain values for
        JSON. Places before it are forgotten.

        Raises:
            ValueError: for a place that was not reached yet or is forgotten.
        """
        while len(self._blocks) > 1 and self._blocks[1]["rows"] <= rows:
            self._blocks.popleft()
        if not self._blocks or not self._blocks[0]["rows"] <= rows <= self._given:
            raise ValueError(f"Row {rows} is not within what this stream has given and remembers.")
        return self._blocks[0] | {"rows_to_skip": rows - self._blocks[0]["rows"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Begin the next iteration at a place that [`state_dict`] gave, of the same documents, seed and lengths.

        Raises:
            ValueError: for a place in rows that an earlier version packed otherwise.
        """
        if state.get("layout") != LAYOUT:
            raise ValueError(
                "The checkpoint's place in the stream is one in sequences that an earlier version of sas_hf packed, "
                "without the end of each document; start a new run from its weights (`model.checkpoint`)."
            )
        self._start = state

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError(
                "`dataloader_num_workers` must be 0 for streamed data: its place is kept in this process."
            )
        state, self._start = self._start or BEGINNING, None
        rows, skip, number, block, place = (state[name] for name in ("rows", "rows_to_skip", "pass", "block", "place"))
        self.packer.load_state_dict(state["packer"])
        self._blocks.clear()
        while True:
            reader = self._reader(number, place)
            empty = block == 0
            while True:
                mark = {"layout": LAYOUT, "rows": rows, "pass": number, "block": block, "place": place}
                self._blocks.append(mark | {"packer": self.packer.state_dict()})
                documents = [document[self.column] for document in islice(reader, self.shuffle_buffer)]
                if not documents:
                    break
                place = self.documents.state_dict()
                np.random.default_rng([self.seed, number, block]).shuffle(documents)
                texts = [text for text in documents if text]
                empty = empty and not texts
                for row in self.packer.pack(texts):
                    self._given = rows = rows + 1
                    if skip:  # given before the place that this iteration began at
                        skip -= 1
                    else:
                        yield row
                block += 1
            if empty:
                raise ValueError(f"There is no text in the column {self.column!r} of the streamed documents.")
            number, block, place = number + 1, 0, None

    def _reader(self, number: int, place: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        # With an epoch above 0, `datasets` reads the files in an order that depends on it.
        self.documents.set_epoch(int(np.random.default_rng([self.seed, number]).integers(1, 2**31)))
        self.documents.load_state_dict(place)
        return iter(self.documents)
