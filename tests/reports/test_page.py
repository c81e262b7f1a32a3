"""The page with the best, the median and the worst images."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fcclip.data import get_dataset
from fcclip.evaluation import evaluate
from fcclip.reports import ORACLES, Report, write_page
from fcclip.reports.page import choose_cases
from fcclip.reports.zero_shot import cells_of, set_config
from tests.data.published_trees import write_tree
from tests.evaluation import tiny_world


def test_no_image_is_shown_twice_and_undefined_ones_never():
    values = {number: float(number) for number in range(10)} | {99: math.nan}
    assert choose_cases(values, 2) == {"best": [9, 8], "median": [5, 4], "worst": [0, 1]}
    assert choose_cases(values, 100) == {"best": [9, 8, 7], "median": [6, 5, 4], "worst": [0, 1, 2]}
    assert choose_cases({1: 5.0}, 3) == {"best": [1], "median": [], "worst": []}
    assert choose_cases({1: 5.0, 2: 7.0}, 1) == {"best": [2], "median": [], "worst": [1]}
    assert choose_cases({1: math.nan}, 3) == {"best": [], "median": [], "worst": []}
    for count in range(1, 12):
        cases = choose_cases({number: float(number % 4) for number in range(count)}, 3)
        chosen = [image_id for image_ids in cases.values() for image_id in image_ids]
        assert len(chosen) == len(set(chosen)), count


class Links(HTMLParser):
    """Collects what a page points to, and checks that its elements are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.links, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "world"
    folder.mkdir()
    tiny_world.write(folder)
    dataset = tiny_world.dataset(folder)
    options = {"modes": None, "output_dir": tmp_path / "out", "save_predictions": True}
    results = tiny_world.run(folder, **options)["ensemble"]
    cells = cells_of("tiny_val", {"ensemble": results}, backbone=None, reasons=[])
    report = Report(cells, {}, {}, {"weights": "<b>&.pth", "commit": "abc"}, "")
    sets = [(dataset, tmp_path / "out" / "tiny_val")]
    return write_page(report, sets, tmp_path / "page", images=2, title="A <title>")


def test_the_page_shows_image_truth_and_prediction_of_each_case(page):
    text = page.read_text()
    assert len(Links(text).links) == 2 * 3 * 6  # link and image; image, truth, prediction; 2 best, median and worst
    for kind in ("Best", "Median", "Worst"):
        assert f">{kind}</h3>" in text
    assert "PQ <b>" in text and "mIoU <b>" in text
    judged = dict(map(tuple, json.loads((page.parents[1] / "out/tiny_val/per_image.json").read_text())["panoptic_seg"]))
    first = re.search(r"<figcaption>(\d+) &middot; PQ <b>([\d.]+)</b>", text)
    assert int(first[1]) == max(judged, key=judged.get) and first[2] == f"{max(judged.values()):.1f}"


def test_the_page_needs_nothing_outside_its_folder(page, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(page.parent, moved)
    for link in Links((moved / "index.html").read_text()).links:
        assert "://" not in link and not link.startswith("/") and (moved / link).is_file(), link
    names = ("ground_truth", "prediction")
    drawn = {name: np.asarray(Image.open(moved / f"tiny_val/best1_{name}.jpg")) for name in names}
    assert drawn["ground_truth"].shape == drawn["prediction"].shape and drawn["prediction"].std() > 10
    assert "script" not in (moved / "index.html").read_text()


def test_names_are_text_and_no_markup(page):
    text = page.read_text()
    assert "A &lt;title&gt;" in text and "&lt;b&gt;&amp;.pth" in text and "<b>&" not in text


def test_label_maps_are_drawn_too(tmp_path, tiny_model, tiny_cfg):
    write_tree("openvocab_pascal21_sem_seg_val", tmp_path)
    dataset = get_dataset("openvocab_pascal21_sem_seg_val", tmp_path)
    tiny_cfg.INPUT.MIN_SIZE_TEST = tiny_cfg.INPUT.MAX_SIZE_TEST = 64
    cfg = set_config(tiny_cfg, dataset, given=["INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"])
    model = tiny_model(cfg=cfg)
    options = {"output_dir": tmp_path / "out", "save_predictions": True, "progress": False, "oracle": ORACLES["masks"]}
    evaluate(model, cfg, dataset, **options)  # with pixels without a class
    report = Report([], {}, {}, {}, "")
    path = write_page(report, [(dataset, tmp_path / "out" / dataset.name)], tmp_path, images=1)
    assert len(Links(path.read_text()).links) == 2 * 3 * 3


def test_data_sets_without_figures_of_single_images_say_so(tmp_path):
    dataset = tiny_world.dataset(tmp_path)
    (tmp_path / "per_image.json").write_text("{}")
    path = write_page(Report([], {}, {}, {}, ""), [(dataset, tmp_path)], tmp_path, images=1)
    assert "Its metrics say nothing about a single image." in path.read_text()
    with pytest.raises(ValueError, match="--images must be 1 or more, got 0"):
        write_page(Report([], {}, {}, {}, ""), [], tmp_path, images=0)
