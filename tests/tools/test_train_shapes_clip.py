import importlib.util
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("train_shapes_clip", REPOSITORY / "tools" / "train_shapes_clip.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def pool():
    return tool.render_pool(seed=11, rule_name="clip", num_images=12, workers=1)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return tool.build_clip(tool.ASSETS / "shapes_convnext.json").eval()


@pytest.fixture(scope="module")
def shipped():
    return tool.load_clip(tool.ASSETS / "shapes_convnext.json", tool.ASSETS / "shapes_clip.safetensors")


def named(batch, row):
    return [tool.FACTS[i] for i in np.flatnonzero(batch.mentioned[row])]


@pytest.mark.parametrize("size_px", [64, 128, 256])
def test_a_caption_names_only_what_its_crop_shows(pool, size_px):
    batch = tool.sample_crops(
        np.random.default_rng(0), pool, size_px=size_px, num_crops=24, scale=1.0, plain=0.5, attributes=0.5
    )
    assert batch.images.shape == (24, size_px, size_px, 3) and batch.images.dtype == torch.uint8
    assert set(batch.crop_of_caption.tolist()) == set(range(24))
    for row, caption in enumerate(batch.captions):
        assert (batch.mentioned[row] & ~batch.present[batch.crop_of_caption[row]]).sum() == 0
        for fact in named(batch, row):
            if fact in [c.name for c in tool.CLASSES]:
                entry = next(c for c in tool.CLASSES if c.name == fact)
                assert any(word in caption for word in (entry.name, *entry.synonyms))


def test_sampling_is_repeatable(pool):
    first, second = (
        tool.sample_crops(np.random.default_rng(3), pool, size_px=64, num_crops=6, scale=1.0) for _ in range(2)
    )
    assert torch.equal(first.images, second.images) and first.captions == second.captions


def test_a_caption_tells_of_shapes_before_grounds():
    red_circle, sand = 0, next(i for i, c in enumerate(tool.CLASSES) if c.name == "sand")
    for seed in range(20):
        caption = tool.write_caption(np.random.default_rng(seed), [red_circle, sand])
        thing = max(caption.find(word) for word in ("red circle", "crimson circle", "red disc"))
        ground = max(caption.find(word) for word in ("sand", "beach"))
        assert 0 <= thing < ground


def test_short_text_gives_the_vectors_of_the_whole_context(clip):
    tokens = open_clip.get_tokenizer("ViT-B-32")(
        ["a photo of a red circle.", "sand", "There is a small azure star and a white box on wood in the scene."]
    )
    with torch.no_grad():
        torch.testing.assert_close(
            tool.encode_text(clip, tokens), clip.encode_text(tokens, normalize=True), atol=1e-5, rtol=1e-4
        )


def batch_of(mentioned, present, crop_of_caption):
    return tool.CropBatch(
        torch.empty(0), [], torch.tensor(crop_of_caption), torch.tensor(mentioned).bool(), torch.tensor(present).bool()
    )


def test_equal_captions_are_positives_of_each_other():
    batch = batch_of([[1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]], [0, 1, 2])
    logits = torch.tensor([[5.0, 5.0, -5.0], [5.0, 5.0, -5.0], [-5.0, -5.0, 5.0]])
    rows = torch.log_softmax(logits, 1)
    expected = -(rows[0, :2].mean() + rows[1, :2].mean() + rows[2, 2]) / 3
    torch.testing.assert_close(tool.contrastive_loss(logits, batch), expected)


def test_a_caption_that_is_true_of_another_crop_is_no_negative_of_it():
    batch = batch_of(
        [[1, 1], [0, 1]], [[1, 1], [0, 1]], [0, 1]
    )  # the second caption is true of the first crop, not the other way round
    logits = torch.zeros(2, 2, requires_grad=True)
    tool.contrastive_loss(logits, batch).backward()
    assert logits.grad[0, 1] == 0 and logits.grad[1, 0] > 0


def test_a_crop_with_two_captions_is_pulled_to_both():
    batch = batch_of([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 0, 1]], [0, 0, 1])
    logits = torch.zeros(2, 3, requires_grad=True)
    tool.contrastive_loss(logits, batch).backward()
    assert (logits.grad[0] < 0).tolist() == [True, True, False]


def test_a_few_steps_lower_the_loss_and_the_file_holds_the_model(pool, clip, tmp_path):
    torch.manual_seed(1)
    model = tool.build_clip(tool.ASSETS / "shapes_convnext.json")
    tool.start_weights(model)
    losses = tool.train(model, pool, seed=1, iterations=30, pixels_per_batch=64**2 * 12, learning_rate=2e-3)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    tool.save_clip(model, tmp_path / "clip.safetensors", {"training": {"seed": 1}})
    again = tool.load_clip(tool.ASSETS / "shapes_convnext.json", tmp_path / "clip.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


def test_missing_weights_are_named(tmp_path, capsys):
    assert tool.main(["--gate-only", "--output", str(tmp_path / "none.safetensors")]) == 2
    assert "no weights (--output) at" in capsys.readouterr().err


def test_training_on_the_world_of_the_gate_is_refused(capsys):
    assert tool.main(["--seed", "5", "--gate-seed", "5"]) == 2
    assert "both 5" in capsys.readouterr().err


def test_the_shipped_file_is_small_half_precision_and_says_how_it_was_made():
    path = tool.ASSETS / "shapes_clip.safetensors"
    assert path.stat().st_size <= 15 * 2**20
    with safe_open(path, "pt") as file:
        assert {"architecture", "training"} <= set(file.metadata())
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118


def test_the_shipped_clip_names_single_shapes(shipped):
    singles = tool.render_pool(seed=4711, rule_name="single", num_images=24, workers=1)
    words, owners = tool.word_vectors(shipped)
    with torch.no_grad():
        vectors = shipped.visual(tool.enlarge(singles.images, 256))
    predicted = tool.class_logits(vectors, words, owners, shipped.logit_scale)[:, : tool.NUM_THINGS].argmax(1)
    truth = torch.tensor([classes[-1] for classes in singles.piece_classes])
    assert (predicted == truth).float().mean() >= 0.9


def test_class_logits_take_the_best_word_of_a_class():
    words = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    owners = torch.tensor([0, 0, 1])
    logits = tool.class_logits(torch.tensor([[0.0, 2.0]]), words, owners, torch.tensor(0.0))
    torch.testing.assert_close(logits[0, :2], torch.tensor([1.0, 0.5**0.5]))
