import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from fcclip.data.images import image_size, read_header, read_id_map, read_image, read_label_map, read_pil_image


def test_an_image_beyond_pillows_limit_is_refused_with_what_to_do_about_its_size(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "panorama.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"panorama\.png.*1200 pixels.*smaller.*1,000 pixels") as caught:
        read_image(tmp_path / "panorama.png")
    assert "Copy" not in str(caught.value)


def test_an_id_map_is_red_plus_256_green_plus_65536_blue(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ids.png")
    wide = pixels.astype(np.int32)
    id_map = read_id_map(tmp_path / "ids.png")
    np.testing.assert_array_equal(id_map, wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2])
    assert id_map.dtype == np.int32


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_image_is_turned_upright_as_its_exif_says(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read_image(tmp_path / "turned.jpg"), expected)
    assert image_size(tmp_path / "turned.jpg") == expected.shape[:2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_image_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)


def test_grey_palette_and_alpha_keep_their_colours(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    grey = pixels[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "grey.jpg") - grey[..., None].astype(int)).max() <= 2
    palette = Image.fromarray(np.arange(42, dtype=np.uint8).reshape(6, 7))
    palette.putpalette(pixels.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), pixels)
    alpha = np.dstack([pixels, np.zeros((6, 7), np.uint8)])  # all transparent: the colours count, as published
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), pixels)


def test_cmyk_becomes_the_colour_that_it_would_print(tmp_path):
    Image.new("CMYK", (5, 4), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg")
    np.testing.assert_allclose(read_image(tmp_path / "cyan.jpg")[0, 0], [0, 255, 255], atol=3)


@pytest.mark.parametrize(("ending", "channels"), [("png", 1), ("png", 3), ("png", 4), ("tif", 1), ("tif", 3)])
def test_of_16_bits_a_channel_the_higher_8_are_taken(tmp_path, ending, channels):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (6, 7, channels), dtype=np.uint16)
    path = tmp_path / f"deep.{ending}"
    cv2.imwrite(str(path), pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels)
    expected = np.broadcast_to(pixels[..., :3] >> 8, (6, 7, 3))
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize(("dtype", "what"), [(np.int32, "32-bit numbers"), (np.float32, "floating-point numbers")])
def test_pixels_without_a_fixed_black_and_white_are_refused(tmp_path, dtype, what):
    Image.fromarray(np.full((4, 5), 300, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"x\.tif: .*pixels are {what}, .* store it with 8 or 16 bits a channel"):
        read_image(tmp_path / "x.tif")


def test_a_image_stays_readable_when_its_file_is_gone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_pil_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert (image.mode, image.size) == ("RGB", (6, 5))
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_id_png_of_16_bits_is_refused_because_half_of_each_id_would_be_lost(tmp_path, channels):
    pixels = np.full((4, 5, channels), 7, np.uint16)
    cv2.imwrite(str(tmp_path / "ids.png"), pixels)
    with pytest.raises(ValueError, match=r"ids\.png: .*an id PNG has 8 bits a channel, this one 16 or more"):
        read_id_map(tmp_path / "ids.png")


def test_an_id_png_that_a_program_has_made_smaller_has_the_same_ids(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3), dtype=np.uint8)
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    small = Image.fromarray(pixels)
    small.putpalette(colours.ravel().tolist())
    small.save(tmp_path / "palette.png")
    Image.fromarray(colours[pixels]).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([colours[pixels], pixels])).save(tmp_path / "rgba.png")
    expected = read_id_map(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_id_map(tmp_path / "palette.png"), expected)
    np.testing.assert_array_equal(read_id_map(tmp_path / "rgba.png"), expected)


