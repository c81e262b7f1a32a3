"""The OpenSeg ensemble: the recording, laws, geometry, and the files of masks."""

import json

import numpy as np
import pytest
import torch

from fcclip.modeling import build_model
from fcclip.modeling.openseg import (
    OpenSegEnsemble,
    ensembled_semantic,
    on_grid,
    read_sam_masks,
    save_sam_masks,
    unseen_shares,
)
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import semantic_inference
from fcclip.vocabulary import Vocabulary
from tests.conftest import DATA, tiny_frozenseg
from tests.modeling.test_fcclip import sample_image
from tests.parity_weights import seeded_mask_predictions

RECORDED = DATA / "parity" / "frozenseg" / "openseg_151"
SETUP = json.loads(RECORDED.with_suffix(".json").read_text())


def predictions():
    """Class and mask logits of queries and of SAM's masks as recorded."""
    setup = SETUP["_setup"]
    sizes = (setup["classes"], setup["height"], setup["width"])
    queries = seeded_mask_predictions(setup["queries"], *sizes, setup["seed"])
    return *queries, *seeded_mask_predictions(setup["sam_masks"], *sizes, setup["seed"] + 1)


def seen_classes(indices):
    seen = torch.zeros(SETUP["_setup"]["classes"], dtype=torch.bool)
    seen[list(indices)] = True
    return seen


def ensemble(seen, *, epsilon=SETUP["_setup"]["epsilon"], sam_class_logits=None, **options):
    class_logits, mask_logits, named, sam_logits = predictions()
    named = named if sam_class_logits is None else sam_class_logits
    return ensembled_semantic(
        class_logits,
        OutputMasks.whole(mask_logits),
        sam_logits=sam_logits,
        sam_shares=unseen_shares(named, seen),
        seen=seen,
        epsilon=epsilon,
        masks_first=True,
        **options,
    )


def plain():
    class_logits, mask_logits, *_ = predictions()
    return semantic_inference(class_logits, OutputMasks.whole(mask_logits))


@pytest.mark.parametrize("case", ["plain", "ensemble", "all_seen", "none_seen", "none_kept"])
def test_the_ensemble_agrees_with_the_recording_within_1e_5(case):
    recorded, seen = np.load(RECORDED.with_suffix(".npz"))[case], SETUP["_setup"]["seen"]
    classes = SETUP["_setup"]["classes"]
    found = {
        "plain": plain,
        "ensemble": lambda: ensemble(seen_classes(seen)),
        "all_seen": lambda: ensemble(seen_classes(range(classes))),
        "none_seen": lambda: ensemble(seen_classes([])),
        "none_kept": lambda: ensemble(seen_classes(seen), sam_class_logits=torch.zeros(14, classes + 1)),
    }[case]()
    deviation = np.abs(found.flatten()[:: SETUP[case]["step"]][: recorded.size].numpy() - recorded.flatten())
    assert (deviation / SETUP[case]["std"]).max() < 1e-5


def test_masks_whose_best_unseen_class_passes_one_half_are_kept():
    shares = unseen_shares(predictions()[2], seen_classes(SETUP["_setup"]["seen"]))
    assert (shares > 0).any(-1).nonzero().flatten().tolist() == SETUP["kept"]
    assert not shares[:, SETUP["_setup"]["seen"]].any()


def test_without_a_share_and_with_all_classes_seen_it_is_the_plain_map():
    for found in (ensemble(seen_classes([0]), epsilon=0.0), ensemble(seen_classes(range(9)))):
        torch.testing.assert_close(found, plain(), rtol=1e-6, atol=1e-6)


def test_labels_are_the_best_classes_of_the_scores():
    seen = seen_classes([0, 3, 4])
    assert torch.equal(ensemble(seen, labels=True), ensemble(seen).argmax(0))


@pytest.mark.parametrize("masks_first", [True, False])
def test_scores_at_another_size_are_those_of_the_whole_maps_resized(masks_first, monkeypatch):
    monkeypatch.setattr("fcclip.modeling.output_masks._BLOCK_CPU", 3000)  # some rows at a time
    class_logits, mask_logits, named, sam_logits = predictions()
    seen = seen_classes([0, 3, 4])
    masks = OutputMasks(mask_logits, padded_size=(96, 128), image_size=(90, 110), output_size=(50, 61))
    shares = unseen_shares(named, seen)
    found = ensembled_semantic(
        *(class_logits, masks),
        sam_logits=sam_logits,
        sam_shares=shares,
        seen=seen,
        epsilon=0.2,
        masks_first=masks_first,
    )

    def sized(maps, size):
        return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear")[0]

    of_queries = semantic_inference(class_logits, masks, masks_first=masks_first)
    at = (
        sized(sam_logits, (50, 61)).sigmoid()
        if masks_first
        else sized(sized(sam_logits, (90, 110)).sigmoid(), (50, 61))
    )
    of_sam = torch.einsum("jk,jhw->khw", shares, at)
    expected = torch.where(seen[:, None, None], of_queries, 0.8 * of_queries + 0.2 * of_sam)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_quadrant_lies_on_the_grid_where_it_lies_in_the_image():
    """Of an image of 800 x 1067, padded to 800 x 1088; the published code gives an overlap of 0.02."""
    logits = torch.full((1, 512, 683), -1.0)
    logits[:, 256:, 341:] = 1
    masks = OutputMasks(torch.zeros(1, 1, 1), padded_size=(800, 1088), image_size=(800, 1067), output_size=(512, 683))
    found = on_grid(logits, masks, (25, 34))[0] > 0
    rows, columns = (torch.arange(25) + 0.5) * 32 / 800 > 0.5, (torch.arange(34) + 0.5) * 32 / 1067 > 0.5
    expected = rows[:, None] & columns
    assert (found & expected).sum() / (found | expected).sum() >= 0.9


