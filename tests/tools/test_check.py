import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from fcclip.config import assets_dir
from fcclip.engine import save_checkpoint
from fcclip.vocabulary import Vocabulary
from fcclip.weights import vocabulary_note
from tests.data.published_trees import write_tree
from tests.tools.conftest import REPOSITORY, load_program

SHAPES = "shapes/fcclip_shapes.yaml"
ADE20K = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k{}.yaml"
WEIGHTS = "shapes_fcclip.safetensors"


tool = load_program(REPOSITORY / "tools" / "check.py")


def checked(*words, config=SHAPES):
    return tool.check(tool.parse_arguments(["--config-file", str(config), *map(str, words)]))


def of_level(report, level, section=None):
    return [one for one in report.findings if one.level == level and section in (None, one.section)]


def the_error(report):
    """The only error there is."""
    errors = of_level(report, tool.ERROR)
    assert len(errors) == 1, [one.text for one in errors]
    return errors[0]


# ---- everything fits ----


@pytest.mark.parametrize("words", [[], ["--eval-only"]])
def test_the_shipped_weights_fit_the_shipped_config(root, words):
    report = checked(*words, "--weights", WEIGHTS)
    assert not of_level(report, tool.ERROR) and not of_level(report, tool.WARNING)
    texts = " ".join(one.text for one in report.findings)
    for text in (
        "keys and shapes are those of the model",
        "it is the CLIP that MODEL.WEIGHTS were trained on",
        "40 classes seen in training, 20 unseen",
        "evaluated for panoptic, instance, semantic",
    ):
        assert text in texts


def test_nothing_is_written_and_no_weight_is_made(root, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    report = checked("--weights", WEIGHTS)
    assert sorted(tmp_path.rglob("*")) == before
    assert not report.count(tool.ERROR)
    with report.section("model"):
        cfg = tool.load_config(SHAPES)
        assert all(weight.is_meta for weight in tool.check_model(report, cfg).parameters())


@pytest.mark.parametrize("backbone", ["", "_r50", "_r50x64"])
def test_a_published_config_fits_although_nothing_is_on_this_machine(tmp_path, monkeypatch, backbone):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    report = checked("--eval-only", "OUTPUT_DIR", tmp_path, config=ADE20K.format(backbone))
    assert not of_level(report, tool.ERROR, "model") and not of_level(report, tool.ERROR, "config")
    assert "would download" in of_level(report, tool.WARNING, "CLIP")[0].text
    assert "FREEZE_AT" in of_level(report, tool.NOTE, "config")[0].text
    assert len(of_level(report, tool.ERROR, "test data")) == 1
    assert [one.section for one in of_level(report, tool.ERROR)] == ["weights", "test data"]


# ---- command line and config ----


def test_every_wrong_key_is_named_and_the_others_are_used(root, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"_BASE_: {REPOSITORY / 'configs' / SHAPES}\nSOLVER:\n  MAX_ITERS: 7\n  GAMMA: fast\n")
    report = checked("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "12", "TEST.MODUS", "x", config=config)
    errors = [one.text for one in of_level(report, tool.ERROR)]
    assert len(errors) == 3
    assert "MAX_ITERS" in errors[0] and "Did you mean 'SOLVER.MAX_ITER'" in errors[0] and "mine.yaml" in errors[0]
    assert "'SOLVER.GAMMA' takes a float" in errors[1]
    assert "TEST.MODUS" in errors[2] and "command line" in errors[2]
    assert "12 queries" in of_level(report, tool.OK, "model")[0].text


def test_a_key_without_a_value_is_named(root):
    assert "come in pairs" in the_error(checked("SOLVER.MAX_ITER")).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("SOLVER: [", "not a plain YAML file"),
        ("_BASE_: no.yaml", "'no.yaml' does not exist"),
        ("- a", "a mapping of keys"),
    ],
)
def test_a_config_that_cannot_be_read_is_the_only_finding(tmp_path, content, message):
    (tmp_path / "broken.yaml").write_text(content)
    report = checked(config=tmp_path / "broken.yaml")
    assert message in the_error(report).text and len(report.findings) == 1


def test_a_missing_config_is_the_only_finding():
    report = checked(config="shapes/fcclip_shape.yaml")
    assert "Did you mean 'shapes/fcclip_shapes.yaml'" in the_error(report).text and len(report.findings) == 1


