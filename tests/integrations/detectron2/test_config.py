"""The keys that detectron2 lacks, and the published files on top of them."""

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.config import get_cfg

from fcclip.config import configs_dir, load_config
from fcclip.config import get_cfg as own_defaults
from fcclip.integrations.detectron2 import add_fcclip_config, add_maskformer2_config

FILES = sorted(
    [*configs_dir().glob("shapes/*.yaml"), *configs_dir().glob("coco/panoptic-segmentation/fcclip/*.yaml")],
    key=lambda path: path.name,
)


def flat(cfg, prefix=""):
    values = {}
    for name, value in cfg.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def completed():
    cfg = get_cfg()
    add_fcclip_config(cfg)
    return cfg


def test_no_default_of_detectron2_changes():
    assert flat(completed()).items() >= flat(get_cfg()).items()


def test_every_key_of_fcclip_is_there_with_its_default():
    detectron2s, ours = flat(get_cfg()), flat(own_defaults())
    assert flat(completed()) == {**ours, **detectron2s}


def test_published_entry_points_may_be_called_together_and_again():
    cfg = get_cfg()
    cfg.SOLVER.POLY_LR_POWER = 0.5  # as another project's function would
    for add in (add_maskformer2_config, add_fcclip_config, add_fcclip_config):
        add(cfg)
    assert cfg.SOLVER.POLY_LR_POWER == 0.5
    cfg.SOLVER.POLY_LR_POWER = 0.9
    assert cfg == completed()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_means_the_same_in_detectron2(path):
    cfg = completed()
    before = flat(cfg)
    cfg.merge_from_file(str(path))
    ours, defaults = flat(load_config(path)), flat(own_defaults())
    values = flat(cfg)
    for key, value in ours.items():
        set_by_the_file = value != defaults[key]
        assert values[key] == value or (not set_by_the_file and values[key] == before[key]), key


def test_a_config_that_detectron2_dumps_is_read(tmp_path):
    cfg = completed()
    cfg.SOLVER.MAX_ITER = 77
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    ours = flat(load_config(path))
    assert ours["SOLVER.MAX_ITER"] == 77
    assert {key: ours[key] for key in ours if key in flat(get_cfg())}.items() <= flat(cfg).items()


def test_what_is_no_config_of_detectron2_is_refused():
    with pytest.raises(ValueError, match=r"made by detectron2.config.get_cfg\(\), got fvcore.common.config.CfgNode"):
        add_fcclip_config(own_defaults())
    cfg = get_cfg()
    cfg.MODEL.MASK_FORMER = "none"
    with pytest.raises(ValueError, match="'MODEL.MASK_FORMER' is a group of keys in fcclip, but the config has 'none'"):
        add_fcclip_config(cfg)
