"""What a recipe says, field by field; what is done with it stands elsewhere."""

import dataclasses
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any


RECIPES = files(__package__) / "recipes"


@dataclass
class ModelRecipe:
    """
    What is trained.

    Args:
        config: name of one of the papers' configurations, for a new model; or
        checkpoint: folder or Hub id of a model to go on from.
        revision: branch, tag or commit of a Hub checkpoint.
        conversion: fields of `ConversionOptions`; the checkpoint is converted to SAS as by `sas-hf convert`, verified
            and reported, into the folder `base` of the run, and trained from there. `{}`: converted by default;
            `None`: trained as it is.
        overrides: configuration fields to change (of a checkpoint that is converted: after it is).
        tokenizer: folder or Hub id; the checkpoint's own where `None`; "python-reference": one of 2,048 tokens that
            is trained on that text. Where `None`, a new language model, masked language model or classifier of texts
            gets one that is trained on its data.
        chat_template: Jinja file, or `chatml`; the tokenizer's own where `None`.
        lora: fields of peft's `LoraConfig`, such as `{r: 8, target_modules: [q_proj, v_proj]}`.
        trainable: regular expressions; only parameters whose names one of them matches are trained.
    """

    config: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    conversion: dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_template: str | None = None
    lora: dict[str, Any] | None = None
    trainable: list[str] | None = None


@dataclass
class DataRecipe:
    """
    What it is trained on.

    Args:
        train: text files or tables (CSV, TSV, JSON lines, parquet; names or patterns), a Hub id, or
            `"python-reference"`, the text that CPython brings along; for chats JSONL files, parquet files or a Hub id,
            with a column `messages`; for images what `load_image_dataset` takes; for labelled texts tables or a Hub
            id.
        validation: the same, but not what is trained on; or one of the next two; or nothing is validated.
        validation_split: of the Hub dataset `train`.
        validation_documents: so many documents from the start of `train`, which are then not trained on; of labelled
            texts, which may be sorted, so many at random.
        config: configuration of a Hub dataset.
        split: of Hub datasets.
        text_column: of tables and Hub datasets.
        second_text_column: of labelled texts that are pairs.
        label_column: of labelled texts: the name or number of a class, a number with a point that is to be predicted,
            or a list of labels; or several columns that hold 0 or 1.
        document_separator: line that parts the documents of a text file, such as `<|endoftext|>`; `None`: each file is
            one document.
        streaming: read `train` as it comes instead of tokenising it first; for datasets larger than the disk.
        shuffle_buffer: documents among which a stream is shuffled.
        sequence_length: tokens per packed sequence; of a chat, a labelled text or either side of a pair, those beyond
            are cut off.
        packed: of a masked language model: documents are packed into full sequences, else each is a row, cut and
            padded.
        mlm_probability: of a masked language model: share of the tokens that it must find.
        max_validation_sequences: of the validation text, chats or pairs, from their start.
        source_column, target_column: of pairs to translate: columns, or languages inside of a column `translation`.
        source_language, target_language: as a multilingual tokenizer writes them, such as `en_XX`.
        class_names: of the classes of images or labelled texts, in their order; by default the dataset's own.
        augment: flip and shift the training images at random.
        cache: folder for tokenised and packed text; `None`: that of `datasets`.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    validation_split: str | None = None
    validation_documents: int | None = None
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    second_text_column: str | None = None
    label_column: str | list[str] = "label"
    document_separator: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    sequence_length: int = 1024
    packed: bool = True
    mlm_probability: float = 0.15
    max_validation_sequences: int | None = 100
    source_column: str | None = None
    target_column: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    class_names: list[str] | None = None
    augment: bool = True
    cache: str | None = None


@dataclass
class EvaluationRecipe:
    """
    Benchmarks during the training, by `sas_hf.eval.evaluate`.

    Args:
        tasks: suites or tasks, such as `[sas_table1]`; none: no benchmarks.
        steps: every so many steps, and at the end.
        data: folder of parquet files, for evaluations without a network.
        limit: questions per task.
    """

    tasks: list[str] = field(default_factory=list)
    steps: int = 1000
    data: str | None = None
    limit: float | None = None


@dataclass
class TrainingRecipe:
    """
    A whole recipe.

    Args:
        task: what is trained, and how it is evaluated: "language_modeling", "chat", ...; all are in `tasks`.
        model, data, evaluation: see there.
        batch_size: sequences per step over all devices, which sets `gradient_accumulation_steps`; so that the same
            recipe is the same training on any number of devices. `None`: as `training` says.
        simulation_learning_rate: of the simulation's parameters; `None`: as all others.
        minimum_learning_rate: where the cosine ends (the papers' floor); the simulation's rate keeps its ratio to the
            others', there too. `None`: the schedule that `training` says.
        training: fields of `TrainingArguments`, `output_dir` among them; null is as if not given. `bf16: auto` is bf16
            where the device has it.
    """

    task: str = "language_modeling"
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    batch_size: int | None = None
    simulation_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return dataclasses.asdict(self)
