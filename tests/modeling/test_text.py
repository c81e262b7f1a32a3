"""Text embeddings: exact short cuts and honest caches."""

import logging
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from fcclip.modeling import text
from fcclip.modeling.backbones.clip import build_clip
from fcclip.modeling.text import TextEncoder, encode_tokens, text_weights_hash
from fcclip.vocabulary import Vocabulary, prompts

TINY = str(Path(__file__).parents[1] / "data" / "tiny_convnext.json")


@pytest.fixture
def clip_model():
    torch.manual_seed(0)
    return build_clip(TINY).clip_model


def counted(monkeypatch) -> list[int]:
    """The number of names of every encoding that really ran."""
    calls, encode = [], text.encode_class_names

    def encode_and_count(clip_model, names, templates):
        calls.append(len(names))
        return encode(clip_model, names, templates)

    monkeypatch.setattr(text, "encode_class_names", encode_and_count)
    return calls


def test_cutting_behind_the_last_end_of_text_changes_nothing(clip_model):
    tokens = open_clip.tokenize(["a cat", "a photo of a very long red and blue striped cat in the scene", "dog"])
    with torch.no_grad():
        torch.testing.assert_close(
            encode_tokens(clip_model, tokens), clip_model.encode_text(tokens), atol=1e-6, rtol=1e-5
        )
        full = tokens.clone()
        full[0, 1:76], full[0, 76] = 320, 49407  # a prompt that fills the context
        torch.testing.assert_close(encode_tokens(clip_model, full), clip_model.encode_text(full), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "names", [["cat"], ["", "cat"], ["sea", "red and blue striped cat", "sea lion", "cat " * 90, "🐈"]]
)
def test_prompts_that_share_their_beginning_are_read_as_by_themselves(clip_model, names, monkeypatch):
    """`encode_text` of open_clip over whole prompts is the truth; the rounding is that of sums of 32 numbers."""
    monkeypatch.setattr(text, "_CHUNK", 9)
    found = text.encode_class_names(clip_model, names)
    with torch.no_grad():
        whole = F.normalize(clip_model.encode_text(open_clip.tokenize(prompts(names))), dim=-1)
    expected = F.normalize(whole.unflatten(0, (len(names), -1)).mean(1), dim=-1)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_templates_may_begin_with_the_name_or_have_nothing_else(clip_model):
    names, templates = ["cat", "red dog"], ["{}", "{} in the scene", "a {}"]
    found = text.encode_class_names(clip_model, names, templates)
    with torch.no_grad():
        whole = F.normalize(clip_model.encode_text(open_clip.tokenize(prompts(names, templates))), dim=-1)
    expected = F.normalize(whole.unflatten(0, (len(names), -1)).mean(1), dim=-1)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_a_name_is_the_normalised_mean_of_its_normalised_prompts(clip_model):
    embeddings = TextEncoder(clip_model).encode(Vocabulary.from_names("cat, kitty; grass"))
    assert embeddings.class_of_vector.tolist() == [0, 0, 1] and embeddings.num_classes == 2
    with torch.no_grad():
        prompt = F.normalize(clip_model.encode_text(open_clip.tokenize(prompts(["kitty"]))), dim=-1)
    torch.testing.assert_close(embeddings.vectors[1], F.normalize(prompt.mean(0), dim=0), atol=1e-6, rtol=1e-5)
    assert embeddings.vectors.dtype == torch.float32 and not embeddings.vectors.requires_grad


def test_a_name_that_is_cut_is_told_with_its_number_of_tokens(clip_model, caplog):
    long = "a red circle " * 30
    with caplog.at_level("WARNING", logger="fcclip"):
        TextEncoder(clip_model).encode(Vocabulary.from_names([long + "left", long + "right", "sand"]))
    told = [message for message in caplog.messages if "tokens" in message]
    assert len(told) == 2 and "right" in told[1] and all("101 tokens" in message for message in told), told
    assert str(len(clip_model.positional_embedding)) in told[0]


def test_equal_names_are_encoded_once(clip_model, monkeypatch):
    calls = counted(monkeypatch)
    encoder = TextEncoder(clip_model)
    embeddings = encoder.encode(Vocabulary.from_names("cat; dog; hound, cat"))
    assert calls == [3]
    assert torch.equal(embeddings.vectors[0], embeddings.vectors[3])
    encoder.encode(Vocabulary.from_names("cat; dog; hound, cat"))
    assert calls == [3]


def test_features_survive_on_disk_and_new_weights_never_get_old_ones(clip_model, monkeypatch, tmp_path):
    calls = counted(monkeypatch)
    vocabulary = Vocabulary.from_names("cat; dog")
    first = TextEncoder(clip_model, cache_dir=tmp_path).encode(vocabulary)
    again = TextEncoder(clip_model, cache_dir=tmp_path).encode(vocabulary)
    assert calls == [2] and torch.equal(first.vectors, again.vectors)
    encoder = TextEncoder(clip_model, cache_dir=tmp_path)
    encoder.encode(vocabulary)
    clip_model.load_state_dict(
        {key: value * 1.5 if "token" in key else value for key, value in clip_model.state_dict().items()}
    )
    changed = encoder.encode(vocabulary)
    assert calls == [2, 2] and not torch.allclose(first.vectors, changed.vectors)


def test_a_broken_cache_file_is_said_and_replaced(clip_model, tmp_path, caplog):
    vocabulary = Vocabulary.from_names("cat; dog")
    first = TextEncoder(clip_model, cache_dir=tmp_path).encode(vocabulary)
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        again = TextEncoder(clip_model, cache_dir=tmp_path).encode(vocabulary)
    assert "unreadable" in caplog.text and torch.equal(first.vectors, again.vectors)
    assert path.stat().st_size > 100 and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_only_the_cache(clip_model, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        TextEncoder(clip_model, cache_dir=blocked / "below").encode(Vocabulary.from_names("cat"))
    assert "could not be kept" in caplog.text


def test_the_hash_knows_the_activation_and_every_text_weight(clip_model):
    torch.manual_seed(0)
    quick = build_clip(TINY, quick_gelu="on").clip_model
    assert text_weights_hash(clip_model) != text_weights_hash(quick)
    before = text_weights_hash(clip_model)
    with torch.no_grad():
        clip_model.visual.trunk.stem[0].weight.add_(1)
    assert text_weights_hash(clip_model) == before
    with torch.no_grad():
        clip_model.ln_final.bias.add_(1)
    assert text_weights_hash(clip_model) != before
