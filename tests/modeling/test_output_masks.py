"""Semantic maps in blocks of rows against the whole maps that the published order of steps makes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fcclip.modeling.output_masks import OutputMasks, resize, resize_rows, semantic_blocks
from tests.msda_engines import built, output_functions  # noqa: F401

# mask logits; network input with padding; without; output
SIZES = {
    "the input's size": ((24, 32), (96, 128), (90, 121), (90, 121)),
    "smaller": ((24, 32), (96, 128), (90, 121), (61, 83)),
    "twice as large": ((24, 32), (96, 128), (90, 121), (180, 242)),
    "larger": ((24, 32), (96, 128), (96, 128), (191, 257)),
    "tiny": ((24, 32), (96, 128), (96, 100), (3, 5)),
    "no whole stride": ((25, 33), (97, 130), (97, 130), (50, 50)),
}


def whole(probabilities, mask_logits, padded, image, output, masks_first):
    """The published steps, one whole tensor after the other."""
    masks = resize(mask_logits, padded)
    if not masks_first:
        masks = torch.einsum("qk,qhw->khw", probabilities, masks.sigmoid())
    resized = resize(masks[:, : image[0], : image[1]], output)
    return torch.einsum("qk,qhw->khw", probabilities, resized.sigmoid()) if masks_first else resized


@pytest.mark.usefixtures("output_functions")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("masks_first", [True, False])
@pytest.mark.parametrize("num_classes", [5, 40])  # fewer and more than queries
@pytest.mark.parametrize("block", [1, 20_000, 2**22])
def test_blocks_are_the_rows_of_the_whole(sizes, masks_first, num_classes, block, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fcclip.modeling.output_masks._BLOCK_CPU", block)
    shape, padded, image, output = sizes
    mask_logits, probabilities = torch.randn(20, *shape) * 4, torch.rand(20, num_classes)
    expected = whole(probabilities, mask_logits, padded, image, output, masks_first)
    masks = OutputMasks(mask_logits, padded, image, output)
    blocks = list(semantic_blocks(masks, probabilities, masks_first=masks_first))
    assert [rows.start for rows, _ in blocks[1:]] == [rows.stop for rows, _ in blocks[:-1]]
    assert (blocks[0][0].start, blocks[-1][0].stop) == (0, output[0])
    assert block > 1 or len(blocks) == output[0]
    # 20 sums of products of numbers below 1, resized in another order: rounding of numbers below 20
    scores = torch.cat([scores for _, scores in blocks], dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_rows_of_a_whole_stride_are_those_of_the_whole_map():
    """To the rounding of a sum of four: how torch resizes depends on the size and the number of threads."""
    torch.manual_seed(0)
    maps = torch.randn(3, 20, 30)
    expected = resize(maps, (80, 120))
    for rows in (range(0, 80), range(0, 7), range(33, 50), range(79, 80)):
        found = resize_rows(maps, rows, (80, 120))
        torch.testing.assert_close(found, expected[:, rows.start : rows.stop], atol=2e-6, rtol=0)


def test_rows_can_be_made_of_a_part_of_the_map():
    torch.manual_seed(0)
    maps = torch.randn(3, 20, 30)
    expected = resize_rows(maps, range(10, 20), (33, 44))
    found = resize_rows(maps[:, 4:15], range(10, 20), (33, 44), first=4, of=20)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    # weights of torch and ours may differ by the rounding of a row number below 32
    torch.testing.assert_close(expected, resize(maps, (33, 44))[:, 10:20], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("classes_and_size", "outputs", "limit"), [("847 512 683", "semantic", 150), ("5000 640 960", "all", 450)]
)
def test_many_classes_do_not_take_many_maps_of_the_image(classes_and_size, outputs, limit):
    """847 maps of 512 x 683 floats are 1,130 MiB, 100 masks 133 MiB; measured: 42 to 63. 5,000 of 640 x 960 are 11,700
    MiB, 100 masks 234 MiB; measured: 191 to 245."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.modeling.predict_many_classes", *classes_and_size.split(), outputs],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < limit
