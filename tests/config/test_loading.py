"""Files, overrides and what is said about wrong ones."""

import math
from pathlib import Path

import pytest
import torch

from fcclip.config import (
    cache_folder,
    configs_dir,
    find_config,
    get_cfg,
    keys_without_effect,
    load_config,
    lookup,
    resolve_device,
    resolve_file,
)
from fcclip.modeling import build_model, options_of
from fcclip.vocabulary import Vocabulary

FOLDER = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_"
FROZENSEG = sorted((configs_dir() / "coco/frozenseg").glob("[!B]*.yaml"))
RUNNABLE = sorted((configs_dir() / "coco/panoptic-segmentation/fcclip").glob("*.yaml"))
BEYOND = sorted(
    path
    for folder in ("ovrcoat", "maft_plus", "mask_adapter")
    for path in (configs_dir() / "coco/panoptic-segmentation" / folder).glob("*.yaml")
)
TEST_SETS = {
    "ade20k": "openvocab_ade20k_panoptic_val",
    "coco": "openvocab_coco_2017_val_panoptic_with_sem_seg",
    "cityscapes": "openvocab_cityscapes_fine_panoptic_val",
    "mapillary_vistas": "openvocab_mapillary_vistas_panoptic_val",
    "a847": "openvocab_ade20k_full_sem_seg_val",
    "pc59": "openvocab_pascal_ctx59_sem_seg_val",
    "pc459": "openvocab_pascal_ctx459_sem_seg_val",
    "pas20": "openvocab_pascal20_sem_seg_val",
    "pas21": "openvocab_pascal21_sem_seg_val",
}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_there_are_the_fourteen_published_files():
    assert len(RUNNABLE) == 14


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem.removeprefix("fcclip_convnext_large_eval_"))
def test_every_published_file_builds(path):
    cfg = load_config(path, ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.sem_seg_head.predictor.query_feat.weight.shape == (250, 256)
    assert model.backbone.embed_dim == cfg.MODEL.FC_CLIP.EMBED_DIM
    assert len(model.train_vocabulary) == 133


@pytest.mark.parametrize("path", BEYOND, ids=lambda path: path.stem)
def test_every_file_of_what_goes_beyond_builds_and_names_it(path):
    cfg = load_config(path, ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    own = {"ovrcoat": "void trust 0.5", "maft_plus": "MAFT+", "mask_adapter": "Mask-Adapter"}
    assert options_of(cfg) == (own[path.parent.name],)
    assert len(model.extra_losses) == bool(cfg.MODEL.MASK_ADAPTER.TRAIN)


def shapes_of(path):
    """Name -> shape of everything that a file of the config's weights holds, in the names of the model."""
    cfg = load_config(path, ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_model(cfg).state_dict().items()}


def test_published_files_of_what_goes_beyond_are_fcclips_with_one_part_more_at_most():
    """As the spec lists their keys; MAFT+ has 100 queries, all others 250."""
    plain = shapes_of(f"{FOLDER}ade20k.yaml")
    queries = {f"sem_seg_head.predictor.{name}.weight": (100, 256) for name in ("query_feat", "query_embed")}
    assert queries.keys() < plain.keys()
    expected = {"ovrcoat": (plain, "", 0, 0), "maft_plus": (plain | queries, "cdt.", 8, 2_954_496)}
    expected["mask_adapter"] = (plain, "classifier.", 43, 14_907_568)
    for path in BEYOND:
        if "_eval_" in path.stem:
            base, part, number, size = expected.pop(path.parent.name)
            shapes = shapes_of(path)
            own = {key: shapes.pop(key) for key in shapes.keys() - base.keys()}
            assert shapes == base
            assert all(key.startswith(part) for key in own)
            assert (len(own), sum(map(math.prod, own.values()))) == (number, size)
    assert not expected


@pytest.mark.parametrize("path", FROZENSEG, ids=lambda path: path.stem)
def test_every_published_file_of_frozenseg_builds(path):
    unloaded = ["MODEL.FROZEN_SEG.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.SAM_WEIGHTS", "", "MODEL.DEVICE", "meta"]
    cfg = load_config(path, unloaded)
    own = Vocabulary.from_names("cat") if "lvis" in path.stem else None  # its classes stand in the user's file
    with torch.device("meta"):
        model = build_model(cfg, test_vocabulary=own)
    assert type(model).__name__ == "FrozenSeg" and cfg.DATASETS.TEST and len(model.train_vocabulary) == 133
    former = cfg.MODEL.MASK_FORMER
    assert (former.SAM_QUERY_FUSE_LAYER, former.SAM_FEATURE_FUSE_LAYER, cfg.MODEL.SAM_NAME) == (2, 0, "vit_b")


def test_files_may_call_fcclips_keys_frozensegs(tmp_path):
    text = "MODEL:\n  FROZEN_SEG:\n    EMBED_DIM: 640\n    GEOMETRIC_ENSEMBLE_BETA: 0.6\n"
    cfg = load_config(write(tmp_path, "own.yaml", text))
    assert (cfg.MODEL.FC_CLIP.EMBED_DIM, cfg.MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_BETA) == (640, 0.6)
    with pytest.raises(ValueError, match=r"unknown key 'MODEL.FC_CLIP.EMBED_DIMS'"):
        load_config(write(tmp_path, "own.yaml", text), ["MODEL.FROZEN_SEG.EMBED_DIMS", 3])


def test_a_file_of_ovrcoat_asks_for_its_form_of_void_trust(tmp_path):
    text = "MODEL:\n  OVRCOAT:\n    CLIP_TRUST_WEIGHT: 0.5\n    EMBED_DIM: 640\n    DIST_WEIGHT: 0.0\n"
    path = write(tmp_path, "own.yaml", text)
    fc_clip = load_config(path).MODEL.FC_CLIP
    assert (fc_clip.CLIP_TRUST_WEIGHT, fc_clip.CLIP_TRUST_SCOPE, fc_clip.EMBED_DIM) == (0.5, "all", 640)
    assert fc_clip.CLIP_TRUST_HEADS == ("panoptic", "semantic", "instances")
    assert keys_without_effect(path) == {"MODEL.OVRCOAT.DIST_WEIGHT": "of another model"}


@pytest.mark.parametrize("suffix", TEST_SETS)
def test_evaluation_files_set_what_the_published_ones_set(suffix):
    cfg = load_config(f"{FOLDER}{suffix}.yaml")
    assert (TEST_SETS[suffix],) == cfg.DATASETS.TEST
    assert cfg.DATASETS.TRAIN == ("openvocab_coco_2017_train_panoptic_with_sem_seg",)
    driving = suffix in ("cityscapes", "mapillary_vistas")
    assert ((1024, 2560) if driving else (800, 1333)) == (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    test = cfg.MODEL.MASK_FORMER.TEST
    panoptic = suffix in ("ade20k", "coco", "cityscapes", "mapillary_vistas")
    assert (True, panoptic) == (test.SEMANTIC_ON, test.PANOPTIC_ON)
    assert (panoptic and suffix != "mapillary_vistas") == test.INSTANCE_ON
    assert (test.OBJECT_MASK_THRESHOLD, test.OVERLAP_THRESHOLD) == (0.0, 0.8)


@pytest.mark.parametrize(
    ("suffix", "name", "width"),
    [
        ("r50", "RN50", 1024),
        ("r101", "RN101", 512),
        ("r50x4", "RN50x4", 640),
        ("r50x16", "RN50x16", 768),
        ("r50x64", "RN50x64", 1024),
    ],
)
def test_backbone_files_set_what_the_published_ones_set(suffix, name, width):
    fc_clip = load_config(f"{FOLDER}ade20k_{suffix}.yaml").MODEL.FC_CLIP
    assert (name, "openai", width) == (fc_clip.CLIP_MODEL_NAME, fc_clip.CLIP_PRETRAINED_WEIGHTS, fc_clip.EMBED_DIM)
    assert fc_clip.ENSEMBLE_ON_VALID_MASK


def test_the_training_recipe_is_the_published_one():
    cfg = load_config(f"{FOLDER}ade20k.yaml")
    solver, former = cfg.SOLVER, cfg.MODEL.MASK_FORMER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY, solver.MAX_ITER) == (16, 1e-4, 0.05, 368750)
    assert solver.STEPS == (327778, 355092)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == ("full_model", 0.01)
    assert (former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT, former.NO_OBJECT_WEIGHT) == (
        2.0,
        5.0,
        5.0,
        0.1,
    )
    assert (former.NUM_OBJECT_QUERIES, former.DEC_LAYERS, former.TRAIN_NUM_POINTS) == (250, 10, 12544)
    assert cfg.MODEL.PIXEL_MEAN == [122.7709383, 116.7460125, 104.09373615]
    assert cfg.INPUT.DATASET_MAPPER_NAME == "coco_panoptic_lsj"


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("MODEL.FC_CLIP.CLIP_MODEL_NAME", "convnext_large_d_320"),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100),
        ("MODEL.MASK_FORMER.MASK_WEIGHT", 20.0),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 6),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 54),
        ("SOLVER.WARMUP_FACTOR", 0.001),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", False),
        ("INPUT.FORMAT", "BGR"),
        ("TEST.AUG.MAX_SIZE", 4000),
        ("SOLVER.CE_NORM", "rank"),
        ("TEST.MODE", "ensemble"),
    ],
)
def test_defaults_are_the_published_ones(key, default):
    node = get_cfg()
    for part in key.split("."):
        node = node[part]
    assert node == default


