"""Image processor of the SAS ViT: Transformers' own resizing, rescaling and normalising, for RGB or grey models.

A converted ViT keeps its source's processor; this one is for models trained here. Pipelines turn every image into RGB,
which a model of one channel needs undone.
"""

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack


class SASViTImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, defaults to 3):
        1: images become grey; 3: RGB.
    """

    num_channels: int


class SASViTImageProcessor(PilBackend):
    """
    PIL, NumPy or torch images to `pixel_values` `[B, num_channels, height, width]`.

    Args:
        num_channels: 1 or 3, as the model's. An RGB image that was grey gives the grey image back exactly.
        size: `{"height": ..., "width": ...}`, as the model's `image_size`.
        kwargs: as Transformers' ViT image processor takes them; `image_mean` and `image_std` may be single numbers.

    Raises:
        ValueError: for another `num_channels`.
    """

    valid_kwargs = SASViTImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = 0.5
    image_std = 0.5
    size = {"height": 224, "width": 224}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    num_channels = 3

    def __init__(self, **kwargs: Unpack[SASViTImageProcessorKwargs]):
        super().__init__(**kwargs)
        if self.num_channels not in (1, 3):
            raise ValueError(f"`num_channels` is {self.num_channels}; it must be 1 (grey) or 3 (RGB).")

    def _preprocess(self, images: list[np.ndarray], num_channels: int, **kwargs) -> BatchFeature:
        return super()._preprocess([with_channels(image, num_channels) for image in images], **kwargs)


def with_channels(image: np.ndarray, num_channels: int) -> np.ndarray:
    """`[1 or 3, H, W]` to `[num_channels, H, W]`: RGB to grey by ITU-R 601's weights, as PIL, or grey repeated."""
    if image.shape[0] == num_channels:
        return image
    if num_channels == 3:
        return image.repeat(3, axis=0)
    grey = np.tensordot(np.array([0.299, 0.587, 0.114]), image, axes=1)[None]
    return (grey.round() if np.issubdtype(image.dtype, np.integer) else grey).astype(image.dtype)


__all__ = ["SASViTImageProcessor"]
