"""tools/fusioner.py on a tree of eight images: trains, writes checkpoints, tests all folds."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import DATA
from tests.tools.conftest import REPOSITORY, load_program

tool = load_program(REPOSITORY / "tools" / "fusioner.py")
train_net = load_program(REPOSITORY / "train_net.py")
TINY = [
    *("MODEL.FC_CLIP.CLIP_MODEL_NAME", str(DATA / "tiny_vit.json"), "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""),
    *("MODEL.FC_CLIP.EMBED_DIM", "16", "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "8"),
]


@pytest.fixture
def root(tmp_path):
    """Two images a fold, of one class each; aeroplane, bus, dog and sheep."""
    rng = np.random.default_rng(0)
    for fold, label in enumerate((1, 6, 12, 17)):
        for kind, numbers in (("trn", (0, 1)), ("val", (2,))):
            names = [f"{2000 + fold}_{number:06d}" for number in numbers]
            path = tmp_path / "pascal_5i" / kind / f"fold{fold}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name}__{label:02d}\n" for name in names))
            for name in names:
                mask = np.zeros((40, 50), np.uint8)
                mask[10:30, 10:40], mask[:2] = label, 255
                pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
                for folder, array, ending in (
                    ("VOCdevkit/VOC2012/JPEGImages", pixels, "jpg"),
                    ("SegmentationClassAug", mask, "png"),
                ):
                    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(tmp_path / folder / f"{name}.{ending}")
    return tmp_path


def words(root, *more):
    small = {"transformer_width": 16, "transformer_layers": 1, "transformer_heads": 2, "batch_size": 4}
    run = {"dataset_name": "pascal", "dataset_root": root, "output_dir": root / "out", "num_workers": 0}
    flags = {**small, **run, "device": "cpu"}
    return [*(f"--{name}={value}" for name, value in flags.items()), "--target_size", "32", "32", *more]


def test_it_trains_writes_a_checkpoint_and_tests_it(root, capfd, monkeypatch):
    def in_this_process(command, env, check):
        monkeypatch.setenv("DETECTRON2_DATASETS", env["DETECTRON2_DATASETS"])
        return subprocess.CompletedProcess(command, train_net.main(command[2:]))

    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=in_this_process))
    epochs = ["--warmup_epochs", "1", "--training_epochs", "1", "--norm", "reference", "--border", "background"]
    assert tool.main(["train", *words(root, "--fold", "2", *epochs), *TINY]) == 0
    folder = root / "out" / "fold2"
    assert (folder / "model_final.pth").is_file() and (folder / "metrics.json").is_file()
    assert "fold 2: mIoU" in capfd.readouterr().out

    weights = ["--load_ckpt_path", str(folder / "model_final.pth"), "--norm", "reference"]
    windows = ["--test_with_org_resolution", "--windows", "pad", "--fold", "1"]
    assert tool.main(["test", *words(root, *weights, *windows), *TINY]) == 0
    printed = capfd.readouterr().out
    assert "fold 1: mIoU" in printed and "pairs 1.00, skipped 0.00" in printed
    assert "training images may show novel classes" in printed
    several = ["--load_ckpt_path", str(folder / "model_final.pth"), "--test_pairs", "multiclass", "--fold", "0"]
    assert tool.main(["test", *words(root, *several), *TINY]) == 0
    printed = capfd.readouterr().out
    assert "fold 0: mIoU" in printed and "mIoU_background" in printed and "all novel classes prompted" in printed


def test_the_mean_of_four_folds_is_printed(capsys):
    folds = {fold: {"mIoU": 10.0 * fold, "FB_IoU": 50.0, "pairs": 3.0, "skipped": 1.0} for fold in range(4)}
    tool.print_results(folds, strict=True, names="reference", pairs="all")
    assert "mean of the folds: mIoU 15.00, FB_IoU 50.00, pairs 3.00, skipped 1.00" in (
        printed := capsys.readouterr().out
    )
    assert "fold 3: mIoU 30.00, FB_IoU 50.00, pairs 3.00, skipped 1.00" in printed
    assert "no training image shows a novel class" in printed


def test_the_published_flags_become_keys(root):
    args, rest = tool.parse_arguments(
        ["train", *words(root, "--fold", "3", "--wd_end", "0.5", "--strict", "--names", "readable"), "SEED", "7"]
    )
    keys = tool.overrides(args, 3, root / "out")
    keys = dict(zip(keys[::2], keys[1::2]))
    assert rest == ["SEED", "7"]
    assert keys["DATASETS.TRAIN"] == "('pascal_5i_readable_fold3_train_strict',)"
    assert keys["DATASETS.TEST"] == "('pascal_5i_readable_fold3_val',)"
    assert (keys["SOLVER.WEIGHT_DECAY_END"], keys["MODEL.FUSIONER.WIDTH"]) == ("0.5", "16")
    assert keys["INPUT.SQUARE_TEST"] == "32"
    assert (keys["SOLVER.MAX_ITER"], keys["SOLVER.WARMUP_ITERS"]) == (str(2 * 510), str(2 * 10))
    coco, _ = tool.parse_arguments(["test", "--load_ckpt_path", "x", "--fold", "all"])
    keys = tool.overrides(coco, 1, root)
    assert "('coco_20i_fold1_val_first1000',)" in keys and "0.2" in keys


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "--fold", "4"], "invalid choice: '4'"),
        (["train", "--target_size", "224", "256"], "must be a square, got 224 x 256"),
        (["train", "--beta1", "0.8"], "--beta1 is 0.9"),
        (["test"], "a test needs --load_ckpt_path"),
    ],
)
def test_flags_that_cannot_work_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        tool.parse_arguments(flags)
    assert message in capsys.readouterr().err
