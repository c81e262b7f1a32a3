import pytest

from fcclip.segmenter import read_vocabulary
from fcclip.vocabulary import Vocabulary


def test_a_string_a_list_and_a_vocabulary_mean_the_same():
    text = read_vocabulary("sea; surfboard, surf board; sand:stuff")
    assert text == read_vocabulary(["sea", "surfboard, surf board", "sand:stuff"])
    assert text.synonyms == (("sea",), ("surfboard", "surf board"), ("sand",))
    assert read_vocabulary(text) is text


def test_the_name_of_a_built_in_vocabulary_stands_for_all_of_its_classes():
    assert read_vocabulary("shapes") is Vocabulary.builtin("shapes")
    several = read_vocabulary("glorp:stuff; shapes_seen ;pascal_voc_20")
    assert several.class_names[0] == "glorp" and not several.classes[0].thing
    assert len(several) == 1 + 40 + 20
    assert several == read_vocabulary(["glorp:stuff", "shapes_seen", "pascal_voc_20"])


def test_built_in_vocabularies_that_share_a_name_are_joined_in_one_class():
    one, both = read_vocabulary("shapes"), read_vocabulary("shapes_seen; shapes")
    assert len(both) == len(one)


def test_entries_that_are_no_names_are_refused():
    with pytest.raises(ValueError, match="give at least one"):
        read_vocabulary([])
    with pytest.raises(ValueError, match="has no name"):
        read_vocabulary(["cat", " ,"])
