"""tools/compare_fusioner.py: folds, pairs, views and the table; trainings are those of tests/test_architectures.py."""

import numpy as np
import pytest
import torch

from fcclip.preparation.shapes_world import world_classes
from tests.tools.conftest import REPOSITORY, load_program

tool = load_program(REPOSITORY / "tools" / "compare_fusioner.py")


@pytest.mark.parametrize("fold", range(tool.NUM_FOLDS))
def test_a_fold_divides_the_sixty_classes_and_every_colour_and_shape_is_trained(fold):
    base, novel = (tool.pairs(("val",), fold, novel=novel).own_vocabulary().class_names for novel in (False, True))
    assert (len(base), len(novel)) == (45, 15)
    assert {*base, *novel} == {entry.name for entry in world_classes()}
    things = [name.split() for name in base if " " in name]
    assert [len(set(words)) for words in zip(*things)] == [8, 6]


def test_what_is_prompted_instead_of_a_class_has_another_colour_and_shape(monkeypatch):
    entries = world_classes()
    segments = [{"category_id": index} for index in range(len(entries))]
    image = {"file_name": "val/1.jpg", "sem_seg_file_name": "1.png", "height": 4, "width": 4, "image_id": 1}
    records = [{**image, "segments_info": segments}]
    monkeypatch.setattr(tool, "get_dataset", lambda name: type("_", (), {"annotations": lambda self: records})())
    for record in tool.pairs(("val",), 1, novel=True, step=2).records():
        own = entries[record["mask_value"]].name
        assert own != record["class_name"]
        assert not set(own.split()) & set(record["class_name"].split())


def test_the_pieces_of_a_view_are_turned_with_its_image():
    image = torch.arange(16.0).view(1, 4, 4).expand(3, 4, 4)
    pieces = (image[:1] > 6).float()
    for seed in range(8):
        turned, areas = tool.view(image, pieces, np.random.default_rng(seed))
        scale = turned.max() / image.max()
        assert torch.equal(areas[0], (turned[0] > 6.5 * scale).float())


def test_a_table_has_a_mean_only_of_four_folds():
    results = {f"CLIP {fold}": dict.fromkeys(tool.ROWS, 10.0 * fold) for fold in range(4)}
    rows = tool.format_table(results).splitlines()
    assert rows[2] == "| CLIP (convolutional) | novel | 0.0 | 10.0 | 20.0 | 30.0 | 15.0 |"
    assert rows[-1].endswith("| – | – | – | – | – |")
