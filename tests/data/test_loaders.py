import copy
import dataclasses
import functools
import gc
import itertools
import logging
import os
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fcclip.data import build_test_loader, build_train_loader, get_dataset, loaders
from fcclip.data.loaders import LoaderError
from fcclip.data.mappers import PanopticJitterMapper, ShortestEdgeMapper, build_train_mapper
from fcclip.data.samplers import permutation_stream
from tests.data.published_trees import write_tree


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert [sample["image_id"] for sample in batch] == [sample["image_id"] for sample in other]
        for first, second in zip(batch, other, strict=True):
            assert torch.equal(first["image"], second["image"])
            assert torch.equal(first["targets"].id_map, second["targets"].id_map)
            assert torch.equal(first["targets"].labels, second["targets"].labels)


def test_batches_have_the_size_of_one_rank(cfg, coco_val):
    cfg.SOLVER.IMS_PER_BATCH = 6
    batches = take(build_train_loader(cfg, dataset=coco_val, rank=1, world_size=2), 3)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert batches[0][0]["image"].shape == (3, 32, 32)


def test_two_loaders_with_one_seed_are_equal_and_with_two_are_not(cfg, coco_val):
    first = take(build_train_loader(cfg, dataset=coco_val), 4)
    assert_same(first, take(build_train_loader(cfg, dataset=coco_val), 4))
    other = take(build_train_loader(cfg, dataset=coco_val, seed=8), 4)
    assert any(not torch.equal(a["image"], b["image"]) for x, y in zip(first, other) for a, b in zip(x, y))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(cfg, coco_val, num_workers):
    expected = take(build_train_loader(cfg, dataset=coco_val), 5)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    assert_same(take(build_train_loader(cfg, dataset=coco_val), 5), expected)


@pytest.mark.parametrize("grouping", [True, False])
def test_a_resumed_loader_goes_on_where_the_other_stopped(cfg, coco_val, grouping):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    whole = take(build_train_loader(cfg, dataset=coco_val), 7)
    assert_same(take(build_train_loader(cfg, dataset=coco_val, start=4), 3), whole[4:])


def test_resuming_reads_no_skipped_image(cfg, coco_val, coco_root):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_train_loader(cfg, dataset=coco_val, start=2)
    first_four = list(itertools.islice(permutation_stream(6, 7), 4))
    for index in first_four:
        (coco_root / "coco" / "val2017" / f"{100 + index:012d}.jpg").unlink()
    assert {sample["image_id"] - 100 for sample in next(loader)} == set(range(6)) - set(first_four)


def test_a_sample_is_drawn_from_seed_and_position(cfg, coco_val):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    records, order = coco_val.records(), list(itertools.islice(permutation_stream(6, 7), 8))
    samples = [
        sample for batch in take(build_train_loader(cfg, dataset=coco_val, rank=1, world_size=2), 4) for sample in batch
    ]
    for position, sample in zip(range(1, 8, 2), samples):
        again = build_train_mapper(cfg)(records[order[position]], np.random.default_rng((7, position)))
        assert torch.equal(sample["image"], again["image"])


def test_two_ranks_load_what_one_would(cfg, coco_val):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 4
    whole = take(build_train_loader(cfg, dataset=coco_val), 3)
    ranks = [take(build_train_loader(cfg, dataset=coco_val, rank=rank, world_size=2), 3) for rank in range(2)]
    assert_same([[a, c, b, d] for (a, b), (c, d) in zip(*ranks)], whole)


