"""What the tasks of causal language models share: their model, tokenizer and metrics."""

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..adapters import lora_config
from ..base import starting_model
from ..benchmarks import PREFIX, check_benchmarks, known_scores
from ..models import check_match, load_config, load_tokenizer, take_special_tokens
from ..recipe_fields import TrainingRecipe
from ..reporting import perplexity
from .task import LOSS, Metric, Task, random_tokens


PERPLEXITY = Metric("perplexity", "perplexity", digits=2, from_loss=perplexity)


class CausalTask(Task):
    """A task that trains a causal language model."""

    auto_class = AutoModelForCausalLM
    metrics = (LOSS, PERPLEXITY)
    needs_tokenizer = True
    has_benchmarks = True

    def possible_metrics(self, recipe: TrainingRecipe) -> tuple[Metric, ...]:
        known = known_scores(recipe.evaluation).items()
        scores = [Metric(name, name.removeprefix(PREFIX), higher, prefix="") for name, higher in known]
        return (*self.metrics, *scores)

    def check_sources(self, recipe: TrainingRecipe) -> None:
        self.load_sources(recipe)

    def load_sources(self, recipe: TrainingRecipe) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
        """
        Configuration and tokenizer of the model, once nothing in them is left to refuse.

        Raises:
            ValueError, FileNotFoundError, ImportError: as [`load_config`], [`load_tokenizer`], [`check_match`],
                [`lora_config`] and [`check_benchmarks`].
        """
        config = load_config(recipe.model)
        tokenizer = self.tokenizer(recipe, config)
        check_match(recipe, config, tokenizer)
        take_special_tokens(recipe.model, config, tokenizer)
        if recipe.model.lora is not None:
            lora_config(recipe.model.lora)
        check_benchmarks(recipe.evaluation)
        return config, tokenizer

    def tokenizer(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
        return load_tokenizer(recipe.model)

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        tokens = random_tokens(config, rows, *lengths)
        return {"input_ids": tokens, "labels": tokens}

    def build_model(
        self,
        recipe: TrainingRecipe,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        arguments: TrainingArguments,
    ) -> PreTrainedModel:
        """The model of the recipe, before adapters are put on it or parameters frozen."""
        return starting_model(self.auto_class, recipe.model, config, arguments, tokenizer)
