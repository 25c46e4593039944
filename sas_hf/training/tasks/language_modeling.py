"""Language modelling: the next token of documents that are packed into full sequences."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils.generic import is_flash_attention_requested

from ...data.text import train_tokenizer
from ..adapters import prepare_parameters
from ..data import check_data, training_data, training_rows, training_texts
from ..optimizer import RecipeTrainer
from ..packing import Packer
from ..recipe_fields import TrainingRecipe
from .causal import CausalTask
from .task import Samples


# Of `data`, what tells which documents there are and what sequences are made of them.
DOCUMENTS = (
    "data.validation_split",
    "data.validation_documents",
    "data.config",
    "data.split",
    "data.text_column",
    "data.document_separator",
    "data.sequence_length",
    "data.max_validation_sequences",
)


class LanguageModeling(CausalTask):
    """A new model without a tokenizer gets one that is trained on its data."""

    name = "language_modeling"
    needs_tokenizer = False
    reads = ("model.conversion", *DOCUMENTS, "data.streaming", "data.shuffle_buffer")

    def check_sources(self, recipe: TrainingRecipe) -> None:
        check_data(recipe.data)
        super().check_sources(recipe)

    def tokens_per_sequence(self, recipe: TrainingRecipe) -> int:
        return recipe.data.sequence_length

    def tokenizer(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
        if recipe.model.checkpoint is None and recipe.model.tokenizer is None:
            return train_tokenizer(_excerpts("".join(training_texts(recipe.data))), config.vocab_size)
        return super().tokenizer(recipe, config)

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples:
        check_data(recipe.data)
        packer = Packer(self.tokenizer(recipe, config), recipe.data.sequence_length)
        return Samples(sum(1 for _ in training_rows(recipe.data, packer)))

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Two documents a row, so that there is a mask as of packed ones."""
        batch = super().random_batch(config, rows, lengths)
        positions = torch.arange(*lengths).expand(rows, -1)
        first = lengths[0] // 2
        return batch | {"position_ids": torch.where(positions < first, positions, positions - first)}

    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> RecipeTrainer:
        check_data(recipe.data)
        config, tokenizer = self.load_sources(recipe)
        data = training_data(recipe.data, tokenizer, arguments.seed)
        model = self.build_model(recipe, config, tokenizer, arguments)
        trainer = RecipeTrainer(
            prepare_parameters(model, recipe.model, tokenizer),
            arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=default_data_collator,  # packed sequences are of one length
            processing_class=tokenizer,
            callbacks=[*callbacks, *data.callbacks],
        )
        # Transformers' FlashAttention looks for packed documents in batches of one row alone.
        trainer.joins_rows = is_flash_attention_requested(cast(PreTrainedModel, trainer.model).config)
        return trainer


def _excerpts(text: str, count: int = 1000, size: int = 4000) -> str:
    """So many stretches of a text at equal distances: enough to train a tokenizer on in seconds."""
    every = max(len(text) // count, size)
    return "".join(text[start : start + size] for start in range(0, len(text), every))
