import pytest
import torch
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    StepWithFixedGammaParamScheduler,
)

from fcclip.config import get_cfg, load_config
from fcclip.engine import build_lr_scheduler, build_multiplier, scale_to_world_size

PUBLISHED = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml"


def cfg_with(**solver):
    cfg = get_cfg()
    for name, value in solver.items():
        cfg.SOLVER[name] = value
    return cfg


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 1e-4), (5, 1e-4), (327777, 1e-4), (327778, 1e-5), (355091, 1e-5), (355092, 1e-6), (368749, 1e-6)],
)
def test_the_published_recipe_has_the_published_rate(iteration, rate):
    cfg = load_config(PUBLISHED)
    assert cfg.SOLVER.BASE_LR * build_multiplier(cfg)(iteration) == pytest.approx(rate, rel=1e-12)


def test_the_scheduler_sets_the_rate_of_every_group_by_iteration():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 0.1}])
    scheduler = build_lr_scheduler(cfg_with(MAX_ITER=4, STEPS=(2,), WARMUP_ITERS=0), optimizer)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [[1.0, 0.1], [1.0, 0.1], pytest.approx([0.1, 0.01]), pytest.approx([0.1, 0.01])]


def test_linear_warm_up_rises_from_the_factor():
    rate = build_multiplier(cfg_with(MAX_ITER=100, STEPS=(50,), WARMUP_ITERS=10, WARMUP_FACTOR=0.2))
    assert [rate(iteration) for iteration in (0, 5, 10, 11, 50)] == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.1])


def test_constant_warm_up_stays_at_the_factor():
    rate = build_multiplier(
        cfg_with(MAX_ITER=100, STEPS=(), WARMUP_ITERS=10, WARMUP_FACTOR=0.2, WARMUP_METHOD="constant")
    )
    assert [rate(iteration) for iteration in (0, 9, 10)] == pytest.approx([0.2, 0.2, 1.0])


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
def test_schedules_agree_with_an_independent_implementation(name, rescale):
    max_iter, warm, factor = 200, 20, 0.25
    cfg = cfg_with(LR_SCHEDULER_NAME=name, MAX_ITER=max_iter, STEPS=(80, 150), WARMUP_ITERS=warm, WARMUP_FACTOR=factor)
    cfg.SOLVER.RESCALE_INTERVAL, cfg.SOLVER.BASE_LR, cfg.SOLVER.BASE_LR_END = rescale, 1.0, 0.05
    plain = {
        "WarmupMultiStepLR": MultiStepParamScheduler([1, 0.1, 0.01], num_updates=max_iter, milestones=[80, 150]),
        "WarmupCosineLR": CosineParamScheduler(1, 0.05),
        "WarmupStepWithFixedGammaLR": StepWithFixedGammaParamScheduler(1, 3, 0.1, max_iter),
    }[name]
    rate = build_multiplier(cfg)
    for iteration in range(max_iter):
        if iteration < warm:
            end = plain(0.0) if rescale else plain(warm / max_iter)
            expected = factor + (end - factor) * iteration / warm
        else:
            where = (iteration - warm) / (max_iter - warm) if rescale else iteration / max_iter
            expected = plain(where)
        assert rate(iteration) == pytest.approx(expected, abs=1e-9), iteration


def test_the_poly_schedule_falls_to_its_ending_and_is_scaled_by_the_warm_up():
    cfg = cfg_with(
        LR_SCHEDULER_NAME="WarmupPolyLR", MAX_ITER=100, WARMUP_ITERS=10, WARMUP_FACTOR=0.5, POLY_LR_POWER=2.0
    )
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.04
    rate = build_multiplier(cfg)
    assert [rate(iteration) for iteration in (0, 5, 50, 79, 81, 100)] == pytest.approx(
        [0.5, 0.75 * 0.95**2, 0.25, 0.21**2, 0.04, 0.04]
    )


def test_steps_beyond_the_end_are_ignored_with_a_warning(caplog):
    rate = build_multiplier(cfg_with(MAX_ITER=10, STEPS=(5, 20), WARMUP_ITERS=0))
    assert rate(9) == pytest.approx(0.1) and "(20,)" in caplog.text


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"LR_SCHEDULER_NAME": "WarmupMultistepLR"}, "Did you mean 'WarmupMultiStepLR'"),
        ({"WARMUP_METHOD": "liner"}, "Did you mean 'linear'"),
        ({"STEPS": (30, 20)}, "SOLVER.STEPS must ascend"),
        ({"MAX_ITER": 0}, "SOLVER.MAX_ITER must be at least 1"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 1.0}, "SOLVER.BASE_LR_END"),
    ],
)
def test_values_that_cannot_work_are_refused(solver, message):
    with pytest.raises(ValueError, match=message):
        build_multiplier(cfg_with(**solver))


def test_batch_rate_and_lengths_scale_to_the_number_of_processes():
    cfg = cfg_with(
        IMS_PER_BATCH=16, BASE_LR=1e-4, MAX_ITER=1000, STEPS=(600, 900), WARMUP_ITERS=10, REFERENCE_WORLD_SIZE=8
    )
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 100, 50
    solver = scale_to_world_size(cfg, 2).SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (4, 4000, (2400, 3600), 40)
    assert pytest.approx(2.5e-5) == solver.BASE_LR and solver.CHECKPOINT_PERIOD == 400
    assert scale_to_world_size(cfg, 2).TEST.EVAL_PERIOD == 200


def test_without_a_reference_nothing_is_scaled():
    cfg = cfg_with(REFERENCE_WORLD_SIZE=0)
    assert scale_to_world_size(cfg, 4) is cfg
