"""What would stand in the way of an export: sizes that become numbers, caches that meet symbols, vanishing epsilons."""

import pytest
import torch
from torch.export import Dim

from fcclip.modeling.classifier import mask_pool, text_logits, with_void
from fcclip.modeling.position import sine_positions
from fcclip.structures import TextEmbeddings


def exported(function, inputs, dynamic):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    return torch.export.export(Module(), inputs, dynamic_shapes=(dynamic,), strict=False).module()


def test_the_mean_inside_a_mask_is_to_the_bit_what_it_was_with_the_published_epsilon():
    generator = torch.Generator().manual_seed(0)
    features, masks = torch.randn(2, 5, 9, 7, generator=generator), torch.randn(2, 6, 9, 7, generator=generator) - 1
    masks[0, 0], masks[0, 1], masks[0, 2] = -1, 1, -1
    masks[0, 2, 4, 4] = 1
    inside = (masks > 0).float().flatten(2)
    published = inside / (inside.sum(-1, keepdim=True) + 1e-8) @ features.flatten(2).transpose(1, 2)
    pooled = mask_pool(features, masks)
    assert torch.equal(pooled, published)
    assert not pooled[0, 0].any() and torch.equal(pooled[0, 2], features[0, :, 4, 4])


def test_names_of_any_number_go_through_one_program():
    def logits(embeddings, vectors, classes):
        text = with_void(TextEmbeddings(vectors, classes, 3), torch.ones(1, 4))
        return text_logits(embeddings, text, torch.tensor(1.0))

    generator, names = torch.Generator().manual_seed(0), Dim("names", min=1, max=100)
    embeddings, vectors = torch.randn(2, 5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    classes = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    program = exported(logits, (embeddings, vectors[:5], classes[[0, 1, 3, 5, 6]]), ({}, {0: names}, {0: names}))
    torch.testing.assert_close(program(embeddings, vectors, classes), logits(embeddings, vectors, classes))
    with pytest.raises(ValueError, match="5 vectors for 4 synonyms"):
        TextEmbeddings(vectors[:5], classes[:4], 3)


def test_positions_of_any_size_go_through_one_program_and_leave_the_cache_alone():
    def positions(image):
        return sine_positions(*image.shape[-2:], 8, image.device)

    rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
    program = exported(positions, (torch.zeros(1, 5, 7),), ({1: rows, 2: columns},))
    torch.testing.assert_close(program(torch.zeros(1, 9, 4)), sine_positions(9, 4, 8, torch.device("cpu")))
