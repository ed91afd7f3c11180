"""An image file as the picture that models are given.

As released models were trained and FiftyOne embeds: the first frame, in RGB before anything is resized, whatever lies
under transparency shown, and turned as its pixels are stored, not as EXIF says.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from fiftyone_ecif.errors import EcifError

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


def read_image(path: str) -> Image.Image:
    """Decodes an image file to 8-bit RGB.

    Of numbers that have more than 8 bits, 16-bit ones keep their upper 8, as those of 16-bit colours do. Floats from
    0 to 1 are multiplied by 255; other ranges are stretched from their least to their greatest number.

    Args:
        path: of the file.

    Raises:
        UnreadableImageError: if it is damaged, has too many pixels, or is a line rather than a picture
    """
    try:
        with Image.open(path) as image:
            _check_size(*image.size)
            if image.mode.startswith(("I", "F")):
                return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
            image.load()
            image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn of it for each image
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UnreadableImageError(path, str(error) or type(error).__name__) from error


def read_jpeg(path: str) -> Tensor:
    """Decodes a JPEG file in colours or grey, to the pixels that :func:`read_image` gives, without holding up threads.

    Args:
        path: of the file.

    Returns:
        uint8, shape ``(3, h, w)``

    Raises:
        OSError: if it is no such file; :func:`read_image` may read it, or says what is wrong
        RuntimeError: likewise
    """
    data = read_file(path)
    _check_size(*_jpeg_size(memoryview(data.numpy())))
    pixels: Tensor = decode_jpeg(data, ImageReadMode.RGB)
    return pixels


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """Width and height, as the frame's header says."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if data[at + 9] not in (1, 3):
                break  # four inks, whose colours are a matter of taste
            return data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
        at += 2 + length
    raise OSError("not a JPEG file in colours or grey")


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise OSError(f"{width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
    if max(width, height) > LONGEST * min(width, height):
        raise OSError(f"{width} x {height} pixels, more than {LONGEST} times as long as wide")


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
