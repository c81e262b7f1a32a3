import numpy as np
import pytest
import torch
from safetensors import safe_open

from fcclip.errors import InputError, MissingFileError
from tests.tools.conftest import REPOSITORY, load_program

tool = load_program(REPOSITORY / "tools" / "train_shapes_clip.py")


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
    batch = tool.sample_crops(np.random.default_rng(0), pool, size_px=size_px, num_crops=24, plain=0.5, attributes=0.5)
    assert batch.images.shape == (24, size_px, size_px, 3) and batch.images.dtype == torch.uint8
    assert set(batch.crop_of_caption.tolist()) == set(range(24))
    for row, caption in enumerate(batch.captions):
        assert (batch.mentioned[row] & ~batch.present[batch.crop_of_caption[row]]).sum() == 0
        for fact in named(batch, row):
            if fact in [c.name for c in tool.CLASSES]:
                entry = next(c for c in tool.CLASSES if c.name == fact)
                assert any(name in caption for name in (entry.name, *entry.synonyms))


def test_sampling_is_repeatable(pool):
    first, second = (tool.sample_crops(np.random.default_rng(3), pool, size_px=64, num_crops=6) for _ in range(2))
    assert torch.equal(first.images, second.images) and first.captions == second.captions


def test_a_caption_tells_of_shapes_before_grounds():
    red_circle, sand = 0, next(i for i, c in enumerate(tool.CLASSES) if c.name == "sand")
    for seed in range(20):
        caption = tool.write_caption(np.random.default_rng(seed), [red_circle, sand])
        thing = max(caption.find(name) for name in ("red circle", "crimson circle", "red disc"))
        ground = max(caption.find(name) for name in ("sand", "beach"))
        assert 0 <= thing < ground


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
    tool.save_half(model, tmp_path / "clip.safetensors", {"training": {"seed": 1}})
    again = tool.load_clip(tool.ASSETS / "shapes_convnext.json", tmp_path / "clip.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no weights \(--output\) at .*none.safetensors"):
        tool.main(["--gate-only", "--output", str(tmp_path / "none.safetensors")])


def test_training_on_the_world_of_the_gate_is_refused():
    with pytest.raises(InputError, match="--seed is 0, the seed of the gate"):
        tool.main(["--seed", "0"])


def test_the_shipped_file_is_small_half_precision_and_says_how_it_was_made():
    path = tool.ASSETS / "shapes_clip.safetensors"
    assert path.stat().st_size <= 15 * 2**20
    with safe_open(path, "pt") as file:
        assert {"architecture", "training"} <= set(file.metadata())
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118


def test_the_shipped_clip_passes_the_gate(shipped):
    """Few images; the floors are those of the whole gate."""
    pools = {name: tool.render_pool(seed=4711, rule_name=name, num_images=24, workers=1) for name in ("single", "tune")}
    figures = tool.gate(shipped, singles=pools["single"], tune=pools["tune"])
    assert figures["single"] >= 90 and figures["grounds"] >= 75
    assert set(tool.MEANINGS) == set(figures)
    assert tool.format_gate(figures).count("%") == len(tool.MEANINGS) + len(tool.FLOORS)
