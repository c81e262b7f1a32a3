"""The report beside an export."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fcclip.deploy import Runner
from fcclip.export import Case, Limits, as_record, as_table, measure, placement
from fcclip.vocabulary import Vocabulary
from tests.export.conftest import NAMES, random_image

GOOD = Case(
    image="a.jpg", size="64x64", classes=3, provider="CPUExecutionProvider", probability=1e-6, probability_999=1e-7,
    mask=1e-6, mask_999=1e-7, sign_flips=0.0, argmax=100.0, pixels=100.0, pq=100.0, seconds=0.1, model_seconds=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"probability": 2e-4}, "a.jpg at 64x64, 3 classes, CPUExecutionProvider: probability 0.0002 > 0.0001"),
        ({"mask": 0.01}, "mask 0.01 > 0.001"),
        ({"argmax": 99.0}, "argmax 99.00 < 99.9"),
        ({"pq": 99.0}, "pq 99.00 < 99.5"),
        ({"probability": float("nan")}, "probability nan > 0.0001"),
    ],
)
def test_every_limit_is_kept_or_named(change, message):
    assert Limits().missed(GOOD) == []
    [missed] = Limits().missed(replace(GOOD, **change))
    assert missed.endswith(message)


def test_half_precision_has_a_limit_on_panoptic_quality_alone():
    limits = Limits.of("float16")
    assert limits.missed(replace(GOOD, probability=0.1, mask=0.1, argmax=90.0, pq=98.5)) == []
    assert limits.missed(replace(GOOD, pq=97.0))


@pytest.mark.slow
def test_the_report_covers_images_sizes_and_vocabularies(exported):
    images = {"first": random_image(70, 100), "second": random_image(128, 64, seed=1)}
    vocabularies = [NAMES, Vocabulary.from_names("boat; sea:stuff")]
    threads = torch.get_num_threads()
    cases = measure(exported.segmenter, exported.folder, images, vocabularies)
    assert torch.get_num_threads() == threads
    assert len({(case.image, case.size, case.classes) for case in cases}) == 8
    nodes = {"CPUExecutionProvider": placement(exported.folder, "CPUExecutionProvider")}
    record = as_record(cases, Limits(), Runner(exported.folder).metadata, nodes)
    assert record["missed"] == [] and len(record["cases"]) == 8
    assert json.loads(json.dumps(record))["graph"]["precision"] == "float32"
    assert record["nodes"]["CPUExecutionProvider"]["CPUExecutionProvider"]["GridSample"] == 3  # a layer, three levels
    table = as_table(cases, nodes)
    assert table.row_count == 8 and "nodes ran on CPUExecutionProvider" in table.caption
    assert all(np.isfinite(case.seconds) for case in cases)
