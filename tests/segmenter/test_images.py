"""Images as people have them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.data import read_image
from fcclip.segmenter.images import read_image_input
from tests.segmenter.conftest import NAMES

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def test_a_path_bytes_a_pil_image_an_array_and_a_tensor_give_the_same_pixels(tmp_path):
    image, path = Image.fromarray(PIXELS), tmp_path / "a.png"
    image.save(path)
    channels = torch.from_numpy(PIXELS.transpose(2, 0, 1).copy())
    for source in (path, str(path), encoded(image), image, Image.open(path), PIXELS, channels, channels / 255):
        np.testing.assert_array_equal(read_image_input(source), PIXELS)


def test_arrays_and_tensors_of_opencv_are_turned_if_that_is_said():
    turned = np.ascontiguousarray(PIXELS[..., ::-1])
    for source in (turned, torch.from_numpy(turned.transpose(2, 0, 1).copy())):
        np.testing.assert_array_equal(read_image_input(source, channel_order="BGR"), PIXELS)
    with pytest.raises(ValueError, match="unknown channel_order 'GBR'"):
        read_image_input(turned, channel_order="GBR")


def test_an_image_that_is_stored_sideways_is_turned_upright_from_a_file_and_from_memory(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    content = encoded(Image.fromarray(PIXELS), exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(read_image_input(source), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_grey_alpha_and_palette_images_have_three_channels(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(read_image_input(encoded(image)), np.array(image.convert("RGB")))


def test_cmyk_and_16_bits_are_read_as_everywhere_else(tmp_path):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (40, 60), dtype=np.uint16)
    np.testing.assert_array_equal(read_image_input(encoded(Image.fromarray(deep)))[..., 0], deep >> 8)
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"))
    np.testing.assert_array_equal(read_image_input((tmp_path / "a.jpg").read_bytes()), read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_images_of_one_pixel_and_of_one_line_give_results_of_their_size(segmenter, size):
    result = segmenter(np.full((*size, 3), 90, np.uint8), NAMES)
    assert result.panoptic.shape == result.semantic.shape == size
    assert len(result.embeddings) == len(result.segments)
    assert result.draw().shape[0] >= size[0]
    assert result.to_json()


def test_what_is_missing_or_unreadable_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"image '.*none\.jpg' does not exist"):
        read_image_input(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match=r"text\.jpg: cannot be read as an image"):
        read_image_input(tmp_path / "text.jpg")
    for content in (b"no image", b"", encoded(Image.fromarray(PIXELS))[:200]):
        with pytest.raises(ValueError, match="the encoded image: cannot be read as an image"):
            read_image_input(content)


def test_pixels_without_a_fixed_white_are_refused_from_a_file_and_from_memory(tmp_path):
    Image.fromarray(np.ones((40, 60), np.float32)).save(tmp_path / "float.tif")
    for source in (tmp_path / "float.tif", Image.open(tmp_path / "float.tif"), (tmp_path / "float.tif").read_bytes()):
        with pytest.raises(ValueError, match="black and what is white"):
            read_image_input(source)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), torch.zeros(4, 4, 3), None],
)
def test_something_that_is_no_image_is_refused(wrong):
    with pytest.raises(ValueError, match=r"RGB array \(h, w, 3\) uint8 with pixels, or a tensor .* got"):
        read_image_input(wrong)


def test_a_tensor_of_floats_beyond_one_is_refused():
    with pytest.raises(ValueError, match=r"values in 0\.\.1, this one in 0\.\.255; divide by 255"):
        read_image_input(torch.tensor([0.0, 255.0]).expand(3, 4, 2))
