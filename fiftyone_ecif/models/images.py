"""An image file as the picture that models are given.

As released models were trained and FiftyOne embeds: the first frame, in RGB before anything is resized, whatever lies
under transparency shown, and turned as its pixels are stored, not as EXIF says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from fiftyone_ecif.errors import EcifError

T = TypeVar("T")

MOST_PIXELS = 178_956_970  # half a gigabyte in RGB; Pillow refuses more too, unless it is told not to
LONGEST = 100  # times as long as wide: to bring the short side to a model's size, the long one grows as much


class UnreadableImageError(EcifError):
    """An image file that is no picture to encode.

    Attributes:
        reason: why, without the file's name.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"The image {path} cannot be read ({reason})")
        self.reason = reason


def check_picture(path: str) -> None:
    """Checks by its header that an image file is one to decode.

    Raises:
        UnreadableImageError: as :func:`read_image`
    """
    _open(path, lambda image: None)


def read_image(path: str) -> Image.Image:
    """Decodes an image file to 8-bit RGB.

    Of numbers that have more than 8 bits, 16-bit ones keep their upper 8, as those of 16-bit colours do. Floats from
    0 to 1 are multiplied by 255; other ranges are stretched from their least to their greatest number.

    Args:
        path: of the file.

    Raises:
        UnreadableImageError: if it is damaged, has too many pixels, or is a line rather than a picture
    """
    return _open(path, _decode)


def _open(path: str, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
            if max(width, height) > LONGEST * min(width, height):
                raise ValueError(f"{width} x {height} pixels, more than {LONGEST} times as long as wide")
            return use(image)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UnreadableImageError(path, str(error) or type(error).__name__) from error


def _decode(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    image.load()
    image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn of it for each image
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 255 in place of ones of a greater range."""
    least, greatest = values.min().item(), values.max().item()
    if not np.isfinite([least, greatest]).all():
        raise ValueError("some pixels are NaN or infinite")
    if values.dtype.kind != "f" and least >= 0 and greatest < 2**16:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind != "f" or least < 0 or greatest > 1:
        values = (values.astype(np.float64) - least) / max(greatest - least, 1e-300)
    scaled: np.ndarray = np.rint(255 * values).astype(np.uint8)
    return scaled
