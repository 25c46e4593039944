"""Configuration of the SAS encoder–decoder: BART's and Marian's fields, and attention's own for each of its places."""

from typing import TYPE_CHECKING, Any

from .configuration_attention import (
    SASAttentionConfig,
    require_positive,
    resolve_attention_fields,
    strict,
    validate_attention_fields,
)
from .configuration_text import SASTextConfig
from .parallel_plans import TensorParallelPlan, seq2seq_parallel_plans


PLACES = ("encoder", "decoder", "cross")

# Fields that a place may have of its own, and for those that follow from others when they are not given, what they
# follow from: where a place changes that, they are not the whole's any more.
OWN_FIELDS = ("num_attention_heads", *SASAttentionConfig.__annotations__)
_OF_HEADS = ("num_attention_heads", "head_dim", "attention_type")
_FOLLOWS = {
    "num_key_value_heads": ("num_attention_heads", "attention_type"),
    "head_dim": ("num_attention_heads",),
    "query_pre_attn_scalar": (*_OF_HEADS, "simulated_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "q_rank", "k_rank", "v_rank"), _OF_HEADS),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), _OF_HEADS),
}


if TYPE_CHECKING:
    Whole = SASTextConfig  # a place is a configuration in all that is read of it
else:
    Whole = object


class AttentionPlace(Whole):
    """
    A configuration as one place of attention sees it: with that place's own fields, and all else the whole's, as it is
    when it is read (the attention implementation and the form of the cache may change on a live model).

    Args:
        whole: the configuration.
        name: "encoder", "decoder" or "cross".
    """

    # What is computed of fields is computed of this place's.
    query_head_dim = SASAttentionConfig.query_head_dim
    simulates = SASAttentionConfig.simulates
    projects_to_cached_heads = SASAttentionConfig.projects_to_cached_heads
    qk_head_dim = SASAttentionConfig.qk_head_dim
    rotary_dim = SASAttentionConfig.rotary_dim

    def __init__(self, whole: SASTextConfig, name: str):
        self.whole, self.name = whole, name
        self.is_causal = name == "decoder"
        if name != "encoder":
            self.intermediate_size = whole.decoder_intermediate_size
        own = getattr(whole, f"{name}_attention") or {}
        defaults = {field: getattr(SASAttentionConfig, field) for field in _FOLLOWS if field not in own}
        self.__dict__.update(own)
        self.__dict__.update(
            {f: default for f, default in defaults.items() if any(other in own for other in _FOLLOWS[f])}
        )
        if own:
            resolve_attention_fields(self)

    def __getattr__(self, name: str) -> Any:
        if name == "whole" or name.startswith("__"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


@strict
class SASSeq2SeqConfig(SASTextConfig):
    r"""
    Configuration of a [`SASSeq2SeqModel`]: an encoder–decoder with any attention of this package in its encoder, in
    its decoder, and from the decoder to the encoder's output. With `attention_type="mha"` and no simulation it is
    Transformers' BART or Marian (with `padding_takes_positions` for texts that are padded on the left).

    Attention's own fields are those of [`SASAttentionConfig`], the backbone's those of [`SASTextConfig`]. Fields not
    listed here (`vocab_size`, `hidden_size` or `d_model`, `decoder_start_token_id`, ...) mean what they mean in
    [`~transformers.BartConfig`].

    Args:
        encoder_attention, decoder_attention, cross_attention (`dict`, *optional*):
            Attention's fields, and `num_attention_heads`, that are others in one place: in the encoder, in the
            decoder's attention to what it wrote, or in its attention to the source. What follows from them and is not
            given, such as `head_dim`, follows anew.
        encoder_layers (`int`, defaults to 6):
            Layers of the encoder.
        decoder_layers (`int`, *optional*):
            Layers of the decoder; as many as the encoder's when `None`.
        decoder_intermediate_size (`int`, *optional*):
            Width of the decoder's feed-forward blocks; `intermediate_size` when `None`.
        decoder_vocab_size (`int`, *optional*):
            Tokens of the decoder; `vocab_size` when `None`.
        share_encoder_decoder_embeddings (`bool`, defaults to `True`):
            One table of tokens for both, which needs as many tokens on both sides.
        tie_word_embeddings (`bool`, defaults to `True`):
            The language-modelling head has the decoder's embeddings as weights.
        lm_head_bias (`bool`, defaults to `False`):
            Whether the head has a bias (BART's and Marian's `final_logits_bias`).
        decoder_starts_with_last_label (`bool`, defaults to `False`):
            The decoder's inputs begin with the last token of the labels, as in mBART, whose labels end in the
            language; else with `decoder_start_token_id`.

    Raises:
        ValueError: for a misspelt field or an impossible combination; the message names the field and valid values.
    """

    model_type = "sas_seq2seq"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"num_hidden_layers": "encoder_layers", "d_model": "hidden_size", "dropout": "hidden_dropout"}

    vocab_size: int = 32000
    decoder_vocab_size: int | None = None
    hidden_size: int = 768
    encoder_layers: int = 6
    decoder_layers: int | None = None
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    decoder_intermediate_size: int | None = None
    hidden_dropout: int | float = 0.1
    attention_dropout: int | float = 0.0
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    encoder_attention: dict | None = None
    decoder_attention: dict | None = None
    cross_attention: dict | None = None
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 2
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    decoder_starts_with_last_label: bool = False

    def __post_init__(self, **kwargs):
        kwargs = self.take_aliases(kwargs)
        if self.decoder_layers is None:
            self.decoder_layers = self.encoder_layers
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = self.intermediate_size
        if self.decoder_vocab_size is None:
            self.decoder_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)

    def place(self, name: str) -> AttentionPlace:
        """The configuration as attention sees it in the "encoder", in the "decoder", or from there to the source
        ("cross")."""
        return AttentionPlace(self, name)

    @TensorParallelPlan
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the base model; it depends on the attention kinds."""
        plans = seq2seq_parallel_plans(self).items()
        return {f"{half}.{name}": style for half, plan in plans for name, style in plan.items()}

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for what cannot be built."""
        super().validate_architecture()
        require_positive(self, "decoder_layers", "decoder_intermediate_size", "decoder_vocab_size")
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` is False, but this is an encoder–decoder; leave it out.")
        if hasattr(self, "is_causal"):
            raise ValueError(
                f"`is_causal` is {self.is_causal}, but an encoder sees both directions and a decoder what it wrote; "
                "leave it out."
            )
        if self.share_encoder_decoder_embeddings and self.decoder_vocab_size != self.vocab_size:
            raise ValueError(
                f"`share_encoder_decoder_embeddings` is True, but `decoder_vocab_size` ({self.decoder_vocab_size}) is "
                f"not `vocab_size` ({self.vocab_size}); set it to False for two vocabularies."
            )
        for name in PLACES:
            self._validate_place(name)

    def _validate_place(self, name: str):
        field = f"{name}_attention"
        own = getattr(self, field)
        if own is None:
            return
        for key in own:
            if key not in OWN_FIELDS:
                raise ValueError(
                    f"`{field}` ({own}) has {key!r}, which is no field of attention; it may have "
                    f"{', '.join(OWN_FIELDS)}."
                )
        try:
            validate_attention_fields(self.place(name))
        except ValueError as error:
            raise ValueError(f"`{field}` ({own}): {error}") from error


__all__ = ["SASSeq2SeqConfig"]
