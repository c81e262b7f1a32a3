"""tools/precompute_sam_masks.py: one file an image, resumed, failures named; and the generator behind it."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from fcclip.data import get_dataset, read_image
from fcclip.modeling.openseg import read_sam_masks
from fcclip.modeling.output_masks import resize
from tests.tools.conftest import REPOSITORY, load_program

tool = load_program(REPOSITORY / "tools" / "precompute_sam_masks.py")
DATASET = "shapes_val"


@pytest.fixture
def calls(monkeypatch):
    """Images for which masks were made, by a generator that finds the upper half."""
    calls = []

    def masks_of(generator, image, *, limit):
        calls.append(image)
        logits = torch.ones(1, 8, 8)
        logits[:, 4:] = -1
        return logits, ["x"]

    monkeypatch.setattr(tool, "build_generator", lambda *_, **__: None)
    monkeypatch.setattr(tool, "automatic_masks", masks_of)
    return calls


def run(*words):
    return tool.main(["--dataset", DATASET, "--weights", "sam.pth", *map(str, words)])


def test_every_image_has_a_file_and_a_second_run_makes_those_that_are_missing(root, calls, tmp_path, capsys):
    assert run() == 0
    files = [record["file_name"] for record in get_dataset(DATASET).records()]
    folder = tmp_path / "output" / "SAM_masks_pred" / "vit_h"
    assert len(list(folder.iterdir())) == len(files) == len(calls) == 2
    for file, image in zip(files, calls):
        assert np.array_equal(image, read_image(file))
        assert (read_sam_masks(folder, file, image.shape[:2]) > 0).sum() == 32
    next(folder.iterdir()).unlink()
    assert run() == 0 and len(calls) == 3
    assert "2 images, 1 have masks" in capsys.readouterr().out
    assert run("--output", "other", "--share", "2/2") == 0 and len(calls) == 4


def test_an_image_that_fails_is_named_and_does_not_stop_the_others(root, calls, tmp_path, capsys):
    broken = get_dataset(DATASET).records()[0]["file_name"]
    with open(broken, "wb") as file:
        file.write(b"no image")
    assert run() == 1
    assert len(calls) == 1 and f"failed: {broken}" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0/2", "3/2", "x"])
def test_a_share_that_does_not_exist_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        run("--share", share)
    assert "expected K/N" in capsys.readouterr().err


def test_the_logits_of_the_package_lie_on_its_own_masks():
    """A SAM of narrow blocks with random weights."""
    package = pytest.importorskip("segment_anything", reason="needs the extra 'sam'")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    encoder = {"depth": 1, "embed_dim": 16, "img_size": 1024, "num_heads": 2, "patch_size": 16, "out_chans": 32}
    prompts = {"embed_dim": 32, "image_embedding_size": (64, 64), "input_image_size": (1024, 1024), "mask_in_chans": 4}
    transformer = TwoWayTransformer(depth=1, embedding_dim=32, mlp_dim=32, num_heads=2)
    sam = Sam(
        ImageEncoderViT(**encoder), PromptEncoder(**prompts), MaskDecoder(transformer_dim=32, transformer=transformer)
    )
    thresholds = {"pred_iou_thresh": -9.0, "stability_score_thresh": -1.0, "min_mask_region_area": 0}
    generator = package.SamAutomaticMaskGenerator(
        sam.eval(), points_per_side=3, output_mode="coco_rle", box_nms_thresh=0.95, **thresholds
    )
    image = np.random.RandomState(0).randint(0, 256, (96, 128, 3), np.uint8)
    logits, rle = tool.automatic_masks(generator, image, limit=5)
    assert logits.shape[1:] == (192, 256) and 1 <= len(logits) == len(rle) <= 5

    records = generator.generate(image)
    masks = coco_mask.decode([record["segmentation"] for record in records]).transpose(2, 0, 1).astype(bool)
    order = sorted(range(len(records)), key=lambda index: -records[index]["area"])
    assert rle == [records[index]["segmentation"]["counts"] for index in order[:5]]
    generator.predictor.set_image(image)
    found = resize(tool.prompted_logits(generator.predictor, records), (96, 128)).numpy() > 0
    assert (found == masks).mean(axis=(1, 2)).min() > 0.999  # the package does the same with all prompts at once


def test_weights_that_are_missing_or_foreign_are_refused(tmp_path):
    pytest.importorskip("segment_anything", reason="needs the extra 'sam'")
    with pytest.raises(ValueError, match=r"unknown SAM 'vit_t'"):
        tool.build_generator("vit_t", "x.pth", device=torch.device("cpu"))
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "x.pth")
    with torch.device("meta"), pytest.raises(ValueError, match=r"do not fit SAM 'vit_b'"):
        tool.build_generator("vit_b", str(tmp_path / "x.pth"), device=torch.device("meta"))
