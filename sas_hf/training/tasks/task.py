"""What a task is: one object, which a run, the checks of a recipe, a study and the model card ask."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments

from ...data.tokenized_text import longest_text
from ...hub.checkpoints import AutoClass
from ..models import load_config
from ..optimizer import RecipeTrainer
from ..recipe_fields import TrainingRecipe


# Fields of `model` and `data` that may be set whatever the task.
COMMON = (
    *(f"model.{name}" for name in ("config", "checkpoint", "revision", "overrides", "tokenizer", "lora", "trainable")),
    *(f"data.{name}" for name in ("train", "validation", "cache")),
)


@dataclass(frozen=True)
class Metric:
    """
    A number that an evaluation has.

    Args:
        name: such as "accuracy": `metric_for_best_model` and studies call it so. The Trainer logs it as
            `eval_accuracy`: its own "loss", or one of the task's `compute_metrics`.
        label: in tables and figures.
        higher_is_better: else lower is.
        digits: behind the point, in tables.
        from_loss: computes it from the loss, where it is another form of that, as perplexity is; then the Trainer does
            not know it, and results hold it by its bare name.
        chance: of so many classes, what who guesses has.
        prefix: of the name in logs and results; none where it is not the Trainer that evaluates it.
    """

    name: str
    label: str
    higher_is_better: bool = False
    digits: int = 4
    from_loss: Callable[[float], float] | None = None
    chance: Callable[[int], float] | None = None
    prefix: str = "eval_"

    def of(self, numbers: dict[str, float]) -> float | None:
        """Its value in a line of the log or the results of a run; `None` where nothing was evaluated."""
        if self.from_loss is None:
            return numbers.get(self.prefix + self.name)
        return self.from_loss(numbers["eval_loss"]) if "eval_loss" in numbers else None


LOSS = Metric("loss", "validation loss")
MEASURED = 2000  # samples, whose lengths stand for those of all


@dataclass(frozen=True)
class Samples:
    """
    What a run trains on, as far as an estimate needs it.

    Args:
        count: of one epoch.
        lengths: in tokens, of some of the samples: a row for each, with a number for each of its sides (one, or of a
            pair of texts to translate two). Empty where all are of one length.
        fields: of the model's configuration, those that the data decide.
    """

    count: int
    lengths: list[tuple[int, ...]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """
    A task of recipes. A new one is a module here with a subclass, and its line in `TASKS`.

    Attributes:
        name: as recipes write it.
        auto_class: that loads what is trained, such as `AutoModelForCausalLM`.
        metrics: that its evaluations can have; studies compare by the first, unless told otherwise.
        reads: the fields of `model` and `data` that it looks at beside [`COMMON`], such as "data.text_column"; a
            recipe that sets another is refused.
        needs_tokenizer: its models read text, and a new one must be given a tokenizer.
        varied_lengths: its samples have them, so that they may be grouped by length.
        has_benchmarks: lm-evaluation-harness can score its models (`evaluation.tasks`).
    """

    name: str
    auto_class: AutoClass
    metrics: tuple[Metric, ...] = (LOSS,)
    reads: tuple[str, ...] = ()
    needs_tokenizer = False
    varied_lengths = False
    has_benchmarks = False

    def evaluated(self) -> dict[str, Metric]:
        """By name, the metrics that the Trainer itself knows: by them it can choose the best model."""
        return {metric.name: metric for metric in (LOSS, *self.metrics) if metric.from_loss is None}

    def possible_metrics(self, recipe: TrainingRecipe) -> tuple[Metric, ...]:
        """What the evaluations of this recipe can have, whatever its data are."""
        return self.metrics

    def metrics_of(self, recipe: TrainingRecipe) -> tuple[Metric, ...]:
        """Those of them that they have, where the data decide."""
        return self.possible_metrics(recipe)

    @abstractmethod
    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> RecipeTrainer:
        """
        The trainer of a recipe, a `RecipeTrainer`, with model, data, collator and metrics.

        Raises:
            ValueError, FileNotFoundError: for what cannot be trained; before a model is built.
        """

    def check_recipe(self, recipe: TrainingRecipe) -> None:  # noqa: B027
        """Raise a ValueError for fields that this task alone refuses; nothing is loaded."""

    def check_sources(self, recipe: TrainingRecipe) -> None:  # noqa: B027
        """Raise a ValueError or FileNotFoundError for what configuration, tokenizer and files show to be wrong.

        A study asks this of all its runs before the first; a run has it from `make_trainer`.
        """

    def is_validated(self, recipe: TrainingRecipe) -> bool:
        """Whether the recipe has something to evaluate on."""
        data = recipe.data
        return bool(data.validation or data.validation_split or data.validation_documents)

    def tokens_per_sequence(self, recipe: TrainingRecipe) -> int | None:
        """Of every sequence, where all have as many; then logs and studies count in tokens, else in steps."""
        return None

    def model_config(self, recipe: TrainingRecipe) -> PreTrainedConfig:
        """The configuration of its model, as far as it can be told without the data.

        Raises:
            ValueError, FileNotFoundError: as [`load_config`].
        """
        return load_config(recipe.model, self.auto_class)

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples | None:
        """Read how many samples there are to train on, and how long they are; `None`: this task does not tell.

        Raises:
            ValueError, FileNotFoundError: for data that cannot be trained on.
        """
        return None

    def longest(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> tuple[int, ...]:
        """The most tokens of each side of a sample."""
        positions = longest_text(config)
        length = recipe.data.sequence_length
        return (length if positions is None else min(length, positions),)

    def random_batch(
        self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]
    ) -> dict[str, torch.Tensor] | None:
        """Inputs and labels of the shape that the collator makes, with random numbers in them; `None`: this task does
        not tell.

        Args:
            lengths: of the sides, in tokens.
        """
        return None


def random_tokens(config: PreTrainedConfig, rows: int, length: int) -> torch.Tensor:
    """`[rows, length]`, special ones among them but no padding."""
    text_config = config.get_text_config()
    tokens = torch.randint(text_config.vocab_size, (rows, length))
    pad = text_config.pad_token_id
    return tokens if pad is None else tokens.masked_fill(tokens == pad, (pad + 1) % text_config.vocab_size)


def evenly(rows: Sequence, count: int = MEASURED) -> list[int]:
    """Places of so many rows at equal distances."""
    return list(range(0, len(rows), max(1, len(rows) // count)))
