"""BERT as a frozen text encoder."""

import sys

import pytest
import torch

from fcclip.modeling import build_model
from fcclip.modeling.backbones.bert import Bert
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_parts
from tests.conftest import tiny_fusioner

CLASSES = Vocabulary.from_names("cat, kitty; dog")


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with random weights, as transformers saves one."""
    transformers = pytest.importorskip("transformers", reason="transformers (extra bert) is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "the", "cat", "dog", "kitty"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return str(tmp_path)


def test_padding_and_neighbours_change_no_vector_and_names_are_told_apart(folder):
    bert = Bert(folder)
    alone, together = bert(["a cat"]), bert(["a cat", "a photo of the dog"])
    torch.testing.assert_close(together[:1], alone)
    assert not torch.allclose(bert(["a cat"]), bert(["a dog"]))


def test_fusioner_reads_class_names_with_it(folder):
    cfg = tiny_fusioner()
    cfg.MODEL.FUSIONER.TEXT_ENCODER, cfg.MODEL.FUSIONER.BERT = "BERT", folder
    model = build_model(cfg, train_vocabulary=CLASSES, test_vocabulary=CLASSES)
    text = model.text_encoder.encode(CLASSES)
    assert text.vectors.shape == (3, 8) and text.class_of_vector.tolist() == [0, 0, 1]
    torch.testing.assert_close(text.vectors.norm(dim=-1), torch.ones(3))
    assert model.text_encoder.encode(CLASSES) is text
    assert set(frozen_parts(model)) == {"backbone.", "text_backbone."}
    [output] = model([{"image": torch.zeros(3, 32, 32)}])
    assert output["sem_seg"].shape == (2, 32, 32)


def test_checks_build_it_as_shapes(folder):
    with torch.device("meta"):
        bert = Bert(folder)
    assert sum(weight.numel() for weight in bert.parameters()) > 0


@pytest.mark.parametrize("folder", ["", "bert-base-uncased"])
def test_weights_that_are_not_local_are_refused(folder):
    with pytest.raises(ValueError, match=r"MODEL.FUSIONER.BERT must be a folder with config.json"):
        Bert(folder)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fcclip\[bert\]'"):
        Bert(str(tmp_path))
