import pytest

from fcclip import Segmenter
from fcclip.data import get_dataset
from fcclip.vocabulary import Vocabulary
from tests.tools.conftest import REPOSITORY, load_program


@pytest.fixture(scope="module")
def program():
    return load_program(REPOSITORY / "tools" / "measure_teaching.py")


def test_only_the_classes_that_are_renamed_have_other_names(program):
    whole = Vocabulary.builtin("shapes")
    renamed = program.nonsense(whole, [3, 5])
    assert [index for index, pair in enumerate(zip(whole.class_names, renamed.class_names)) if len(set(pair)) > 1] == [
        3,
        5,
    ]
    assert renamed.thing_classes == whole.thing_classes
    assert len(set(renamed.class_names)) == len(whole)


def test_examples_are_the_first_segments_of_another_set(program, root):
    segmenter = Segmenter.from_pretrained("shapes", device="cpu")
    index = get_dataset("shapes_tune").records()[0]["segments_info"][-1]["category_id"]
    taught = program.teach(segmenter, {index: "glorp"}, [1])
    assert list(taught[1]) == ["glorp"] and len(segmenter.examples.classes["glorp"].regions) == 1
