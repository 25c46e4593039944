"""Tokens masked for a model to find: at random while it trains, always the same ones while it is evaluated."""

from dataclasses import dataclass
from typing import cast

import torch
from datasets import Dataset
from transformers import BatchEncoding, DataCollatorForLanguageModeling, PreTrainedTokenizerBase


TRIES = 1000  # to mask something of a text


@dataclass
class MaskingCollator(DataCollatorForLanguageModeling):
    """
    Masks rows of `input_ids` anew whenever they are seen, one token of a batch at least; rows with `labels`, as
    [`masked_rows`] makes them, stay as they are.
    """

    def torch_call(self, examples: list) -> BatchEncoding:  # type: ignore[override]  # which pads give, and need `to`
        if "labels" in examples[0]:
            return self._padded(examples)
        for _ in range(TRIES):
            batch = cast(BatchEncoding, super().torch_call(examples))
            if (batch["labels"] != -100).any():  # the mean loss of no token is no number
                return batch
        raise ValueError(
            f"Nothing is masked in {TRIES} tries of a batch; `mlm_probability` is {self.mlm_probability}, and a text "
            "needs tokens that are not special."
        )

    def _padded(self, examples: list[dict]) -> BatchEncoding:
        labels = [example["labels"] for example in examples]
        rows = [{"input_ids": example["input_ids"]} for example in examples]
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        width, left = batch["labels"].shape[1], self.tokenizer.padding_side == "left"
        for row, values in zip(batch["labels"], labels, strict=True):
            row[slice(width - len(values), width) if left else slice(len(values))] = torch.tensor(values)
        return batch


def masked_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, mlm_probability: float, seed: int = 0) -> Dataset:
    """
    Rows of `input_ids` with some of their tokens masked, one of each at least, and these as `labels`: the same ones
    for the same rows, whatever else draws random numbers.
    """
    collator = MaskingCollator(tokenizer, mlm_probability=mlm_probability, seed=seed)
    masked = [collator.torch_call([{"input_ids": ids}]) for ids in rows["input_ids"]]
    return Dataset.from_dict({name: [row[name][0].tolist() for row in masked] for name in ("input_ids", "labels")})
