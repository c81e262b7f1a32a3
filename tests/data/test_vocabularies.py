"""Which words belong to a data set."""

import pytest

from fcclip.data import DATASETS, dataset_vocabulary, get_dataset
from fcclip.vocabulary import Vocabulary

VOC = "openvocab_pascal21_sem_seg_val"


def write_voc(folder, num_classes=21):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{index}:word {index},other {index}\n" for index in range(num_classes)]
    (folder / "pascal_voc_21_with_prompt_eng.txt").write_text("".join(lines))


def test_every_data_set_has_a_vocabulary_as_long_as_its_class_list():
    for name in DATASETS:
        if "lvis" not in name:  # its classes stand in the user's file
            assert len(dataset_vocabulary(name)) == len(get_dataset(name).metadata["stuff_classes"]), name


@pytest.mark.parametrize(
    ("name", "whole"),
    [("openvocab_coco_2017_val", "coco_panoptic"), ("openvocab_ade20k_instance_val", "ade20k_150")],
)
def test_instance_sets_take_the_things_of_the_published_file(tmp_path, name, whole):
    ours = Vocabulary.builtin(whole)
    lines = [f"{entry.id + 1}:word {entry.id}\n" for entry in ours.classes]
    (tmp_path / f"{whole}_with_prompt_eng.txt").write_text("".join(lines))
    vocabulary = dataset_vocabulary(name, tmp_path)
    things = [entry for entry in ours.classes if entry.thing]
    assert [entry.id for entry in vocabulary.classes] == [entry.id for entry in things]
    assert vocabulary.class_names == tuple(f"word {entry.id}" for entry in things)
    assert vocabulary.thing_classes == tuple(range(len(things)))
    (tmp_path / f"{whole}_with_prompt_eng.txt").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=rf"has {len(ours) - 1} classes, but .* has {len(things)} of the {len(ours)}"):
        dataset_vocabulary(name, tmp_path)


def test_published_files_are_taken_from_the_given_folder_and_from_below_the_root(tmp_path, monkeypatch):
    write_voc(tmp_path / "given")
    assert dataset_vocabulary(VOC, tmp_path / "given").synonyms[3] == ("word 3", "other 3")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert dataset_vocabulary(VOC).class_names[3] == Vocabulary.builtin("pascal_voc_21").class_names[3]
    write_voc(tmp_path / "vocabularies")
    assert dataset_vocabulary(VOC).class_names[3] == "word 3"


def test_ids_and_things_stay_those_of_the_data_set(tmp_path):
    ours = Vocabulary.builtin("coco_panoptic")
    lines = [f"{entry.id}:word {index}\n" for index, entry in enumerate(ours.classes)]
    (tmp_path / "coco_panoptic_with_prompt_eng.txt").write_text("0:invalid_class_id\n" + "".join(lines))
    theirs = dataset_vocabulary("openvocab_coco_2017_val_panoptic_with_sem_seg", tmp_path)
    assert theirs.thing_classes == ours.thing_classes
    assert [entry.id for entry in theirs.classes] == [entry.id for entry in ours.classes]


def test_the_twenty_voc_classes_are_the_file_of_21_without_its_background(tmp_path):
    write_voc(tmp_path)
    vocabulary = dataset_vocabulary("openvocab_pascal20_sem_seg_val", tmp_path)
    assert (len(vocabulary), vocabulary.class_names[0]) == (20, "word 1")


def test_a_folder_without_the_file_and_a_file_of_another_length_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pascal_voc_21_with_prompt_eng\.txt in it"):
        dataset_vocabulary(VOC, tmp_path)
    write_voc(tmp_path, num_classes=20)
    with pytest.raises(ValueError, match="has 20 classes, but data set .* has 21"):
        dataset_vocabulary(VOC, tmp_path)


def test_data_sets_without_a_published_file_keep_their_own_words(tmp_path):
    assert dataset_vocabulary("shapes_val", tmp_path).name == "shapes"
