"""Image processor of the SAS ViT: Transformers' own resizing, rescaling and normalising, for RGB or grey models.

A converted ViT keeps its source's processor; this one is for models trained here. Pipelines turn every image into RGB,
which a model of one channel needs undone.
"""

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_vision_available


if is_vision_available():
    from PIL import Image


class SASViTImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, defaults to 3):
        1: images become grey; 3: RGB.
    """

    num_channels: int


class SASViTImageProcessor(PilBackend):
    """
    PIL, NumPy or torch images to `pixel_values` `[B, num_channels, height, width]`.

    PIL images may be of any mode that [`to_rgb`] takes; arrays hold numbers from 0 to white, which is what becomes 1
    by `rescale_factor`: 255 unless it says otherwise.

    Args:
        num_channels: 1 or 3, as the model's. An RGB image that was grey gives the grey image back exactly.
        size: `{"height": ..., "width": ...}`, as the model's `image_size`.
        kwargs: as Transformers' ViT image processor takes them; `image_mean` and `image_std` may be single numbers.

    Raises:
        ValueError: for another `num_channels`, a PIL image that has no 8-bit form, or an array beyond black and white,
            or with NaN.
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
        super().__init__(**kwargs)  # type: ignore[misc]  # it takes all of `valid_kwargs`
        if self.num_channels not in (1, 3):
            raise ValueError(f"`num_channels` is {self.num_channels}; it must be 1 (grey) or 3 (RGB).")

    # Transformers gives it images of PIL, too, whatever its annotation says.
    def convert_to_rgb(self, image, **layout) -> "np.ndarray | Image.Image":  # type: ignore[override]
        # An array's layout is told by newer versions of Transformers alone: 5.19 and older leave arrays as they are.
        image = to_rgb(image) if isinstance(image, Image.Image) else image
        return super().convert_to_rgb(image, **layout)

    def _preprocess(  # type: ignore[override]  # it is called by keywords alone
        self, images: list[np.ndarray], num_channels: int, **kwargs
    ) -> BatchFeature:
        white = 1 / kwargs["rescale_factor"] if kwargs["do_rescale"] else np.inf
        for image in images:
            if np.isnan(image.max()):
                raise ValueError("An image has numbers from nan to nan: it is damaged.")
            if kwargs["do_rescale"] and not (image.min() >= 0 and image.max() <= white * (1 + 1e-6)):
                raise ValueError(
                    f"An image has numbers from {image.min()} to {image.max()}; by `rescale_factor` "
                    f"({kwargs['rescale_factor']:.6g}) they must be from 0 to {white:.6g}. Give images of 8 bits, or "
                    "`do_rescale=False` for numbers that are to stay as they are."
                )
        return super()._preprocess([with_channels(image, num_channels) for image in images], **kwargs)


def to_rgb(image: "Image.Image") -> "Image.Image":
    """
    The image in RGB of 8 bits: grey of 16 bits is scaled, what is transparent lies on white, as Transformers has it.

    Raises:
        ValueError: for numbers of which nothing says what is white (32-bit integers, floats).
    """
    if image.mode.startswith("I;16"):  # Pillow itself would make all above 255 white
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(
            f"its mode is {image.mode!r} ({kind}), of which nothing says what is white; save it in 8 or 16 bits"
        )
    if image.mode in ("RGBa", "La"):  # with the alpha multiplied in
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def with_channels(image: np.ndarray, num_channels: int) -> np.ndarray:
    """`[1 or 3, H, W]` to `[num_channels, H, W]`: RGB to grey by ITU-R 601's weights, as PIL, or grey repeated."""
    if image.shape[0] not in (1, 3):
        raise ValueError(f"An image has {image.shape[0]} channels; give it in grey (1) or RGB (3).")
    if image.shape[0] == num_channels:
        return image
    if num_channels == 3:
        return image.repeat(3, axis=0)
    grey = np.tensordot(np.array([0.299, 0.587, 0.114]), image, axes=1)[None]
    return (grey.round() if np.issubdtype(image.dtype, np.integer) else grey).astype(image.dtype)


__all__ = ["SASViTImageProcessor"]
