"""What a source family says of itself, as tables: each has a module with an instance, convert.py does the rest."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import (
    SASEncoderForMaskedLM,
    SASEncoderForMultipleChoice,
    SASEncoderForQuestionAnswering,
    SASEncoderForSequenceClassification,
    SASEncoderForTokenClassification,
    SASEncoderModel,
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
)
from ..modeling.sharing import config_class_of


class ConversionError(ValueError):
    """A source that cannot be converted, or a conversion that is not exact; the message says why and what to do."""


def one_tensor(name: str, weight: torch.Tensor, config: PreTrainedConfig) -> Iterable[torch.Tensor]:
    """A weight that is one of the SAS model's as it is."""
    return (weight,)


def first_tensor(name: str, weights: Sequence[torch.Tensor], config: PreTrainedConfig) -> torch.Tensor:
    """The converse of [`one_tensor`]."""
    return weights[0]


SourceConfig = Any  # what each family has of its own


@dataclass(frozen=True)
class SourceFamily:
    """
    Args:
        model_type: the source's `config.model_type`.
        architectures: source class name → the SAS class with the same head.
        fields: field of the source's configuration → the SAS field that means the same.
        constants: SAS fields that are the same for the whole family.
        derive: source configuration → SAS fields that must be computed; raises a [`ConversionError`] for what no
            field can express.
        of_architecture: source class name → source configuration → SAS fields that only this class needs.
        names: part of a weight's name (whole words between dots) → the part of its SAS name, or several for a weight
            that becomes several; none for one that is computed. What is not listed keeps its name. The body's own
            prefix ("transformer." and the like) is not part of it.
        tensors: name and weight in the source, source configuration → the SAS weights, in the order of their names.
        join: the converse of `tensors`: name in the source, SAS weights, source configuration → the source's weight;
            raises a [`ConversionError`] for weights that the source cannot have.
        unread: pattern of the names of weights that the family's checkpoints hold for other classes than the one they
            name (BERT's next-sentence head). They are left out where the class has no place for them; all others end
            the conversion.
        without_pooler: SAS fields of a source that has no pooler though its class may have one; `None`: such a source
            is damaged.
    """

    model_type: str
    architectures: Mapping[str, type[PreTrainedModel]]
    fields: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    derive: Callable[[SourceConfig], dict] = lambda config: {}
    of_architecture: Mapping[str, Callable[[SourceConfig], dict]] = field(default_factory=dict)
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    tensors: Callable[[str, torch.Tensor, SourceConfig], Iterable[torch.Tensor]] = one_tensor
    join: Callable[[str, Sequence[torch.Tensor], SourceConfig], torch.Tensor] = first_tensor
    unread: str | None = None
    without_pooler: Mapping[str, object] | None = None

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """Of the SAS models."""
        return config_class_of(next(iter(self.architectures.values())))

    def sas_fields(self, config: PreTrainedConfig, architecture: str) -> dict:
        """The fields of the SAS configuration that make the source's function without simulation."""
        fields = {sas: getattr(config, name) for name, sas in self.fields.items()}
        own = self.of_architecture[architecture](config) if architecture in self.of_architecture else {}
        return fields | dict(self.constants) | own | self.derive(config)

    def sas_weights(self, source: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The weights of `source` by their SAS names; most are the source's own tensors or views of them."""
        weights: dict[str, torch.Tensor] = {}
        for name, weight in source.state_dict().items():
            names = self.sas_names(name, source.base_model_prefix)
            weights |= zip(names, self.tensors(name, weight, source.config), strict=True)
        return weights

    def source_fields(self, config: PreTrainedConfig) -> dict:
        """The fields of a source's configuration that a SAS configuration holds."""
        return {name: getattr(config, sas) for name, sas in self.fields.items()}

    def source_weights(
        self, weights: Mapping[str, torch.Tensor], names: Iterable[str], body: str, config: PreTrainedConfig
    ) -> dict[str, torch.Tensor]:
        """The weights of a source, all whose names are given, from those of a SAS model without its simulation.

        Raises:
            ConversionError: if the SAS model lacks some, has others, or has some that the source cannot have.
        """
        tables = {name: self.sas_names(name, body) for name in names}
        used = {name for sas_names in tables.values() for name in sas_names}
        if used != weights.keys():
            raise ConversionError(
                "The weights are not those of the conversion: missing "
                f"{sorted(used - weights.keys())[:5]}, unexpected {sorted(weights.keys() - used)[:5]}."
            )
        return {name: self.join(name, [weights[sas] for sas in tables[name]], config) for name in tables}

    def sas_names(self, name: str, body: str) -> list[str]:
        """The SAS names of a weight in a model whose body is the attribute `body`."""
        if name.startswith(f"{body}."):
            sas_body = next(iter(self.architectures.values())).base_model_prefix
            name = f"{sas_body}." + name.removeprefix(f"{body}.")
        if not self.names:
            return [name]
        parts = "|".join(map(re.escape, sorted(self.names, key=len, reverse=True)))
        pieces = re.split(rf"(?:^|(?<=\.))({parts})(?=\.|$)", name)  # the odd ones are parts in the table
        choices = [self.names[piece] if index % 2 else piece for index, piece in enumerate(pieces)]
        if () in choices:
            return []
        width = max(len(choice) if isinstance(choice, tuple) else 1 for choice in choices)
        return [
            "".join(choice[i] if isinstance(choice, tuple) else choice for choice in choices) for i in range(width)
        ]


def same(*names: str) -> dict[str, str]:
    """Fields that bear the same name on both sides."""
    return {name: name for name in names}


# Fields of every language model.
TEXT_FIELDS = same(
    "vocab_size",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# Of every decoder with RoPE.
ROPE_FIELDS = TEXT_FIELDS | same(
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rope_parameters",
)
# Of every one in Llama's manner.
LLAMA_FIELDS = ROPE_FIELDS | same("num_key_value_heads", "rms_norm_eps", "attention_dropout")


def text_architectures(
    prefix: str, causal: str = "ForCausalLM", without: tuple[str, ...] = ()
) -> dict[str, type[PreTrainedModel]]:
    """`architectures` of a text family whose class names begin with `prefix`, but for the heads that it has not."""
    heads = {
        "Model": SASGPTModel,
        causal: SASGPTForCausalLM,
        "ForSequenceClassification": SASGPTForSequenceClassification,
        "ForTokenClassification": SASGPTForTokenClassification,
        "ForQuestionAnswering": SASGPTForQuestionAnswering,
    }
    return {prefix + head: sas_class for head, sas_class in heads.items() if head not in without}


def encoder_architectures(prefix: str) -> dict[str, type[PreTrainedModel]]:
    """`architectures` of a family of encoders whose class names begin with `prefix`."""
    return {
        f"{prefix}Model": SASEncoderModel,
        f"{prefix}ForMaskedLM": SASEncoderForMaskedLM,
        f"{prefix}ForSequenceClassification": SASEncoderForSequenceClassification,
        f"{prefix}ForTokenClassification": SASEncoderForTokenClassification,
        f"{prefix}ForQuestionAnswering": SASEncoderForQuestionAnswering,
        f"{prefix}ForMultipleChoice": SASEncoderForMultipleChoice,
    }


def refuse_decoder(config: PreTrainedConfig) -> None:
    """Raise a [`ConversionError`] for an encoder's architecture that is used as a decoder."""
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ConversionError(
                f"`{name}` is true: the source is a {config.model_type} as decoder, which looks back only"
                f"{' and at an encoder' if name == 'add_cross_attention' else ''}, but SASEncoder looks at all of a "
                "text; convert an encoder, or an encoder-decoder (bart, mbart, marian)."
            )


def check_token(config: PreTrainedConfig, name: str, vocab_size: int) -> None:
    """Raise a [`ConversionError`] if the number of a token lies outside the vocabulary; `None` is no number."""
    number = getattr(config, name)
    if number is not None and not 0 <= number < vocab_size:
        raise ConversionError(
            f"`{name}` is {number}, but the vocabulary has {vocab_size} tokens, from 0 on; set it in the source's "
            "config.json to the token that is meant."
        )


def refuse_relative_positions(config: PreTrainedConfig) -> None:
    """Raise a [`ConversionError`] for scores that depend on distances, which Transformers 5 ignores in silence."""
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        raise ConversionError(
            f"`position_embedding_type` is {kind!r}: relative positions are part of the scores, for which neither the "
            'SAS model nor Transformers 5 has a place; only "absolute" positions are converted.'
        )


def refuse_sliding_window(config: PreTrainedConfig, active: bool) -> None:
    """Raise a [`ConversionError`] if some layer sees only a window that is shorter than the positions."""
    if active and config.sliding_window < config.max_position_embeddings:
        raise ConversionError(
            f"`sliding_window` is {config.sliding_window}, shorter than `max_position_embeddings` "
            f"({config.max_position_embeddings}): the source does not see all of a long text, but the SAS model "
            f"would. If texts of up to {config.sliding_window} tokens are enough, set `max_position_embeddings` to "
            "that in the source's config.json."
        )


def full_attention_only(config: PreTrainedConfig) -> dict:
    """`derive` of a family whose `layer_types` say which layers have a window: nothing, or a [`ConversionError`]."""
    refuse_sliding_window(config, active="sliding_attention" in config.layer_types)
    return {}


def common_dropout(config: PreTrainedConfig, *names: str) -> float:
    """`hidden_dropout` of a source that has a rate for the embeddings and one for the residual branches.

    Raises:
        ConversionError: if they differ.
    """
    rates = {name: getattr(config, name) for name in names}
    if len(set(rates.values())) > 1:
        raise ConversionError(
            f"The dropouts {', '.join(f'`{name}` ({rate})' for name, rate in rates.items())} differ, but the SAS "
            "model has one rate, `hidden_dropout`; give them one value in the source's config.json."
        )
    return rates[names[0]]
