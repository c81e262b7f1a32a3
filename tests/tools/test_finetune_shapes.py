"""The program that shows forgetting on the shapes world; its trainings take minutes and are not run here."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from fcclip.config import load_config
from fcclip.data import dataset_vocabulary, get_dataset, read_id_map
from fcclip.finetuning.start import METHODS, check_finetuning
from fcclip.vocabulary import Vocabulary
from tests.tools.conftest import REPOSITORY, load_program

program = load_program(REPOSITORY / "tools" / "finetune_shapes.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder of data sets with six images in each set but the training set, which has one."""
    folder = tmp_path_factory.mktemp("datasets")
    prepare = load_program(REPOSITORY / "datasets" / "prepare_shapes.py").prepare
    prepare(out=folder, seed=3, num_images=1, num_workers=1, num_evaluation=6)
    return folder


def test_the_own_classes_are_unseen_ones():
    unseen = ~Vocabulary.builtin("shapes").seen_by(Vocabulary.builtin("shapes_seen"))
    names = [name for name, new in zip(Vocabulary.builtin("shapes").class_names, unseen) if new]
    assert set(program.OWN) <= set(names)
    counts = {"own": len(program.OWN), "seen": 60 - len(names), "unseen": len(names) - len(program.OWN)}
    assert all(str(count) in program.GROUPS[group] for group, count in counts.items())
    assert set(program.METHODS) == set(METHODS) - {""}


def test_own_data_are_the_images_of_orange_shapes_with_nothing_else_labelled(world, tmp_path):
    path = program.write_own_data(tmp_path / "own" / "test", world, ("val", "val_unseen"))
    dataset = get_dataset(str(path))
    assert dataset.name == "orange_test" and dataset.own_vocabulary().class_names == program.OWN
    assert dataset_vocabulary(dataset).thing_classes == (0, 1, 2, 3, 4)
    names, expected = Vocabulary.builtin("shapes").class_names, []
    for split in ("val", "val_unseen"):
        for record in get_dataset(f"shapes_{split}", world).records():
            labels = {segment["id"]: names[segment["category_id"]] for segment in record["segments_info"]}
            expected.append({id: name for id, name in labels.items() if name in program.OWN})
    records = dataset.records()
    labelled = [
        {segment["id"]: program.OWN[segment["category_id"]] for segment in record["segments_info"]}
        for record in records
    ]
    assert labelled and labelled == [labels for labels in expected if labels]
    for record in records:
        ids = {segment["id"] for segment in record["segments_info"]}
        assert set(np.unique(read_id_map(record["pan_seg_file_name"]))) == ids | {0}


def test_every_method_has_a_command_line_that_can_start(world, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(world))
    args = Namespace(iterations=60, opts=["SEED", "1"])
    for method in program.METHODS:
        arguments = program.overrides(method, tmp_path / "train.yaml", tmp_path / "test.yaml", tmp_path / method, args)
        cfg = load_config(REPOSITORY / program.CONFIG, arguments)
        assert method == cfg.FINETUNE.METHOD and cfg.SOLVER.MAX_ITER == 60 and cfg.SEED == 1
        check_finetuning(cfg, world_size=1)


def test_the_figure_has_a_bar_for_each_method_and_group(tmp_path):
    def figures(value):
        groups = {"all": value, "seen": value, "own": value + 5, "unseen": None}
        return {"shapes_val": {metric: dict(groups) for metric in ("PQ", "AP", "mIoU")}}

    results = {name: {"before": figures(50.0), "after": figures(40.0)} for name in program.METHODS}
    figure = program.draw(results, "shapes_val")
    assert [len(panel.patches) for panel in figure.axes] == [12, 12, 12]
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights[0] == 55.0 and heights[3] == 45.0 and np.isnan(heights[2])
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
