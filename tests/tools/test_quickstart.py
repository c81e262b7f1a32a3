import numpy as np
import pytest
from PIL import Image

from fcclip.config import load_config
from fcclip.data import DATASETS
from fcclip.errors import UserError
from fcclip.segmenter import Computed, Segmentation
from fcclip.vocabulary import Vocabulary
from tests.tools.conftest import REPOSITORY, load_program

quickstart = load_program(REPOSITORY / "tools" / "quickstart.py")


def test_a_failing_script_ends_the_quickstart_and_the_stage_is_named(tmp_path):
    seconds, script = {}, tmp_path / "script.py"
    script.write_text("import sys; sys.exit(2)")
    with pytest.raises(UserError, match=r"failed in stage 'train'.*status 2"), quickstart.stage("train", seconds):
        quickstart.call(str(script))
    assert seconds == {}


def test_a_stage_notes_its_seconds(capsys):
    seconds = {}
    with quickstart.stage("render", seconds):
        pass
    assert 0 <= seconds["render"] < 5
    assert capsys.readouterr().out.startswith("== render\n")


def test_what_the_quickstart_names_exists():
    assert set(quickstart.SETS) <= set(DATASETS)
    cfg = load_config(REPOSITORY / quickstart.CONFIG, list(quickstart.SHORT_TRAIN))
    assert cfg.SOLVER.MAX_ITER < load_config(REPOSITORY / quickstart.CONFIG).SOLVER.MAX_ITER


def test_a_sheet_shows_image_ground_truth_and_prediction_of_the_first_images(monkeypatch, tmp_path):
    pixels, ids = tmp_path / "1.png", tmp_path / "ids.png"
    Image.new("RGB", (64, 64), (90, 120, 30)).save(pixels)
    Image.new("RGB", (64, 64), (7, 0, 0)).save(ids)
    segment = {"id": 7, "category_id": 1, "isthing": True, "area": 4096}
    record = {"file_name": str(pixels), "pan_seg_file_name": str(ids), "segments_info": [segment]}

    classes = Vocabulary.from_names("red circle; blue star")

    class TenImages:
        def records(self):
            return [record] * 10

    class FindsNothing:
        def __call__(self, image, vocabulary):
            nothing = np.zeros(image.shape[:2], np.int32)
            return Segmentation(image, Computed(vocabulary, nothing, (), (), nothing, np.zeros((0, 8))))

    monkeypatch.setattr(quickstart, "get_dataset", lambda name: TenImages())
    monkeypatch.setattr(quickstart, "dataset_vocabulary", lambda dataset: classes)
    sheet = np.array(Image.open(quickstart.draw_set(FindsNothing(), "some_set", tmp_path / "new")))
    height, width = sheet.shape[:2]
    assert width > 3 * 768
    assert height > quickstart.ROWS_DRAWN * 768
