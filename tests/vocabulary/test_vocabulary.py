"""Words, files and what is seen."""

import json
from pathlib import Path

import pytest

from fcclip.vocabulary import TEMPLATES, Vocabulary, builtin_names, prompts


def test_an_entry_is_a_class_with_synonyms_and_an_optional_mark():
    vocabulary = Vocabulary.from_names("red circle; blue star,  azure star ;sand:stuff; ")
    assert vocabulary.class_names == ("red circle", "blue star", "sand")
    assert vocabulary.synonyms == (("red circle",), ("blue star", "azure star"), ("sand",))
    assert vocabulary.thing_classes == (0, 1)


def test_a_mark_wins_over_the_given_things():
    vocabulary = Vocabulary.from_names(["cat", "dog:stuff", "sky", "sea:thing"], things=[0, 1])
    assert vocabulary.thing_classes == (0, 3)


@pytest.mark.parametrize("entry", ["sand: stuff", "sand :stuff", "sand:STUFF", " sand : Stuff ", "sand\u200b:stuff"])
def test_spaces_and_case_of_a_mark_do_not_matter(entry):
    vocabulary = Vocabulary.from_names(["cat", entry])
    assert vocabulary.synonyms[1] == ("sand",) and vocabulary.thing_classes == (0,)


@pytest.mark.parametrize("suffix", ["stuf", "background", "Things"])
def test_an_unknown_mark_is_refused_with_the_known_ones(suffix):
    with pytest.raises(ValueError, match=f"sand:{suffix}.*:thing or :stuff"):
        Vocabulary.from_names(f"cat; sand:{suffix}")


def test_names_that_differ_by_unicode_form_or_invisible_letters_are_one():
    vocabulary = Vocabulary.from_names(["cafe\u0301", "zebra\u00a0 crossing\ufeff, \u200bzebra crossing"])
    assert vocabulary.synonyms == (("caf\u00e9",), ("zebra crossing",))


@pytest.mark.parametrize("entries", ["cat; dog; cat", "cat; dog; Cat, kitty"])
def test_the_same_class_twice_is_refused_with_both_places(entries):
    with pytest.raises(ValueError, match="classes 0 and 2 .*'cat'"):
        Vocabulary.from_names(entries)


def test_a_synonym_of_two_classes_is_told(caplog):
    with caplog.at_level("WARNING", logger="fcclip"):
        Vocabulary.from_names("dog, animal; cat, animal")
    assert "'animal'" in caplog.text and "dog, cat" in caplog.text


@pytest.mark.parametrize("words", ["", " ; ;", [], ["cat", " , "], ["cat", ":stuff"]])
def test_entries_without_a_name_are_refused(words):
    with pytest.raises(ValueError, match="name"):
        Vocabulary.from_names(words)


def test_thing_indices_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"thing indices \[2\] are no classes \(0..1\)"):
        Vocabulary.from_names("a; b", things=[0, 2])


