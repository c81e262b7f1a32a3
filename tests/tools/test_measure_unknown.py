import numpy as np

from fcclip.vocabulary import Vocabulary
from tests.tools.conftest import REPOSITORY, load_program

program = load_program(REPOSITORY / "tools" / "measure_unknown.py")


def test_every_class_is_left_out_in_one_turn():
    whole = Vocabulary.builtin("shapes")
    left_out = [
        set(whole.class_names) - set(program.asked_names(whole, turn).class_names) for turn in range(program.TURNS)
    ]
    assert sorted(name for names in left_out for name in names) == sorted(whole.class_names)


def test_a_labelled_segment_is_what_most_of_its_pixels_are_called():
    truth = np.repeat([[11, 12, 13, 14]], 5, axis=0)
    found = truth - 10
    found[0] = 0  # nothing in the upper row
    found[2:, 3] = 0
    names = {1: "red circle", 2: "blue star", 3: "unknown", 4: "sand"}
    ids = {11: "red circle", 12: "pink star", 13: "green cross", 14: "sand", 15: "without a pixel"}
    assert program.answers(found, truth, names, ids) == [
        ("red circle", "own name"),
        ("pink star", "wrong name"),
        ("green cross", "unknown"),
        ("sand", "nothing"),
    ]
