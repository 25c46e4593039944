"""What the configurations of encoders and encoder–decoders share: the backbone that attention stands in."""

from transformers.activations import ACT2FN

from .configuration_attention import SASAttentionConfig, require_choice, require_positive, strict


ROPE_KEYWORDS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


@strict
class SASTextConfig(SASAttentionConfig):
    r"""
    The part of a configuration that says what stands around attention in an encoder, or in both halves of an
    encoder–decoder.

    Args:
        position_embedding_type (`str`, defaults to `"learned"`):
            `"learned"` absolute positions, `"sinusoidal"` ones (Marian's: sines, then cosines), or `"rope"` (of
            queries and keys after simulation; attention to a source knows no positions then).
        rope_parameters (`dict`, *optional*):
            Of RoPE, as in [`~transformers.LlamaConfig`]; only with RoPE is there such an attribute, by which
            Transformers knows models whose positions can be scaled.
        padding_takes_positions (`bool`, defaults to `False`):
            Whether padding on the left counts as positions, as it does in BERT, BART and Marian. `False`: a row begins
            at its first real token, so that padding on either side changes nothing.
        scale_embedding (`bool`, defaults to `False`):
            Multiply the embeddings of tokens by √C (Marian, mBART).
        embedding_norm (`bool`):
            Norm the sum of embeddings (BERT, BART).
        norm_position (`str`):
            Where each branch f has its norm: `"post_residual"` norm(x + f(x)), as in "Attention Is All You Need", BERT
            and BART; `"pre"` x + f(norm(x)); `"post"` x + norm(f(x)) (OLMo 2). But for the first, the last layer is
            followed by a norm.
        norm_type (`str`, defaults to `"layer_norm"`):
            `"layer_norm"` (with `layer_norm_eps`) or `"rms_norm"` (with `rms_norm_eps`).
        mlp_type (`str`, defaults to `"plain"`):
            `"plain"` (up and down projection) or `"gated"` (gate, up and down projection).
        activation_dropout (`float`, defaults to 0.0):
            Dropout inside the feed-forward block.
    """

    hidden_act: str = "gelu"
    activation_dropout: int | float = 0.0
    initializer_range: float = 0.02
    norm_type: str = "layer_norm"
    norm_position: str = "post_residual"
    embedding_norm: bool = True
    rms_norm_eps: float = 1e-6
    position_embedding_type: str = "learned"
    padding_takes_positions: bool = False
    scale_embedding: bool = False
    mlp_type: str = "plain"
    mlp_bias: bool = True
    attention_bias: bool = True
    attention_output_bias: bool = True

    def __post_init__(self, **kwargs):
        if self.position_embedding_type == "rope":
            self.rope_parameters = kwargs.pop("rope_parameters", None)
        for name in ROPE_KEYWORDS:
            if self.position_embedding_type != "rope" and kwargs.pop(name, None) is not None:
                raise ValueError(
                    f"`{name}` is of RoPE, but `position_embedding_type` is {self.position_embedding_type!r}; "
                    "leave it out, or choose 'rope'."
                )
        super().__post_init__(**kwargs)
        # Also run by `@strict` afterwards; run here so that the error is a plain ValueError.
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for what cannot be built."""
        super().validate_architecture()
        require_positive(self, "vocab_size", "intermediate_size", "max_position_embeddings")
        require_choice(self, "position_embedding_type", "learned", "sinusoidal", "rope")
        require_choice(self, "norm_type", "layer_norm", "rms_norm")
        require_choice(self, "norm_position", "post_residual", "pre", "post")
        require_choice(self, "mlp_type", "plain", "gated")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}; it must be one of {', '.join(ACT2FN)}.")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be even with `position_embedding_type='sinusoidal'`: there "
                "are as many sines as cosines."
            )
