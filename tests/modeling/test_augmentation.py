"""Test-time augmentation of the tiny model."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from fcclip.modeling import outputs, test_modes
from fcclip.modeling.augmentation import (
    AugmentedModel,
    ImageVariants,
    build_augmented,
    build_variants,
)
from fcclip.vocabulary import Vocabulary

VARIANTS = ImageVariants(min_sizes=(48, 80, 100), max_size=120, flip=True)


def sample_image(rows=60, columns=90, /, seed=0, **extra):
    """Smooth colours with some noise, so that the sizes of an image look alike but not the same."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(rows, columns), mode="bicubic")[0]
    noisy = 255 * smooth + 20 * torch.randn(3, rows, columns, generator=generator)
    return {"image": noisy.clamp(0, 255).to(torch.uint8), **extra}


def mirrored(sample):
    return {**sample, "image": sample["image"].flip(-1)}


def maps_of(model, samples, vocabulary=None, **options):
    return [
        model.outputs(scored, heads=("semantic",), **options)["sem_seg"] for scored in model.score(samples, vocabulary)
    ]


def scores_of(model, sample, **options):
    [scores] = maps_of(model, [sample], **options)
    return scores


@pytest.mark.parametrize("panoptic", [True, False], ids=["masks resized", "scores resized"])
def test_the_mean_is_that_of_the_published_loop(tiny_cfg, tiny_model, panoptic):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = panoptic
    model = tiny_model(cfg=tiny_cfg)
    sample = sample_image(60, 90, height=50, width=70)
    pixels = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
    total, count = 0, 0
    for height, width in ((48, 72), (80, 120), (80, 120)):  # 100 x 150 does not fit into 120
        resized = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR))
        for mirror in (False, True):
            turned = resized[:, ::-1] if mirror else resized
            image = torch.from_numpy(turned.transpose(2, 0, 1).copy())
            [output] = model([{"image": image, "height": 50, "width": 70}])
            total = total + (output["sem_seg"].flip(2) if mirror else output["sem_seg"])
            count += 1
    assert count == len(VARIANTS) == 6
    found = scores_of(AugmentedModel(model, variants=VARIANTS), sample)
    assert found.dtype == torch.float32 and found.shape == (3, 50, 70)
    torch.testing.assert_close(found, total / 6, atol=1e-6, rtol=1e-6)
    assert (found - scores_of(model, sample)).abs().max() > 1e-4  # the variants do say something else


def test_one_variant_that_is_the_image_gives_what_the_model_gives(tiny_cfg, tiny_model):
    model, images = tiny_model(), [sample_image(60, 90), sample_image(90, 60, seed=1, height=30, width=20)]
    same = AugmentedModel(model, variants=ImageVariants(min_sizes=(60,), max_size=90, flip=False))
    for semantic in ("scores", "labels"):
        for scores, sample in zip(maps_of(same, images, semantic=semantic), images):
            assert torch.equal(scores, scores_of(model, sample, semantic=semantic))
    for ensemble in test_modes(tiny_cfg).values():
        expected = scores_of(model, images[0], ensemble=ensemble)
        assert torch.equal(scores_of(same, images[0], ensemble=ensemble), expected)


def test_the_mirrored_image_gives_the_mirrored_result(tiny_model):
    augmented = AugmentedModel(tiny_model(), variants=ImageVariants(min_sizes=(60,), max_size=90, flip=True))
    sample = sample_image(60, 90)
    assert torch.equal(scores_of(augmented, mirrored(sample)), scores_of(augmented, sample).flip(-1))
    assert not torch.equal(scores_of(augmented.model, mirrored(sample)), scores_of(augmented.model, sample).flip(-1))


def test_each_variant_is_one_pass_however_often_it_is_weighed_and_only_semantic_maps_are_made(
    tiny_cfg, tiny_model, monkeypatch
):
    model, passes = tiny_model(), []
    assert model.heads == ("semantic", "panoptic", "instances")
    augmented = AugmentedModel(model, variants=VARIANTS)
    expected = scores_of(augmented, sample_image())
    for name in ("panoptic_inference", "instance_inference"):
        monkeypatch.setattr(outputs, name, None)  # calling it would fail
    model.sem_seg_head.register_forward_hook(lambda *_: passes.append(1))
    [scored] = augmented.score([sample_image()])
    together = {name: augmented.outputs(scored, ensemble=pair) for name, pair in test_modes(tiny_cfg).items()}
    assert len(passes) == len(VARIANTS)
    assert together["ensemble"].keys() == {"sem_seg"} and torch.equal(together["ensemble"]["sem_seg"], expected)
    alone = scores_of(augmented, sample_image(), ensemble=(1.0, 1.0))
    assert torch.equal(together["out_of_vocabulary"]["sem_seg"], alone)
    assert not torch.equal(alone, expected)


