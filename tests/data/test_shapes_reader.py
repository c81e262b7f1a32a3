"""What datasets/prepare_shapes.py writes is read like any COCO panoptic data set."""

import itertools
from pathlib import Path

import pytest

from fcclip.data import build_test_loader, build_train_loader, get_dataset
from tests.tools.conftest import REPOSITORY, load_program

SETS = ("shapes_train", "shapes_tune", "shapes_val", "shapes_val_seen", "shapes_val_unseen")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    script = load_program(REPOSITORY / "datasets" / "prepare_shapes.py")
    root = tmp_path_factory.mktemp("datasets")
    script.prepare(out=root, seed=11, num_images=4, num_workers=1, num_evaluation=2)
    return root


@pytest.mark.parametrize("name", SETS)
def test_its_records_are_complete(root, name):
    records = get_dataset(name, root).records()
    assert len(records) == (4 if name == "shapes_train" else 2)
    for record in records:
        assert (record["height"], record["width"]) == (256, 256)
        assert all(Path(record[key]).is_file() for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"))


@pytest.mark.parametrize("name", SETS)
def test_its_images_go_through_both_loaders(root, name, cfg):
    cfg.INPUT.IMAGE_SIZE = cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 256
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    dataset = get_dataset(name, root)
    for batch in itertools.islice(build_train_loader(cfg, dataset=dataset), 3):
        for sample in batch:
            masks = sample["targets"].expand()
            assert masks.sum(0).eq(1).all()  # every pixel of this world belongs to exactly one segment
            assert sample["targets"].labels.max() < len(dataset.metadata["stuff_classes"])
    assert [len(batch) for batch in build_test_loader(cfg, dataset)] == [1] * len(dataset.records())
