"""Image files of all kinds are given to models as released models were trained: in RGB before they are resized."""

import resource
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models import images
from fiftyone_ecif.models.images import read_image, read_jpeg
from fiftyone_ecif.models.inputs import Images, resize_pixels

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.fixture
def save(tmp_path):
    """Writes an image, or an array, to a file."""

    def write(image, name="a.png", **options):
        path = str(tmp_path / name)
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(path, **options)
        return path

    return write


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((65535 * RAMP).astype(np.uint16), "a.png"),
        ((65535 * RAMP).astype(np.uint16), "a.tif"),
        ((65535 * RAMP).astype(np.int32), "a.tif"),
        ((1e6 * RAMP - 3).astype(np.int32), "a.tif"),
        (RAMP.astype(np.float32), "a.tif"),
        ((70 * RAMP - 35).astype(np.float32), "a.tif"),
    ],
)
def test_numbers_of_more_than_eight_bits_are_scaled(values, name, save):
    image = read_image(save(values, name))
    assert image.mode == "RGB"
    found = np.asarray(image).astype(float)
    assert (found == found[..., :1]).all()
    np.testing.assert_allclose(found[..., 0], 255 * RAMP, atol=1)


def test_grey_and_colour_of_sixteen_bits_come_out_alike(tmp_path):
    cv2 = pytest.importorskip("cv2")
    values = (65535 * RAMP).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "grey.png"), values)
    cv2.imwrite(str(tmp_path / "colour.png"), np.repeat(values[..., None], 3, axis=2))
    grey, colour = (np.asarray(read_image(str(tmp_path / f"{name}.png"))) for name in ("grey", "colour"))
    np.testing.assert_array_equal(grey, colour)


def test_numbers_that_are_none_are_said(save):
    values = RAMP.astype(np.float32)
    values[0, 0] = np.nan
    with pytest.raises(EcifError, match=r"a\.tif cannot be read .some pixels are NaN"):
        read_image(save(values, "a.tif"))


def noise(mode, size=(50, 40)):
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def palette(transparency=None):
    image = noise("RGB").quantize(64)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (noise("RGBA"), "a.png"),
        (noise("LA"), "a.png"),
        (palette(), "a.png"),
        (palette(bytes(range(64))), "a.png"),
        (palette(3), "a.gif"),
        (noise("L").convert("1"), "a.png"),
        (noise("CMYK"), "a.jpg"),
        (noise("RGBA"), "a.webp"),
    ],
)
def test_what_is_resized_is_rgb(image, name, save):
    """As webdataset's ``pilrgb`` and FiftyOne do: ``Image.open(path).convert("RGB")``."""
    path = save(image, name)
    preprocess = open_clip.image_transform(32, is_train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = preprocess(Image.open(path).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, found, reason = Images([path], preprocess)[0]
    assert reason is None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_image_is_turned_as_it_is_stored(save):
    """As released models were trained, whatever EXIF says."""
    image = Image.fromarray(np.arange(4 * 6, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    found = read_image(save(image, exif=exif.tobytes()))
    assert found.size == (6, 4)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], np.asarray(image))


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (101, 1)])
def test_a_line_is_no_picture(size, save):
    path = save(Image.new("RGB", size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EcifError, match=rf"a\.png cannot be read .{size[0]} x {size[1]} pixels, more than 100 times"):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_line_is_no_picture_where_jpeg_files_have_a_way_of_their_own(save):
    path = save(Image.new("RGB", (10_000, 1)), "a.jpg")
    _, image, reason = Images([path], lambda image: image, lambda pixels: pixels)[0]
    assert image is None
    assert "more than 100 times as long as wide" in reason


def test_a_long_picture_is_one(save):
    assert read_image(save(Image.new("RGB", (100, 1)))).size == (100, 1)


def test_too_many_pixels_are_said_before_they_are_decoded(save, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    with pytest.raises(EcifError, match=r"50 x 40 pixels, more than"):
        read_image(save(noise("RGB")))


@pytest.mark.parametrize("damage", [lambda content: content[:200], lambda content: b"", lambda content: b"text"])
def test_a_damaged_file_is_named(damage, tmp_path):
    content = BytesIO()
    noise("RGB").save(content, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(damage(content.getvalue()))
    with pytest.raises(EcifError, match=r"The image .*a\.png cannot be read"):
        read_image(str(path))
    index, image, reason = Images([str(path)], lambda image: image)[0]
    assert (index, image) == (0, None)
    assert reason


@pytest.fixture
def jpeg(tmp_path):
    """A photograph of blurred noise, in a mode, as a file."""

    def make(mode="RGB", size=(64, 48), **options):
        noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = tmp_path / f"{mode}.jpg"
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, quality=90, **options)
        return str(path)

    return make


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff" * 9}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_files_have_the_same_pixels_either_way(mode, options, jpeg):
    path = jpeg(mode, **options)
    expected = np.asarray(read_image(path)).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_jpeg(path).numpy(), expected)


def test_jpeg_files_of_other_kinds_are_left_to_pillow(jpeg, tmp_path):
    inks, line, cut, fake = jpeg("CMYK"), jpeg(size=(1, 300)), tmp_path / "cut.jpg", tmp_path / "fake.jpg"
    for path in (inks, line):
        with pytest.raises(OSError, match=r"not a JPEG file in colours or grey|1 x 300 pixels"):
            read_jpeg(path)
    cut.write_bytes(Path(jpeg()).read_bytes()[:-400])
    fake.write_bytes(b"\x89PNG" + bytes(40))
    for path in (cut, fake):
        with pytest.raises((OSError, RuntimeError)):
            read_jpeg(str(path))


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (224, 224), (90, 90)])
@pytest.mark.parametrize("wanted", [224, (224,), (96, 128)], ids=str)
@pytest.mark.parametrize("mode", [InterpolationMode.BICUBIC, InterpolationMode.BILINEAR])
def test_pixels_are_resized_as_pillow_does(size, wanted, mode, jpeg):
    path, step = jpeg(size=size), Resize(wanted, mode, antialias=True)
    found = resize_pixels(step, read_jpeg(path)).int()
    expected = torch.from_numpy(np.asarray(step(read_image(path)))).permute(2, 0, 1).int()
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.2
