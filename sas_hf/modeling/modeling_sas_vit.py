"""The SAS ViT: a Vision Transformer with any attention of this package, its base model and its heads."""

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .annotations import ForwardKwargs
from .attention import SASAttention
from .configuration_sas_vit import SASViTConfig
from .kinds import as_boolean, initialize_attention, make_attention, with_boolean_masks
from .losses import classification_loss
from .quantisation import QuantisableMixin
from .registration import register
from .sharing import CodeTravelsMixin


class SASViTPatchEmbeddings(nn.Module):
    """A linear map of each patch: pixels `[B, channels, height, width]` to `[B, patches, C]`, row by row."""

    def __init__(self, config: SASViTConfig):
        super().__init__()
        self.config = config
        patch = config.patch_shape
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; it must be [batch, channels, height, width]."
            )
        channels = self.config.num_channels
        if pixel_values.shape[1] != channels:
            raise ValueError(
                f"`pixel_values` has {pixel_values.shape[1]} channels, but this model's `num_channels` is {channels}; "
                f"convert the images{' to grey' if channels == 1 else ' to RGB' if channels == 3 else ''} "
                "(`SASViTImageProcessor` does, with its `num_channels`)."
            )
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class SASViTEmbeddings(nn.Module):
    """Images to tokens `[B, T, C]`: class and distillation token where there are any, then patches, with positions."""

    def __init__(self, config: SASViTConfig, use_mask_token: bool):
        super().__init__()
        self.config = config

        def token():
            return nn.Parameter(torch.zeros(1, 1, config.hidden_size))

        self.cls_token = token() if config.use_class_token else None
        self.distillation_token = token() if config.use_distillation_token else None
        self.mask_token = token() if use_mask_token else None
        self.patch_embeddings = SASViTPatchEmbeddings(config)
        positions = torch.zeros(1, config.max_position_embeddings, config.hidden_size)
        self.position_embeddings = nn.Parameter(positions)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, interpolate_pos_encoding: bool
    ) -> torch.Tensor:
        embeddings = self.patch_embeddings(pixel_values)
        grid = patch_grid(self.config, pixel_values, interpolate_pos_encoding)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError(
                    "`bool_masked_pos` was given, but this model has no mask token; use "
                    "`SASViTForMaskedImageModeling`, or `SASViTModel(config, use_mask_token=True)`."
                )
            mask = bool_masked_pos.unsqueeze(-1).to(embeddings.dtype)
            embeddings = embeddings * (1.0 - mask) + self.mask_token * mask
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        embeddings = torch.cat([*(token.expand(embeddings.shape[0], -1, -1) for token in prefix), embeddings], dim=1)
        return self.dropout(embeddings + self.positions(grid))

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings `[1, T, C]` for a grid of patches, interpolated (bicubic) where it is not the trained
        one."""
        if grid == self.config.grid_shape:
            return self.position_embeddings
        prefix, patches = self.position_embeddings.tensor_split([self.config.num_prefix_tokens], dim=1)
        patches = patches.unflatten(1, self.config.grid_shape).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((prefix, patches.flatten(2).transpose(1, 2)), dim=1)

    def initialize(self, std: float) -> None:
        for parameter in (self.position_embeddings, self.cls_token, self.distillation_token):
            if parameter is not None:
                init.trunc_normal_(parameter, mean=0.0, std=std)
        if self.mask_token is not None:
            init.zeros_(self.mask_token)


def patch_grid(config: SASViTConfig, pixel_values: torch.Tensor, interpolate: bool) -> tuple[int, int]:
    """Patches from top to bottom and from left to right of images `[B, channels, height, width]`.

    Raises:
        ValueError: for images of another size than `image_size`, unless positions may be interpolated and the patches
            cover them.
    """
    height, width = shape = tuple(pixel_values.shape[-2:])
    if shape != config.image_shape and not interpolate:
        raise ValueError(
            f"`pixel_values` holds images of {shape[0]} x {shape[1]} pixels, but `image_size` of this model is "
            f"{config.image_shape[0]} x {config.image_shape[1]}; resize them (the image processor does), or pass "
            "`interpolate_pos_encoding=True`."
        )
    if any(pixels % patch for pixels, patch in zip(shape, config.patch_shape, strict=True)):
        raise ValueError(
            f"`pixel_values` holds images of {shape[0]} x {shape[1]} pixels, which patches of {config.patch_shape[0]} "
            f"x {config.patch_shape[1]} do not cover; resize or pad them to multiples of `patch_size`."
        )
    grid = height // config.patch_shape[0], width // config.patch_shape[1]
    if grid != config.grid_shape and config.attention_type == "super":
        raise ValueError(
            f"Images of {shape[0]} x {shape[1]} pixels are {grid[0]} x {grid[1]} patches, but the token mixing of "
            f"Super attention has parameters for the {config.max_position_embeddings} tokens of `image_size` "
            f"{config.image_shape[0]} x {config.image_shape[1]} only, which cannot be interpolated; resize the images."
        )
    return grid


class SASViTMLP(nn.Module):
    """Feed-forward block: `fc2(act(fc1(x)))`."""

    def __init__(self, config: SASViTConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SASViTLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then the feed-forward block. Hidden states in and out: `[B, T, C]`."""

    def __init__(self, config: SASViTConfig, layer_idx: int):
        super().__init__()
        self.attention = make_attention(config, layer_idx)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SASViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[ForwardKwargs]) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attention_output)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class SASViTPooler(nn.Module):
    """A dense layer and an activation on what the classifier would read: `[B, C]` to `[B, pooler_output_size]`."""

    def __init__(self, config: SASViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(pooled))