def test_cells_of_the_padding_are_outside():
    masks = OutputMasks(torch.zeros(1, 1, 1), padded_size=(128, 128), image_size=(64, 90), output_size=(64, 90))
    found = on_grid(torch.ones(2, 16, 16), masks, (4, 4)) > 0
    assert found[:, :2, :3].all() and found.sum() == 2 * 2 * 3


# ---- files ----


def written(folder, stem="a", size=(64, 96), masks=3):
    torch.manual_seed(0)
    logits = 10 * torch.randn(masks, 8, 12)
    save_sam_masks(folder / f"{stem}.npz", logits, image_size=size, rle=["x"] * masks)
    return logits


def test_files_give_back_what_was_saved(tmp_path):
    logits = written(tmp_path)
    torch.testing.assert_close(read_sam_masks(tmp_path, "images/a.jpg", (64, 96)), logits.half().float())


def test_missing_foreign_and_broken_files_are_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no SAM masks of 'x/b.jpg'.*b.npz' does not exist; tools/precompute"):
        read_sam_masks(tmp_path, "x/b.jpg", (64, 96))
    with pytest.raises(ValueError, match=r"image of \(64, 96\).*but 'x/a.jpg' has \(96, 64\)"):
        read_sam_masks(tmp_path, "x/a.jpg", (96, 64))
    with pytest.raises(ValueError, match="comes from none"):
        read_sam_masks(tmp_path, "", (64, 96))
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"c.npz' is no file of SAM masks"):
        read_sam_masks(tmp_path, "c.jpg", (64, 96))
    np.savez(tmp_path / "d.npz", logits=np.zeros((2, 3)), image_size=np.array([64, 96]))
    with pytest.raises(ValueError, match=r"must be \(masks, height, width\), got \(2, 3\)"):
        read_sam_masks(tmp_path, "d.jpg", (64, 96))


# ---- in the model ----


@pytest.fixture
def cfg(tmp_path):
    cfg = tiny_frozenseg()
    cfg.TEST.USE_SAM_MASKS, cfg.TEST.SAM_MASKS_DIR = True, str(tmp_path)
    (tmp_path / "vit_h").mkdir()
    return cfg


def test_the_model_finds_the_masks_of_each_image_of_a_batch_and_changes_semantic_maps_alone(cfg, tmp_path):
    for stem, masks in (("a", 3), ("b", 2), ("empty", 0)):
        written(tmp_path / "vit_h", stem, masks=masks)
    torch.manual_seed(0)
    words = Vocabulary.from_names("cat; dog; grass:stuff")
    model = build_model(cfg, train_vocabulary=Vocabulary.from_names("dog"), test_vocabulary=words)
    batch = [sample_image(seed=seed, file_name=f"{stem}.jpg") for seed, stem in enumerate(("a", "b", "empty"))]
    found, labels = model(batch), model(batch, semantic="labels")
    alone = [model([sample])[0] for sample in batch]
    model.openseg = OpenSegEnsemble(model.openseg.folder, epsilon=0.0)
    without = model(batch)
    model.openseg = None
    plain_maps = model(batch)
    for index, output in enumerate(found):
        torch.testing.assert_close(output["sem_seg"], alone[index]["sem_seg"], rtol=1e-4, atol=1e-5)
        assert torch.equal(output["panoptic_seg"][0], plain_maps[index]["panoptic_seg"][0])
        assert torch.equal(labels[index]["sem_seg"], output["sem_seg"].argmax(0))
        torch.testing.assert_close(without[index]["sem_seg"], plain_maps[index]["sem_seg"])
        assert torch.equal(output["sem_seg"], plain_maps[index]["sem_seg"]) == (index == 2)


def test_a_config_that_cannot_work_is_refused(cfg):
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(ValueError, match=r"TEST.USE_SAM_MASKS and TEST.AUG.ENABLED do not go together"):
        build_model(cfg)
    cfg.TEST.AUG.ENABLED, cfg.TEST.PKL_SAM_MODEL_NAME = False, "vit_b"
    with pytest.raises(ValueError, match=r"no folder '.*vit_b'"):
        build_model(cfg)
    cfg.TEST.PKL_SAM_MODEL_NAME, cfg.TEST.SAM_MASK_PRED_ALPHA = "vit_h", 2
    with pytest.raises(ValueError, match=r"TEST.SAM_MASK_PRED_ALPHA must lie in 0..1, got 2"):
        build_model(cfg)
