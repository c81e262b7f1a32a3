"""What every preparation program keeps to: restart, errors, processes; and that what it makes can be used."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fcclip.config import get_cfg
from fcclip.data import build_test_mapper, build_train_mapper, get_dataset
from fcclip.errors import run_program
from fcclip.preparation import files as preparation_files
from fcclip.preparation import programs as preparation

REPOSITORY = Path(__file__).resolve().parents[2]
VOC = "pascal_voc_d2/annotations_pascal20/validation/2007_000033.png"


@dataclass(frozen=True)
class Case:
    """One program.

    Args:
        download: function of downloads.py that writes what it reads.
        made: a file that it makes for val.
        datasets: registered val sets that are complete with it.
        mapper: training mapper for them.
        first: programs to be run before it.
        rest: programs without which the sets cannot be loaded.
    """

    download: str
    made: str
    datasets: tuple[str, ...]
    mapper: str
    first: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()


CASES = {
    "coco_semantic_annos_from_panoptic_annos": Case(
        "coco",
        "coco/panoptic_semseg_val2017/000000000139.png",
        ("openvocab_coco_2017_val_panoptic_with_sem_seg",),
        "coco_panoptic_lsj",
    ),
    "coco_stuff_sem_seg": Case(
        "coco_stuff",
        "coco/stuffthingmaps_detectron2/val2017/000000000139.png",
        ("openvocab_coco_2017_test_stuff_sem_seg",),
        "mask_former_semantic",
    ),
    "bdd100k_panoptic": Case(
        "bdd100k",
        "bdd100k/labels/pan_seg/coco_pano/val/val-00000001.png",
        ("bdd10k_40_panoptic_val",),
        "coco_panoptic_lsj",
    ),
    "ade20k_sem_seg": Case(
        "ade20k",
        "ADEChallengeData2016/annotations_detectron2/validation/ADE_val_00000002.png",
        ("openvocab_ade20k_sem_seg_val",),
        "mask_former_semantic",
    ),
    "ade20k_ins_seg": Case(
        "ade20k",
        "ADEChallengeData2016/ade20k_instance_val.json",
        ("openvocab_ade20k_instance_val",),
        "coco_instance_lsj",
    ),
    "ade20k_pan_seg": Case(
        "ade20k",
        "ADEChallengeData2016/ade20k_panoptic_val/ADE_val_00000002.png",
        ("openvocab_ade20k_panoptic_val",),
        "mask_former_panoptic",
        rest=("ade20k_sem_seg",),
    ),
    "ade20k_full_sem_seg": Case(
        "ade20k_full",
        "ADE20K_2021_17_01/annotations_detectron2/validation/ADE_val_00000001.tif",
        ("openvocab_ade20k_full_sem_seg_val",),
        "mask_former_semantic",
    ),
    "cityscapes_panoptic": Case(
        "cityscapes",
        "cityscapes/gtFine/cityscapes_panoptic_val/munster_000001_000294_gtFine_panoptic.png",
        ("openvocab_cityscapes_fine_panoptic_val",),
        "mask_former_panoptic",
    ),
    "pascal_voc_sem_seg": Case(
        "pascal_voc", VOC, ("openvocab_pascal20_sem_seg_val", "openvocab_pascal21_sem_seg_val"), "mask_former_semantic"
    ),
    "pascal_ctx_sem_seg": Case(
        "pascal_context",
        "pascal_ctx_d2/annotations_ctx59/validation/2008_000002.png",
        ("openvocab_pascal_ctx59_sem_seg_val",),
        "mask_former_semantic",
    ),
    "pascal_ctx_full_sem_seg": Case(
        "pascal_context",
        "pascal_ctx_d2/annotations_ctx459/validation/2008_000002.tif",
        ("openvocab_pascal_ctx459_sem_seg_val",),
        "mask_former_semantic",
        first=("pascal_ctx_sem_seg",),
    ),
}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return CASES[name]


@pytest.fixture
def downloaded(case, downloads, prepare, tmp_path):
    """A root with the download and what other programs make of it."""
    getattr(downloads, case.download)(tmp_path)
    for other in case.first:
        assert prepare(other) == 0
    return tmp_path


def contents(files):
    return {path: content for path, (_, content) in files().items()}


def test_there_is_a_case_for_every_program():
    programs = {path.stem.removeprefix("prepare_") for path in (REPOSITORY / "datasets").glob("prepare_*.py")}
    assert programs - {"shapes", "pascal_5i", "coco_20i"} == {*CASES}  # folds: test_prepare_folds.py


def test_a_program_and_the_guide_say_the_command_and_the_counts(name, case, program):
    guide = (REPOSITORY / "datasets" / "README.md").read_text(encoding="utf-8")
    module = program(name)
    command = f"python datasets/prepare_{name}.py"
    assert f"    {command} [" in module.__doc__ and f"\n{command}\n" in guide
    for dataset in map(get_dataset, (case.datasets[0], re.sub("_(val|test)(?=_|$)", "_train", case.datasets[0]))):
        assert f"{dataset.published_count:,}" in module.__doc__ and f"{dataset.published_count:,}" in guide


# ---- what is made can be used ----


def test_what_is_made_is_registered_loaded_and_mapped(name, case, downloaded, prepare):
    for program_name in (name, *case.rest):
        assert prepare(program_name) == 0
    cfg = get_cfg()
    cfg.INPUT.DATASET_MAPPER_NAME = case.mapper
    cfg.INPUT.IMAGE_SIZE = cfg.INPUT.MIN_SIZE_TEST = 8
    cfg.INPUT.MIN_SIZE_TRAIN = (8,)
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.FORMAT = "RGB"
    for dataset in (get_dataset(dataset_name, downloaded) for dataset_name in case.datasets):
        records = dataset.records()
        assert len(records) == 2
        sample = build_test_mapper(cfg)(records[0])
        assert sample["image"].shape == (3, 8, 12) and (sample["height"], sample["width"]) == (4, 6)
        labels = set()
        for record in records:
            sample = build_train_mapper(cfg, dataset.metadata)(record, np.random.default_rng(0))
            labels |= {*sample["targets"].labels.tolist()}
        classes = len(dataset.metadata["stuff_classes"] or dataset.metadata["thing_classes"])
        assert labels and labels <= {*range(classes)}


# ---- a second run ----


def test_a_second_run_changes_nothing(name, downloaded, prepare, files, capsys):
    assert prepare(name) == 0
    before = files()
    capsys.readouterr()
    assert prepare(name) == 0
    assert files() == before
    assert capsys.readouterr().out.count("all there already") == 2


def test_fewer_images_than_published_are_told(downloads, prepare, capsys, tmp_path):
    downloads.pascal_voc(tmp_path)
    assert prepare("pascal_voc_sem_seg") == 0
    assert "warning: Pascal VOC semantic, val has 2 images, the published set 1449" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_an_empty_or_missing_file_is_made_again(damage, name, case, downloaded, prepare, files):
    assert prepare(name) == 0
    before = contents(files)
    damage(downloaded / case.made)
    assert prepare(name) == 0
    assert contents(files) == before


# ---- downloads ----


def test_what_is_not_downloaded_is_named_with_its_source(name, case, prepare, program, files, capsys, tmp_path):
    assert prepare(name) == 1
    message = capsys.readouterr().err
    for split in ("train", "val"):
        for download in program(name).downloads(split):
            for part in (f"{tmp_path / download.path}\n", f"{download.what}. Get it from {download.source}."):
                assert part in message
    assert "--splits val prepares one split alone, --help shows the whole tree" in message
    assert files() == {}


def test_one_split_alone_can_be_prepared_and_an_error_says_so(downloads, prepare, capsys, tmp_path):
    downloads.ade20k(tmp_path)
    for folder in ("images", "annotations", "annotations_instance"):
        (tmp_path / "ADEChallengeData2016" / folder / "training").rename(tmp_path / f"no_{folder}")
    for name in ("ade20k_sem_seg", "ade20k_ins_seg", "ade20k_pan_seg"):
        assert prepare(name) == 1
        assert "--splits val prepares one split alone" in capsys.readouterr().err
        assert prepare(name, "--splits", "val") == 0
    assert not list((tmp_path / "ADEChallengeData2016").rglob("*train*"))


def test_a_root_that_does_not_exist_is_named(program, capsys, tmp_path):
    arguments = ["--root", str(tmp_path / "nowhere")]
    assert run_program(lambda: program("ade20k_sem_seg").main(arguments)) == 1
    assert "nowhere, does not exist" in capsys.readouterr().err


def test_the_root_is_that_of_the_variable(program, downloads, monkeypatch, tmp_path):
    downloads.pascal_voc(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert program("pascal_voc_sem_seg").main(["--workers", "1"]) == 0
    assert (tmp_path / VOC).is_file()


def test_paths_may_have_spaces_and_letters_of_any_script(program, downloads, tmp_path):
    root = tmp_path / "my data süß 数据.v1"
    root.mkdir()
    downloads.cityscapes(root)
    assert program("cityscapes_panoptic").main(["--root", str(root), "--workers", "1"]) == 0
    assert len(get_dataset("openvocab_cityscapes_fine_panoptic_val", root).records()) == 2


def test_no_process_at_all_is_refused(prepare, capsys):
    assert prepare("ade20k_sem_seg", "--workers", "0") == 1
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err


def test_bad_images_are_named_together_and_the_others_are_made(downloads, prepare, capsys, tmp_path):
    downloads.coco(tmp_path)
    folder = tmp_path / "coco" / "panoptic_val2017"
    (folder / "000000000139.png").write_bytes(b"")
    assert prepare("coco_semantic_annos_from_panoptic_annos", "--splits", "val") == 1
    message = capsys.readouterr().err
    assert "1 of 2 images failed; the others are made" in message
    assert "000000000139.png: cannot be read as an image: the file is empty" in message
    (folder / "000000000144.png").unlink()
    made = tmp_path / "coco" / "panoptic_semseg_val2017"
    assert [path.name for path in made.iterdir()] == ["000000000144.png"]


# ---- processes and interruptions ----


def test_processes_find_what_a_program_calls_by_its_name(name, program):
    module = program(name)
    made = module.preparation(corrected=True) if name == "ade20k_pan_seg" else module.PREPARATION
    pickle.dumps(made.make)


@pytest.mark.parametrize("name", ["ade20k_pan_seg", "pascal_ctx_full_sem_seg"])
def test_the_number_of_processes_changes_nothing(name, case, downloads, program, prepare, files, tmp_path):
    roots, download = [tmp_path / "one", tmp_path / "two"], tmp_path / "download"
    download.mkdir()
    getattr(downloads, case.download)(download)
    for workers, root in enumerate(roots, start=1):
        shutil.copytree(download, root)  # not made twice: a .mat file holds the second of its making
        for program_name in (*case.first, name):
            assert program(program_name).main(["--root", str(root), "--workers", str(workers)]) == 0
    made = contents(files)
    first, second = ({path[4:]: made[path] for path in made if path.startswith(f"{root.name}/")} for root in roots)
    assert first == second and case.made in first


def test_an_error_in_another_process_names_the_image(downloads, program, capsys, tmp_path):
    downloads.ade20k(tmp_path)
    path = tmp_path / "ADEChallengeData2016" / "annotations" / "validation" / "ADE_val_00000002.png"
    path.write_bytes(path.read_bytes()[:50])
    arguments = ["--root", str(tmp_path), "--splits", "val", "--workers", "2"]
    assert run_program(lambda: program("ade20k_sem_seg").main(arguments)) == 1
    assert "ADE_val_00000002.png: cannot be read as an image" in capsys.readouterr().err


def test_a_process_that_is_ended_from_outside_ends_the_run_with_advice():
    with pytest.raises(OSError, match=r"a process was ended from outside.*fewer --workers"):
        preparation._make_all(exec, ["import os; os._exit(9)", "pass"], workers=2, title="none")


def test_after_many_failures_the_rest_is_not_tried():
    tried = []

    def make(task):
        tried.append(task)
        raise ValueError("bad")

    with pytest.raises(
        ValueError, match=r"20 of 100 images failed and the rest was not tried\.(?s:.*)  9: bad\n  and 10 more"
    ):
        preparation._make_all(make, [preparation.Task(str(number), ()) for number in range(100)], workers=1, title="x")
    assert len(tried) == 20


def test_processes_do_not_outlive_a_program_that_is_killed(downloads, tmp_path):
    downloads.pascal_context(tmp_path)
    pipe = tmp_path / "VOCdevkit" / "VOC2010" / "JPEGImages" / "2008_000002.jpg"
    pipe.unlink()
    os.mkfifo(pipe)  # an image that takes for ever to read
    program = REPOSITORY / "datasets" / "prepare_pascal_ctx_sem_seg.py"
    command = [sys.executable, str(program), "--root", str(tmp_path), "--splits", "val", "--workers", "2"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running,
        open(pipe, "wb"),  # returns when a process has the other end
    ):
        running.kill()
        running.communicate(timeout=60)  # its processes hold the output: this returns when they have ended
    assert running.returncode == -signal.SIGKILL


def test_a_program_that_is_killed_at_any_point_leaves_no_half_file_and_goes_on(downloads, program, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    roots = [tmp_path / f"killed_{number}" for number in range(1, 4)]  # two PNGs, the JSON file
    for root in (whole, *roots):
        root.mkdir(exist_ok=True)
        downloads.ade20k(root)
    main = program("ade20k_pan_seg").main
    assert main(["--root", str(whole), "--splits", "val", "--workers", "1"]) == 0
    expected = made_by(whole)
    killer = Path(__file__).with_name("killed_preparation.py")
    ended = subprocess.run(
        [sys.executable, str(killer), "ade20k_pan_seg", *map(str, roots)], check=True, capture_output=True, text=True
    )
    assert ended.stdout.split() == ["-9"] * len(roots)
    for number, root in enumerate(roots, start=1):
        left = made_by(root)
        half = [path for path in left if path.endswith(".partial")]
        finished = {path: content for path, content in left.items() if path not in half}
        assert len(half) == 1 and len(finished) == number - 1 and finished.items() <= expected.items()
        assert main(["--root", str(root), "--splits", "val", "--workers", "1"]) == 0
        assert made_by(root) == expected


def made_by(root):
    """Path below the root: content of every file that is not of the download."""
    folders = ("images", "annotations", "annotations_instance")
    paths = {path.relative_to(root / "ADEChallengeData2016"): path for path in root.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in paths.items()
        if name.parts[0] not in folders and name.suffix != ".txt"
    }


def test_an_interrupted_run_says_how_to_go_on(downloads, prepare, monkeypatch, capsys, tmp_path):
    downloads.pascal_voc(tmp_path)
    replace, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == 4:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(preparation_files.os, "replace", interrupted)
    assert prepare("pascal_voc_sem_seg") == 130
    assert "what is finished is kept, the same command goes on from there" in capsys.readouterr().err
    made = tmp_path / "pascal_voc_d2"
    assert len([path for path in made.rglob("*") if path.is_file()]) == 3  # of the first image
    assert prepare("pascal_voc_sem_seg") == 0
    assert "1 of 2 images are there already" in capsys.readouterr().out


def test_a_full_disk_is_told(downloads, prepare, monkeypatch, capsys, tmp_path):
    downloads.pascal_voc(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparation_files.os, "replace", full)
    assert prepare("pascal_voc_sem_seg") == 1
    assert "cannot write" in (message := capsys.readouterr().err) and "No space left on device" in message
    assert not list((tmp_path / "pascal_voc_d2").rglob("*.*"))


def test_a_program_runs_from_any_folder(downloads, tmp_path):
    downloads.ade20k(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, str(REPOSITORY / "datasets" / "prepare_ade20k_pan_seg.py"), "--root", ".."]
    ended = subprocess.run([*command, "--workers", "1"], cwd=elsewhere, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0].startswith("ADE20K-150 panoptic, train: 2 images, made 2 in")
    assert len(get_dataset("openvocab_ade20k_panoptic_val", tmp_path).annotations()) == 2
