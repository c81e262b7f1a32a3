import pytest
import torch
from torch import nn

from fcclip.config import get_cfg
from fcclip.engine import build_gradient_clipping, build_optimizer, parameter_groups

RULES = {"weight_decay": 0.05, "weight_decay_norm": 0.0, "weight_decay_embed": 0.0, "backbone_multiplier": 0.1}


def published_cfg():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1e-4, 0.05
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    return cfg


def published_group_of_each(model, lr=1e-4):
    """One (lr, weight decay) per parameter name, written out rule by rule."""
    norms = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)
    found = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            own_lr, decay = (lr * 0.1 if "backbone" in path else lr), 0.05
            if "relative_position_bias_table" in name or "absolute_pos_embed" in name:
                decay = 0.0
            if isinstance(module, (*norms, nn.Embedding)):
                decay = 0.0
            found[f"{path}.{name}".lstrip(".")] = (own_lr, decay)
    return found


def test_every_parameter_has_the_published_rate_and_decay(toy):
    model = toy()
    groups = parameter_groups(model, lr=1e-4, **RULES)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    assert found == published_group_of_each(model)
    decays = {name: decay for name, (_, decay) in found.items()}
    assert decays["void_embedding.weight"] == 0 and decays["sem_seg_head.predictor.query_feat.weight"] == 0
    assert decays["sem_seg_head.pixel_decoder.input_proj.0.1.bias"] == 0  # of a norm
    assert decays["sem_seg_head.pixel_decoder.input_proj.0.0.bias"] == 0.05  # other biases decay
    assert decays["sem_seg_head.pixel_decoder.level_embed"] == decays["sem_seg_head.predictor.logit_scale"] == 0.05


def test_a_trainable_backbone_learns_more_slowly_and_position_tables_do_not_decay():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    model.backbone.absolute_pos_embed = nn.Parameter(torch.zeros(2))
    groups = parameter_groups(model, lr=1.0, **RULES)
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 0.05, 2),
        (0.1, 0.0, 1),
    ]


def test_frozen_parameters_are_left_out_and_shared_ones_taken_once(toy):
    model = toy()
    model.again = model.void_embedding
    names = [name for group in parameter_groups(model, lr=1.0, **RULES) for name, _ in group["params"]]
    assert not any(name.startswith("backbone") for name in names)
    assert names.count("void_embedding.weight") == 1 and "again.weight" not in names


def test_a_model_without_anything_to_train_is_refused(toy):
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(toy().requires_grad_(False), lr=1.0, **RULES)


def test_merged_groups_step_like_one_group_per_parameter(toy):
    merged, single = toy(), toy()
    optimizer = build_optimizer(published_cfg(), merged)
    of_each = published_group_of_each(single)
    groups = [
        {"params": [p], "lr": of_each[n][0], "weight_decay": of_each[n][1]}
        for n, p in single.named_parameters()
        if n in of_each
    ]
    plain = torch.optim.AdamW(groups, lr=1e-4)
    for step in range(3):
        for model in (merged, single):
            torch.manual_seed(step)
            for _, parameter in sorted(model.named_parameters()):
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        plain.step()
    for (name, one), other in zip(merged.named_parameters(), single.parameters()):
        # the fused kernel rounds in another order
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)


def test_adamw_is_fused_on_the_cpu(toy):
    optimizer = build_optimizer(published_cfg(), toy())
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8


def test_an_unknown_optimizer_is_named_with_its_neighbour(toy):
    cfg = published_cfg()
    cfg.SOLVER.OPTIMIZER = "ADAM"
    with pytest.raises(ValueError, match=r"unknown SOLVER.OPTIMIZER 'ADAM'. Did you mean 'ADAMW'"):
        build_optimizer(cfg, toy())


def gradients_of(values):
    parameters = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for parameter, value in zip(parameters, values):
        parameter.grad = torch.tensor(value)
    return parameters


def test_full_model_clipping_scales_the_joint_norm_to_the_value():
    parameters = gradients_of([[3.0, 0.0], [0.0, 4.0]])
    norm = build_gradient_clipping(published_cfg())(parameters)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor([3.0, 0.0, 0.0, 4.0]) * 0.01 / 5)


def test_full_model_clipping_ignores_the_norm_type_as_published():
    cfg = published_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 1.0
    assert build_gradient_clipping(cfg)(gradients_of([[3.0], [4.0]])).item() == pytest.approx(5.0)


def test_norm_clipping_treats_each_parameter_alone():
    cfg = published_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "norm", 1.0
    parameters = gradients_of([[3.0, 4.0], [0.6, 0.0]])
    build_gradient_clipping(cfg)(parameters)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5)
    assert parameters[1].grad.tolist() == pytest.approx([0.6, 0.0])


def test_value_clipping_limits_each_number():
    cfg = published_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "value", 1.0
    parameters = gradients_of([[3.0, -4.0, 0.5]])
    build_gradient_clipping(cfg)(parameters)
    assert parameters[0].grad.tolist() == [1.0, -1.0, 0.5]


@pytest.mark.parametrize(("enabled", "value"), [(False, 0.01), (True, 0.0)])
def test_full_model_clipping_is_off_when_disabled_or_zero(enabled, value):
    cfg = published_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = enabled, value
    parameters = gradients_of([[3.0]])
    assert build_gradient_clipping(cfg)(parameters) is None and parameters[0].grad.item() == 3.0
