"""Configuration of the SAS encoder: BERT's fields, the backbone choices of other encoders, and attention's own."""

from transformers.activations import ACT2FN

from .configuration_attention import require_choice, strict
from .configuration_text import SASTextConfig
from .parallel_plans import TensorParallelPlan, encoder_parallel_plan


@strict
class SASEncoderConfig(SASTextConfig):
    r"""
    Configuration of a [`SASEncoderModel`]: a bidirectional encoder of text with any attention of this package. With
    `attention_type="mha"` and no simulation it is Transformers' BERT (with `padding_takes_positions` for texts that
    are padded on the left).

    Attention's own fields are those of [`SASAttentionConfig`], the backbone's those of [`SASTextConfig`]; nothing is
    cached. Fields not listed here (`vocab_size`, `hidden_size`, `intermediate_size`, `hidden_dropout_prob`,
    `type_vocab_size`, ...) mean what they mean in [`~transformers.BertConfig`].

    Args:
        type_vocab_size (`int`, defaults to 2):
            Token types, which tell the texts of a pair apart; 0: none.
        classifier_pooling (`str`, defaults to `"first"`):
            What the pooler, or without one the classifier of texts, reads: the `"first"` token of a row or the
            `"mean"` of its real tokens.
        pooler_act (`str`, *optional*, defaults to `"tanh"`):
            Activation of the pooler, a dense layer on what was pooled; `None`: there is no such layer.
        classifier_dropout (`float`, *optional*):
            Before the classifier; `hidden_dropout_prob` when `None`.
        lm_head_act (`str`, *optional*):
            Activation in the head for masked tokens; `hidden_act` when `None` (RoBERTa has GELU there in any case).

    Raises:
        ValueError: for a misspelt field or an impossible combination; the message names the field and valid values.
    """

    model_type = "sas_encoder"
    attribute_map = {"hidden_dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}

    # What the attention layers read of any architecture, and is never otherwise in an encoder.
    is_causal = False

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    classifier_pooling: str = "first"
    pooler_act: str | None = "tanh"
    classifier_dropout: float | int | None = None
    lm_head_act: str | None = None

    @TensorParallelPlan
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the base model; it depends on the attention kind."""
        return encoder_parallel_plan(self)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for what cannot be built."""
        super().validate_architecture()
        if self.is_causal:
            raise ValueError(
                "`is_causal` is True, but an encoder sees both directions; leave it out, or take a `SASGPTConfig`."
            )
        require_choice(self, "classifier_pooling", "first", "mean")
        for name in ("pooler_act", "lm_head_act"):
            if getattr(self, name) is not None and getattr(self, name) not in ACT2FN:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it may be None or one of {', '.join(ACT2FN)}.")
        if self.type_vocab_size < 0:
            raise ValueError(f"`type_vocab_size` is {self.type_vocab_size}; it must be 0 (no token types) or more.")


__all__ = ["SASEncoderConfig"]
