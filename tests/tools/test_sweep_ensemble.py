"""alpha, beta and void trust from one pass of the network, on any data set."""

import pytest

from fcclip.modeling import build_model
from tests.conftest import tiny_config
from tests.data.published_trees import write_tree
from tests.tools.conftest import REPOSITORY, load_program
from tests.weight_files import save_weights

tool = load_program(REPOSITORY / "tools" / "sweep_ensemble.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    cfg = tiny_config()
    save_weights(build_model(cfg), folder / "tiny.safetensors", full=True, dtype=None)
    (folder / "tiny.yaml").write_text(cfg.dump())
    return ["--config-file", str(folder / "tiny.yaml"), "--weights", str(folder / "tiny.safetensors")]


def run(tiny, *arguments):
    return tool.main([*tiny, *arguments, "--opts", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"])


@pytest.mark.parametrize(
    ("name", "metric", "is_reported"),
    [
        ("openvocab_ade20k_panoptic_val", "PQ", True),
        ("openvocab_pascal20_sem_seg_val", "mIoU", True),
        ("openvocab_coco_2017_val", "AP", False),
    ],
)
def test_every_kind_of_data_set_is_swept_by_its_metric_and_a_reported_one_recommends_nothing(
    tiny, name, metric, is_reported, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_tree(name, tmp_path)
    options = ["--alphas", "0", "1", "--betas", "0.5", "--trusts", "0", "0.5", "--scopes", "unseen", "all"]
    assert run(tiny, "--dataset", name, *options, "--first", "2") == 0
    printed = capsys.readouterr().out
    assert f"{metric} on {name}, percent" in printed
    assert printed.count("void trust 0.5") == 2 and printed.count("alpha \\ beta") == 3
    assert (f"best {metric} " in printed and "GEOMETRIC_ENSEMBLE_BETA 0.5" in printed) != is_reported
    assert ("is reported: nothing is recommended by it" in printed) == is_reported


def test_a_metric_that_the_data_set_does_not_have_is_refused(tiny):
    with pytest.raises(ValueError, match="is evaluated for semantic, which gives no PQ"):
        run(tiny, "--dataset", "openvocab_pascal20_sem_seg_val", "--metric", "PQ")
