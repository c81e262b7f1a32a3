import numpy as np
import pytest
from PIL import Image, ImageOps

from fcclip.data.images import image_size, read_id_map, read_image


def test_an_id_map_is_red_plus_256_green_plus_65536_blue(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ids.png")
    wide = pixels.astype(np.int32)
    id_map = read_id_map(tmp_path / "ids.png")
    np.testing.assert_array_equal(id_map, wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2])
    assert id_map.dtype == np.int32


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_says(tmp_path, orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read_image(tmp_path / "turned.jpg"), expected)
    assert image_size(tmp_path / "turned.jpg") == expected.shape[:2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_picture_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)


@pytest.mark.parametrize("read", [read_image, read_id_map, image_size])
def test_a_missing_picture_is_named(tmp_path, read):
    with pytest.raises(
        FileNotFoundError, match=r"gone\.png: no such picture, though the data set lists it.*DETECTRON2"
    ):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize("read", [read_image, read_id_map, image_size])
def test_a_file_that_is_no_picture_is_named(tmp_path, read):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: cannot be read as a picture: .*Copy or prepare the file again"):
        read(tmp_path / "page.jpg")


@pytest.mark.parametrize("read", [read_image, read_id_map, image_size])
def test_a_file_of_zero_bytes_is_named(tmp_path, read):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: cannot be read as a picture: the file is empty \(0 bytes\)"):
        read(tmp_path / "empty.png")


@pytest.mark.parametrize(("name", "read"), [("cut.jpg", read_image), ("cut.png", read_image), ("cut.png", read_id_map)])
def test_a_picture_that_was_cut_off_is_named(tmp_path, name, read):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a picture"):
        read(path)


def test_a_folder_instead_of_a_picture_is_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jpg: cannot be read as a picture"):
        read_image(tmp_path / "folder.jpg")
