"""Reading strictly and writing whole files or none."""

import numpy as np
import pytest
from PIL import Image

from fcclip.data import read_id_map
from fcclip.data.datasets.files import files_by_stem
from fcclip.preparation.files import (
    COLOUR_MODES,
    atomically,
    box_and_area,
    check_size,
    copy_file,
    id_colours,
    pair_by_stem,
    read_json,
    read_pixels,
    remap,
    stored_size,
    write_image,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_box_counts_its_last_row_and_column():
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = mask[3, 5] = True
    assert box_and_area(mask) == ([2, 1, 4, 3], 2)


def test_ids_survive_being_colours(tmp_path):
    id_map = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    write_image(tmp_path / "ids.png", id_colours(id_map))
    assert read_id_map(tmp_path / "ids.png").tolist() == id_map.tolist()


def test_a_label_map_of_16_bits_is_stored_without_loss_and_small(tmp_path):
    labels = np.full((200, 300), 65535, np.uint16)
    labels[0, :4] = [0, 255, 256, 846]
    write_image(tmp_path / "labels.tif", labels, compression="tiff_adobe_deflate")
    stored = read_pixels(tmp_path / "labels.tif")
    assert stored.dtype == np.uint16 and np.array_equal(stored, labels)
    assert (tmp_path / "labels.tif").stat().st_size < 5000


def test_palette_indices_are_read_and_not_their_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    image.putpalette([9] * 768)
    image.save(tmp_path / "palette.png")
    assert read_pixels(tmp_path / "palette.png").tolist() == [[0, 1], [2, 255]]


def test_an_image_is_read_as_it_is_stored_whatever_its_exif_block_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert stored_size(tmp_path / "turned.jpg") == (4, 6)
    pixels = read_pixels(tmp_path / "turned.jpg", modes=COLOUR_MODES)
    assert pixels.shape == (4, 6, 3)
    check_size(tmp_path / "x.png", pixels, tmp_path / "turned.jpg")


@pytest.mark.parametrize("value", [3, 4, 200])
def test_a_value_outside_the_table_is_an_error(value, tmp_path):
    table = np.array([0, 1, 2, 9], np.uint8)
    with pytest.raises(ValueError, match=rf"x\.png: value {value} stands for no class"):
        remap(np.array([[0, value]], np.uint8), table, tmp_path / "x.png", invalid=9)
    assert remap(np.array([[2, 0]], np.uint8), table, tmp_path / "x.png", invalid=9).tolist() == [[2, 0]]


def test_hidden_files_are_skipped_and_pairs_need_both(tmp_path):
    for name in ("b.jpg", "a.jpg", "._a.jpg", "a.txt"):
        (tmp_path / name).touch()
    images = files_by_stem(tmp_path, ".jpg")
    assert [*images] == ["a", "b"]
    assert pair_by_stem(images, images)[0] == ("a", (tmp_path / "a.jpg", tmp_path / "a.jpg"))
    with pytest.raises(ValueError, match="images that are in one of them only: 1, e.g. b"):
        pair_by_stem(images, {"a": tmp_path / "a.txt"})


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "file.json"
    with atomically(target) as file:
        file.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half" and names(target.parent) == ["file.json"]


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    target = tmp_path / "file.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(target, {"a": object()})
    assert read_json(target) == {"a": 1} and names(tmp_path) == ["file.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "folder").touch()
    with pytest.raises(OSError, match=r"cannot write .*folder/file\.json: .*not writable\?"):
        write_json(tmp_path / "folder" / "file.json", {})


def test_a_missing_source_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such file"):
        copy_file(tmp_path / "gone.jpg", tmp_path / "copy.jpg")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_half_written_is_written_over(tmp_path):
    (tmp_path / ".x.json.partial").write_text("{")
    write_json(tmp_path / "x.json", {})
    assert names(tmp_path) == ["x.json"]
