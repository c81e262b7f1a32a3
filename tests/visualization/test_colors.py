import itertools

import cv2
import numpy as np

from fcclip.visualization import class_colors, shade
from fcclip.visualization.colors import PALETTE_SIZE, _palette
from fcclip.vocabulary import Vocabulary


def lab(color):
    return cv2.cvtColor(np.float32([[color]]) / 255, cv2.COLOR_RGB2LAB)[0, 0]


def test_all_colors_can_be_told_apart():
    colors = [lab(color) for color in _palette()]
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2))
    assert nearest > 6  # a difference of about 2 is just noticeable


def test_a_class_keeps_its_color_when_others_come_before_it():
    [alone] = class_colors(["sea"])
    assert class_colors(["cat", "dog", "sea"])[2] == class_colors(["sea", "cup"])[0] == alone


def test_no_two_classes_of_a_vocabulary_share_a_color_before_the_palette_ends():
    colors = class_colors(Vocabulary.builtin("ade20k_150").class_names)
    assert len(set(colors)) == 150
    colors = class_colors([f"name {index}" for index in range(2 * PALETTE_SIZE + 10)])
    assert len(set(colors[:PALETTE_SIZE])) == len(set(colors[PALETTE_SIZE : 2 * PALETTE_SIZE])) == PALETTE_SIZE


def test_the_first_instance_has_the_class_color_and_the_next_ones_differ_from_it():
    shades = [shade((200, 90, 10), instance) for instance in range(5)]
    assert shades[0] == (200, 90, 10)
    assert len(set(shades)) == 5
    assert all(0 <= channel <= 255 for each in shades for channel in each)
