import cv2
import numpy as np
import pytest

from fcclip.data.color_jitter import ColorJitter


class Scripted:
    """A generator whose numbers a test chooses: coins below 1/2 mean yes."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def uniform(self, low, high):
        return self.numbers.pop(0)

    def integers(self, low, high):
        number = self.numbers.pop(0)
        assert low <= number < high
        return number


YES, NO = 0.1, 0.9


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def hsv(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2HSV)


def test_nothing_is_changed_where_every_coin_says_no(image):
    changed = ColorJitter()(image, Scripted(NO, YES, NO, NO, NO))
    np.testing.assert_array_equal(changed, image)


def test_brightness_is_added_and_cut(image):
    changed = ColorJitter()(image, Scripted(YES, 20.5, YES, NO, NO, NO))
    np.testing.assert_array_equal(changed, np.minimum(image.astype(int) + 20, 255))  # rounded down


def test_contrast_is_a_factor(image):
    changed = ColorJitter()(image, Scripted(NO, YES, YES, 1.5, NO, NO))
    np.testing.assert_array_equal(changed, np.minimum(np.floor(image * 1.5), 255))


def test_saturation_and_hue_are_changed_in_hsv(image):
    grey = ColorJitter()(image, Scripted(NO, YES, NO, YES, 0.5, NO))
    expected = hsv(image)
    expected[..., 1] //= 2
    np.testing.assert_array_equal(grey, cv2.cvtColor(expected, cv2.COLOR_HSV2RGB))
    turned = ColorJitter()(image, Scripted(NO, YES, NO, NO, YES, -18))
    expected = hsv(image)
    expected[..., 0] = (expected[..., 0].astype(int) - 18) % 180
    np.testing.assert_array_equal(turned, cv2.cvtColor(expected, cv2.COLOR_HSV2RGB))


def test_a_coin_decides_whether_contrast_comes_first_or_last(image):
    first = ColorJitter()(image, Scripted(NO, YES, YES, 1.5, YES, 0.5, NO))
    last = ColorJitter()(image, Scripted(NO, NO, YES, 0.5, NO, YES, 1.5))
    halved = ColorJitter()(image, Scripted(NO, YES, NO, YES, 0.5, NO))
    np.testing.assert_array_equal(last, np.minimum(np.floor(halved * 1.5), 255))
    assert (first != last).any()


@pytest.mark.parametrize("generator", [np.random.default_rng, np.random.RandomState])
def test_the_argument_is_left_alone_and_a_seed_gives_one_image(image, generator):
    before = image.copy()
    images = [ColorJitter()(image, generator(seed)) for seed in (0, 1, 2, 3, 0)]
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(images[0], images[4])
    assert any((changed != image).any() for changed in images)
    assert all(changed.dtype == np.uint8 and changed.shape == image.shape for changed in images)
