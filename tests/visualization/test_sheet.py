import numpy as np
import pytest

from fcclip.visualization import contact_sheet


def plain(height, width, value):
    return np.full((height, width, 3), value, np.uint8)


def test_a_row_shows_the_three_images_at_the_same_width():
    sheet = contact_sheet([[plain(64, 64, 10), plain(256, 256, 100), plain(256, 256, 200)]])
    row = sheet[sheet.shape[0] // 2]
    for value in (10, 100, 200):
        assert (row == value).all(-1).sum() == 256


def test_rows_stand_below_each_other_without_overlap():
    sheet = contact_sheet([[plain(50, 100, 1), plain(80, 100, 2)], [plain(20, 100, 3), plain(20, 100, 4)]])
    assert [int((sheet == value).all(-1).sum()) for value in (1, 2, 3, 4)] == [5000, 8000, 2000, 2000]


def test_titles_take_room_above_the_images():
    rows = [[plain(100, 100, 1)]]
    assert contact_sheet(rows, titles=["image"]).shape[0] > contact_sheet(rows).shape[0]


@pytest.mark.parametrize("rows", [[], [[]], [[plain(4, 4, 0)], []]])
def test_a_sheet_without_images_or_with_ragged_rows_is_refused(rows):
    with pytest.raises(ValueError, match="same number of images"):
        contact_sheet(rows)


def test_titles_must_fit_the_columns():
    with pytest.raises(ValueError, match="2 titles for 1 columns"):
        contact_sheet([[plain(4, 4, 0)]], titles=["a", "b"])
