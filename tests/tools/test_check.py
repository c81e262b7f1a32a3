"""tools/check.py on the shapes world: what fits has no issue, and each thing that does not is named with its remedy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fcclip.checks import frozen, machine
from fcclip.checks.frozen import check_frozen
from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.checks.run import check_run
from fcclip.checks.weights import check_model
from fcclip.config import assets_dir, load_config
from fcclip.engine import save_checkpoint
from fcclip.modeling.backbones.clip import build_clip
from fcclip.modeling.backbones.sam import build_sam
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_parts, read_weight_file, vocabulary_note
from tests.conftest import tiny_frozenseg
from tests.data.published_trees import write_tree
from tests.tools.conftest import REPOSITORY, load_program

SHAPES = "shapes/fcclip_shapes.yaml"
ADE20K = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k{}.yaml"
WEIGHTS = "shapes_fcclip.safetensors"
PRETRAINED = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"
CITYSCAPES = "openvocab_cityscapes_fine_panoptic_val"


tool = load_program(REPOSITORY / "tools" / "check.py")


def checked(*words, config=SHAPES):
    args = tool.parse_arguments(["--config-file", str(config), *map(str, words)])
    options = {"weights": args.weights, "training": not args.eval_only, "world_size": args.num_gpus}
    return check_run(args.config_file, args.opts, **options)


def evaluated(*overrides, weights=WEIGHTS):
    """Issues of an evaluation of the shipped weights."""
    return checked("--eval-only", "--weights", weights, *overrides)


def of_level(issues, level, section=None):
    return [issue for issue in issues if issue.level == level and section in (None, issue.section)]


def the_error(issues):
    """The only error there is."""
    errors = of_level(issues, ERROR)
    assert len(errors) == 1, [issue.text for issue in errors]
    return errors[0]


def said(issues):
    return " ".join(f"{issue.text} {issue.remedy}" for issue in issues)


# ---- everything fits ----


@pytest.mark.parametrize("words", [[], ["--eval-only"]])
def test_the_shipped_weights_fit_the_shipped_config_and_nothing_is_written(root, tmp_path, words):
    before = sorted(tmp_path.rglob("*"))
    issues = checked(*words, "--weights", WEIGHTS)
    assert sorted(tmp_path.rglob("*")) == before
    assert {issue.level for issue in issues} == {OK, NOTE}
    for text in (
        "keys and shapes are those of the model",
        "it is the CLIP that MODEL.WEIGHTS were trained on",
        "40 classes seen in training, 20 unseen",
        "evaluated for panoptic, instance, semantic",
    ):
        assert text in said(issues)


def test_the_model_has_shapes_alone():
    assert all(weight.is_meta for weight in check_model(Issues(), load_config(SHAPES)).parameters())


@pytest.mark.parametrize("backbone", ["", "_r50", "_r50x64"])
def test_a_published_config_fits_although_nothing_is_on_this_machine(tmp_path, monkeypatch, backbone):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    issues = checked("--eval-only", "OUTPUT_DIR", tmp_path, config=ADE20K.format(backbone))
    assert [issue.section for issue in of_level(issues, ERROR)] == ["weights", "test data"]
    assert "would download" in of_level(issues, WARNING, "CLIP")[0].text
    assert "FREEZE_AT" in of_level(issues, NOTE, "config")[0].text


# ---- command line and config ----


def test_a_wrong_key_is_named_with_its_file_and_neighbour(root, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"_BASE_: {REPOSITORY / 'configs' / SHAPES}\nSOLVER:\n  MAX_ITERS: 7\n")
    error = the_error(checked(config=config))
    assert all(text in error.text for text in ("MAX_ITERS", "SOLVER.MAX_ITER'", "mine.yaml"))


@pytest.mark.parametrize("content", ["SOLVER: [", "_BASE_: no.yaml", "- a", None])
def test_a_config_that_cannot_be_read_is_the_only_issue(tmp_path, content):
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_text(content)
    issues = checked(config=path)
    assert "broken.yaml" in the_error(issues).text and len(issues) == 1


def test_options_behind_the_keys_are_refused(capsys):
    with pytest.raises(SystemExit):
        tool.parse_arguments(["--config-file", SHAPES, "SEED", "1", "--eval-only"])
    assert "--eval-only" in capsys.readouterr().err


# ---- one thing is wrong ----

FINETUNE = ("FINETUNE.METHOD", "plain", "DATASETS.TRAIN", "('shapes_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 60)
REPLAY = (*FINETUNE, "FINETUNE.METHOD", "replay", "FINETUNE.REPLAY_DATASETS", "('shapes_tune',)")
TRAINING = ("--weights", WEIGHTS)
EVALUATION = ("--eval-only", *TRAINING)
# command line: texts of the only error
WRONG = {
    "a key without a value": (("SOLVER.MAX_ITER",), ["pairs"]),
    "a GPU that is not there": (("MODEL.DEVICE", "cuda:99"), ["MODEL.DEVICE is 'cuda:99'"]),
    "an engine that is not built": (("MODEL.MSDA_ENGINE", "cpp"), ["cannot run on cpu"]),
    "an unknown part": (("MODEL.SEM_SEG_HEAD.NAME", "FCCLIPHeads"), ["Did you mean 'FCCLIPHead'"]),
    "weights with another number of queries": (
        (*TRAINING, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "50"),
        ["query_feat.weight (file 30x64, model 50x64)", "set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 30"],
    ),
    "nothing to evaluate": (("--eval-only",), ["MODEL.WEIGHTS is empty"]),
    "a CLIP in the place of a segmenter": (
        ("--eval-only", "--weights", "shapes_clip.safetensors"), ["a CLIP, not a segmenter"],
    ),
    "a tag that does not exist": ((PRETRAINED, "laion"), ["'laion'", "tag"]),
    "weights of a head on a random CLIP": ((*TRAINING, PRETRAINED, ""), ["a CLIP of random weights", PRETRAINED]),
    "NUM_CLASSES": ((*TRAINING, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "39"), ["NUM_CLASSES is 39"]),
    "an unknown data set": (("DATASETS.TEST", "('shapes_vall', 'shapes_val')"), ["Did you mean 'shapes_val'"]),
    "training sets of different classes": (
        ("DATASETS.TRAIN", "('shapes_train', 'shapes_tune')"), ["have different classes"],
    ),
    "a fine-tuning from nothing": (FINETUNE, ["MODEL.WEIGHTS is empty"]),
    "nothing evaluated": ((*EVALUATION, "DATASETS.TEST", "()"), ["DATASETS.TEST is empty"]),
    "no batch": ((*EVALUATION, "TEST.BATCH_SIZE", "0"), ["TEST.BATCH_SIZE"]),
    "an expected result of three": (
        (*EVALUATION, "TEST.EXPECTED_RESULTS", "[['panoptic_seg', 'PQ', 70.0]]"), ["TEST.EXPECTED_RESULTS"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_the_only_error(root, case):
    words, texts = WRONG[case]
    error = the_error(checked(*words))
    assert all(text in f"{error.text} {error.remedy}" for text in texts), error


def test_an_evaluation_needs_nothing_of_training(root):
    words = ("FINETUNE.METHOD", "repaly", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "39", "SOLVER.OPTIMIZER", "ADAMWW")
    assert not evaluated(*words).count(ERROR)


def test_every_setting_of_a_training_that_cannot_work_is_named(root):
    keys = ["SOLVER.STEPS", "(5, 4)", "SOLVER.OPTIMIZER", "ADAMWW", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"]
    keys += ["INPUT.DATASET_MAPPER_NAME", "lsj", "DATALOADER.SAMPLER_TRAIN", "x", "SOLVER.AMP.DTYPE", "half"]
    errors = said(of_level(checked("--num-gpus", "3", *keys), ERROR, "training"))
    for text in ("STEPS", "ADAMWW", "CLIP_TYPE", "'lsj'", "SAMPLER_TRAIN", "'half'", "3 process(es)"):
        assert text in errors


# ---- machine ----


def test_an_engine_that_the_environment_names_is_used(root, monkeypatch):
    assert "engine 'torch' (the fastest" in said(of_level(checked(), OK, "machine"))
    monkeypatch.setenv("FCCLIP_MSDA", "torch")
    assert "engine 'torch'" in said(of_level(checked("MODEL.MSDA_ENGINE", "cpp"), OK, "machine"))


def test_an_output_folder_that_is_a_file_is_named_and_the_rest_is_looked_at(root, tmp_path):
    (tmp_path / "taken").write_text("")
    issues = checked("OUTPUT_DIR", tmp_path / "taken" / "run")
    assert "is a file" in the_error(issues).text and "OUTPUT_DIR /some/folder" in the_error(issues).remedy
    assert of_level(issues, OK, "model") and of_level(issues, OK, "test data")


@pytest.mark.parametrize(("free", "level"), [(1, ERROR), (10, WARNING)])
def test_a_disk_too_small_for_the_checkpoints_is_named(root, monkeypatch, free, level):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free * 2**20))
    assert f"{free}.0 MiB are free" in of_level(checked(), level, "training")[0].text
    assert not evaluated().count(WARNING)


# ---- weights and vocabulary ----


def checkpoint(path, tensors=None, **notes):
    save_checkpoint(path, {"model": tensors or load_file(assets_dir() / WEIGHTS), **notes})
    return path


def test_damaged_weights_are_named(root, tmp_path):
    content = (assets_dir() / WEIGHTS).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut off" in the_error(checked("--weights", tmp_path / "cut.safetensors")).text
    tensors = load_file(assets_dir() / WEIGHTS)
    tensors["void_embedding.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    assert "void_embedding.weight" in the_error(checked("--weights", tmp_path / "nan.safetensors")).text


def test_settings_of_the_training_that_change_the_meaning_of_weights_are_compared(root, tmp_path):
    config = (
        "MODEL: {PIXEL_MEAN: [0, 0, 0], MASK_FORMER: {PRE_NORM: true, NUM_OBJECT_QUERIES: 30}}\nINPUT: {FORMAT: BGR}"
    )
    path = checkpoint(tmp_path / "other.pth", config=config)
    assert {issue.remedy for issue in of_level(evaluated(weights=path), ERROR)} == {
        "MODEL.MASK_FORMER.PRE_NORM True",
        "MODEL.PIXEL_MEAN [0, 0, 0]",
        "INPUT.FORMAT 'BGR'",
    }
    issues = checked("--weights", path)  # a training may start from them on purpose
    assert not issues.count(ERROR) and issues.count(WARNING) == 3


def test_the_vocabulary_of_the_training_is_compared(root, tmp_path):
    note = vocabulary_note(Vocabulary.builtin("shapes_seen"))
    same = checkpoint(tmp_path / "same.pth", vocabulary=note)
    assert "the 40 classes that the weights were trained on" in said(checked("--weights", same))
    other = {**note, "sha256": "0", "classes": [*note["classes"][1:], ["zebra"]]}
    for name, texts in ((other, ["1 are gone, 1 are new", "zebra"]), ("coco_panoptic", ["'coco_panoptic'"])):
        path = checkpoint(tmp_path / "other.pth", vocabulary=name)
        (warning,) = of_level(evaluated(weights=path), WARNING)
        assert all(text in warning.text for text in texts) and "DATASETS.TRAIN" in warning.remedy


def test_former_classes_of_fine_tuned_weights_count_as_seen(root, tmp_path):
    seen, own = Vocabulary.builtin("shapes_seen"), Vocabulary.from_names("red moon; green moon", name="own")

    def with_former(former):
        notes = {"vocabulary": vocabulary_note(own), "former_vocabulary": vocabulary_note(former)}
        return evaluated(weights=checkpoint(tmp_path / "tuned.pth", **notes))

    issues = with_former(seen)
    assert not issues.count(ERROR) and not issues.count(WARNING)
    assert "the 42 classes that the weights" in said(issues) and "40 classes seen in training, 20 unseen" in said(
        issues
    )
    assert "60 classes seen in training, 0 unseen" in said(with_former(Vocabulary.builtin("shapes")))
    (warning,) = of_level(with_former(own), WARNING)
    assert "'shapes_seen' (40 classes)" in warning.text and "40 are new" in warning.text


def test_weights_of_mask2former_are_a_start_for_training_and_nothing_to_evaluate(root, tmp_path):
    tensors = load_file(assets_dir() / WEIGHTS)
    tensors = {key: value for key, value in tensors.items() if ".class_embed." not in key}
    tensors["sem_seg_head.predictor.class_embed.weight"] = torch.zeros(134, 64)
    torch.save({"model": tensors}, tmp_path / "mask2former.pth")
    issues = checked("--weights", tmp_path / "mask2former.pth")
    assert not issues.count(ERROR)
    assert "a start from Mask2Former" in said(of_level(issues, OK, "weights"))
    assert "closed-vocabulary" in the_error(evaluated(weights=tmp_path / "mask2former.pth")).text


def test_a_published_file_without_a_class_is_an_error(root, tmp_path):
    lines = [f"{number}:class {number}" for number in range(18)]
    (tmp_path / "cityscapes_with_prompt_eng.txt").write_text("\n".join(lines))
    words = ("MODEL.FC_CLIP.VOCABULARIES", tmp_path, "DATASETS.TEST", f"('{CITYSCAPES}',)")
    assert "18 classes" in of_level(checked(*words), ERROR, "vocabulary")[0].text


# ---- CLIP ----


def clip_file(path, **changes):
    """The CLIP of the shapes with some tensors changed, None: left out."""
    tensors = {**load_file(assets_dir() / "shapes_clip.safetensors"), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return path


def test_another_clip_than_that_of_the_training_is_named(root, tmp_path):
    projection = load_file(assets_dir() / "shapes_clip.safetensors")["text_projection"]
    path = clip_file(tmp_path / "other.safetensors", text_projection=projection + 1)
    error = the_error(checked("--weights", WEIGHTS, PRETRAINED, path))
    assert error.section == "CLIP" and "CLIP_PRETRAINED_WEIGHTS" in error.text


def test_clip_weights_of_another_architecture_are_named(root, tmp_path):
    changes = {"ln_final.weight": None, "positional_embedding": torch.zeros(77, 32)}
    error = the_error(checked(PRETRAINED, clip_file(tmp_path / "other.safetensors", **changes)))
    assert "positional_embedding" in error.text and "ln_final.weight" in error.text


def test_a_clip_of_random_weights_is_a_warning(root):
    (warning,) = of_level(checked(PRETRAINED, ""), WARNING)
    assert "random weights" in warning.text


def test_a_clip_inside_the_weights_needs_no_other(root, tmp_path):
    clip = load_file(assets_dir() / "shapes_clip.safetensors")
    inside = {f"backbone.clip_model.{key}": value for key, value in clip.items()}
    tensors = load_file(assets_dir() / WEIGHTS)

    def with_clip(**changes):
        held = {**tensors, **inside, **{f"backbone.clip_model.{key}": value for key, value in changes.items()}}
        return checked("--weights", checkpoint(tmp_path / "full.pth", held), PRETRAINED, "")

    issues = with_clip()
    assert not issues.count(ERROR) and not issues.count(WARNING)
    assert "positional_embedding" in the_error(with_clip(positional_embedding=torch.zeros(77, 32))).text
    inside.pop("backbone.clip_model.text_projection")
    assert "1 tensors would be random" in the_error(with_clip()).text


def test_a_resnet_file_that_does_not_say_its_activation_is_named(root, tmp_path):
    architecture = str(REPOSITORY / "tests" / "data" / "tiny_resnet.json")
    clip = build_clip(architecture)
    torch.save(clip.clip_model.state_dict(), tmp_path / "resnet.pth")
    words = ("MODEL.FC_CLIP.CLIP_MODEL_NAME", architecture, "MODEL.FC_CLIP.EMBED_DIM", clip.embed_dim)
    words = (*words, PRETRAINED, tmp_path / "resnet.pth")
    assert "MODEL.FC_CLIP.QUICK_GELU" in the_error(checked(*words)).text
    assert not checked(*words, "MODEL.FC_CLIP.QUICK_GELU", "on").count(ERROR)


def test_a_tag_is_looked_for_where_downloads_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hub, known = frozen.huggingface_hub, {}
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *place: known.get(place))
    tag = {"hf_hub": "somebody/clip/", "url": "https://example.org/RN50.pt"}
    assert frozen.cached_clip(tag) is None
    downloaded = tmp_path / ".cache" / "clip" / "RN50.pt"
    downloaded.parent.mkdir(parents=True)
    downloaded.touch()
    assert frozen.cached_clip(tag) == downloaded
    known["somebody/clip", "open_clip_model.safetensors"] = "/cache/a.safetensors"
    assert frozen.cached_clip(tag) == Path("/cache/a.safetensors")
    assert frozen.cached_clip({"hf_hub": "somebody/clip/own.bin"}) is None
    assert frozen.cached_clip({}) is None


# ---- fine-tuning ----


def test_a_fine_tuning_on_other_classes_is_no_mistake(root):
    issues = checked("--weights", WEIGHTS, *FINETUNE)
    assert not issues.count(ERROR) and not issues.count(WARNING)
    assert "40 classes ('shapes_seen'), which stay seen; 20 of the 60 classes" in said(issues)
    assert "FINETUNE.METHOD plain can start" in said(of_level(issues, OK, "fine-tuning"))
    (warning,) = of_level(checked("--weights", WEIGHTS, *FINETUNE[2:]), WARNING)
    assert "'shapes_seen'" in warning.text and "set FINETUNE.METHOD" in warning.remedy


def test_former_images_are_looked_at_like_new_ones(root):
    issues = checked("--weights", WEIGHTS, *REPLAY)
    assert not issues.count(ERROR)
    assert "shapes_tune: 2 images" in of_level(issues, OK, "former training data")[0].text
    shutil.rmtree(root / "shapes" / "tune")
    error = the_error(checked("--weights", WEIGHTS, *REPLAY))
    assert error.section == "former training data" and "only 2 of 3" in error.text


# ---- data ----


def test_a_missing_data_set_is_one_issue_with_all_its_places(root):
    shutil.rmtree(root / "shapes")
    errors = of_level(checked(), ERROR)
    assert len(errors) == 4  # one for each data set
    assert "shapes_train: none of 3" in errors[0].text and "shapes/panoptic_train" in errors[0].text
    assert "shapes/panoptic_semseg_val" in errors[1].text and "datasets/README.md" in errors[1].remedy


def test_what_training_alone_needs_is_a_warning_of_an_evaluation(root):
    shutil.rmtree(root / "shapes" / "panoptic_train")
    assert "only 2 of 3" in the_error(checked("--weights", WEIGHTS)).text
    issues = evaluated()
    assert not issues.count(ERROR) and "only 2 of 3" in of_level(issues, WARNING, "training data")[0].text


def resized(path):
    Image.open(path).resize((128, 256), Image.Resampling.NEAREST).save(path)


def with_pixel(value):
    def damage(path):
        pixels = np.array(Image.open(path))
        pixels[0, 0] = value
        Image.fromarray(pixels).save(path)

    return damage


def with_category(path):
    content = json.loads(path.read_text())
    content["annotations"][-1]["segments_info"][0]["category_id"] = 999
    path.write_text(json.dumps(content))


# file: what is done to it, texts of the only error
DAMAGES = {
    "annotations/panoptic_val_seen.json": (
        lambda path: path.write_text(path.read_text()[:500]), ["panoptic_val_seen.json", "JSON"],
    ),
    "annotations/panoptic_train.json": (with_category, ["category_id 999"]),
    "val/000000000001.jpg": (resized, ["shapes_val: ", "256 x 128"]),
    "panoptic_val/000000000001.png": (resized, ["256 x 128 (height x width), its image is 256 x 256"]),
    "panoptic_semseg_val/000000000002.png": (Path.unlink, ["1 of 2 files", "000000000002.png"]),
    "panoptic_semseg_val/000000000001.png": (with_pixel(200), ["200 (1 pixel)"]),
    "panoptic_val_unseen/000000000001.png": (with_pixel((1, 2, 3)), [str(1 + 2 * 256 + 3 * 65536)]),
    "panoptic_train/000000000001.png": (with_pixel((1, 2, 3)), [str(1 + 2 * 256 + 3 * 65536)]),
    "train/000000000003.jpg": (Path.unlink, ["1 of 3 files", "000000000003.jpg"]),
    "train/000000000001.jpg": (lambda path: path.write_bytes(b""), ["the file is empty"]),
}  # fmt: skip


@pytest.mark.parametrize("file", DAMAGES)
def test_damaged_files_of_a_data_set_are_named(root, file):
    damage, texts = DAMAGES[file]
    damage(root / "shapes" / file)
    error = the_error(checked())
    assert all(text in error.text for text in texts), error


def test_missing_ground_truth_of_instances_matters_only_while_they_are_evaluated(root):
    for name in ("val", "val_seen", "val_unseen"):
        (root / "shapes" / "annotations" / f"instances_{name}.json").unlink()
    assert len(of_level(checked(), ERROR, "test data")) == 3
    assert not checked("MODEL.MASK_FORMER.TEST.INSTANCE_ON", "False").count(ERROR)


def test_the_files_that_cityscapes_is_evaluated_with_are_looked_for(root):
    write_tree(CITYSCAPES, root)
    words = ("DATASETS.TEST", f"('{CITYSCAPES}',)")
    folder = root / "cityscapes" / "gtFine" / "val"
    for path in folder.glob("*/*_gtFine_labelTrainIds.png"):  # nothing reads them
        path.unlink()
    issues = evaluated(*words)
    assert not issues.count(ERROR)
    assert "evaluated for panoptic, instance, semantic" in of_level(issues, OK, "test data")[0].text
    (folder / "lindau" / "lindau_000000_000019_gtFine_instanceIds.png").unlink()
    error = the_error(evaluated(*words))
    assert "1 of 4 files" in error.text and "lindau_000000_000019_gtFine_instanceIds.png" in error.text
    off = ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False)
    assert not evaluated(*words, *off).count(ERROR)


def test_semantic_sets_are_looked_at_too_and_what_fcclip_warns_of_is_an_issue(root, caplog):
    for name in ("images", "annotations_ctx59"):
        (root / "pascal_ctx_d2" / name / "validation").mkdir(parents=True)
    images, labels = (root / "pascal_ctx_d2" / name / "validation" for name in ("images", "annotations_ctx59"))
    Image.new("RGB", (8, 6)).save(images / "a.jpg")
    words = ("DATASETS.TEST", "('openvocab_pascal_ctx59_sem_seg_val',)")
    assert "has no records" in the_error(evaluated(*words)).text
    Image.new("L", (8, 6), 58).save(labels / "a.png")
    issues = evaluated(*words)
    assert not issues.count(ERROR) and not issues.count(WARNING)
    assert "1 images; the first, 6 x 8 as its ground truth" in of_level(issues, OK, "test data")[0].text
    Image.new("RGB", (8, 6)).save(images / "b.jpg")
    caplog.clear()
    assert "1 of 2 images" in said(of_level(evaluated(*words), WARNING)) and not caplog.records
    errors = of_level(evaluated(*words, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False"), ERROR, "test data")
    assert "MODEL.MASK_FORMER.TEST.SEMANTIC_ON" in said(errors)


def test_the_program_for_every_file_is_named_with_the_data_sets(root):
    (note,) = of_level(checked("DATASETS.TEST", "('shapes_val',)"), NOTE, "data in full")
    assert note.remedy.endswith("tools/check_dataset.py shapes_train shapes_val")


# ---- the program ----


def test_an_error_that_nobody_foresaw_is_an_issue_without_traceback(root, monkeypatch):
    monkeypatch.setattr("fcclip.checks.run.check_machine", lambda issues, cfg: {}["missing"])
    error = the_error(checked())
    assert error.text == "KeyError: 'missing'" and "report" in error.remedy


def test_the_command_says_in_its_exit_code_whether_something_is_wrong(root, tmp_path, capsys):
    words = ["--config-file", SHAPES, "--eval-only", "--weights", WEIGHTS]
    assert tool.main([*words, "--json", str(tmp_path / "issues.json")]) == 0
    good = capsys.readouterr()
    assert good.err == "" and good.out.isascii() and "\x1b" not in good.out
    assert good.out.splitlines()[0] == "config" and "everything fits together" in good.out.splitlines()[-1]
    content = json.loads((tmp_path / "issues.json").read_text())
    assert content["errors"] == content["warnings"] == 0 and content["issues"][0]["level"] == "ok"
    assert tool.main([*words, "MODEL.DEVICE", "gpu", "DATASETS.TEST", "('shapes_vall',)"]) == 1
    bad = capsys.readouterr()
    assert "Traceback" not in bad.out + bad.err
    assert bad.out.count("  ERROR ") == 2 and bad.out.splitlines()[-1].startswith("2 errors (checked in")
    with pytest.raises(OSError, match="issues.json"):  # which run_program says
        tool.main([*words, "--json", str(tmp_path / "no" / "issues.json")])


# ---- SAM ----


@pytest.fixture
def seen_by_sam(tmp_path):
    """Function (SAM weights, tensors, notes) -> what is said of the SAM of a tiny FrozenSeg with such MODEL.WEIGHTS."""
    cfg = tiny_frozenseg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    model = check_model(Issues(), cfg)

    def check(source="", tensors=None, **notes):
        cfg.MODEL.SAM_WEIGHTS = str(source)
        torch.save({"model": tensors or {"weight": torch.ones(1)}, **notes}, tmp_path / "w.pth")
        issues = Issues()
        with issues.section("SAM"):
            check_frozen(issues, cfg, "sam.", frozen_parts(model)["sam."], read_weight_file(tmp_path / "w.pth"))
        return [(issue.level, issue.text) for issue in issues]

    check.sam = build_sam(cfg.MODEL.SAM_NAME)
    return check


def test_the_sam_of_a_run_is_known_by_its_file_by_the_weights_and_by_the_training(seen_by_sam, tmp_path):
    sam = seen_by_sam.sam
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    inside = {f"sam.{key}": value for key, value in sam.state_dict().items()}
    assert [level for level, _ in seen_by_sam(tmp_path / "sam.pth")] == [OK]
    (_, same) = seen_by_sam(tmp_path / "sam.pth", sam=sam.fingerprint())
    assert same == (OK, "it is the SAM that MODEL.WEIGHTS were trained on")
    assert [level for level, _ in seen_by_sam(tensors=inside)] == [OK]

    [(level, text)] = seen_by_sam()
    assert level == WARNING and "random weights" in text
    [(level, text)] = seen_by_sam(sam=sam.fingerprint())
    assert level == ERROR and "would be put on a SAM of random weights" in text
    [(level, text)] = seen_by_sam(tensors=dict(list(inside.items())[2:]))
    assert level == ERROR and "2 tensors would be random" in text
    (error, _) = seen_by_sam(tensors={**inside, "sam.image_encoder.pos_embed": torch.zeros(1, 2, 2, 8)})
    assert error[0] == ERROR and "image_encoder.pos_embed" in error[1]
    torch.nn.init.normal_(sam.image_encoder.pos_embed)
    (_, (level, text)) = seen_by_sam(tmp_path / "sam.pth", sam=sam.fingerprint())
    assert level == ERROR and "was trained on another SAM" in text