def test_two_maps_are_held_and_no_more(tiny_model, monkeypatch):
    made, alive, compute = [], [], outputs._run

    def watched(*arguments):
        alive.append(sum(reference() is not None for reference in made))
        result = compute(*arguments)
        made.append(weakref.ref(result["sem_seg"]))
        return result

    monkeypatch.setattr(outputs, "_run", watched)
    augmented = AugmentedModel(tiny_model(), variants=VARIANTS)
    maps_of(augmented, [sample_image(), sample_image(seed=1)], semantic="labels")
    assert alive == 2 * [0, *[1] * (len(VARIANTS) - 1)]


def test_outputs_have_the_size_of_the_record_or_else_of_the_image(tiny_model):
    augmented = AugmentedModel(tiny_model(), variants=VARIANTS)
    images = [sample_image(60, 90), sample_image(61, 47, height=30), sample_image(40, 40, height=33, width=55)]
    shapes = [scores.shape for scores in maps_of(augmented, images)]
    assert shapes == [(3, 60, 90), (3, 30, 47), (3, 33, 55)]


def test_the_vocabulary_comes_with_the_call_with_the_image_or_from_the_model(tiny_model):
    augmented = AugmentedModel(tiny_model(), variants=VARIANTS)
    five, two = Vocabulary.from_names("a; b; c; d:stuff; e:stuff"), Vocabulary.from_names("f; g")
    first, second = maps_of(augmented, [sample_image(), sample_image(vocabulary=two)], five)
    assert len(first) == 5 and len(second) == 2
    assert torch.equal(second, scores_of(augmented, sample_image(), vocabulary=two))
    assert len(scores_of(augmented, sample_image())) == 3


def test_distributed_wrapping_is_taken_off(tiny_model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = tiny_model()
        assert AugmentedModel(DistributedDataParallel(model), variants=VARIANTS).model is model
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_call_cannot_give_is_refused(tiny_model):
    augmented = AugmentedModel(tiny_model(), variants=VARIANTS)
    [scored] = augmented.score([sample_image()])
    with pytest.raises(ValueError, match="'scores' or 'labels', got None"):
        augmented.outputs(scored, semantic=None)
    with pytest.raises(ValueError, match="panoptic"):
        augmented.outputs(scored, heads=("panoptic",))
    with pytest.raises(ValueError, match="empty list"):
        augmented.score([])
    with pytest.raises(ValueError, match=r"images of uint8, got torch\.float32"):
        augmented.score([{"image": sample_image()["image"].float()}])
    augmented.model.test_vocabulary = None
    with pytest.raises(ValueError, match="vocabulary="):
        augmented.score([sample_image()])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TEST.AUG.MIN_SIZES", (), r"TEST\.AUG\.MIN_SIZES must name at least one size, .* got none"),
        ("TEST.AUG.MIN_SIZES", (400, 0, -3), r"TEST\.AUG\.MIN_SIZES .* got \[0, -3\]"),
        ("TEST.AUG.MIN_SIZES", (400.5,), r"TEST\.AUG\.MIN_SIZES .* got \[400\.5\]"),
        ("TEST.AUG.MAX_SIZE", 0, r"TEST\.AUG\.MAX_SIZE .* got 0"),
        (
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON",
            False,
            r"TEST\.AUG\.ENABLED .* MODEL\.MASK_FORMER\.TEST\.SEMANTIC_ON is False",
        ),
    ],
)
def test_a_config_that_cannot_be_augmented_is_refused_before_a_model_is_built(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_variants(tiny_cfg)


def test_a_model_that_cannot_be_augmented_is_refused(tiny_model):
    model = tiny_model()
    model.heads = ("panoptic", "instances")
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED .*SEMANTIC_ON is False"):
        AugmentedModel(model, variants=VARIANTS)


def test_the_config_is_what_is_built(tiny_cfg, tiny_model):
    assert build_variants(tiny_cfg) == ImageVariants(tuple(range(400, 1300, 100)), max_size=4000, flip=True)
    assert len(build_variants(tiny_cfg)) == 18
    tiny_cfg.TEST.AUG.MIN_SIZES, tiny_cfg.TEST.AUG.FLIP = (60, 80), False
    augmented = build_augmented(tiny_cfg, tiny_model())
    assert augmented.variants == ImageVariants((60, 80), max_size=4000, flip=False)