def test_a_released_yaml_merges_with_values_over_its_base(tmp_path):
    write(tmp_path, "base.yaml", "SOLVER:\n  MAX_ITER: 7\n  STEPS: (3, 5)\nMODEL:\n  SWIN:\n    EMBED_DIM: 128\n")
    top = write(tmp_path, "top.yaml", '_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 9\nDATASETS:\n  TEST: ("a", "b")\n')
    cfg = load_config(top, ["SOLVER.BASE_LR", "1", "DATASETS.TRAIN", "('c',)"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR) == (9, (3, 5), 1.0)
    assert (cfg.DATASETS.TEST, cfg.DATASETS.TRAIN) == (("a", "b"), ("c",))
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    with pytest.raises(AttributeError):
        cfg.SEED = 3


def test_keys_without_effect_are_told_with_the_reason(tmp_path):
    path = write(tmp_path, "a.yaml", "MODEL:\n  SWIN:\n    DEPTHS: [1, 1, 1, 1]\nSEED: 3\n")
    assert keys_without_effect(path) == {"MODEL.SWIN.DEPTHS": "there is no Swin backbone"}


def test_keys_of_detectron2s_other_models_are_accepted_and_told(tmp_path):
    others = "MODEL:\n  RPN:\n    CONV_DIMS: [-1]\n  RESNETS:\n    DEFORM_MODULATED: false\nVIS_PERIOD: 0\nSEED: 5\n"
    path = write(tmp_path, "dumped.yaml", others)
    assert load_config(path).SEED == 5
    assert {*keys_without_effect(path)} == {"MODEL.RPN.CONV_DIMS", "MODEL.RESNETS.DEFORM_MODULATED", "VIS_PERIOD"}
    with pytest.raises(ValueError, match=r"MODEL\.RPNS"):
        load_config(write(tmp_path, "misspelt.yaml", "MODEL:\n  RPNS:\n    CONV_DIMS: [-1]\n"))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "MODEL:\n  MASK_FORMER:\n    NUM_OBJECT_QUERY: 3\n",
            [],
            "unknown key 'MODEL.MASK_FORMER.NUM_OBJECT_QUERY'.*NUM_OBJECT_QUERIES",
        ),
        ("", ["MAX_ITER", "3"], "command line: unknown key 'MAX_ITER'.*'SOLVER.MAX_ITER'"),
        ("SOLVER:\n  MAX_ITER: soon\n", [], "'SOLVER.MAX_ITER' takes a int .*got str 'soon'"),
        ("SOLVER:\n  STEPS: 5\n", [], "'SOLVER.STEPS' takes a list .*got int 5"),
        ("TEST:\n  AUG:\n    FLIP: 1\n", [], "'TEST.AUG.FLIP' takes a bool .*got int 1"),
        ("SOLVER: 3\n", [], "'SOLVER' is a group of keys"),
        ("", ["SEED"], "pairs KEY VALUE"),
        ("- 1\n", [], "expected a mapping"),
        ("SEED: !!python/object/apply:os.getpid []\n", [], "not a plain YAML file"),
        ("_BASE_: a.yaml\n", [], "leads back to itself"),
    ],
)
def test_a_wrong_file_or_override_is_refused_by_name(tmp_path, text, overrides, message):
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    with pytest.raises(FileNotFoundError, match="fcclip_shapes"):
        load_config("configs/shapes/fclip_shapes.yaml")
    path = write(tmp_path, "a.yaml", "_BASE_: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match="its _BASE_ 'gone.yaml' does not exist"):
        load_config(path)


def test_shipped_configs_are_found_with_and_without_their_folder():
    assert find_config("configs/shapes/fcclip_shapes.yaml").samefile(find_config("shapes/fcclip_shapes.yaml"))


def test_files_are_taken_as_given_or_from_the_assets(tmp_path):
    own = write(tmp_path, "own.json", "{}")
    assert resolve_file(own) == own
    assert resolve_file("shapes_convnext.json").parent.name == "assets"
    with pytest.raises(FileNotFoundError, match="weights 'gone.pth' not found"):
        resolve_file("gone.pth", what="weights")


def test_the_cache_is_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fcclip" and cache_folder("ops") == tmp_path / "fcclip" / "ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("ops") == tmp_path / ".cache" / "fcclip" / "ops"


def test_lookup_names_what_exists():
    with pytest.raises(
        ValueError, match=r"unknown data set 'shapes_vall'\. Did you mean 'shapes_val'\? Known: shapes_val, voc\."
    ):
        lookup("data set", "shapes_vall", {"shapes_val": 1, "voc": 2})


def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="MODEL.DEVICE is 'cuda'"):
            resolve_device("cuda")
