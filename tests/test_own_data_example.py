"""The section "Your own data" of GETTING_STARTED.md: its YAML is read, its commands are run."""

import importlib
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fcclip.data import get_dataset
from tests.data.own_world import edit_json, write_own

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "GETTING_STARTED.md").read_text(encoding="utf-8").split("## Your own data\n")[1].split("\n## ")[0]
YAML, COMMANDS = (re.search(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)[1] for kind in ("yaml", "bash"))
MOON = "blue moon"  # a class that no annotation has and no JSON knows


def words_of(script: str) -> list[str]:
    """The words behind a script in the commands of the section."""
    (command,) = re.findall(rf"python {re.escape(script)} ((?:.*\\\n)*.*)", COMMANDS)
    return shlex.split(command.replace("\\\n", " "))


@pytest.fixture
def program(monkeypatch):
    """Imports a script of the repository."""
    for folder in (ROOT, ROOT / "datasets", ROOT / "tools"):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.fixture
def my_data(tmp_path, monkeypatch, program) -> Path:
    """The folder that the commands make, in a working directory of its own, and harder: category ids 7 apart, a class
    more than the JSON knows, and an image without a label."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fcclip").symlink_to(ROOT / "fcclip")
    prepare = program("prepare_shapes")
    asked = prepare.parse_arguments(words_of("datasets/prepare_shapes.py"))
    prepare.prepare(out=asked.out, seed=asked.seed, num_images=asked.images, num_workers=1, num_evaluation=1)
    name, text = re.search(r"cat > (\S+) << END\n(.*?)END\n", COMMANDS, re.DOTALL).groups()
    description = yaml.safe_load(text)
    folder = tmp_path / Path(name).parent

    def harden(content):
        for category in content["categories"]:
            category["id"] = 7 * category["id"] + 3
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["category_id"] = 7 * segment["category_id"] + 3
        content["annotations"][4]["segments_info"] = []
        empty = folder / description["masks"] / content["annotations"][4]["file_name"]
        Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(empty)

    edit_json(folder / description["annotations"], harden)
    classes = json.loads((folder / description["classes"]).read_text())
    classes["classes"].append({"name": MOON})
    (folder / "classes.json").write_text(json.dumps(classes))
    (tmp_path / name).write_text(text.replace(description["classes"], "classes.json"))
    return tmp_path / name


def test_the_yaml_describes_a_data_set(tmp_path):
    path = write_own(tmp_path, "panoptic")
    path.write_text(YAML)
    dataset = get_dataset(str(path))
    assert dataset.metadata["thing_classes"] == ["car", "person"] and dataset.metadata["ignore_label"] == 255
    assert len(dataset.records()) == 5


def test_the_table_of_mappers_is_that_of_the_code():
    from fcclip.data.mappers import MAPPERS

    assert {name for name in re.findall(r"`(\w+_\w+)`", SECTION) if name in MAPPERS} == set(MAPPERS)


def test_twenty_images_are_trained_on_and_evaluated_with_sensible_numbers(my_data, program, capsys):
    dataset = get_dataset(str(my_data))
    assert len(dataset.records()) == 20 and len(dataset.metadata["stuff_classes"]) == 61
    assert dataset.records()[4]["segments_info"] == []

    assert program("check_dataset").main([str(my_data)]) == 0
    train = [word if word != "60" else "61" for word in words_of("train_net.py")]
    assert program("train_net").main(train) == 0, capsys.readouterr().err
    content = json.loads(Path("output/mine/inference/mine/results.json").read_text())
    assert content["vocabulary"] == "mine"
    found = content["results"]["ensemble"]
    quality, precision, iou = found["panoptic_seg"], found["segm"], found["sem_seg"]
    headlines = (quality["PQ"], quality["PQ_th"], quality["PQ_st"], precision["AP"], iou["mIoU"])
    assert all(math.isfinite(value) and 50 < value < 99 for value in headlines), headlines
    assert iou[f"IoU-{MOON}"] is None and precision[f"AP-{MOON}"] is None  # nothing to measure
