"""Configuration of the SAS ViT: the fields of Transformers' ViT, how images become tokens, and attention's own."""

from typing import cast

from transformers.activations import ACT2FN

from .configuration_attention import SASAttentionConfig, require_choice, strict


@strict
class SASViTConfig(SASAttentionConfig):
    r"""
    Configuration of a [`SASViTModel`]: a Vision Transformer with any attention of this package. With
    `attention_type="mha"` and no simulation it is Transformers' ViT.

    Attention's own fields are those of [`SASAttentionConfig`]; attention is bidirectional and nothing is cached.
    Fields not listed here (`hidden_size`, `image_size`, `patch_size`, `num_channels`, `qkv_bias`, `encoder_stride`,
    `pooler_output_size`, `pooler_act`, ...) mean what they mean in [`~transformers.ViTConfig`]; sizes may be given as
    `(height, width)`.

    Args:
        use_class_token (`bool`, defaults to `True`):
            Put a learned token before the patches.
        use_distillation_token (`bool`, defaults to `False`):
            Put DeiT's second learned token after the class token.
        classifier_pooling (`str`, defaults to `"class_token"`):
            What the classifier (and the pooler) reads: the `"class_token"`, the `"mean"` of the patches, or
            `"distilled"`: one classifier on the class token and one on the distillation token, whose logits are
            averaged, as DeiT does it in inference.
        classifier_hidden_size (`int`, *optional*):
            Width of a hidden layer of the classifier, with `hidden_act`; `None`: the classifier is linear, as in ViT.
        rms_norm_eps (`float`, defaults to 1e-6):
            Of the norms of MLA's latents, queries and keys.

    Raises:
        ValueError: for a misspelt field or an impossible combination; the message names the field and valid values.
    """

    model_type = "sas_vit"
    attribute_map = {"attention_bias": "qkv_bias", "attention_dropout": "attention_probs_dropout_prob"}

    # What the attention layers read of any architecture, and is never otherwise for images.
    is_causal = False
    attention_output_bias = True

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    use_class_token: bool = True
    use_distillation_token: bool = False
    classifier_pooling: str = "class_token"
    classifier_hidden_size: int | None = None
    rms_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.pooler_output_size = self.pooler_output_size or self.hidden_size
        # Also run by `@strict` afterwards; run here so that the error is a plain ValueError.
        self.validate_architecture()

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return height_and_width(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return height_and_width(self.patch_size)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        (height, width), (rows, columns) = self.image_shape, self.patch_shape
        return height // rows, width // columns

    @property
    def num_prefix_tokens(self) -> int:
        """Learned tokens before the patches."""
        return int(self.use_class_token) + int(self.use_distillation_token)

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of an image of `image_size`."""
        return self.num_prefix_tokens + self.grid_shape[0] * self.grid_shape[1]

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for what cannot be built."""
        for name in ("image_size", "patch_size"):
            if min(height_and_width(getattr(self, name))) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive.")
        if self.num_channels < 1:
            raise ValueError(f"`num_channels` is {self.num_channels}; it must be positive: 1 for grey, 3 for RGB.")
        for pixels, patch in zip(self.image_shape, self.patch_shape, strict=True):
            if pixels % patch != 0:
                raise ValueError(
                    f"`image_size` ({self.image_size}) is not a multiple of `patch_size` ({self.patch_size}), so "
                    f"{pixels % patch} of {pixels} pixels would never be seen; for instance {pixels - pixels % patch} "
                    f"or {pixels - pixels % patch + patch} would do."
                )
        super().validate_architecture()
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(ACT2FN)}.")
        require_choice(self, "classifier_pooling", "class_token", "mean", "distilled")
        needed = {"class_token": "use_class_token", "distilled": "use_distillation_token"}.get(self.classifier_pooling)
        if needed is not None and not getattr(self, needed):
            raise ValueError(
                f"`classifier_pooling={self.classifier_pooling!r}` needs `{needed}=True`; without it choose 'mean'."
            )
        if self.classifier_hidden_size is not None and self.classifier_hidden_size < 1:
            raise ValueError(
                f"`classifier_hidden_size` is {self.classifier_hidden_size}; it must be positive, or None for a "
                "linear classifier."
            )
        if self.use_distillation_token and not self.use_class_token:
            raise ValueError("`use_distillation_token=True` needs `use_class_token=True`, as in DeiT.")
        if self.is_causal:
            raise ValueError("`is_causal` is True, but images are attended to in both directions; leave it out.")


def height_and_width(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A size as Transformers allows it, as a pair."""
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


__all__ = ["SASViTConfig"]