def pool_tokens(
    config: SASViTConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """`[B, T, C]` to `[B, C]`: the mean of the patches (that a mask `[B, T]` does not hide), or the class token."""
    if config.classifier_pooling != "mean":
        return hidden_states[:, 0]
    patches = hidden_states[:, config.num_prefix_tokens :]
    if attention_mask is None or attention_mask.ndim != 2:
        return patches.mean(dim=1)
    weights = attention_mask[:, config.num_prefix_tokens :, None].to(patches.dtype)
    return (patches * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class SASViTPreTrainedModel(CodeTravelsMixin, QuantisableMixin, PreTrainedModel):
    """Loading, saving and initialisation shared by the SAS ViT and its heads."""

    config: SASViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as Transformers' own
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASViTEmbeddings", "SASViTLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SASViTLayer, "attentions": SASAttention}
    _input_embed_layer = "patch_embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SASViTEmbeddings):
            module.initialize(self.config.initializer_range)
        else:
            initialize_attention(module, self.config)


class SASViTModel(SASViTPreTrainedModel):
    """
    The encoder without a head: images `[B, channels, height, width]` in, hidden states `[B, T, C]` out.

    Args:
        add_pooling_layer: also return `pooler_output` `[B, pooler_output_size]`.
        use_mask_token: let patches be hidden, for masked image modelling.
    """

    def __init__(self, config: SASViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = SASViTEmbeddings(config, use_mask_token)
        self.layers = nn.ModuleList([SASViTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = SASViTPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: `[B, channels, height, width]`.
            bool_masked_pos: `[B, patches]`, true where a patch is hidden.
            interpolate_pos_encoding: accept images of another size than `image_size`.
            attention_mask: `[B, T]`, 0 for tokens that nobody sees; or a prepared 4-D mask.

        Raises:
            ValueError: for images whose channels or size the model cannot take; the message says which it can.
        """
        if pixel_values is None:
            raise ValueError("You must specify `pixel_values`.")
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, bool(interpolate_pos_encoding))

        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        token_mixing = None
        attention: SASAttention = self.layers[0].attention  # type: ignore[assignment]  # a list without a type
        if attention.mixes_tokens:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
            visible = torch.ones_like(positions, dtype=torch.bool)[:, None, None, :]
            if attention_mask is not None:
                visible = create_bidirectional_mask(
                    with_boolean_masks(self.config), hidden_states, attention_mask, allow_is_bidirectional_skip=False
                )
                visible = as_boolean(visible)
            token_mixing = (positions, positions, visible)

        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, attention_mask=mask, token_mixing=token_mixing, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(pool_tokens(self.config, hidden_states, attention_mask))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class SASViTClassificationHead(nn.Module):
    """A classifier with one hidden layer: `[B, C]` to logits `[B, num_labels]`."""

    def __init__(self, config: SASViTConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(width, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.activation_fn(self.dense(pooled)))


def make_classifier(config: SASViTConfig) -> nn.Module:
    """From `[B, C]` to logits `[B, num_labels]`; without labels nothing is done."""
    if config.num_labels == 0:
        return nn.Identity()
    if config.classifier_hidden_size is None:
        return nn.Linear(config.hidden_size, config.num_labels)
    return SASViTClassificationHead(config, config.classifier_hidden_size)


class SASViTForImageClassification(SASViTPreTrainedModel):
    """
    The SAS ViT with a classifier on what `classifier_pooling` says: logits `[B, num_labels]`. It is linear, or has the
    hidden layer that `classifier_hidden_size` asks for.
    """

    def __init__(self, config: SASViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = SASViTModel(config, add_pooling_layer=False)
        distilled = config.classifier_pooling == "distilled"
        self.classifier = make_classifier(config)
        self.distillation_classifier = make_classifier(config) if distilled else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> ImageClassifierOutput:
        """
        Args (see [`SASViTModel.forward`] for the others):
            labels: `[B]` class indices or regression targets, or `[B, num_labels]`.
        """
        outputs: BaseModelOutputWithPooling = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = outputs[0]
        logits = self.classifier(pool_tokens(self.config, hidden_states, attention_mask))
        if self.distillation_classifier is not None:
            logits = (logits + self.distillation_classifier(hidden_states[:, 1])) / 2
        loss = None
        if labels is not None:
            loss = classification_loss(self, logits, labels, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SASViTForMaskedImageModeling(SASViTPreTrainedModel):
    """The SAS ViT with a decoder that reconstructs hidden patches (SimMIM, arXiv:2111.09886)."""

    def __init__(self, config: SASViTConfig):
        super().__init__(config)
        self.vit = SASViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> MaskedImageModelingOutput:
        """
        Args (see [`SASViTModel.forward`] for the others):
            bool_masked_pos: `[B, patches]`; with it comes a loss, the mean absolute error of the hidden pixels.

        Returns:
            `reconstruction` `[B, channels, height, width]`, and the loss.

        Raises:
            ValueError: with `bool_masked_pos` when `patch_size` is not `encoder_stride`, so that the reconstruction
                has another size than the image.
        """
        patch, stride = self.config.patch_shape, self.config.encoder_stride
        if bool_masked_pos is not None and patch != (stride, stride):
            raise ValueError(
                f"With `bool_masked_pos`, `patch_size` ({self.config.patch_size}) must equal `encoder_stride` "
                f"({stride}), so that the reconstruction has the size of the image."
            )
        outputs: BaseModelOutputWithPooling = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        assert pixel_values is not None  # or the model would have raised
        grid = patch_grid(self.config, pixel_values, bool(interpolate_pos_encoding))
        patches = outputs[0][:, self.config.num_prefix_tokens :]
        reconstruction = self.decoder(patches.transpose(1, 2).unflatten(2, grid))
        loss = None
        if bool_masked_pos is not None:
            hidden = bool_masked_pos.unflatten(1, grid).repeat_interleave(stride, 1).repeat_interleave(stride, 2)
            hidden = hidden.unsqueeze(1)
            error = nn.functional.l1_loss(pixel_values, reconstruction, reduction="none")
            loss = (error * hidden).sum() / (hidden.sum() + 1e-5) / self.config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


register(
    "vit",
    {
        AutoModel: SASViTModel,
        AutoModelForImageClassification: SASViTForImageClassification,
        AutoModelForMaskedImageModeling: SASViTForMaskedImageModeling,
    },
)

__all__ = [
    "SASViTForImageClassification",
    "SASViTForMaskedImageModeling",
    "SASViTModel",
    "SASViTPreTrainedModel",
]
