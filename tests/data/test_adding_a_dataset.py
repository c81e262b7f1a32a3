"""Adding a data set takes its module, its vocabulary file, one line in DATASETS and four images; nothing else."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from fcclip import vocabulary
from fcclip.data import DATASETS, build_train_loader, build_train_mapper, dataset_vocabulary, get_dataset
from fcclip.evaluation.runner import build_evaluators

VOCABULARY = {
    "name": "pond",
    "version": "1",
    "classes": [
        {"id": 3, "name": "duck", "synonyms": ["mallard"], "thing": True},
        {"id": 8, "name": "water", "synonyms": [], "thing": False},
    ],
}
MODULE = """
from fcclip.data.datasets.panoptic import panoptic_dataset

def pond_panoptic(root, *, name, split):
    pond = root / "pond"
    return panoptic_dataset(
        name=name,
        vocabulary="pond",
        evaluator_type="coco_panoptic_seg",
        image_root=pond / split,
        panoptic_root=pond / f"panoptic_{split}",
        panoptic_json=pond / f"panoptic_{split}.json",
        sem_seg_root=pond / f"semantic_{split}",
        json_file=None,
        published_count=4,
        published_vocabulary="pond_with_prompt_eng.txt",
        benchmark="Pond",
        test_size=(64, 96),
    )
"""


@pytest.fixture
def pond(tmp_path, monkeypatch):
    """The name of a data set that was added."""
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "pond.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "added_pond.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    builtin = vocabulary.Vocabulary.builtin.__func__
    monkeypatch.setattr(
        vocabulary.Vocabulary,
        "builtin",
        classmethod(
            lambda cls, name: cls.from_file(tmp_path / "names" / "pond.json") if name == "pond" else builtin(cls, name)
        ),
    )
    build = importlib.import_module("added_pond").pond_panoptic
    monkeypatch.setitem(DATASETS, "pond_val", lambda root: build(root, name="pond_val", split="val"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_images(tmp_path / "pond")
    return "pond_val"


def write_images(folder):
    annotations = []
    for number in range(4):
        ids = np.full((32, 48), 8, np.uint8)
        ids[4:20, 4 : 20 + number] = 3
        for place, pixels, ending in (
            ("val", np.random.default_rng(number).integers(0, 256, (32, 48, 3)).astype(np.uint8), "jpg"),
            ("panoptic_val", np.stack([ids, ids * 0, ids * 0], -1), "png"),
            ("semantic_val", (ids == 8).astype(np.uint8), "png"),
        ):
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / place / f"{number}.{ending}")
        segments = [{"id": category, "category_id": category, "iscrowd": 0} for category in (3, 8)]
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    (folder / "panoptic_val.json").write_text(json.dumps({"annotations": annotations}))


def test_it_is_loaded_mapped_and_evaluated_like_every_other(pond, cfg, tmp_path):
    dataset = get_dataset(pond)
    assert (dataset.published_count, dataset.benchmark, dataset.test_size) == (4, "Pond", (64, 96))
    records = dataset.records()
    assert len(records) == dataset.published_count
    assert [segment["category_id"] for segment in records[0]["segments_info"]] == [0, 1]
    for mapper in ("coco_panoptic_lsj", "mask_former_semantic"):
        cfg.INPUT.DATASET_MAPPER_NAME, cfg.DATASETS.TRAIN = mapper, (pond,)
        cfg.INPUT.MIN_SIZE_TRAIN = (32,)
        assert len(build_train_mapper(cfg)(records[0], np.random.default_rng(0))["targets"]) == 2
    assert len(next(build_train_loader(cfg, dataset=dataset))) == 2
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = True
    (evaluators,) = build_evaluators(cfg, dataset, modes=["ensemble"]).values()
    assert dataset.evaluators == ("panoptic", "instance", "semantic") and len(evaluators) == 2
    (tmp_path / "vocabularies").mkdir()
    (tmp_path / "vocabularies" / "pond_with_prompt_eng.txt").write_text("1:bird,duck\n2:lake\n")
    published = dataset_vocabulary(pond)
    assert published.class_names == ("bird", "lake") and published.thing_classes == (0,)
