"""Translation by an encoder-decoder of Transformers: pairs of texts in, BLEU, chrF and samples of translations out."""

import copy
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
)

from ...data.languages import begin_with_language, language_token, set_languages
from ...data.text_files import find_files
from ...data.text_pairs import (
    PairColumns,
    encode_side,
    read_pairs,
    train_pair_tokenizer,
    warn_if_swapped,
    warn_of_likeness,
)
from ...hub.checkpoints import CARD_NAME
from ...report.files import write_atomically
from ...report.translation import corpus_metrics, corpus_scores
from ..adapters import lora_config, prepare_parameters
from ..base import starting_model
from ..folders import output_folder
from ..held_out import check_apart, compare_with_training, digests
from ..models import check_match, load_config, load_tokenizer, take_special_tokens
from ..optimizer import RecipeTrainer
from ..recipe_fields import DataRecipe, TrainingRecipe
from ..reporting import read_log
from .task import LOSS, Metric, Samples, Task, evenly, random_tokens


# Of a run: what each evaluation translated, a file each.
TRANSLATIONS = "translations"
SHOWN = 8  # of these on a card
IGNORED = -100  # a label that is no target
# Of `TrainingArguments`: without these an evaluation has no BLEU.
USUAL = {"eval_do_concat_batches": True, "batch_eval_metrics": False, "prediction_loss_only": False}


