import numpy as np
import pytest

from fcclip.checks.images import regions


@pytest.mark.parametrize("shape", [(13, 17), (1, 1), (3, 4)])
def test_regions_have_the_area_of_their_numbers_and_runs_within_rows(shape):
    numbers = np.random.default_rng(0).integers(0, 5, shape)
    painted = regions(numbers)
    values, areas = np.unique(numbers, return_counts=True)
    assert painted.area_of == dict(zip(values.tolist(), areas.tolist()))
    assert painted.lengths.sum() == numbers.size
    np.testing.assert_array_equal(numbers.ravel()[painted.starts], painted.values[painted.which])
