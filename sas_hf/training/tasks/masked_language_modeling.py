"""Masked language modelling: tokens that are hidden in a text, found from both sides, as BERT is pre-trained."""

from collections.abc import Sequence

import torch
from transformers import (
    AutoModelForMaskedLM,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from ...data.masking import MaskingCollator, masked_rows
from ...data.text import train_word_tokenizer
from ..adapters import lora_config, prepare_parameters
from ..base import starting_model
from ..data import check_data, training_data, training_rows, training_texts
from ..models import check_match, load_config, load_tokenizer, take_special_tokens
from ..optimizer import RecipeTrainer
from ..packing import MaskedPacker
from ..recipe_fields import TrainingRecipe
from .language_modeling import DOCUMENTS
from .task import LOSS, Metric, Samples, Task, evenly, random_tokens


class MaskedLanguageModeling(Task):
    """
    The loss is that of the masked tokens, in nats each. It is no perplexity of the text: all that is masked of a
    sequence is hidden at once, while a pseudo-perplexity hides each token alone.
    """

    name = "masked_language_modeling"
    auto_class = AutoModelForMaskedLM
    metrics = (LOSS, Metric("accuracy", "masked tokens found", higher_is_better=True))
    reads = (*DOCUMENTS, "data.packed", "data.mlm_probability")
    varied_lengths = True

    def check_recipe(self, recipe: TrainingRecipe) -> None:
        data, strategy = recipe.data, recipe.training.get("train_sampling_strategy")
        if not 0 < data.mlm_probability < 1:
            raise ValueError(f"`data.mlm_probability` is {data.mlm_probability}; it must be between 0 and 1.")
        if data.packed and strategy == "group_by_length":
            raise ValueError(
                f"`training.train_sampling_strategy` is {strategy!r}, but all sequences are of one length; leave it "
                "out, or set `data.packed` to false."
            )
        if recipe.training.get("label_smoothing_factor"):
            raise ValueError(
                f"`training.label_smoothing_factor` is {recipe.training['label_smoothing_factor']}, but what is "
                "masked has one right token; leave it out."
            )

    def check_sources(self, recipe: TrainingRecipe) -> None:
        self._load_sources(recipe)

    def tokens_per_sequence(self, recipe: TrainingRecipe) -> int | None:
        return recipe.data.sequence_length if recipe.data.packed else None

    def _load_sources(self, recipe: TrainingRecipe) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
        check_data(recipe.data)
        config = load_config(recipe.model, self.auto_class)
        if recipe.model.checkpoint is None and recipe.model.tokenizer is None:
            tokenizer: PreTrainedTokenizerBase = train_word_tokenizer(training_texts(recipe.data), config.vocab_size)
        else:
            tokenizer = load_tokenizer(recipe.model, parts_documents=False)
        for name in ("mask", "pad"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise ValueError(
                    f"The tokenizer has no {name} token, which a masked language model needs; take another "
                    "`model.tokenizer`, or for a new model none: one is trained on the data."
                )
        MaskedPacker(tokenizer, recipe.data.sequence_length)
        check_match(recipe, config, tokenizer)
        take_special_tokens(recipe.model, config, tokenizer)
        if recipe.model.lora is not None:
            lora_config(recipe.model.lora)
        return config, tokenizer

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples:
        _, tokenizer = self._load_sources(recipe)
        packer = MaskedPacker(tokenizer, recipe.data.sequence_length, recipe.data.packed)
        lengths = [(len(row["input_ids"]),) for row in training_rows(recipe.data, packer)]
        return Samples(len(lengths), [] if recipe.data.packed else [lengths[place] for place in evenly(lengths)])

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        tokens = random_tokens(config, rows, *lengths)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> RecipeTrainer:
        config, tokenizer = self._load_sources(recipe)
        packer = MaskedPacker(tokenizer, recipe.data.sequence_length, recipe.data.packed)
        data, probability = training_data(recipe.data, tokenizer, arguments.seed, packer), recipe.data.mlm_probability
        validation = None
        if data.validation is not None:  # every evaluation, of every run, hides the same tokens
            validation = masked_rows(data.validation, tokenizer, probability)
        model = starting_model(self.auto_class, recipe.model, config, arguments, tokenizer)
        return RecipeTrainer(
            prepare_parameters(model, recipe.model),
            arguments,
            train_dataset=data.train,
            eval_dataset=validation,
            data_collator=MaskingCollator(tokenizer, mlm_probability=probability),
            processing_class=tokenizer,
            compute_metrics=found_tokens,
            preprocess_logits_for_metrics=most_likely,
            callbacks=list(callbacks),
        )


def most_likely(logits, labels):
    """Of each place its token, as there are too many logits to keep."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


def found_tokens(found: EvalPrediction) -> dict[str, float]:
    """The share of masked tokens that are the most likely ones."""
    masked = found.label_ids != -100
    return {"accuracy": (found.predictions[masked] == found.label_ids[masked]).mean()}