class Translation(Task):
    name = "translation"
    auto_class = AutoModelForSeq2SeqLM
    metrics = (
        Metric("bleu", "validation BLEU", higher_is_better=True, digits=2),
        Metric("chrf", "validation chrF", higher_is_better=True, digits=2),
        Metric("token_accuracy", "token accuracy", higher_is_better=True),
        LOSS,
    )
    reads = (
        "model.conversion",
        "data.source_column",
        "data.target_column",
        "data.source_language",
        "data.target_language",
        "data.validation_split",
        "data.config",
        "data.split",
        "data.sequence_length",
        "data.max_validation_sequences",
    )
    varied_lengths = True

    def check_recipe(self, recipe: TrainingRecipe) -> None:
        _columns(recipe.data)
        for name in ("sequence_length", "max_validation_sequences"):
            value, least = getattr(recipe.data, name), 3 if name == "sequence_length" else 1
            if value is not None and value < least:
                raise ValueError(f"`data.{name}` is {value}; it must be at least {least}.")
        if recipe.data.validation and recipe.data.validation_split:
            raise ValueError("`data.validation` and `data.validation_split` are both given; set one to null.")
        for name, usual in USUAL.items():
            if recipe.training.get(name, usual) != usual:
                raise ValueError(
                    f"`training.{name}` is {str(not usual).lower()}, but BLEU is of all translations together; leave "
                    "it out."
                )

    def check_sources(self, recipe: TrainingRecipe) -> None:
        self.load_sources(recipe)

    def load_sources(
        self, recipe: TrainingRecipe
    ) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, Dataset, Dataset | None]:
        """
        Configuration, tokenizer, and the pairs to train and validate on, once nothing in them is left to refuse.

        Raises:
            ValueError, FileNotFoundError, ImportError: for what cannot be trained.
        """
        corpus_metrics(recipe.data.target_language or recipe.data.target_column)
        config = load_config(recipe.model, self.auto_class)
        if not config.is_encoder_decoder:
            raise ValueError(
                f"{recipe.model.config or recipe.model.checkpoint} is a {config.model_type} that is no "
                "encoder-decoder; the task needs one, such as nmt-standard, a BART or a Marian."
            )
        if recipe.model.lora is not None:
            lora_config(recipe.model.lora)
        train, validation = load_splits(recipe.data)
        tokenizer = pair_tokenizer(recipe, config, train)
        check_match(recipe, config, tokenizer)
        check_tokens(recipe, config, tokenizer)
        return config, tokenizer, train, validation

    def read_samples(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> Samples:
        _, tokenizer, train, _ = self.load_sources(recipe)
        some = train.select(evenly(train))
        sides = (("source", False), ("target", True))
        found = [
            encode_side(tokenizer, some[name][:], recipe.data.sequence_length, target=target)[0]
            for name, target in sides
        ]
        return Samples(len(train), [tuple(map(len, pair)) for pair in zip(*found, strict=True)])

    def longest(self, recipe: TrainingRecipe, config: PreTrainedConfig) -> tuple[int, ...]:
        return super().longest(recipe, config) * 2

    def random_batch(self, config: PreTrainedConfig, rows: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        tokens = random_tokens(config, rows, lengths[0])
        vocabulary = getattr(config, "decoder_vocab_size", None) or config.get_text_config().vocab_size
        labels = torch.randint(vocabulary, (rows, lengths[1]))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def make_trainer(
        self, recipe: TrainingRecipe, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> "TranslationTrainer":
        config, tokenizer, train, validation = self.load_sources(recipe)
        length = recipe.data.sequence_length
        rows = encoded(train, tokenizer, length, "data.train")
        held_out = validation and encoded(validation, tokenizer, length, "data.validation")
        model = starting_model(self.auto_class, recipe.model, config, arguments, tokenizer)
        prepare_generation(model, tokenizer, length + 1)
        adapted = prepare_parameters(model, recipe.model, tokenizer)
        fields = arguments.to_dict() | {
            "hub_token": arguments.hub_token,  # which `to_dict` hides
            "predict_with_generate": True,
            "generation_max_length": length + 1,  # with the token that a decoder starts with
            "generation_num_beams": 1,
        }
        return TranslationTrainer(
            adapted,
            Seq2SeqTrainingArguments(**fields),
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=adapted, label_pad_token_id=IGNORED),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            validation=validation,
            language=recipe.data.target_language or recipe.data.target_column,
        )


class TranslationTrainer(RecipeTrainer, Seq2SeqTrainer):
    """
    The stock `Seq2SeqTrainer` that loses no work (see [`RecipeTrainer`]): it validates by greedy translations
    (`predict_with_generate`), whose references are the texts themselves, and keeps them.

    The loss is the mean over the targets of a step, whatever the micro-batches: many encoder-decoders of
    Transformers, BART and Marian among them, do not count the targets of a step themselves.

    Args:
        validation: columns `source` and `target`, the rows of `eval_dataset`.
        language: that is translated into.
        args, kwargs: as `Seq2SeqTrainer`'s.
    """

    def __init__(self, model, args, *, validation: Dataset | None = None, language: str | None = None, **kwargs):
        self.validation, self.language = validation, language
        super().__init__(
            model,
            args,
            compute_loss_func=self.mean_over_targets,
            compute_metrics=None if validation is None else self.score_translations,
            **kwargs,
        )

    def mean_over_targets(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Cross-entropy over `num_items_in_batch` targets, or those of this batch; smoothed while training."""
        smoothing = 0.0 if self.label_smoother is None else self.args.label_smoothing_factor
        total = nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            labels.flatten().to(outputs.logits.device),
            ignore_index=IGNORED,
            label_smoothing=smoothing,
            reduction="sum",
        )
        return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return SequentialSampler(eval_dataset)  # not by length: translations are scored by their references' places

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generation):
        """The stock one's, and of each row how many targets were the likeliest token, and how many there are."""
        inference: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        settings = copy.deepcopy(inference.generation_config)
        try:
            found = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys, **generation)
        finally:  # the stock one leaves defaults there, a length of 20 among them, which would be saved
            inference.generation_config = settings
        loss, translations, labels = found
        if translations is None or labels is None:
            return found
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            guesses = model(**inputs).logits.argmax(dim=-1)
        targets = inputs["labels"].ne(IGNORED)
        right = guesses.eq(inputs["labels"]) & targets
        return loss, (translations, torch.stack([right.sum(dim=1), targets.sum(dim=1)], dim=1)), labels

    def score_translations(self, prediction: EvalPrediction) -> dict[str, float]:
        """BLEU, chrF and token accuracy; the translations go to a file."""
        validation, tokenizer = cast(Dataset, self.validation), cast(PreTrainedTokenizerBase, self.processing_class)
        tokens, counts = (part[: len(validation)] for part in prediction.predictions)
        pad = tokenizer.pad_token_id
        hypotheses = tokenizer.batch_decode(np.where(tokens < 0, pad, tokens), skip_special_tokens=True)
        hypotheses = [text.strip() for text in hypotheses]
        references = validation["target"][:]
        scores = corpus_scores(hypotheses, references, self.language)
        right, targets = counts.sum(axis=0)
        if self.is_world_process_zero():
            rows = zip(validation["source"], references, hypotheses, strict=True)
            content = {
                "step": self.state.global_step,
                "scores": scores,
                "pairs": [dict(zip(("source", "reference", "translation"), row, strict=True)) for row in rows],
            }
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            path = self._translations(self.state.global_step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
        return scores | {"token_accuracy": float(right / targets)}

    def _translations(self, step: int) -> Path:
        return output_folder(self.args) / TRANSLATIONS / f"step-{step}.json"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        card = (Path(output_dir) if output_dir else output_folder(self.args)) / CARD_NAME
        if self.args.should_save and card.is_file():
            path = self._translations(self.step_of_model)
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            add_translations(card, found, self._seconds_per_epoch())

    def _seconds_per_epoch(self) -> float | None:
        """Of training alone, at the log's median speed; `None` where nothing was logged."""
        try:
            speeds = [
                line["steps_per_second"] for line in read_log(output_folder(self.args)) if "steps_per_second" in line
            ]
        except FileNotFoundError:
            return None
        steps = math.ceil(len(cast(Dataset, self.train_dataset)) / self.get_total_train_batch_size(self.args))
        speeds = [speed for speed in speeds if speed]
        return steps / statistics.median(speeds) if speeds else None


def load_splits(data: DataRecipe) -> tuple[Dataset, Dataset | None]:
    """
    Pairs to train on, and those to validate on, if any: columns `source` and `target`.

    Raises:
        FileNotFoundError, ValueError: as [`read_pairs`], and for validation on what is trained on. Warns of columns
            that seem to be swapped or alike.
    """
    columns, source = _columns(data), cast(str | list[str], data.train)
    files = find_files(source, "data.train")
    held_out = find_files(data.validation, "data.validation") if data.validation else None
    if files and data.validation_split:
        raise ValueError(
            f"`data.validation_split` is {data.validation_split!r}, but only a dataset of the Hub has splits; name "
            "files in `data.validation`."
        )
    check_apart(data, files, held_out)
    options = {"config": data.config, "cache": data.cache}
    train = read_pairs(source, columns, "data.train", split=data.split, **options)
    warn_of_likeness(train, "data.train")
    if not (data.validation or data.validation_split):
        return train, None
    name = "data.validation" if data.validation else "data.validation_split"
    split = data.validation_split or data.split
    validation = read_pairs(data.validation or source, columns, name, split=split, **options)
    validation = validation.take(min(len(validation), data.max_validation_sequences or len(validation)))
    warn_of_likeness(validation, name)
    warn_if_swapped(train, validation, ("data.train", name))
    known = np.array([digest for row in train for digest in digests(_as_text(row))])
    compare_with_training(map(_as_text, validation), [known], "lines of the pairs")
    return train, validation


def _as_text(pair: dict[str, str]) -> str:
    return f"{pair['source']}\t{pair['target']}"


def _columns(data: DataRecipe) -> PairColumns:
    source, target = cast(str, data.source_column), cast(str, data.target_column)
    return PairColumns(source, target, ("data.source_column", "data.target_column"))


def pair_tokenizer(recipe: TrainingRecipe, config: PreTrainedConfig, train: Dataset) -> PreTrainedTokenizerBase:
    """
    The recipe's or the checkpoint's tokenizer, told both languages where it knows any; for a new model without one
    that is made on the data.

    Raises:
        ValueError: as [`load_tokenizer`] and [`train_pair_tokenizer`], for languages that the tokenizer lacks, or
            that a model's two vocabularies would need two.
    """
    model, data = recipe.model, recipe.data
    if model.tokenizer is None and model.checkpoint is None:
        sizes = {config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size}
        if len(sizes) > 1:
            raise ValueError(
                f"The model's `vocab_size` is {config.vocab_size} and its `decoder_vocab_size` "
                f"{config.decoder_vocab_size}, but the tokenizer that is made on the data serves both sides; let "
                "`model.overrides.decoder_vocab_size` be the same, or give `model.tokenizer`."
            )
        longest = getattr(config, "max_position_embeddings", None) or data.sequence_length
        tokenizer: PreTrainedTokenizerBase = train_pair_tokenizer(train, config.vocab_size, longest)
    else:
        tokenizer = load_tokenizer(model)
    set_languages(
        tokenizer, (data.source_language, data.target_language), ("data.source_language", "data.target_language")
    )
    tokenizer.padding_side = "right"  # targets begin behind the token that the decoder starts with
    return tokenizer


def check_tokens(recipe: TrainingRecipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Let a new model begin, end and pad as its tokenizer does, in `config`; a checkpoint must know how.

    Raises:
        ValueError: for a tokenizer without end or padding, or a checkpoint without start or padding.
    """
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"The tokenizer of {recipe.model.tokenizer or recipe.model.checkpoint} has no `{name}`, by which "
                "translations end and are padded; give `model.tokenizer` one that has it."
            )
    pad = tokenizer.pad_token_id
    if recipe.model.checkpoint is None:
        take_special_tokens(recipe.model, config, tokenizer)
        config.pad_token_id = pad
        if "decoder_start_token_id" not in recipe.model.overrides:
            config.decoder_start_token_id = pad if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    elif config.pad_token_id != pad:
        raise ValueError(
            f"The model's `pad_token_id` is {config.pad_token_id}, but its tokenizer pads with {pad} "
            f"({tokenizer.pad_token!r}); set `model.overrides.pad_token_id`, or give `model.tokenizer` its own."
        )
    if getattr(config, "decoder_start_token_id", None) is None and language_token(tokenizer) is None:
        raise ValueError(
            "The model's `decoder_start_token_id` is None, so that no translation could begin; set "
            f"`model.overrides.decoder_start_token_id` (usually that of padding, {pad}, of the beginning or the end)."
        )


def prepare_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Let the model translate into the tokenizer's target language, and no longer than it was trained where it has no
    limit of its own (else Transformers' would be 20 tokens)."""
    settings = model.generation_config
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        if getattr(settings, name, None) is None:
            setattr(settings, name, getattr(model.config, name, None))
    if settings.max_length is None and settings.max_new_tokens is None:
        settings.max_length = max_length
    start = begin_with_language(settings, tokenizer)
    if start is not None:
        model.config.decoder_start_token_id = start


def encoded(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> Dataset:
    """The pairs as `input_ids` and `labels`; texts that are cut off to the length are counted in a warning.

    Args:
        name: of the pairs, for the warning.
    """
    inputs, sources = encode_side(tokenizer, pairs["source"][:], max_length, target=False)
    labels, targets = encode_side(tokenizer, pairs["target"][:], max_length, target=True)
    if sources or targets:
        warnings.warn(
            f"Of the {len(pairs):,} pairs of `{name}`, {sources:,} sources and {targets:,} targets are longer than "
            f"`data.sequence_length` = {max_length} tokens and are cut off there; a larger length keeps them whole.",
            stacklevel=3,
        )
    return Dataset.from_dict({"input_ids": inputs, "labels": labels})


def add_translations(path: Path, found: dict | None, seconds_per_epoch: float | None) -> None:
    """Say on a model's card that it translates, how well and what, as its last evaluation found, and how long an epoch
    took."""
    card = ModelCard.load(path)
    card.data.pipeline_tag = "translation"
    if seconds_per_epoch is not None:
        card.text = card.text.rstrip() + f"\n\nAn epoch took {seconds_per_epoch:,.1f} seconds of training.\n"
    if found is not None:
        bleu, chrf = found["scores"].values()
        lines = []
        for pair in found["pairs"][:SHOWN]:
            lines += [f"- **source**: {_line(pair['source'])}"]
            lines += [f"  **{name}**: {_line(pair[name])}" for name in ("reference", "translation")]
        card.text = (
            f"{card.text.rstrip()}\n\n## Translations\n\nBLEU {bleu:.2f} and chrF {chrf:.2f} on "
            f"{len(found['pairs']):,} pairs that were not trained on, translated greedily. The first of them:\n\n"
            + "  \n".join(lines)
            + "\n"
        )
    card.save(path)


def _line(text: str) -> str:
    return " ".join(text.split())
