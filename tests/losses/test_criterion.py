"""Losses of matched queries."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fcclip.losses import SetCriterion
from fcclip.structures import Targets

SIZE = (32, 32)


def criterion(**changes):
    values = {
        "num_classes": 4,
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 3.0,
        "no_object_weight": 0.1,
        "num_points": 50,
    }
    return SetCriterion(**{**values, **changes})


def batch(seed=0, *, empty=False, segments=([0, 3, 3], [2])):
    """Images with segments of these classes, three prediction sets, five queries."""
    generator = torch.Generator().manual_seed(seed)
    num = len(segments)
    class_logits = [torch.randn(num, 5, 5, generator=generator, requires_grad=True) for _ in range(3)]
    embeddings = [torch.randn(num, 5, 8, generator=generator, requires_grad=True) for _ in range(3)]
    features = torch.randn(num, 8, 8, 8, generator=generator, requires_grad=True)
    targets = []
    for labels in segments:
        labels = [] if empty else labels
        id_map = torch.randint(1, max(4, len(labels) + 1), (4, 4), generator=generator)
        id_map = id_map.repeat_interleave(8, 0).repeat_interleave(8, 1).int()
        targets.append(
            Targets(labels=torch.tensor(labels, dtype=torch.long), id_map=id_map, ids=torch.arange(1, len(labels) + 1))
        )
    return class_logits, embeddings, features, targets


def run(module, data, seeds=(1, 2), **rest):
    class_logits, embeddings, features, targets = data
    return module(class_logits, embeddings, features, targets, padded_size=SIZE, point_seeds=seeds, **rest)


def part_of(data, start, stop):
    """The images from `start` to before `stop`."""
    class_logits, embeddings, features, targets = data
    rows = slice(start, stop)
    return [one[rows] for one in class_logits], [one[rows] for one in embeddings], features[rows], targets[rows]


def inputs_of(data):
    """Every tensor that learns."""
    class_logits, embeddings, features, _ = data
    return [*class_logits, *embeddings, features]


def test_every_prediction_set_has_three_losses_and_the_last_has_no_suffix():
    losses = run(criterion(), batch())
    assert set(losses) == {f"loss_{kind}{suffix}" for kind in ("ce", "mask", "dice") for suffix in ("", "_0", "_1")}
    assert set(run(criterion(deep_supervision=False), batch())) == {"loss_ce", "loss_mask", "loss_dice"}


def test_losses_are_those_of_the_definition_when_every_pixel_is_a_point():
    """With all points uniform, mask losses converge to the mean over the image; here the masks are constant, so they
    are equal.
    """
    module = criterion(importance_ratio=0.0)
    class_logits = [torch.tensor([[[3.0, 0, 0, 0, 0], [0, 0, 0, 0, 3.0]]])]
    features = torch.ones(1, 1, 8, 8)
    embeddings = [torch.tensor([[[2.0], [-2.0]]])]  # query 0 covers everything, query 1 nothing
    targets = [Targets(labels=torch.tensor([0]), id_map=torch.ones(32, 32, dtype=torch.int32), ids=torch.tensor([1]))]
    interior = Targets(labels=targets[0].labels, masks=torch.ones(1, 32, 32, dtype=torch.bool))
    losses = module(class_logits, embeddings, features, [interior], padded_size=SIZE, point_seeds=[0])
    nll = -torch.log_softmax(torch.tensor([3.0, 0, 0, 0, 0]), 0)[0]
    torch.testing.assert_close(losses["loss_ce"], 2 * (nll + 0.1 * nll) / 1.1)
    # near the border bilinear sampling mixes in the zeros outside, for prediction and label alike
    assert abs(float(losses["loss_mask"]) - 5 * float(F.softplus(torch.tensor(-2.0)))) < 0.5
    assert 0 < float(losses["loss_dice"]) < 3 * 0.15


def test_void_is_the_target_of_unmatched_queries_and_counts_a_tenth():
    class_logits, embeddings, features, targets = batch(empty=True)
    losses = run(criterion(), (class_logits, embeddings, features, targets))
    expected = 2 * F.cross_entropy(class_logits[-1].flatten(0, 1), torch.full((10,), 4))
    torch.testing.assert_close(losses["loss_ce"], expected)
    assert losses["loss_mask"].item() == 0 and losses["loss_dice"].item() == 0


def test_gradients_reach_every_input_even_without_targets():
    for empty in (False, True):
        class_logits, embeddings, features, targets = batch(empty=empty)
        sum(run(criterion(), (class_logits, embeddings, features, targets)).values()).backward()
        for tensor in (*class_logits, *embeddings, features):
            assert tensor.grad is not None and tensor.grad.isfinite().all()


def test_seeded_points_make_a_image_independent_of_its_batch():
    class_logits, embeddings, features, targets = batch()
    both = run(criterion(), (class_logits, embeddings, features, targets))
    # normalised by 4 masks together, by 3 and by 1 alone
    parts = [
        run(criterion(), part_of((class_logits, embeddings, features, targets), i, i + 1), seeds=(i + 1,))
        for i in range(2)
    ]
    torch.testing.assert_close(both["loss_mask"], (3 * parts[0]["loss_mask"] + parts[1]["loss_mask"]) / 4)
    torch.testing.assert_close(both["loss_dice_0"], (3 * parts[0]["loss_dice_0"] + parts[1]["loss_dice_0"]) / 4)


# Of four images: none, one, some and more segments than there are queries.
CROWD = ([0, 3, 3], [], [0, 1, 2, 3, 0, 1, 2], [2])
COUNTS = [len(labels) for labels in CROWD]
SEEDS = (1, 2, 3, 4)


@pytest.mark.parametrize("changes", [{}, {"global_class_norm": True}, {"deep_supervision": False}])
@pytest.mark.parametrize(
    "cuts", [cuts for num in range(1, 4) for cuts in itertools.combinations((1, 2, 3), num)], ids=str
)
def test_the_losses_of_parts_add_up_to_those_of_the_whole_however_it_is_cut(cuts, changes):
    data, module = batch(segments=CROWD), criterion(**changes)
    whole = run(module, data, SEEDS)
    bounds = itertools.pairwise((0, *cuts, 4))
    parts = [
        run(module, part_of(data, start, stop), SEEDS[start:stop], segment_counts=COUNTS) for start, stop in bounds
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, msg=name)
    both = (sum(whole.values()), sum(sum(part.values()) for part in parts))
    gradients = [torch.autograd.grad(loss, inputs_of(data), materialize_grads=True) for loss in both]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_parts_of_a_batch_without_segments_add_up_too():
    data, module = batch(segments=([], [], [])), criterion()
    whole = run(module, data, (1, 2, 3))
    first = run(module, part_of(data, 0, 1), (1,), segment_counts=[0, 0, 0])
    second = run(module, part_of(data, 1, 3), (2, 3), segment_counts=[0, 0, 0])
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + second[name], value, msg=name)


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_the_class_loss_is_a_mean_over_queries_also_with_more_segments_than_queries(counts):
    class_logits, embeddings, features, targets = batch(segments=CROWD)
    opinionless = [torch.zeros_like(one) for one in class_logits]  # the same loss for whatever is wanted
    losses = run(criterion(), (opinionless, embeddings, features, targets), SEEDS, segment_counts=counts)
    torch.testing.assert_close(losses["loss_ce"], 2 * torch.tensor(5.0).log())


@pytest.mark.parametrize("segments", [CROWD, ([], []), ([1],)])
def test_the_counts_of_the_batch_itself_change_no_bit(segments):
    data, seeds = batch(segments=segments), SEEDS[: len(segments)]
    alone = run(criterion(), data, seeds)
    told = run(criterion(), data, seeds, segment_counts=[len(labels) for labels in segments])
    assert all(torch.equal(value, told[name]) for name, value in alone.items())


def test_matching_on_sampled_features_equals_matching_on_masks():
    class_logits, embeddings, features, targets = batch()
    module = criterion()
    seen = {}

    def record(points_of):
        def draw(num, count):
            seen["points"] = points_of(num, count)
            return seen["points"]

        return draw

    generator = torch.Generator().manual_seed(3)
    draw = record(lambda num, count: torch.rand(num, count, 2, generator=generator))
    [per_set] = module.assign(
        torch.stack([one[:1] for one in class_logits]),
        torch.stack([one[:1] for one in embeddings]),
        features[:1],
        targets[:1],
        SIZE,
        [draw],
    )
    masks = torch.einsum("qd,dhw->qhw", embeddings[1][0], features[0])
    x = F.grid_sample(masks[None], 2 * seen["points"][1][None, None] - 1, align_corners=False)[0, :, 0]
    t = F.grid_sample(targets[0].expand().float()[None], 2 * seen["points"][1][None, None] - 1, align_corners=False)[
        0, :, 0
    ]
    from fcclip.losses.matching import match, match_costs

    weights = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 3.0}
    [[expected]] = match([match_costs(class_logits[1][:1], x[None], targets[0].labels, t[None], **weights)])
    assert per_set[1][0].tolist() == expected[0].tolist()
    assert per_set[1][1].tolist() == expected[1].tolist()


def test_impossible_sampling_ratios_are_refused():
    with pytest.raises(ValueError, match="OVERSAMPLE_RATIO"):
        criterion(oversample_ratio=0.5)
    with pytest.raises(ValueError, match="2 point seeds|point seeds"):
        run(criterion(), batch(), seeds=(1,))
