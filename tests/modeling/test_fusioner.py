"""The whole Fusioner, tiny."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fcclip.modeling import build_model, text
from fcclip.modeling.fusion import binary_loss, cosine_logits, upsampled_conv
from fcclip.modeling.windows import Windows
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights
from tests.conftest import tiny_fusioner
from tests.modeling.test_fcclip import sample_image, training_sample
from tests.modeling.test_fusioner_parity import published_name

TRAINING = Vocabulary.from_names("cup; sea:stuff; dog", name="train")
NAMES = Vocabulary.from_names("cat, kitty; dog; grass:stuff", name="test")


@pytest.fixture
def cfg():
    return tiny_fusioner()


@pytest.fixture
def build(cfg):
    def build(seed=0):
        torch.manual_seed(seed)
        return build_model(cfg, train_vocabulary=TRAINING, test_vocabulary=NAMES)

    return build


def planes(model, vocabulary=NAMES, **sample):
    [scored] = model.score([sample_image(**sample)], vocabulary)
    return scored.masks.mask_logits


def pair(name, seed):
    """A sample of the published kind: one class is prompted."""
    sample = training_sample(seed, labels=(0,))
    return {**sample, "vocabulary": Vocabulary.from_names(name), "ignored": sample["targets"].id_map == 4}


def test_there_is_a_plane_a_class_at_the_size_of_the_image_and_cosines_are_bounded(build):
    logits = planes(build(), height=50, width=70)
    assert logits.shape == (3, 56, 72)  # padded to the patch
    assert logits.abs().max() <= 1 / 0.07


def test_the_panoptic_map_is_the_published_prediction_with_background_where_no_class_is_above_a_half(build):
    model = build()
    [output] = model([sample_image()])
    expected = torch.cat([torch.full((1, 64, 96), 0.5), output["sem_seg"]]).argmax(0)
    ids, segments = output["panoptic_seg"]
    classes = torch.tensor([0, *(segment["category_id"] + 1 for segment in segments)])
    assert torch.equal(classes[ids.long()], expected)


def test_the_order_of_names_and_the_size_of_the_batch_change_nothing(build):
    model, names = build(), ["cat", "dog", "grass"]
    first = planes(model, Vocabulary.from_names(names))
    for order in itertools.permutations(range(3)):
        other = planes(model, Vocabulary.from_names([names[index] for index in order]))
        torch.testing.assert_close(other, first[list(order)], rtol=0, atol=1e-4)
    twice = model.score([sample_image(), sample_image()], Vocabulary.from_names(names))
    for scored in twice:
        torch.testing.assert_close(scored.masks.mask_logits, first, rtol=0, atol=1e-4)


def test_a_class_scores_as_its_best_synonym(build):
    names = planes(build(), Vocabulary.from_names("cat; kitty; dog; grass:stuff"))
    classes = planes(build(), NAMES)
    torch.testing.assert_close(classes, torch.cat([names[:2].amax(0)[None], names[2:]]))


def test_images_with_other_vocabularies_share_a_batch(build):
    model, short = build(), Vocabulary.from_names("star")
    first, second = model.score([sample_image(vocabulary=short), sample_image(seed=1)])
    torch.testing.assert_close(first.masks.mask_logits, planes(model, short), rtol=0, atol=1e-4)
    torch.testing.assert_close(second.masks.mask_logits, planes(model, seed=1), rtol=0, atol=1e-4)


def test_a_batched_step_equals_accumulated_steps_of_one_image_each(build):
    batch = [pair(name, seed) for seed, name in enumerate(("cup", "dog", "cup"))]
    model = build().train()
    model(batch)["loss_bce"].backward()
    whole = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    losses = []
    for sample in batch:
        loss = model([sample])["loss_bce"] / len(batch)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), model(batch)["loss_bce"].detach())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, whole[name], rtol=1e-3, atol=1e-6, msg=name)


def test_ignored_pixels_change_nothing_and_an_ignored_image_has_a_finite_loss(build):
    model, sample = build().train(), pair("cup", 0)
    ids = sample["targets"].id_map.clone()
    loss = model([sample])["loss_bce"]
    ids[sample["ignored"]] = 1  # were of the class
    changed = Targets(labels=torch.tensor([0]), id_map=ids, ids=torch.tensor([1]))
    assert torch.equal(model([{**sample, "targets": changed}])["loss_bce"], loss)
    everything = torch.ones_like(sample["ignored"])
    assert model([{**sample, "ignored": everything}])["loss_bce"].isfinite()


def test_the_loss_of_several_classes_is_summed_over_them_and_divided_by_the_valid_pixels():
    logits, truth = torch.randn(3, 4, 5), (torch.rand(3, 4, 5) > 0.5).float()
    ignored = torch.rand(4, 5) > 0.7
    expected = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")[:, ~ignored].sum() / (~ignored).sum()
    torch.testing.assert_close(binary_loss(logits, truth, ignored), expected)
    assert torch.equal(binary_loss(logits, truth), binary_loss(logits, truth, torch.ones(4, 5, dtype=torch.bool)))


def test_the_encoders_have_no_gradient_and_stay_in_evaluation_mode(build):
    model = build().train()
    model([pair("cup", 0)])["loss_bce"].backward()
    assert all(weight.grad is None for weight in model.backbone.parameters())
    assert not model.backbone.clip_model.training
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None} == {
        "fusion",
        "decoder",
    }


def test_a_class_is_encoded_once(build, monkeypatch):
    model, calls, encode = build().train(), [], text.encode_class_names
    monkeypatch.setattr(text, "encode_class_names", lambda *words: calls.append(1) or encode(*words))
    for _ in range(3):
        model([pair("a name that nothing has", 0), pair("a name that nothing has", 1)])
    assert len(calls) == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_a_convolution_of_an_upsampled_map_needs_no_upsampled_map(size):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, *size), (4, 3, 3, 3), (4,))
    )
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), weight, bias, padding=1)
    fast = upsampled_conv(x, weight, bias)
    torch.testing.assert_close(fast, plain)
    towards = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for own, expected in zip(*(torch.autograd.grad(result, (x, weight, bias), towards) for result in (fast, plain))):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("size", [(28, 28), (13, 20), (5, 4)])
def test_cosines_of_resized_pixels_need_no_resized_pixels(size):
    generator = torch.Generator().manual_seed(0)
    pixels, classes = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 6, 8, 5), (2, 3, 6))
    )
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    plain = torch.einsum("bdhw,bnd->bnhw", F.normalize(resized, dim=1), F.normalize(classes, dim=-1)) / 0.07
    fast = cosine_logits(pixels, classes, size, temperature=0.07)
    torch.testing.assert_close(fast, plain)
    towards = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for own, expected in zip(*(torch.autograd.grad(logits, (pixels, classes), towards) for logits in (fast, plain))):
        torch.testing.assert_close(own, expected)


def test_autocast_keeps_cosines_in_float32(build):
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model([pair("cup", 0)])["loss_bce"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model([pair("cup", 0)])["loss_bce"], rtol=0.05, atol=0)


@pytest.mark.parametrize("border", ["shift", "pad"])
@pytest.mark.parametrize("size", [(100, 150), (224, 224), (224, 500), (375, 500)])
def test_windows_of_a_constant_give_the_constant(size, border):
    windows = Windows(224, border)
    result = windows.mean(torch.zeros(3, *size), lambda image: torch.full((2, 224, 224), 7.0))
    assert result.shape == (2, *size) and bool((result == 7).all())
    rows, columns = ((max(length - 224, 0) + 148) // 149 + 1 for length in size)
    assert len(windows.boxes(*size)) == rows * columns


def test_predictions_by_windows_have_the_size_of_the_image(cfg, build):
    cfg.MODEL.FUSIONER.WINDOW = 32
    model = build()
    [output] = model([sample_image(height=50, width=21)])
    assert output["sem_seg"].shape == (3, 50, 21)
    whole = planes(model, height=32, width=32)
    cfg.MODEL.FUSIONER.WINDOW = 0
    torch.testing.assert_close(planes(build(), height=32, width=32), whole)


def test_a_checkpoint_of_the_published_code_is_read(build, tmp_path):
    model, other = build(), build(seed=1)
    published = {published_name(key): value for key, value in model.state_dict().items()}
    torch.save({"model": published}, tmp_path / "published.pth")
    load_weights(other, tmp_path / "published.pth")
    torch.testing.assert_close(planes(other), planes(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: {"fusion.x": torch.zeros(1)}, "no key starts with 'fusion.blocks.'"),
        (lambda keys: keys | {"fusion.blocks.1.norm1.bias": torch.zeros(16)}, "set MODEL.FUSIONER.LAYERS 2"),
        (lambda keys: keys | {"fusion.cls_emb": torch.zeros(1, 32)}, "MODEL.FUSIONER.WIDTH 32, not 16"),
        (lambda keys: keys | {"fusion.text_proj.0.weight": torch.zeros(24)}, "another text encoder"),
    ],
)
def test_weights_that_do_not_fit_are_explained(build, tmp_path, change, message):
    model = build()
    torch.save({"model": change(dict(model.state_dict()))}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 12, "multiples of 8, the patch"),
        ("MODEL.FUSIONER.WINDOW", 20, "multiples of 8, the patch"),
        ("MODEL.FUSIONER.HEADS", 3, "WIDTH 16 must be divisible by MODEL.FUSIONER.HEADS 3"),
        ("MODEL.FUSIONER.TEMPLATES", "vilt", "Did you mean 'vild'"),
        ("MODEL.FUSIONER.TEXT_ENCODER", "CLOP", "Did you mean 'CLIP'"),
        ("MODEL.BACKBONE.NAME", "tim", "Did you mean 'timm'"),
    ],
)
def test_values_that_cannot_work_are_refused(cfg, build, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build()