def test_a_batch_is_wide_or_tall(cfg, coco_val):
    for batch in take(build_train_loader(cfg, dataset=coco_val), 8):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(cfg, coco_val, num_workers):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    cfg.SEED = -1
    torch_state, numpy_state = torch.get_rng_state(), copy.deepcopy(np.random.get_state()[1])
    take(build_train_loader(cfg, dataset=coco_val), 2)
    take(build_test_loader(cfg, coco_val), 2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_negative_seed_draws_one_and_reports_it(cfg, coco_val, caplog):
    cfg.SEED = -1
    with caplog.at_level(logging.INFO):
        loader = build_train_loader(cfg, dataset=coco_val)
    assert f"from seed {loader.seed}" in caplog.text
    assert_same(take(build_train_loader(cfg, dataset=coco_val, seed=loader.seed), 2), take(loader, 2))
    assert build_train_loader(cfg, dataset=coco_val).seed != loader.seed


def test_several_ranks_must_share_a_drawn_seed(cfg, coco_val):
    cfg.SEED = -1
    with pytest.raises(ValueError, match="SEED is -1, so each of the 2 processes would draw its own order"):
        build_train_loader(cfg, dataset=coco_val, world_size=2)
    assert build_train_loader(cfg, dataset=coco_val, world_size=2, seed=5).seed == 5


def test_a_batch_that_ranks_cannot_share_equally_is_refused(cfg, coco_val):
    cfg.SOLVER.IMS_PER_BATCH = 16
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 16, which 3 .* Set it to a multiple of 3"):
        build_train_loader(cfg, dataset=coco_val, world_size=3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_stops_training_and_is_named(cfg, coco_val, coco_root, num_workers):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    (coco_root / "coco" / "val2017" / "000000000103.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^/.*000000000103\.jpg: cannot be read as an image: the file is empty"):
        take(build_train_loader(cfg, dataset=coco_val), 6)


# ---- kinds of ground truth ----


@pytest.fixture
def instances(tmp_path):
    """COCO instances: four images, and a fifth without an annotation."""
    write_tree("openvocab_coco_2017_train", tmp_path)
    return get_dataset("openvocab_coco_2017_train", tmp_path)


def test_a_mapper_of_another_kind_of_ground_truth_is_refused_before_anything_is_loaded(cfg, coco_val):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    message = (
        r"data set 'openvocab_coco_2017_val_panoptic_with_sem_seg': the ground truth has no annotations, .* set INPUT"
    )
    with pytest.raises(ValueError, match=message):
        build_train_loader(cfg, dataset=coco_val)


def test_classes_whose_ground_truth_is_all_ignored_are_said(cfg, coco_val, instances, caplog):
    build_train_loader(cfg, dataset=coco_val)  # its only dog is a crowd
    assert "nothing but crowds, which are never trained on, of dog\n" in caplog.text
    assert "ignore_label" not in caplog.text

    def with_crowds(dataset, field):
        records = dataset.records()
        index = records[0][field][0]["category_id"]
        for entry in (entry for record in records for entry in record[field] if entry["category_id"] == index):
            entry["iscrowd"] = 1
        return dataclasses.replace(dataset, load=lambda: records), dataset.metadata["stuff_classes"][index]

    crowds, name = with_crowds(coco_val, "segments_info")
    build_train_loader(cfg, dataset=crowds)
    assert f"nothing but crowds, which are never trained on, of {name}, dog\n" in caplog.text
    unlabelled = dataclasses.replace(coco_val, metadata={**coco_val.metadata, "ignore_label": 0})
    build_train_loader(cfg, dataset=unlabelled)
    assert "label 0 is the class 'person'" in caplog.text
    caplog.clear()
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    crowds, _ = with_crowds(instances, "annotations")
    build_train_loader(cfg, dataset=crowds)
    assert "of dog, toothbrush\n" in caplog.text


@pytest.mark.parametrize("filtered", [True, False])
def test_images_without_an_annotation_are_left_out_if_the_config_says_so(cfg, instances, caplog, filtered):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filtered
    with caplog.at_level(logging.INFO):
        loader = build_train_loader(cfg, dataset=instances)
    assert loader.num_records == (4 if filtered else 5)
    assert ("1 of 5 images have no annotation but crowds; left out" in caplog.text) == filtered
    assert all(len(sample["targets"]) == len(sample["targets"].masks) for batch in take(loader, 5) for sample in batch)


def test_a_data_set_of_crowds_is_refused(cfg, instances):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    records = instances.records()
    for record in records:
        for annotation in record["annotations"]:
            annotation["iscrowd"] = 1
    crowds = dataclasses.replace(instances, load=lambda: records)
    with pytest.raises(ValueError, match="none of its 5 images has an annotation that is not a crowd"):
        build_train_loader(cfg, dataset=crowds)


def test_masks_travel_from_the_loading_processes(cfg, instances):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    expected = take(build_train_loader(cfg, dataset=instances), 3)
    cfg.DATALOADER.NUM_WORKERS = 2
    for batch, other in zip(take(build_train_loader(cfg, dataset=instances), 3), expected):
        for first, second in zip(batch, other, strict=True):
            assert torch.equal(first["targets"].masks, second["targets"].masks)
            assert torch.equal(first["image"], second["image"])


def test_rare_categories_come_more_often_with_repeat_factors(cfg, coco_val, edit_json):
    edit_json(lambda content: content["annotations"][3]["segments_info"][0].update(category_id=2))
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 1.0
    batches = take(build_train_loader(cfg, dataset=coco_val), 60)
    drawn = [sample["image_id"] for batch in batches for sample in batch]
    assert 1.8 < drawn.count(103) / (len(drawn) / 7.5) < 3.2  # sqrt(6) times, the others once


# ---- memory ----


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux, which tells private memory")
def test_a_loading_process_keeps_less_than_a_gigabyte_to_itself_with_the_records_of_coco(cfg, coco_val):
    originals = coco_val.records()

    def load():
        return [
            {**originals[index % 6], "image_id": index, "segments_info": _twelve(index)} for index in range(118_000)
        ]

    def _twelve(index):
        known = originals[index % 6]["segments_info"]
        return [*known, *({**known[0], "id": 900_000 + number, "area": index + number} for number in range(9))]

    cfg.DATALOADER.NUM_WORKERS, cfg.INPUT.IMAGE_SIZE = 1, 1024
    loader = build_train_loader(cfg, dataset=dataclasses.replace(coco_val, load=load))
    take(loader, 3)
    (worker,) = loader._batches._workers
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    private_mb = sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024
    print(f"private memory of one loading process with {loader.num_records} records: {private_mb:.0f} MB")
    assert private_mb < 1000


def test_every_loading_process_calls_the_function_it_was_given(cfg, coco_val, tmp_path):
    cfg.DATALOADER.NUM_WORKERS = 2
    init = functools.partial(_leave_a_file, tmp_path)
    take(build_train_loader(cfg, dataset=coco_val, worker_init=init), 3)
    assert sorted(path.name for path in tmp_path.glob("worker_*")) == ["worker_0", "worker_1"]


def _leave_a_file(folder, worker):
    (folder / f"worker_{worker}").touch()


def kill_itself():
    """Half a second later, when somebody waits for the image."""
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def short_goodbye(monkeypatch):
    """Torch waits less for the end of a loading process, and does so within the test."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    yield
    gc.collect()


@pytest.mark.usefixtures("short_goodbye")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="loading processes must be forked to do what the test says")
@pytest.mark.parametrize("kind", ["training", "test"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (kill_itself, r"a loading process died \(DataLoader worker .*Lower DATALOADER.NUM_WORKERS"),
        (
            lambda: time.sleep(60),
            r"no batch came for 1 s: a loading process hangs .*NUM_WORKERS 0 loads in this process",
        ),
    ],
    ids=["dies", "hangs"],
)
def test_a_loading_process_that_dies_or_hangs_is_a_named_error(cfg, coco_val, monkeypatch, kind, what, message):
    monkeypatch.setattr(loaders, "TIMEOUT_S", 1)
    mapper = PanopticJitterMapper if kind == "training" else ShortestEdgeMapper
    monkeypatch.setattr(mapper, "__call__", lambda *_: what())
    cfg.DATALOADER.NUM_WORKERS = 1
    began = time.monotonic()
    with pytest.raises(LoaderError, match=message):
        next(
            iter(build_train_loader(cfg, dataset=coco_val) if kind == "training" else build_test_loader(cfg, coco_val))
        )
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("short_goodbye")
def test_an_error_of_our_own_in_a_loading_process_is_none_of_a_loader(cfg, coco_val, monkeypatch):
    def mistake(*_):
        raise RuntimeError("a DataLoader worker would say something else")

    monkeypatch.setattr(PanopticJitterMapper, "__call__", mistake)
    for cfg.DATALOADER.NUM_WORKERS in (0, 1):
        with pytest.raises(RuntimeError, match="would say something else") as error:
            next(build_train_loader(cfg, dataset=coco_val))
        assert not isinstance(error.value, LoaderError)
        del error


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_test_image_comes_once(cfg, coco_val, world_size, batch_size):
    cfg.TEST.BATCH_SIZE = batch_size
    loaders = [build_test_loader(cfg, coco_val, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(sample["image_id"] for batch in batches for sample in batch) == list(range(100, 106))
    assert sum(len(loader) for loader in loaders) == len(batches)
    assert sum(loader.num_images for loader in loaders) == 6


def test_test_images_share_a_batch_only_at_equal_padded_size(cfg, coco_val):
    cfg.TEST.BATCH_SIZE = 2
    batches = list(build_test_loader(cfg, coco_val))
    assert [[sample["image_id"] for sample in batch] for batch in batches] == [[100, 102], [101, 103], [104], [105]]


def test_a_test_loader_can_be_walked_twice_and_with_workers(cfg, coco_val):
    loader = build_test_loader(cfg, coco_val)
    first = [sample for batch in loader for sample in batch]
    cfg.DATALOADER.NUM_WORKERS = 2
    for again in (loader, build_test_loader(cfg, coco_val)):
        for sample, same in zip(first, (sample for batch in again for sample in batch), strict=True):
            assert sample["image_id"] == same["image_id"] and torch.equal(sample["image"], same["image"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_for_a_gpu_are_in_pinned_memory(cfg, coco_val, num_workers):
    expected = take(build_train_loader(cfg, dataset=coco_val), 2)
    cfg.MODEL.DEVICE = "cuda"
    cfg.DATALOADER.NUM_WORKERS = num_workers
    batches = take(build_train_loader(cfg, dataset=coco_val), 2)
    assert_same(batches, expected)
    assert all(sample["image"].is_pinned() for batch in batches for sample in batch)


def test_a_test_batch_of_nothing_is_refused(cfg, coco_val):
    cfg.TEST.BATCH_SIZE = 0
    with pytest.raises(ValueError, match=r"TEST\.BATCH_SIZE must be at least 1, got 0"):
        build_test_loader(cfg, coco_val)


def test_workers_start_although_opencv_has_run_threads_in_this_process(cfg, coco_val):
    """A forked worker that changes OpenCV's threads waits for ever for those of its parent."""
    cv2.setNumThreads(4)
    image = np.zeros((2000, 2000, 3), np.uint8)
    for _ in range(3):  # OpenCV starts its threads at the first work that is worth it
        cv2.GaussianBlur(image, (9, 9), 2)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert len(take(build_train_loader(cfg, dataset=coco_val), 2)) == 2
