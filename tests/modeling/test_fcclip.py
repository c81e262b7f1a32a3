"""The whole model, tiny."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fcclip.modeling import HEADS, build_model, options_of, test_modes
from fcclip.modeling.classifier import resize_masks
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary


def sample_image(height=64, width=96, seed=0, **extra):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return {"image": image, **extra}


def training_sample(seed=0, labels=(0, 2, 1)):
    sample = sample_image(64, 64, seed)
    blocks = torch.randint(1, 5, (4, 4), generator=torch.Generator().manual_seed(seed))
    id_map = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1).int()
    sample["targets"] = Targets(
        labels=torch.tensor(labels, dtype=torch.long), id_map=id_map, ids=torch.arange(1, len(labels) + 1)
    )
    return sample


def padded_alone(model, image, size):
    """An image in floating point with the colour around it that becomes zero, as padding is."""
    canvas = model.pixel_mean.expand(3, *size).clone()
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def test_outputs_have_the_contracted_form(tiny_model):
    model = tiny_model()
    [output] = model([sample_image(height=50, width=70)])
    assert output["sem_seg"].shape == (3, 50, 70)
    [output] = model([{**sample_image(60, 90), "height": 50, "width": 70}])
    assert output["sem_seg"].shape == (3, 50, 70) and output["sem_seg"].dtype == torch.float32
    id_map, segments = output["panoptic_seg"]
    assert id_map.shape == (50, 70) and id_map.dtype == torch.int32
    assert set(id_map.unique().tolist()) - {0} == {one["id"] for one in segments}
    assert all(set(one) == {"id", "isthing", "category_id", "score", "area"} for one in segments)
    instances = output["instances"]
    assert instances.pred_masks.shape[1:] == (50, 70) and instances.pred_boxes.shape == (len(instances), 4)
    assert not any(tensor.requires_grad for tensor in (output["sem_seg"], instances.scores))


def weighed(model, scored, modes):
    """Mode -> outputs of each image."""
    return {name: [model.outputs(image, ensemble=ensemble) for image in scored] for name, ensemble in modes.items()}


def test_void_trust_reaches_only_the_outputs_that_it_is_for(tiny_model, tiny_cfg):
    tiny_cfg.MODEL.FC_CLIP.CLIP_TRUST_WEIGHT = 0.9
    model = tiny_model(cfg=tiny_cfg)
    [scored] = model.score([sample_image()])
    plain, own = scored.logits_of_heads((0.4, 0.8), HEADS), scored.logits_of_heads(model.ensemble, HEADS)
    changed = [head for head in HEADS if not torch.equal(plain[head], own[head])]
    assert changed == ["panoptic"]
    outputs, before = model.outputs(scored), model.outputs(scored, ensemble=(0.4, 0.8))
    assert torch.equal(outputs["sem_seg"], before["sem_seg"])
    assert torch.equal(outputs["instances"].scores, before["instances"].scores)
    trusting = replace(model.ensemble, trust_heads=("semantic",))
    assert not torch.equal(model.outputs(scored, ensemble=trusting)["sem_seg"], before["sem_seg"])
    assert all(each.trust == 0 for name, each in test_modes(tiny_cfg).items() if name != "ensemble")
    assert options_of(tiny_cfg) == ("void trust 0.9",)


def test_a_wrong_void_trust_is_refused_by_its_key(tiny_model, tiny_cfg):
    tiny_cfg.MODEL.FC_CLIP.CLIP_TRUST_SCOPE = "seen"
    with pytest.raises(ValueError, match="unknown MODEL.FC_CLIP.CLIP_TRUST_SCOPE 'seen'"):
        tiny_model(cfg=tiny_cfg)
    tiny_cfg.MODEL.FC_CLIP.CLIP_TRUST_SCOPE, tiny_cfg.MODEL.FC_CLIP.CLIP_TRUST_HEADS = "all", ("instance",)
    with pytest.raises(ValueError, match="CLIP_TRUST_HEADS 'instance'. Did you mean 'instances'"):
        tiny_model(cfg=tiny_cfg)


def test_any_vocabulary_can_be_used_at_any_call(tiny_model):
    model = tiny_model()
    [output] = model([sample_image()], vocabulary=Vocabulary.from_names("a; b; c; d:stuff; e:stuff"))
    assert len(output["sem_seg"]) == 5
    assert len(model([sample_image()])[0]["sem_seg"]) == 3
    model.test_vocabulary = Vocabulary.from_names("one thing")
    assert len(model([sample_image()])[0]["sem_seg"]) == 1


def test_the_heads_that_run_are_a_value(tiny_model):
    model, keys = tiny_model(), {"semantic": "sem_seg", "panoptic": "panoptic_seg", "instances": "instances"}
    assert set(model.heads) == set(keys)
    everything = model([sample_image()])[0]
    assert everything.keys() == set(keys.values())
    for head, key in keys.items():
        [output] = model([sample_image()], heads=(head,))
        assert output.keys() == {key}
    assert model([sample_image()], heads=("panoptic",))[0]["panoptic_seg"][1] == everything["panoptic_seg"][1]
    with pytest.raises(ValueError, match="boxes"):
        model([sample_image()], heads=("boxes",))


def test_semantic_maps_come_as_scores_or_labels(tiny_model):
    model = tiny_model()
    scores = model([sample_image()])[0]["sem_seg"]
    labels = model([sample_image()], semantic="labels")[0]["sem_seg"]
    assert labels.dtype == torch.int64 and torch.equal(labels, scores.argmax(0))
    with pytest.raises(ValueError, match="argmax"):
        model([sample_image()], semantic="argmax")


def test_what_is_scored_once_can_be_weighed_often(tiny_cfg, tiny_model):
    model = tiny_model()
    scored, modes = model.score([sample_image()]), test_modes(tiny_cfg)
    together = weighed(model, scored, modes)
    for mode in modes:
        tiny_cfg.TEST.MODE = mode
        alone = tiny_model(cfg=tiny_cfg)
        alone.load_state_dict(model.state_dict())
        assert torch.equal(alone([sample_image()])[0]["sem_seg"], together[mode][0]["sem_seg"])
    assert not torch.equal(together["in_vocabulary"][0]["sem_seg"], together["out_of_vocabulary"][0]["sem_seg"])


def test_other_masks_of_a_scored_image_are_classified_as_its_own_are(tiny_model):
    model = tiny_model()
    [scored] = model.score([sample_image()])
    small = resize_masks(scored.masks.mask_logits[None], scored.dense.shape[-2:])[0]
    queries = torch.tensor([5, 2])
    again = model.score_masks(scored, queries, small[queries])
    assert torch.equal(again.in_logits, scored.in_logits[queries])
    torch.testing.assert_close(again.out_logits, scored.out_logits[queries])
    assert model.outputs(again)["panoptic_seg"][0].shape == (64, 96)


@pytest.mark.parametrize("panoptic", [True, False], ids=["masks resized", "scores resized"])
def test_images_of_mixed_sizes_and_kinds_give_what_each_gives_padded_alone(tiny_cfg, tiny_model, panoptic):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = panoptic
    model = tiny_model(cfg=tiny_cfg)
    sizes = [(50, 70), (64, 33), (90, 64)]
    images = [sample_image(*size, seed=index) for index, size in enumerate(sizes)]
    images[1]["image"] = images[1]["image"].float()
    for sample, output, (height, width) in zip(images, model(images), sizes):
        [alone] = model([{"image": padded_alone(model, sample["image"], (96, 96))}])
        assert output["sem_seg"].shape == (3, height, width)
        torch.testing.assert_close(output["sem_seg"], alone["sem_seg"][:, :height, :width], atol=1e-4, rtol=1e-4)


def test_in_a_mixed_batch_each_image_has_its_own_output_size(tiny_cfg, tiny_model):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = False
    model = tiny_model(cfg=tiny_cfg)
    images = [sample_image(50, 70), {**sample_image(64, 33, seed=1), "height": 40, "width": 20}]
    first, second = model(images)
    assert first["sem_seg"].shape == (3, 50, 70)
    [alone] = model([{"image": padded_alone(model, images[1]["image"], (64, 96))}])
    resized = F.interpolate(alone["sem_seg"][None, :, :64, :33], size=(40, 20), mode="bilinear")[0]
    torch.testing.assert_close(second["sem_seg"], resized, atol=1e-4, rtol=1e-4)


def test_images_of_equal_padded_size_give_the_same_alone_and_together(tiny_model):
    model, images = tiny_model(), [sample_image(60, 90), sample_image(64, 70, seed=1), sample_image(33, 96, seed=2)]
    for sample, output in zip(images, model(images)):
        torch.testing.assert_close(model([sample])[0]["sem_seg"], output["sem_seg"], atol=1e-4, rtol=1e-4)


def test_images_of_one_batch_may_each_bring_their_own_vocabulary(tiny_cfg, tiny_model):
    model, passes = tiny_model(), []
    lists = ["a; b; cat:stuff", None, "person, d; e", "a; b; cat:stuff"]
    vocabularies = [names and Vocabulary.from_names(names) for names in lists]
    images = [sample_image(seed=index) for index in range(len(lists))]
    modes = test_modes(tiny_cfg)
    alone = [weighed(model, model.score([image], own), modes) for image, own in zip(images, vocabularies)]
    model.sem_seg_head.register_forward_hook(lambda *_: passes.append(1))
    scored = model.score([{**image, "vocabulary": own} for image, own in zip(images, vocabularies)])
    together = weighed(model, scored, modes)
    assert len(passes) == 1
    assert [len(output["sem_seg"]) for output in together["ensemble"]] == [3, 3, 2, 3]
    for mode in modes:
        for index, output in enumerate(together[mode]):
            expected = alone[index][mode][0]
            torch.testing.assert_close(output["sem_seg"], expected["sem_seg"], atol=1e-4, rtol=1e-4)
            classes, same = (sorted(result["instances"].pred_classes.tolist()) for result in (output, expected))
            assert classes == same
    assert any(len(output["instances"]) for output in together["ensemble"])


def test_predictions_keep_no_graph(tiny_model):
    model = tiny_model()
    assert torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    [scored] = model.score([sample_image()])
    output = model.outputs(scored)
    tensors = [scored.in_logits, scored.out_logits, scored.masks.mask_logits, scored.class_logits((0.5, 0.5))]
    tensors += [output["sem_seg"], output["panoptic_seg"][0], output["instances"].scores]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert torch.is_grad_enabled()


def test_images_are_padded_with_zeros_after_normalisation(tiny_model):
    model = tiny_model()
    images, sizes = model.preprocess([sample_image(50, 70), sample_image(64, 33)])
    assert images.shape == (2, 3, 64, 96) and sizes == [(50, 70), (64, 33)]
    assert images[0, :, 50:].abs().max() == 0 and images[1, :, :, 33:].abs().max() == 0
    model.size_divisibility = -1
    assert model.preprocess([sample_image(50, 70)])[0].shape == (1, 3, 50, 70)


def test_turned_off_outputs_are_absent_and_pure_semantic_resizes_scores(tiny_cfg, tiny_model):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = False
    after = tiny_model(cfg=tiny_cfg)
    [output] = after([{**sample_image(50, 70), "height": 25, "width": 35}])
    assert set(output) == {"sem_seg"} and output["sem_seg"].shape == (3, 25, 35)
    test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = True
    before = tiny_model(cfg=tiny_cfg)
    before.load_state_dict(after.state_dict())
    [first] = before([{**sample_image(50, 70), "height": 25, "width": 35}])
    assert not torch.equal(first["sem_seg"], output["sem_seg"])
    torch.testing.assert_close(first["sem_seg"], output["sem_seg"], atol=0.3, rtol=0.3)
    test.SEMANTIC_ON = False
    with pytest.raises(ValueError, match="nothing would be computed"):
        tiny_model(cfg=tiny_cfg)


def test_training_gives_weighted_losses_and_a_gradient_for_every_trainable_parameter(tiny_model):
    model = tiny_model().train()
    losses = model([training_sample(0), training_sample(1, labels=(1,))])
    assert set(losses) == {f"loss_{kind}{suffix}" for kind in ("ce", "mask", "dice") for suffix in ("", "_0", "_1")}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith("backbone.")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_losses_of_a_mixed_batch_are_those_of_its_images_padded_alone(tiny_cfg, tiny_model):
    tiny_cfg.MODEL.MASK_FORMER.DROPOUT = 0.0
    model = tiny_model(cfg=tiny_cfg).train()
    samples = [{**training_sample(0), "point_seed": 1}, {**training_sample(1, labels=(1,)), "point_seed": 2}]
    wide = samples[1]["targets"]
    samples[1] = {
        **sample_image(40, 80, seed=1),
        "targets": Targets(labels=wide.labels, id_map=wide.id_map[:40].repeat(1, 2)[:, :80], ids=wide.ids),
        "point_seed": 2,
    }
    together, alone = model(samples), []
    for sample in samples:
        id_map = sample["targets"].id_map
        height, width = id_map.shape
        targets = Targets(
            labels=sample["targets"].labels,
            id_map=F.pad(id_map, (0, 96 - width, 0, 64 - height), value=99),
            ids=sample["targets"].ids,
        )
        alone.append(
            model(
                [
                    {
                        "image": padded_alone(model, sample["image"], (64, 96)),
                        "targets": targets,
                        "point_seed": sample["point_seed"],
                    }
                ]
            )
        )
    num_masks = torch.tensor([3.0, 1.0])
    class_weights = num_masks + (8 - num_masks) * tiny_cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT  # of 8 queries
    for name, loss in together.items():
        share = class_weights if name.startswith("loss_ce") else num_masks
        expected = (share / share.sum() * torch.stack([one[name] for one in alone])).sum()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_images_without_segments_train_too(tiny_model):
    model = tiny_model().train()
    losses = model([training_sample(labels=())])
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_seeded_points_repeat_the_losses(tiny_model):
    model = tiny_model().train()
    sample = {**training_sample(), "point_seed": 7}
    assert all(torch.equal(one, other) for one, other in zip(model([sample]).values(), model([sample]).values()))


def test_a_training_vocabulary_smaller_than_num_classes_builds_and_runs(tiny_cfg, tiny_model):
    assert tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 40
    model = tiny_model().train()
    assert model.criterion.empty_weight.shape == (41,)
    assert model([training_sample()])["loss_ce"].isfinite()


def test_what_is_missing_is_said(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="empty list"):
        model([])
    with pytest.raises(ValueError, match=r"image 0 must be a \(3, H, W\) tensor, got \(64, 64\)"):
        model([{"image": torch.zeros(64, 64)}])
    with pytest.raises(ValueError, match=r"image 1 must bring its pixels under 'image', .* got nothing"):
        model([sample_image(), {"file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=r"image 0 must bring its pixels under 'image', .* got ndarray"):
        model([{"image": sample_image()["image"].numpy()}])
    model.test_vocabulary = None
    with pytest.raises(ValueError, match="vocabulary="):
        model([sample_image()])
    model.train()
    with pytest.raises(ValueError, match=r"images \[1\] of this batch have none"):
        model([training_sample(), sample_image()])
    model.train_vocabulary = None
    with pytest.raises(ValueError, match="no training vocabulary"):
        model([training_sample()])


def test_targets_of_another_size_or_class_list_are_refused(tiny_model):
    model = tiny_model().train()
    with pytest.raises(ValueError, match=r"image 0: its targets are \(64, 64\) .* the image is \(64, 96\)"):
        model([{**training_sample(), "image": sample_image(64, 96)["image"]}])
    with pytest.raises(ValueError, match=r"image 1: labels must lie in 0\.\.2, .* got \[3\]"):
        model([training_sample(), training_sample(labels=(3,))])
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1, the classes of its vocabulary 'words', got \[2\]"):
        model([{**training_sample(labels=(2,)), "vocabulary": Vocabulary.from_names("a; b")}])


def test_a_model_that_has_predicted_in_inference_mode_can_still_be_trained(tiny_model):
    words = "cat; person; grass:stuff"
    model = tiny_model(words=words, train_words=words)
    with torch.inference_mode():
        model([sample_image(64, 64)])
    sum(model.train()([training_sample()]).values()).backward()
    assert model.void_embedding.weight.grad.isfinite().all()


def test_threads_with_different_words_do_not_disturb_each_other(tiny_model):
    model = tiny_model()
    lists = ["a; b", "c; d; e", "f", "g; h; i; j"]
    expected = [model([sample_image()], vocabulary=Vocabulary.from_names(words))[0]["sem_seg"] for words in lists]
    fresh, found = copy.deepcopy(model), [None] * len(lists)
    fresh.text_encoder._memory.clear()

    def work(index):
        found[index] = fresh([sample_image()], vocabulary=Vocabulary.from_names(lists[index]))[0]["sem_seg"]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(expected, found):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.META_ARCHITECTURE", "FCCLIPP", "unknown MODEL.META_ARCHITECTURE 'FCCLIPP'. Did you mean 'FCCLIP'"),
        ("MODEL.BACKBONE.NAME", "D2SwinTransformer", "unknown MODEL.BACKBONE.NAME"),
        ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5", "TRANSFORMER_IN_FEATURE 'res5'"),
        ("MODEL.FC_CLIP.EMBED_DIM", 768, "EMBED_DIM is 768, but CLIP .* has a joint space of 16"),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res6"], "unknown backbone level .* 'res6'"),
        (
            "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
            ["res4", "res5"],
            "must name three of IN_FEATURES",
        ),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", 8, "N_POINTS is 8, but 4 points are built"),
        ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 2, "COMMON_STRIDE is 2"),
        ("TEST.MODE", "both", "unknown TEST.MODE 'both'"),
        ("SOLVER.CE_NORM", "world", "unknown SOLVER.CE_NORM 'world'"),
    ],
)
def test_values_that_cannot_work_are_refused_by_key(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_a_region_is_embedded_as_a_mask_of_the_network_is(tiny_model):
    model = tiny_model()
    [scored] = model.score([{**sample_image(60, 90), "height": 120, "width": 180}])
    ids, _ = model.outputs(scored)["panoptic_seg"]
    regions = torch.stack([ids >= 0, ids < 0, torch.zeros_like(ids, dtype=torch.bool)])
    regions[1, 50, 70] = True  # one pixel, smaller than a cell
    embeddings = model.embed_regions(scored, regions)
    assert embeddings.shape == (3, 16) and embeddings.isfinite().all()
    torch.testing.assert_close(embeddings[:2].norm(dim=-1), torch.ones(2))  # the third region is empty
    everything = scored.dense.new_full((1, 1, *scored.dense.shape[-2:]), -1)
    cells = [-(-side // 32) for side in (60, 90)]
    everything[..., : cells[0], : cells[1]] = 1
    expected = F.normalize(model.classifier(scored.dense[None], everything)[0], dim=-1)
    torch.testing.assert_close(embeddings[:1], expected)
    assert not torch.allclose(embeddings[0], embeddings[1])
    assert model.embed_regions(scored, regions[:0]).shape == (0, 16)
