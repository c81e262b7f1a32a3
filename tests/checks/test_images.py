import numpy as np
import pytest

from fcclip.checks.images import areas_of


@pytest.mark.parametrize("shape", [(13, 17), (1, 1), (3, 4)])
def test_areas_are_the_pixels_of_each_number(shape):
    numbers = np.random.default_rng(0).integers(0, 5, shape)
    values, counts = np.unique(numbers, return_counts=True)
    assert areas_of(numbers) == dict(zip(values.tolist(), counts.tolist()))