def test_options_behind_the_keys_are_refused(capsys):
    with pytest.raises(SystemExit):
        tool.parse_arguments(["--config-file", SHAPES, "SEED", "1", "--eval-only"])
    assert "--eval-only must come before KEY VALUE" in capsys.readouterr().err


# ---- machine ----


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps" if not torch.backends.mps.is_available() else "mps:9"])
def test_a_device_that_is_not_there_is_named(root, device):
    report = checked("MODEL.DEVICE", device)
    assert f"MODEL.DEVICE is '{device}'" in the_error(report).text
    assert any("can be written" in one.text for one in report.findings)  # the rest is still looked at


def test_the_engine_of_deformable_attention_is_named_or_why_it_cannot_run(root, monkeypatch):
    texts = [one.text for one in of_level(checked(), tool.OK, "machine")]
    assert "deformable attention runs on the engine 'torch' (the fastest of those that can)" in texts
    error = the_error(checked("MODEL.MSDA_ENGINE", "cpp"))
    assert error.section == "machine" and "cannot run on cpu: it is not built" in error.text
    monkeypatch.setenv("FCCLIP_MSDA", "torch")
    texts = [one.text for one in of_level(checked("MODEL.MSDA_ENGINE", "cpp"), tool.OK, "machine")]
    assert "deformable attention runs on the engine 'torch'" in texts


def test_an_output_folder_that_is_a_file_is_named(root, tmp_path):
    (tmp_path / "taken").write_text("")
    error = the_error(checked("OUTPUT_DIR", tmp_path / "taken" / "run"))
    assert "is a file" in error.text and "OUTPUT_DIR /some/folder" in error.remedy


def test_a_disk_too_small_for_the_checkpoints_is_named(root, monkeypatch):
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2**20))
    assert "1.0 MiB are free" in the_error(checked()).text
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10 * 2**20))
    report = checked()
    assert not report.count(tool.ERROR) and "10.0 MiB are free" in of_level(report, tool.WARNING)[0].text
    assert not checked("--eval-only", "--weights", WEIGHTS).count(tool.WARNING)


# ---- model ----


def test_every_part_that_cannot_be_built_is_named(root):
    keys = [
        "MODEL.FC_CLIP.EMBED_DIM",
        "65",
        "MODEL.MASK_FORMER.NHEADS",
        "5",
        "MODEL.MASK_FORMER.OVERSAMPLE_RATIO",
        "0.5",
    ]
    report = checked(*keys, "MODEL.SEM_SEG_HEAD.NAME", "FCCLIPHeads", "TEST.MODE", "both")
    errors = " ".join(one.text for one in of_level(report, tool.ERROR, "model"))
    for text in (
        "EMBED_DIM is 65",
        "HIDDEN_DIM 64",
        "OVERSAMPLE_RATIO",
        "Did you mean 'FCCLIPHead'",
        "unknown TEST.MODE",
    ):
        assert text in errors
    assert "cannot be built" in of_level(report, tool.NOTE, "CLIP")[0].text


def test_an_architecture_that_open_clip_does_not_know_is_named(root):
    report = checked("MODEL.FC_CLIP.CLIP_MODEL_NAME", "convnext_huge", "MODEL.META_ARCHITECTURE", "FCCLIPP")
    errors = [one.text for one in of_level(report, tool.ERROR, "model")]
    assert len(errors) == 2 and "FCCLIPP" in errors[0] and "convnext_huge" in errors[1]


# ---- weights ----


def test_weights_with_another_number_of_queries_are_named_with_the_remedy(root):
    error = the_error(checked("--weights", WEIGHTS, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "50"))
    assert "query_feat.weight (file 30x64, model 50x64)" in error.text
    assert "set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 30" in error.text


def test_missing_weights_are_an_error_of_an_evaluation_alone(root):
    assert "nothing to evaluate" in the_error(checked("--eval-only")).text
    assert not checked().count(tool.ERROR)
    assert "'no.pth' not found" in the_error(checked("--weights", "no.pth")).text


def test_a_damaged_file_of_weights_is_named(root, tmp_path):
    content = (assets_dir() / WEIGHTS).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "damaged or cut off" in the_error(checked("--weights", tmp_path / "cut.safetensors")).text


