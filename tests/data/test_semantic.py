import logging

import numpy as np
import pytest
from PIL import Image

from fcclip.data import get_dataset

NAME = "openvocab_pascal_ctx459_sem_seg_val"


@pytest.fixture
def folders(tmp_path):
    images = tmp_path / "pascal_ctx_d2" / "images" / "validation"
    labels = tmp_path / "pascal_ctx_d2" / "annotations_ctx459" / "validation"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for stem, width in (("2008_b", 9), ("2008_a", 7)):
        Image.new("RGB", (width, 5)).save(images / f"{stem}.jpg")
        Image.fromarray(np.full((5, width), 458, np.uint16)).save(labels / f"{stem}.tif")
    return images, labels


def test_images_and_label_maps_are_paired_by_name(tmp_path, folders):
    images, labels = folders
    first, second = get_dataset(NAME, tmp_path).records()
    assert first == {
        "file_name": str(images / "2008_a.jpg"),
        "sem_seg_file_name": str(labels / "2008_a.tif"),
        "image_id": "2008_a",
        "height": 5,
        "width": 7,
    }
    assert second["image_id"] == "2008_b"


def test_a_image_without_a_label_map_is_left_out_with_a_warning(tmp_path, folders, caplog):
    Image.new("RGB", (4, 4)).save(folders[0] / "2007_z.jpg")
    with caplog.at_level(logging.WARNING):
        records = get_dataset(NAME, tmp_path).records()
    assert [record["image_id"] for record in records] == ["2008_a", "2008_b"]
    assert "1 of 3 images" in caplog.text and "have no partner" in caplog.text


def test_two_folders_without_a_pair_are_refused(tmp_path, folders):
    for path in folders[1].iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"has no records: .*images/validation lists no image"):
        get_dataset(NAME, tmp_path).records()


def test_a_missing_folder_is_named(tmp_path, folders):
    for path in folders[1].iterdir():
        path.unlink()
    folders[1].rmdir()
    with pytest.raises(FileNotFoundError, match=r"the folder .*annotations_ctx459/validation does not exist"):
        get_dataset(NAME, tmp_path).records()


def test_hidden_files_are_no_images(tmp_path, folders, caplog):
    for folder, ending in zip(folders, ("jpg", "tif")):
        (folder / f"._2008_a.{ending}").write_bytes(b"of a file system that leaves such files beside the real ones")
    with caplog.at_level(logging.WARNING):
        assert len(get_dataset(NAME, tmp_path).records()) == 2
    assert not caplog.text