def test_the_published_text_format_is_read_by_one_rule(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(
        "0:invalid_class_id\n1: person, child,,girl \n3:traffic light: red,lamp\n\n2:invalid_class_id\n7:sky\n"
    )
    vocabulary = Vocabulary.from_file(path, things=[0])
    assert vocabulary.synonyms == (("person", "child", "girl"), ("traffic light: red", "lamp"), ("sky",))
    assert [entry.id for entry in vocabulary.classes] == [1, 3, 7]
    assert vocabulary.thing_classes == (0,)
    assert not vocabulary.is_published


def test_our_json_is_read(tmp_path):
    path = tmp_path / "pets.json"
    classes = [
        {"id": 4, "name": "cat", "synonyms": ["kitty"], "thing": True},
        {"id": 9, "name": "grass", "thing": False},
    ]
    path.write_text(json.dumps({"name": "pets", "version": "2", "classes": classes}))
    vocabulary = Vocabulary.from_file(path)
    assert (vocabulary.name, len(vocabulary)) == ("pets", 2)
    assert vocabulary.synonyms == (("cat", "kitty"), ("grass",))
    assert vocabulary.thing_classes == (0,)


def test_a_label_only_name_is_shown_but_is_not_a_synonym(tmp_path):
    path = tmp_path / "birds.json"
    classes = [
        {"id": 1, "name": "crane", "label_only": True, "synonyms": ["grey crane", "wading bird"]},
        {"id": 2, "name": "crane", "label_only": False, "synonyms": ["tower crane"]},
    ]
    path.write_text(json.dumps({"name": "birds", "classes": classes}))
    vocabulary = Vocabulary.from_file(path)
    assert vocabulary.class_names == ("crane", "crane")
    assert vocabulary.synonyms == (("grey crane", "wading bird"), ("crane", "tower crane"))
    assert vocabulary.seen_by(Vocabulary.from_names("crane")).tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:cat\nno colon\n", "line 2: expected 'id:name"),
        ("x:cat\n", "line 1"),
        ("1:\n", "line 1"),
        ("", "has no classes"),
        ('{"name": "a", "classes": [}', "broken JSON at line 1"),
        ('{"name": "a", "words": []}', "expected an object with name, version and a list of classes"),
        ('{"name": "a", "classes": [{"id": 0}]}', "class 0 has no name"),
        (
            '{"name": "a", "classes": [{"name": "cat", "synonyms": "kitty"}]}',
            "class 0 must be an object whose synonyms",
        ),
        ('{"name": "a", "classes": ["cat"]}', "class 0 must be an object"),
        (
            '{"name": "a", "classes": [{"name": "wall-other", "label_only": true}]}',
            "'wall-other' is label_only, so it needs at least one synonym",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name_and_line(tmp_path, text, message):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_file(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        Vocabulary.from_file(tmp_path / "gone.json")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbf0:cat\n")
    assert Vocabulary.from_file(tmp_path / "words.txt").class_names == ("cat",)


def test_a_class_is_seen_if_any_synonym_is_one_of_the_training_exactly():
    training = Vocabulary.from_names("person, child; sky")
    test = Vocabulary.from_names("man, child; Sky; skyline; clouds, sky")
    assert test.seen_by(training).tolist() == [True, False, False, True]


def test_the_hash_knows_synonyms_order_and_things_but_not_the_file():
    first, same = Vocabulary.from_names("a, b; c"), Vocabulary.from_names("a,b;c", name="other")
    assert first.hash == same.hash
    assert len({first.hash, Vocabulary.from_names("c; a, b").hash, Vocabulary.from_names("a, b; c:stuff").hash}) == 3


def test_there_are_fourteen_templates_filled_synonym_by_synonym():
    assert len(TEMPLATES) == 14
    filled = prompts(["cat", "dog"])
    assert (filled[0], filled[1], filled[14]) == ("a photo of a cat.", "This is a photo of a cat", "a photo of a dog.")
    assert filled[13] == "There is a large cat in the scene."


def test_builtin_vocabularies_are_found_by_name():
    assert {"coco_panoptic", "ade20k_150", "pascal_voc_20", "shapes", "shapes_seen"} <= set(builtin_names())
    assert len(Vocabulary.builtin("coco_panoptic").thing_classes) == 80
    with pytest.raises(ValueError, match="Did you mean 'coco_panoptic'"):
        Vocabulary.builtin("coco_panoptik")


PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "vocabularies"
COUNTS = {  # classes, synonyms, classes seen by COCO panoptic
    "coco_panoptic": (133, 254, 133),
    "ade20k_150": (150, 403, 64),
    "ade20k_847": (847, 1342, 101),
    "cityscapes": (19, 60, 17),
    "mapillary_vistas": (65, 153, 26),
    "pascal_ctx_59": (59, 160, 51),
    "pascal_ctx_459": (459, 559, 85),
    "pascal_voc_21": (21, 153, 21),
    "coco_stuff": (171, 328, 135),
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published vocabulary files are not here")
@pytest.mark.parametrize("name", COUNTS)
def test_the_published_files_give_the_published_counts(name):
    training = Vocabulary.from_file(PUBLISHED / "coco_panoptic_with_prompt_eng.txt")
    vocabulary = Vocabulary.from_file(PUBLISHED / f"{name}_with_prompt_eng.txt")
    words = sum(len(synonyms) for synonyms in vocabulary.synonyms)
    assert (len(vocabulary), words, int(vocabulary.seen_by(training).sum())) == COUNTS[name]
    assert vocabulary.is_published


def test_joined_lists_keep_every_synonym_once_and_classes_that_share_one_are_one():
    pets = Vocabulary.from_names("cat; dog, hound; sand:stuff", name="pets")
    other = Vocabulary.from_names("cow; puppy, hound; beach, sand:stuff; lake, cow", name="other")
    both = pets.joined(other)
    assert both.synonyms == (("cat",), ("dog", "hound", "puppy"), ("sand", "beach"), ("cow", "lake"))
    assert both.name == "pets+other" and both.thing_classes == (0, 1, 3)
    assert [entry.id for entry in both.classes] == [0, 1, 2, 3]
    for vocabulary in (pets, other):
        assert vocabulary.seen_by(both).all()
    assert pets.joined(Vocabulary.from_names("hound; cat")) is pets