def test_weights_with_numbers_that_are_none_are_named(root, tmp_path):
    tensors = load_file(assets_dir() / WEIGHTS)
    tensors["void_embedding.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    assert "void_embedding.weight" in the_error(checked("--weights", tmp_path / "nan.safetensors")).text


def test_a_clip_in_the_place_of_a_segmenter_is_named(root):
    assert "a CLIP, not a segmenter" in the_error(checked("--eval-only", "--weights", "shapes_clip.safetensors")).text


def checkpoint(path, **notes):
    save_checkpoint(path, {"model": load_file(assets_dir() / WEIGHTS), **notes})
    return path


def test_settings_of_the_training_that_change_the_meaning_of_weights_are_compared(root, tmp_path):
    config = (
        "MODEL: {PIXEL_MEAN: [0, 0, 0], MASK_FORMER: {PRE_NORM: true, NUM_OBJECT_QUERIES: 30}}\nINPUT: {FORMAT: BGR}"
    )
    path = checkpoint(tmp_path / "other.pth", config=config)
    errors = of_level(checked("--eval-only", "--weights", path), tool.ERROR)
    assert {finding.remedy for finding in errors} == {
        "MODEL.MASK_FORMER.PRE_NORM True",
        "MODEL.PIXEL_MEAN [0, 0, 0]",
        "INPUT.FORMAT 'BGR'",
    }
    report = checked("--weights", path)  # a training may start from them on purpose
    assert not report.count(tool.ERROR) and report.count(tool.WARNING) == 3


def test_the_words_of_the_training_are_compared(root, tmp_path):
    trained = Vocabulary.builtin("shapes_seen")
    words = [list(synonyms) for synonyms in trained.synonyms]
    notes = {"name": trained.name, "sha256": trained.hash, "classes": words}
    same = checkpoint(tmp_path / "same.pth", vocabulary=notes)
    assert any("on the words of DATASETS.TRAIN" in one.text for one in checked("--weights", same).findings)
    notes = {**notes, "sha256": "0", "classes": [*words[1:], ["zebra"]]}
    other = checkpoint(tmp_path / "other.pth", vocabulary=notes)
    (warning,) = of_level(checked("--eval-only", "--weights", other), tool.WARNING)
    assert "1 classes are no more, 1 are new" in warning.text and "zebra" in warning.text
    named = checkpoint(tmp_path / "named.pth", vocabulary="coco_panoptic")
    (warning,) = of_level(checked("--eval-only", "--weights", named), tool.WARNING)
    assert "'coco_panoptic'" in warning.text and "DATASETS.TRAIN" in warning.remedy


# ---- fine-tuning ----

FINETUNE = ("FINETUNE.METHOD", "plain", "DATASETS.TRAIN", "('shapes_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 60)


def test_a_fine_tuning_on_other_words_is_no_mistake(root, tmp_path):
    report = checked("--weights", WEIGHTS, *FINETUNE)
    assert not report.count(tool.ERROR) and not report.count(tool.WARNING)
    texts = [one.text for one in of_level(report, tool.OK)]
    assert any("know 40 classes ('shapes_seen'), which stay seen; 20 of the 60 classes of" in one for one in texts)
    assert "FINETUNE.METHOD plain can start" in texts
    (warning,) = of_level(checked("--weights", WEIGHTS, *FINETUNE[2:]), tool.WARNING)
    assert "trained on the words 'shapes_seen'" in warning.text and "set FINETUNE.METHOD" in warning.remedy


def test_former_classes_of_fine_tuned_weights_count_as_seen(root, tmp_path):
    seen, own = Vocabulary.builtin("shapes_seen"), Vocabulary.from_names("red moon; green moon", name="own")
    notes = {"vocabulary": vocabulary_note(own), "former_vocabulary": vocabulary_note(seen)}
    report = checked("--eval-only", "--weights", checkpoint(tmp_path / "tuned.pth", **notes))
    assert not report.count(tool.ERROR) and not report.count(tool.WARNING)
    texts = " ".join(one.text for one in of_level(report, tool.OK, "words"))
    assert "fine-tuned: all 42 classes that they know count as seen" in texts
    assert "40 classes seen in training, 20 unseen" in texts
    notes["former_vocabulary"] = vocabulary_note(Vocabulary.builtin("shapes"))
    report = checked("--eval-only", "--weights", checkpoint(tmp_path / "all.pth", **notes))
    assert "60 classes seen in training, 0 unseen" in " ".join(one.text for one in report.findings)
    notes = {"vocabulary": vocabulary_note(own), "former_vocabulary": vocabulary_note(own)}
    report = checked("--eval-only", "--weights", checkpoint(tmp_path / "none.pth", **notes))
    (warning,) = of_level(report, tool.WARNING)
    assert "40 classes of DATASETS.TRAIN ('shapes_seen') are unknown to the weights" in warning.text


def test_a_fine_tuning_that_cannot_start_is_named(root, tmp_path):
    assert "MODEL.WEIGHTS is empty" in the_error(checked(*FINETUNE)).text
    assert "Did you mean 'replay'" in the_error(checked("--weights", WEIGHTS, "FINETUNE.METHOD", "repaly")).text
    nothing_known = checkpoint(tmp_path / "published.pth")
    assert "does not say which classes" in the_error(checked("--weights", nothing_known, *FINETUNE)).text
    assert not checked("--eval-only", "--weights", WEIGHTS, "FINETUNE.METHOD", "repaly").count(tool.ERROR)


def test_former_images_are_looked_at_like_new_ones(root):
    replay = ("--weights", WEIGHTS, *FINETUNE, "FINETUNE.METHOD", "replay", "FINETUNE.REPLAY_DATASETS")
    report = checked(*replay, "('shapes_tune',)")
    assert not report.count(tool.ERROR)
    assert "shapes_tune: 2 images" in of_level(report, tool.OK, "former training data")[0].text
    mapper = ("FINETUNE.REPLAY_MAPPER", "coco_instance_lsj")
    assert "shapes_tune" in the_error(checked(*replay, "('shapes_tune',)", *mapper)).text
    shutil.rmtree(root / "shapes" / "tune")
    error = the_error(checked(*replay, "('shapes_tune',)"))
    assert (error.section, "only 2 of 3" in error.text) == ("former training data", True)
    assert "Did you mean 'shapes_tune'" in " ".join(one.text for one in checked(*replay, "('shapes_tun',)").findings)


def test_weights_of_mask2former_are_a_start_for_training_and_nothing_to_evaluate(root, tmp_path):
    tensors = load_file(assets_dir() / WEIGHTS)
    tensors = {key: value for key, value in tensors.items() if ".class_embed." not in key}
    tensors["sem_seg_head.predictor.class_embed.weight"] = torch.zeros(134, 64)
    torch.save({"model": tensors}, tmp_path / "mask2former.pth")
    report = checked("--weights", tmp_path / "mask2former.pth")
    assert not report.count(tool.ERROR)
    assert "a start from Mask2Former" in of_level(report, tool.OK, "weights")[1].text
    error = the_error(checked("--eval-only", "--weights", tmp_path / "mask2former.pth"))
    assert "closed-vocabulary" in error.text


# ---- CLIP ----


def test_another_clip_than_that_of_the_training_is_named(root, tmp_path):
    tensors = load_file(assets_dir() / "shapes_clip.safetensors")
    tensors["text_projection"] = tensors["text_projection"] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    words = ("--weights", WEIGHTS, "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS")
    error = the_error(checked(*words, tmp_path / "other.safetensors"))
    assert "trained on another CLIP" in error.text and "CLIP_PRETRAINED_WEIGHTS" in error.remedy
    assert "a CLIP of random weights" in the_error(checked(*words, "")).text


def test_clip_weights_of_another_architecture_are_named(root, tmp_path):
    tensors = load_file(assets_dir() / "shapes_clip.safetensors")
    del tensors["ln_final.weight"]
    tensors["positional_embedding"] = torch.zeros(77, 32)
    save_file(tensors, tmp_path / "other.safetensors")
    error = the_error(checked("MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", tmp_path / "other.safetensors"))
    assert "1 of another shape (e.g. positional_embedding: file (77, 32), model (77, 64))" in error.text
    assert "1 missing (e.g. ln_final.weight" in error.text and "CLIP_MODEL_NAME" in error.remedy


def test_a_segmenter_in_the_place_of_a_clip_is_named(root):
    error = the_error(checked("MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", WEIGHTS))
    assert "belongs in MODEL.WEIGHTS" in error.text


def test_a_tag_that_does_not_exist_is_named(root):
    error = the_error(checked("MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "laion"))
    assert "'laion' is no open_clip tag" in error.text


def test_a_clip_of_random_weights_is_a_warning(root):
    (warning,) = of_level(checked("MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""), tool.WARNING)
    assert "random weights" in warning.text


def test_a_clip_inside_the_weights_needs_no_other(root, tmp_path):
    clip = load_file(assets_dir() / "shapes_clip.safetensors")
    inside = {f"backbone.clip_model.{key}": value for key, value in clip.items()}
    tensors = load_file(assets_dir() / WEIGHTS)
    save_file({**tensors, **inside}, tmp_path / "full.safetensors")
    words = ("MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "")
    report = checked("--weights", tmp_path / "full.safetensors", *words)
    assert not report.count(tool.ERROR) and not report.count(tool.WARNING)
    inside.pop("backbone.clip_model.text_projection")
    save_file({**tensors, **inside}, tmp_path / "part.safetensors")
    assert "the others would be random" in the_error(checked("--weights", tmp_path / "part.safetensors", *words)).text


RESNET = ("MODEL.FC_CLIP.CLIP_MODEL_NAME", str(REPOSITORY / "tests" / "data" / "tiny_resnet.json"))


def test_a_resnet_file_that_does_not_say_its_activation_is_named(root, tmp_path):
    cfg = tool.load_config(SHAPES, [*RESNET, "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""])
    clip = tool.parts.build_clip_backbone(cfg)
    torch.save(clip.clip_model.state_dict(), tmp_path / "resnet.pth")
    words = [*RESNET, "MODEL.FC_CLIP.EMBED_DIM", clip.embed_dim]
    words += ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", tmp_path / "resnet.pth"]
    error = the_error(checked(*words))
    assert "QuickGELU" in error.text and "MODEL.FC_CLIP.QUICK_GELU" in error.remedy
    assert not checked(*words, "MODEL.FC_CLIP.QUICK_GELU", "on").count(tool.ERROR)


def test_a_tag_is_looked_for_where_downloads_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tool.huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    tag = {"hf_hub": "somebody/clip/", "url": "https://example.org/RN50.pt"}
    assert tool.cached_clip(tag) is None
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "RN50.pt").write_bytes(b"")
    assert tool.cached_clip(tag) == tmp_path / ".cache" / "clip" / "RN50.pt"
    known = {("somebody/clip", "open_clip_model.safetensors"): "/cache/a.safetensors"}
    monkeypatch.setattr(tool.huggingface_hub, "try_to_load_from_cache", lambda *place: known.get(place))
    assert tool.cached_clip(tag) == Path("/cache/a.safetensors")
    assert tool.cached_clip({"hf_hub": "somebody/clip/own.bin"}) is None
    assert tool.cached_clip({}) is None


# ---- words ----


def test_prompts_longer_than_the_context_are_named():
    words = Vocabulary.from_names(["cat", " ".join(["very"] * 80) + " long cat"])
    found = tool.long_prompts(words, 77)
    assert list(found) == [words.class_names[1]] and list(found.values()) == [
        80 + 2 + 8 + 2
    ]  # the words, those of the template with its full stop, start and end
    assert not tool.long_prompts(Vocabulary.builtin("pascal_voc_21"), 77)


def test_long_words_of_a_published_file_are_a_warning(root, tmp_path):
    lines = [f"{number}:class {number}" for number in range(18)] + ["18:" + "dog " * 90]
    (tmp_path / "cityscapes_with_prompt_eng.txt").write_text("\n".join(lines))
    words = ["MODEL.FC_CLIP.VOCABULARIES", tmp_path, "DATASETS.TEST", "('openvocab_cityscapes_fine_panoptic_val',)"]
    report = checked(*words)
    assert "the rest is cut off" in of_level(report, tool.WARNING, "words")[0].text
    (tmp_path / "cityscapes_with_prompt_eng.txt").write_text("\n".join(lines[1:]))
    assert "has 18 classes" in of_level(checked(*words), tool.ERROR, "words")[0].text


def test_classes_that_are_not_num_classes_are_an_error_of_training_alone(root):
    words = ("--weights", WEIGHTS, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "39")
    assert "NUM_CLASSES is 39" in the_error(checked(*words)).text
    report = checked("--eval-only", *words)
    assert not report.count(tool.ERROR) and "NUM_CLASSES is 39" in of_level(report, tool.NOTE, "words")[0].text


def test_an_unknown_data_set_is_named_once(root):
    error = the_error(checked("DATASETS.TEST", "('shapes_vall', 'shapes_val')"))
    assert "Did you mean 'shapes_val'" in error.text


def test_training_sets_with_different_classes_are_named(root):
    report = checked("DATASETS.TRAIN", "('shapes_train', 'shapes_tune')")
    assert "have different classes" in the_error(report).text


# ---- training ----


def test_every_setting_that_cannot_work_is_named(root):
    keys = ["SOLVER.STEPS", "(5, 4)", "SOLVER.OPTIMIZER", "ADAMWW", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"]
    keys += ["INPUT.DATASET_MAPPER_NAME", "lsj", "DATALOADER.SAMPLER_TRAIN", "x", "SOLVER.AMP.DTYPE", "half"]
    report = checked("--num-gpus", "3", *keys)
    errors = " ".join(one.text for one in of_level(report, tool.ERROR, "training"))
    for text in (
        "STEPS must ascend",
        "ADAMWW",
        "CLIP_TYPE 'all'",
        "'lsj'",
        "SAMPLER_TRAIN 'x'",
        "'half'",
        "3 process(es)",
    ):
        assert text in errors
    assert not checked("--eval-only", "--weights", WEIGHTS, *keys).count(tool.ERROR)


# ---- data ----


def test_a_missing_data_set_is_one_finding_with_all_its_places(root):
    shutil.rmtree(root / "shapes")
    errors = of_level(checked(), tool.ERROR)
    assert len(errors) == 4  # one for each data set
    assert "shapes_train: none of 3 files and folders" in errors[0].text and "shapes/panoptic_train" in errors[0].text
    assert "shapes/panoptic_semseg_val" in errors[1].text and "datasets/README.md" in errors[1].remedy


def test_what_training_alone_needs_is_a_warning_of_an_evaluation(root):
    shutil.rmtree(root / "shapes" / "panoptic_train")
    assert "only 2 of 3" in the_error(checked("--weights", WEIGHTS)).text
    report = checked("--eval-only", "--weights", WEIGHTS)
    assert not report.count(tool.ERROR) and "only 2 of 3" in of_level(report, tool.WARNING, "training data")[0].text


def test_a_root_folder_that_is_none_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    report = checked("OUTPUT_DIR", tmp_path)
    assert "which is no folder" in of_level(report, tool.ERROR, "training data")[0].text


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_half_an_annotation_file_is_named(root):
    path = root / "shapes" / "annotations" / "panoptic_val_seen.json"
    path.write_text(path.read_text()[:500])
    error = the_error(checked())
    assert "panoptic_val_seen.json is not valid JSON" in error.text


def test_a_class_id_that_is_not_in_the_vocabulary_is_named(root):
    def shift(content):
        content["annotations"][-1]["segments_info"][0]["category_id"] = 999

    edit(root / "shapes" / "annotations" / "panoptic_train.json", shift)
    assert "category_id 999" in the_error(checked()).text


def test_a_image_of_another_size_than_its_annotation_is_named(root):
    path = root / "shapes" / "val" / "000000000001.jpg"
    Image.open(path).resize((128, 256)).save(path)
    error = the_error(checked())
    assert "shapes_val: " in error.text and "256 x 128" in error.text


@pytest.mark.parametrize("folder", ["panoptic_val", "panoptic_semseg_val"])
def test_ground_truth_of_another_size_is_named(root, folder):
    path = root / "shapes" / folder / "000000000001.png"
    Image.open(path).resize((128, 256), Image.Resampling.NEAREST).save(path)
    assert "is 256 x 128 (height x width), its image 256 x 256" in the_error(checked()).text


def test_labels_that_are_no_class_are_named(root):
    path = root / "shapes" / "panoptic_semseg_val" / "000000000001.png"
    labels = np.array(Image.open(path))
    labels[0, 0] = 200
    Image.fromarray(labels).save(path)
    assert "labels that are no class: [200]" in the_error(checked()).text


def test_segments_that_the_annotation_does_not_list_are_named(root):
    for name in ("val", "train"):
        path = root / "shapes" / f"panoptic_{name}" / "000000000001.png"
        ids = np.array(Image.open(path))
        ids[0, 0] = (1, 2, 3)
        Image.fromarray(ids).save(path)
    errors = of_level(checked(), tool.ERROR)
    assert len(errors) == 2 and all(str(1 + 2 * 256 + 3 * 65536) in one.text for one in errors)


def test_files_that_are_missing_later_in_a_data_set_are_named(root):
    (root / "shapes" / "train" / "000000000003.jpg").unlink()
    error = the_error(checked())
    assert "1 of 3 files" in error.text and "000000000003.jpg" in error.text


def test_a_image_that_cannot_be_opened_is_named(root):
    (root / "shapes" / "train" / "000000000001.jpg").write_bytes(b"")
    assert "the file is empty" in the_error(checked()).text


def test_missing_ground_truth_of_instances_matters_only_while_they_are_evaluated(root):
    for name in ("val", "val_seen", "val_unseen"):
        (root / "shapes" / "annotations" / f"instances_{name}.json").unlink()
    assert len(of_level(checked(), tool.ERROR, "test data")) == 3
    assert not checked("MODEL.MASK_FORMER.TEST.INSTANCE_ON", "False").count(tool.ERROR)


def test_the_files_that_cityscapes_is_evaluated_with_are_looked_for(root):
    name = "openvocab_cityscapes_fine_panoptic_val"
    write_tree(name, root)
    words = ("--eval-only", "--weights", WEIGHTS, "DATASETS.TEST", f"('{name}',)")
    report = checked(*words)
    assert not report.count(tool.ERROR)
    assert "evaluated for panoptic, instance, semantic" in of_level(report, tool.OK, "test data")[0].text
    folder = root / "cityscapes" / "gtFine" / "val"
    for path in folder.glob("*/*_gtFine_labelTrainIds.png"):  # nothing reads them
        path.unlink()
    assert not checked(*words).count(tool.ERROR)
    (folder / "lindau" / "lindau_000000_000019_gtFine_instanceIds.png").unlink()
    error = the_error(checked(*words))
    assert "1 of 4 files" in error.text and "lindau_000000_000019_gtFine_instanceIds.png" in error.text
    off = ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False)
    assert not checked(*words, *off).count(tool.ERROR)


def test_the_program_for_every_file_is_named_with_the_data_sets(root):
    report = checked("--weights", WEIGHTS, "DATASETS.TEST", "('shapes_val', 'shapes_vall')")
    (note,) = of_level(report, tool.NOTE, "data in full")
    assert note.remedy == "for every file: python tools/check_dataset.py shapes_train shapes_val"


def test_semantic_sets_are_looked_at_too(root):
    for name in ("images", "annotations_ctx59"):
        (root / "pascal_ctx_d2" / name / "validation").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(root / "pascal_ctx_d2" / "images" / "validation" / "a.jpg")
    words = ("--weights", WEIGHTS, "DATASETS.TEST", "('openvocab_pascal_ctx59_sem_seg_val',)")
    assert "has no records" in the_error(checked("--eval-only", *words)).text
    Image.new("L", (8, 6), 58).save(root / "pascal_ctx_d2" / "annotations_ctx59" / "validation" / "a.png")
    report = checked("--eval-only", *words)
    assert not report.count(tool.ERROR)
    assert "1 images; the first, 6 x 8 as its ground truth" in of_level(report, tool.OK, "test data")[0].text
    idle = of_level(report, tool.NOTE, "test data")[0]
    assert idle.remedy == "MODEL.MASK_FORMER.TEST.PANOPTIC_ON False MODEL.MASK_FORMER.TEST.INSTANCE_ON False"


def test_a_kind_of_data_without_evaluator_is_named(root, monkeypatch):
    monkeypatch.setattr(tool, "EVALUATORS", {})
    monkeypatch.setattr("fcclip.evaluation.runner.EVALUATORS", {"sem_seg": ("semantic",)})
    errors = [one.text for one in of_level(checked(), tool.ERROR)]
    assert len(errors) == 1 and "unknown evaluator type 'coco_panoptic_seg'" in errors[0]


def test_heads_that_are_all_off_for_a_data_set_are_named(root):
    words = ["DATASETS.TEST", "('openvocab_pascal20_sem_seg_val',)", "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False"]
    errors = [one.text for one in of_level(checked(*words), tool.ERROR, "test data")]
    assert any("switch on at least one of MODEL.MASK_FORMER.TEST.SEMANTIC_ON" in text for text in errors)


# ---- evaluation ----


def test_settings_of_the_evaluation_that_cannot_work_are_named(root):
    keys = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()", "TEST.BATCH_SIZE", "0", "INPUT.MIN_SIZE_TEST", "-1"]
    keys += ["TEST.EXPECTED_RESULTS", "[['panoptic_seg', 'PQ', 70.0]]"]
    errors = " ".join(one.text for one in of_level(checked("--weights", WEIGHTS, *keys), tool.ERROR))
    for text in (
        "TEST.AUG.MIN_SIZES",
        "TEST.BATCH_SIZE must be",
        "INPUT.MIN_SIZE_TEST must be",
        "TEST.EXPECTED_RESULTS",
    ):
        assert text in errors


def test_test_time_augmentation_is_described(root):
    report = checked("--eval-only", "--weights", WEIGHTS, "TEST.AUG.ENABLED", "True")
    assert "18 variants" in of_level(report, tool.OK, "evaluation")[0].text


def test_an_evaluation_without_data_sets_is_an_error(root):
    assert (
        "DATASETS.TEST is empty" in the_error(checked("--eval-only", "--weights", WEIGHTS, "DATASETS.TEST", "()")).text
    )


# ---- report ----


def test_an_error_that_nobody_foresaw_is_a_finding_without_traceback(root, monkeypatch):
    monkeypatch.setattr(tool, "check_machine", lambda report, cfg: {}["missing"])
    error = the_error(checked())
    assert error.text == "KeyError: 'missing'" and "report" in error.remedy


def test_what_fcclip_warns_of_is_a_finding_and_not_printed_twice(root, caplog):
    (root / "pascal_voc_d2" / "images" / "validation").mkdir(parents=True)
    (root / "pascal_voc_d2" / "annotations_pascal20" / "validation").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (8, 6)).save(root / "pascal_voc_d2" / "images" / "validation" / f"{name}.jpg")
    Image.new("L", (8, 6)).save(root / "pascal_voc_d2" / "annotations_pascal20" / "validation" / "a.png")
    report = checked("DATASETS.TEST", "('openvocab_pascal20_sem_seg_val',)")
    (warning,) = of_level(report, tool.WARNING)
    assert "no partner of the same name" in warning.text and not caplog.records


def test_the_command_says_in_its_exit_code_whether_something_is_wrong(root, tmp_path, capsys):
    words = ["--config-file", SHAPES, "--eval-only", "--weights", WEIGHTS]
    assert tool.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    good = capsys.readouterr()
    assert good.err == "" and good.out.isascii() and "\x1b" not in good.out
    assert good.out.splitlines()[0] == "config" and "everything fits together" in good.out.splitlines()[-1]
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["errors"] == content["warnings"] == 0 and content["findings"][0]["level"] == "ok"
    assert tool.main([*words, "MODEL.DEVICE", "gpu", "DATASETS.TEST", "('shapes_vall',)"]) == 1
    bad = capsys.readouterr()
    assert "Traceback" not in bad.out + bad.err
    assert bad.out.count("  ERROR ") == 2 and bad.out.splitlines()[-1].startswith("2 errors (checked in")


def test_findings_that_cannot_be_written_are_an_error(root, tmp_path, capsys):
    words = ["--config-file", SHAPES, "--eval-only", "--weights", WEIGHTS]
    assert tool.main([*words, "--json", str(tmp_path / "no" / "found.json")]) == 1
    assert "found.json" in capsys.readouterr().err


def test_a_terminal_shows_marks_and_long_lines_beside_them():
    console = Console(file=StringIO(), force_terminal=True, width=60, color_system=None)
    report = tool.Report()
    with report.section("here"):
        report.add(tool.OK, "fits " * 20)
        report.add(tool.ERROR, "wrong", "do this")
    tool.print_report(report, console, 0.1)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[0] == "here" and lines[1].startswith("  ✓ fits") and lines[2].startswith("    fits")
    assert "  ✗ wrong" in lines and "    → do this" in lines and lines[-1] == "1 error (checked in 0.1 s)"
