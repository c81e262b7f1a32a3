"""The built-in label sets."""

import json
from pathlib import Path

import pytest

import fcclip.vocabulary
from fcclip.vocabulary import Vocabulary

NAMES = Path(fcclip.vocabulary.__file__).parent / "names"
COUNTS = {  # name: (classes, things)
    "ade20k_150": (150, 100),
    "ade20k_847": (847, 0),
    "cityscapes": (19, 8),
    "coco_panoptic": (133, 80),
    "coco_stuff_171": (171, 0),
    "mapillary_vistas": (65, 37),
    "pascal_context_59": (59, 0),
    "pascal_context_459": (459, 0),
    "pascal_voc_20": (20, 0),
    "pascal_voc_21": (21, 0),
    "shapes": (60, 48),
    "shapes_seen": (40, 32),
}


def test_the_list_here_is_complete():
    assert {path.stem for path in NAMES.glob("*.json")} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_data_set(name):
    vocabulary = Vocabulary.builtin(name)
    assert (len(vocabulary), len(vocabulary.thing_classes)) == COUNTS[name]
    assert vocabulary.name == name


@pytest.mark.parametrize("name", COUNTS)
def test_every_entry_is_clean(name):
    entries = json.loads((NAMES / f"{name}.json").read_text(encoding="utf-8"))["classes"]
    ids = [entry["id"] for entry in entries]
    assert len(set(ids)) == len(ids)
    assert not {"invalid_class_id", "unlabeled", "void"} & {entry["name"].lower() for entry in entries}
    for entry in entries:
        words = [entry["name"], *entry["synonyms"]]
        assert len(set(words)) == len(words), entry
        assert all(word and word == word.strip() and not set(",;:") & set(word) for word in words), entry
        assert isinstance(entry["thing"], bool)


def test_an_official_comma_list_became_name_and_synonyms():
    chest = Vocabulary.builtin("ade20k_150").classes[44]
    assert (chest.id, chest.name) == (44, "chest of drawers")
    assert chest.synonyms == ("chest of drawers", "chest", "bureau", "dresser")


def test_ids_are_the_data_sets_own():
    assert [entry.id for entry in Vocabulary.builtin("coco_panoptic").classes][78:82] == [89, 90, 92, 93]
    assert [entry.id for entry in Vocabulary.builtin("cityscapes").classes][:3] == [7, 8, 11]
    cityscapes = json.loads((NAMES / "cityscapes.json").read_text(encoding="utf-8"))
    assert [entry["train_id"] for entry in cityscapes["classes"]] == list(range(19))


def test_voc_20_is_voc_21_without_background():
    with_background, without = Vocabulary.builtin("pascal_voc_21"), Vocabulary.builtin("pascal_voc_20")
    assert with_background.class_names[0] == "background"
    assert with_background.classes[1:] == without.classes
