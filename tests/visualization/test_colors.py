import itertools

import cv2
import numpy as np

from fcclip.visualization import class_color, instance_color


def lab(color):
    return cv2.cvtColor(np.float32([[color]]) / 255, cv2.COLOR_RGB2LAB)[0, 0]


def test_the_first_twenty_class_colors_are_well_separated():
    colors = [lab(class_color(index)) for index in range(20)]
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2))
    assert nearest > 25  # a difference of about 2 is just noticeable


def test_a_class_has_the_same_color_every_time_and_colors_repeat_only_after_the_palette():
    assert class_color(7) == class_color(7)
    assert len({class_color(index) for index in range(256)}) == 256
    assert class_color(256) == class_color(0)


def test_the_first_instance_has_the_class_color_and_the_next_ones_differ_from_it():
    shades = [instance_color(3, instance) for instance in range(5)]
    assert shades[0] == class_color(3)
    assert len(set(shades)) == 5
    assert all(0 <= channel <= 255 for shade in shades for channel in shade)
