"""Saved predictions give what the model gave, to the bit, whatever was interrupted in between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fcclip
from fcclip.data import Dataset
from fcclip.evaluation import GroundTruth, PredictionWriter, SavedPredictions
from fcclip.structures import Instances
from tests.evaluation import tiny_world

SINGLE = {"modes": None, "save_predictions": True}


class GoneError(BaseException):
    """As sudden as a kill: nothing in the package catches it."""


class DyingModel(tiny_world.GreyModel):
    """Gives up before an image."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    def score(self, inputs, vocabulary=None):
        if self.calls == self.before:
            raise GoneError
        return super().score(inputs, vocabulary)


def evaluate(folder, model, output, *, cfg=None, dataset=None, **options):
    settings = {"modes": tiny_world.MODES, "training_vocabulary": tiny_world.TRAINING}
    settings |= {"vocabulary": tiny_world.VOCABULARY, "progress": False, "save_predictions": True}
    return tiny_world.evaluate(
        model,
        cfg or tiny_world.config(),
        dataset or tiny_world.dataset(folder),
        output_dir=output,
        **settings | options,
    )


def files_of(output):
    """Every file below a folder that does not depend on who wrote which line."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith("images.")
    }


def lines_of(predictions):
    return sorted(line for path in predictions.glob("images.*.jsonl") for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("before", [1, 4, 7])
def test_an_evaluation_that_was_interrupted_goes_on_to_the_same_numbers_and_files(folder, tmp_path, before):
    whole = evaluate(folder, tiny_world.GreyModel(), tmp_path / "whole")
    interrupted = DyingModel(before)
    if before < tiny_world.NUM_IMAGES:
        with pytest.raises(GoneError):
            evaluate(folder, interrupted, tmp_path / "parts")
    else:
        evaluate(folder, interrupted, tmp_path / "parts")
    kept = len(lines_of(tmp_path / "parts" / "tiny_val" / "ensemble" / "predictions"))
    assert before - 5 <= kept <= before  # those under way in the background are lost when the process goes down
    rest = tiny_world.GreyModel()
    resumed = evaluate(folder, rest, tmp_path / "parts", resume=True)
    assert rest.calls == tiny_world.NUM_IMAGES - kept
    assert repr(resumed) == repr(whole)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def writer_for(folder, output, **metadata):
    """A writer into a folder that has a header, and the records of the data set."""
    dataset = tiny_world.dataset(folder, **metadata)
    (output / "header.json").write_text(json.dumps({"format": 1}))
    return PredictionWriter(output, dataset, dataset.records()), dataset.records()


def test_what_the_model_gives_and_what_is_read_are_the_same(folder, tmp_path):
    writer, records = writer_for(folder, tmp_path)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 40, 60, generator=generator) > 0.5
    instances = Instances(
        scores=torch.rand(5, generator=generator),
        pred_classes=torch.tensor([0, 2, 0, 2, 2]),
        pred_masks=masks[[0, 0, 1, 2, 2]],  # instances of one mask
        pred_boxes=torch.rand(5, 4, generator=generator) * 60,
    )
    id_map = torch.randint(0, 1 << 24, (40, 60), generator=generator, dtype=torch.int32)
    segments = [{"id": 1 << 23, "isthing": True, "category_id": 3, "score": 1 / 3, "area": 7}]
    labels = torch.randint(0, 4, (40, 60), generator=generator)
    output = {"panoptic_seg": (id_map, segments), "sem_seg": labels, "instances": instances}
    writer.process(GroundTruth(records[2]), output)
    read = SavedPredictions(tmp_path).read(records[2]["image_id"])
    assert read.keys() == output.keys()
    assert np.array_equal(read["panoptic_seg"][0], id_map.numpy()) and read["panoptic_seg"][1] == segments
    assert np.array_equal(read["sem_seg"], labels.numpy())
    for name in ("scores", "pred_classes", "pred_masks", "pred_boxes"):
        value, expected = getattr(read["instances"], name), getattr(instances, name)
        assert torch.equal(value, expected.to(value.dtype)), name
    assert len(SavedPredictions(tmp_path).record(records[2]["image_id"])["masks"]) == 3


def test_no_instance_at_all_is_saved_too(folder, tmp_path):
    writer, records = writer_for(folder, tmp_path)
    none = Instances(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 40, 60, dtype=torch.bool), torch.zeros(0, 4))
    writer.process(GroundTruth(records[0]), {"instances": none})
    read = SavedPredictions(tmp_path).read(records[0]["image_id"])["instances"]
    assert read.pred_masks.shape == (0, 40, 60) and read.pred_boxes.shape == (0, 4) and len(read.scores) == 0


def test_more_than_256_classes_need_16_bit(folder, tmp_path):
    writer, records = writer_for(folder, tmp_path, stuff_classes=["-"] * 847)
    labels = torch.arange(40 * 60).reshape(40, 60) % 847
    writer.process(GroundTruth(records[0]), {"sem_seg": labels})
    assert np.array_equal(SavedPredictions(tmp_path).read(records[0]["image_id"])["sem_seg"], labels.numpy())


@pytest.mark.parametrize("cut", [1, 40, "all"])
def test_a_line_that_a_kill_cut_off_is_evaluated_again(folder, tmp_path, cut):
    whole = evaluate(folder, tiny_world.GreyModel(), tmp_path, **SINGLE)
    (path,) = (tmp_path / "tiny_val" / "predictions").glob("images.*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + (lines[-1][:-cut] if cut != "all" else b""))
    model = tiny_world.GreyModel()
    assert repr(evaluate(folder, model, tmp_path, resume=True, **SINGLE)) == repr(whole)
    assert model.calls == 1
    assert path.read_bytes().splitlines(keepends=True) == lines


def test_an_image_that_only_one_mode_has_is_evaluated_again(folder, tmp_path):
    whole = evaluate(folder, tiny_world.GreyModel(), tmp_path)
    path = tmp_path / "tiny_val" / "in_vocabulary" / "predictions" / "images.0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    model = tiny_world.GreyModel()
    assert repr(evaluate(folder, model, tmp_path, resume=True)) == repr(whole)
    assert model.calls == 2
    for mode in tiny_world.MODES:  # and nothing stands there twice
        assert len(lines_of(tmp_path / "tiny_val" / mode / "predictions")) == tiny_world.NUM_IMAGES


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_image_whose_file_is_not_whole_is_evaluated_again(folder, tmp_path, damage):
    whole = evaluate(folder, tiny_world.GreyModel(), tmp_path, **SINGLE)
    path = tmp_path / "tiny_val" / "predictions" / "semantic" / "3.png"
    path.write_bytes(path.read_bytes()[:20])
    if damage == "gone":
        path.unlink()
    model = tiny_world.GreyModel()
    assert repr(evaluate(folder, model, tmp_path, resume=True, **SINGLE)) == repr(whole)
    assert model.calls == 1


def test_a_file_with_a_flipped_bit_is_named(folder, tmp_path):
    evaluate(folder, tiny_world.GreyModel(), tmp_path, **SINGLE)
    path = tmp_path / "tiny_val" / "predictions" / "3.png"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"predictions/3\.png is not the one that was written: .* --resume"):
        evaluate(folder, tiny_world.GreyModel(), tmp_path, resume=True, **SINGLE)


def test_a_damaged_line_in_the_middle_is_named(folder, tmp_path):
    evaluate(folder, tiny_world.GreyModel(), tmp_path, **SINGLE)
    path = tmp_path / "tiny_val" / "predictions" / "images.0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + b"".join(lines[2:]))
    with pytest.raises(ValueError, match=rf"images\.0\.jsonl' is damaged at byte {len(lines[0])} .*Remove that line"):
        evaluate(folder, tiny_world.GreyModel(), tmp_path, resume=True, **SINGLE)


class LearningModel(tiny_world.GreyModel):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("words", "vocabulary_sha256 was "),
        ("sizes", "INPUT.MIN_SIZE_TEST was 0, now 32"),
        ("mode", r"alpha_and_beta was \[1\.0, 1\.0\], now \[0\.9, 1\.0\]"),
        ("weights", "weights_sha256 was "),
    ],
)
def test_predictions_of_something_else_are_not_mixed_in(folder, tmp_path, change, told):
    options, cfg, model = {"modes": dict(tiny_world.MODES)}, tiny_world.config(), LearningModel()
    evaluate(folder, model, tmp_path, cfg=cfg, **options)
    if change == "words":
        entries = [", ".join((*entry.synonyms, "other")) for entry in tiny_world.VOCABULARY.classes]
        options["vocabulary"] = tiny_world.VOCABULARY.from_names(entries, things=[0, 2])
    elif change == "sizes":
        cfg.INPUT.MIN_SIZE_TEST = 32
    elif change == "mode":
        options["modes"]["out_of_vocabulary"] = (0.9, 1.0)
    else:
        model.weight.data += 1
    with pytest.raises(ValueError, match=f"predictions' were made with something else: .*{told}") as caught:
        evaluate(folder, model, tmp_path, cfg=cfg, resume=True, **options)
    assert "Give the same as then" in str(caught.value) and "remove this one" in str(caught.value)


def test_what_changes_only_rounding_does_not_stop_a_resume(folder, tmp_path):
    cfg = tiny_world.config()
    whole = evaluate(folder, tiny_world.GreyModel(), tmp_path, cfg=cfg, **SINGLE)
    cfg.TEST.BATCH_SIZE, cfg.MODEL.WEIGHTS = 3, "elsewhere.pth"
    assert repr(evaluate(folder, tiny_world.GreyModel(), tmp_path, cfg=cfg, resume=True, **SINGLE)) == repr(whole)


def test_without_resume_everything_begins_anew(folder, tmp_path):
    evaluate(folder, tiny_world.GreyModel(), tmp_path, max_images=2, **SINGLE)
    model = tiny_world.GreyModel()
    evaluate(folder, model, tmp_path, **SINGLE)
    assert model.calls == tiny_world.NUM_IMAGES


def test_a_subset_grows(folder, tmp_path):
    evaluate(folder, tiny_world.GreyModel(), tmp_path, max_images=2, **SINGLE)
    model = tiny_world.GreyModel()
    whole = evaluate(folder, model, tmp_path, resume=True, **SINGLE)
    assert model.calls == tiny_world.NUM_IMAGES - 2
    assert repr(whole) == repr(evaluate(folder, tiny_world.GreyModel(), tmp_path / "whole", **SINGLE))
    some = evaluate(folder, DyingModel(0), tmp_path, max_images=3, resume=True, **SINGLE)
    assert repr(some) == repr(evaluate(folder, tiny_world.GreyModel(), tmp_path / "some", max_images=3, **SINGLE))


def test_images_of_one_name_in_several_folders_keep_apart(folder, tmp_path):
    dataset = tiny_world.dataset(folder)
    records = dataset.records()
    for index, record in enumerate(records):
        place = tmp_path / str(index) / "image.jpg"
        place.parent.mkdir()
        Image.open(record["file_name"]).save(place, quality=100, subsampling=0)
        record["file_name"] = str(place)
    moved = Dataset(dataset.name, dataset.metadata, lambda: records, dataset.vocabulary, dataset.read_vocabulary)
    whole = evaluate(folder, tiny_world.GreyModel(), tmp_path / "out", dataset=moved, **SINGLE)
    again = evaluate(folder, DyingModel(0), tmp_path / "out", dataset=moved, resume=True, **SINGLE)
    assert repr(again) == repr(whole)
    assert len(list((tmp_path / "out" / "tiny_val" / "predictions").glob("*.png"))) == tiny_world.NUM_IMAGES


def test_how_good_each_image_is_stands_in_a_file(folder, tmp_path):
    evaluate(folder, tiny_world.GreyModel(), tmp_path, **SINGLE)
    found = json.loads((tmp_path / "tiny_val" / "per_image.json").read_text())
    assert found.keys() == {"panoptic_seg", "sem_seg"}
    assert [image_id for image_id, _ in found["sem_seg"]] == [1, 4, 7, 10, 13, 16, 19]
    assert all(0 <= value <= 100 for _, value in found["panoptic_seg"])


def test_two_processes_resume_what_one_began_and_one_what_two_began(folder, tmp_path):
    whole = repr(evaluate(folder, tiny_world.GreyModel(), tmp_path / "whole"))
    program = Path(__file__).with_name("resume_in_processes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(fcclip.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def run(output, world_size, before):
        processes = [
            subprocess.Popen(
                [sys.executable, program, folder, output, str(rank), str(world_size), str(before)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(world_size)
        ]
        told = [process.communicate(timeout=180) for process in processes]
        return told[0][0].strip(), [process.returncode for process in processes], told

    _, codes, told = run(tmp_path / "from_two", 2, 2)  # each process is killed before its third image
    assert codes == [-9, -9], told
    assert repr(evaluate(folder, tiny_world.GreyModel(), tmp_path / "from_two", resume=True)) == whole
    with pytest.raises(GoneError):
        evaluate(folder, DyingModel(3), tmp_path / "from_one")
    found, codes, told = run(tmp_path / "from_one", 2, 99)
    assert codes == [0, 0], told
    assert found == whole
    for parts in ("from_one", "from_two"):
        assert files_of(tmp_path / parts) == files_of(tmp_path / "whole")