@pytest.mark.parametrize("kind", ["grey", "palette", "16-bit png", "16-bit tif", "32-bit tif"])
def test_a_label_map_is_read_as_the_numbers_that_it_stores(tmp_path, kind):
    largest = {"16": 65535, "32": 100_000}.get(kind[:2], 255)
    labels = np.random.default_rng(0).integers(0, largest + 1, (5, 6))
    image = Image.fromarray(labels.astype({"16": np.uint16, "32": np.int32}.get(kind[:2], np.uint8)))
    if kind == "palette":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    path = tmp_path / ("labels.tif" if kind.endswith("tif") else "labels.png")
    image.save(path)
    read = read_label_map(path)
    np.testing.assert_array_equal(read, labels)
    assert read.dtype == np.int32


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("RGB", "several channels"),
        ("RGBA", "several"),
        ("LA", "grey with alpha"),
        ("1", "one bit a pixel"),
        ("F", "float"),
    ],
)
def test_a_label_map_without_one_whole_number_a_pixel_is_refused(tmp_path, mode, what):
    path = tmp_path / ("labels.tif" if mode == "F" else "labels.png")
    Image.new(mode, (6, 5)).save(path)
    with pytest.raises(ValueError, match=rf"labels\..*one whole number a pixel .* mode '{mode}', {what}"):
        read_label_map(path)


@pytest.mark.parametrize("read", [read_image, read_id_map, read_label_map, image_size])
def test_a_missing_image_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such image, though the data set lists it.*DETECTRON2"):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize("read", [read_image, read_id_map, read_label_map, image_size])
def test_a_file_that_is_no_image_is_named(tmp_path, read):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: cannot be read as an image: .*Copy or prepare the file again"):
        read(tmp_path / "page.jpg")


@pytest.mark.parametrize("read", [read_image, read_id_map, read_label_map, image_size])
def test_a_file_of_zero_bytes_is_named(tmp_path, read):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: cannot be read as an image: the file is empty \(0 bytes\)"):
        read(tmp_path / "empty.png")


@pytest.mark.parametrize(
    ("name", "read"),
    [("cut.jpg", read_image), ("cut.png", read_image), ("cut.png", read_id_map), ("cut.png", read_label_map)],
)
def test_a_image_that_was_cut_off_is_named(tmp_path, name, read):
    path, shape = tmp_path / name, (40, 40) if read is read_label_map else (40, 40, 3)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as an image"):
        read(path)


def test_paths_may_have_spaces_and_letters_that_are_not_ascii(tmp_path):
    path = tmp_path / "Bilder für später" / "日本 1.png"
    path.parent.mkdir()
    Image.new("RGB", (6, 5), (1, 2, 3)).save(path)
    assert read_image(path)[0, 0].tolist() == [1, 2, 3]
    assert read_id_map(str(path))[0, 0] == 1 + 256 * 2 + 65536 * 3
    assert image_size(path) == (5, 6)


# ---- headers ----


def png_chunks(content):
    """(name, whole chunk) of each part of a PNG."""
    position = 8
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position : position + 12 + length]
        position += 12 + length


@pytest.mark.parametrize("behind", [False, True])
def test_a_png_is_turned_wherever_its_exif_stands(tmp_path, behind):
    path, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)).save(path, exif=exif)
    if behind:  # the pixels first, as the format allows
        chunks = dict(png_chunks(path.read_bytes()))
        order = (b"IHDR", b"IDAT", b"eXIf", b"IEND")
        path.write_bytes(path.read_bytes()[:8] + b"".join(chunks[name] for name in order))
    assert read_image(path).shape == (10, 6, 3)
    assert image_size(path) == (10, 6)
    assert read_header(path).orientation == 6


def test_the_header_of_a_png_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[200:4000] = bytes(3800)
    path.write_bytes(content)
    assert read_header(path).upright == (60, 100)
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image"):
        read_image(path)


def test_a_header_tells_what_the_pixels_are(tmp_path):
    Image.new("CMYK", (5, 4)).save(tmp_path / "a.jpg")
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((4, 5, 3), np.uint16))
    photo, two = read_header(tmp_path / "a.jpg"), read_header(tmp_path / "b.png")
    assert (photo.format, photo.mode, photo.stored, photo.orientation, photo.is_deep) == (
        "JPEG",
        "CMYK",
        (4, 5),
        1,
        False,
    )
    assert (two.format, two.is_deep) == ("PNG", True)
