"""Figures of docs/beyond.md that need no training, on the whole of `shapes_val`."""

from types import SimpleNamespace

import pytest

from fcclip import Segmenter
from fcclip.data import get_dataset
from fcclip.evaluation import evaluate
from fcclip.modeling import Ensemble
from fcclip.reports.zero_shot import set_config
from fcclip.vocabulary import Vocabulary
from tests.tools.conftest import REPOSITORY, load_program

pytestmark = pytest.mark.slow
SHAPES = Vocabulary.builtin("shapes")
IMAGES = {"val": 200, "tune": 90}  # the second are enough for five examples of every unseen class


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """The shipped segmenter; the shapes world, of seed 0, is where data sets are looked for."""
    root = tmp_path_factory.mktemp("datasets")
    program = load_program(REPOSITORY / "datasets" / "prepare_shapes.py")
    for name, number in IMAGES.items():
        (root / "shapes").mkdir(exist_ok=True)
        program.write_set(root / "shapes", name, seed=0, num_images=number, run_each=map)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield Segmenter.from_pretrained("shapes", device="cpu")


def evaluated(segmenter, model, modes, off=("SEMANTIC", "INSTANCE"), **options):
    """Mode -> task -> metric -> percent; the outputs that are `off` are not computed."""
    dataset = get_dataset("shapes_val")
    cfg = set_config(segmenter.cfg, dataset)
    cfg.merge_from_list([word for head in off for word in (f"MODEL.MASK_FORMER.TEST.{head}_ON", False)])
    options |= {"training_vocabulary": segmenter.model.seen_vocabulary, "vocabulary": SHAPES, "progress": False}
    return evaluate(model, cfg, dataset, modes=modes, **options)


def test_void_trust_for_unseen_classes_gives_panoptic_maps_what_was_measured_and_changes_no_other_output(segmenter):
    modes = {"off": Ensemble(0.4, 0.8), "on": Ensemble(0.4, 0.8, trust=0.5)}
    quality = {mode: tasks["panoptic_seg"] for mode, tasks in evaluated(segmenter, segmenter.model, modes).items()}
    # rounded to one decimal in the page, and other kernels round single pixels and equal scores in another way
    assert [quality[mode]["PQ"] for mode in modes] == pytest.approx([78.4, 79.2], abs=0.1)
    assert [quality[mode]["PQ_unseen"] for mode in modes] == pytest.approx([62.7, 64.9], abs=0.1)
    others = evaluated(segmenter, segmenter.model, modes, off=("PANOPTIC",), max_images=20)
    assert others["on"].keys() == {"sem_seg", "segm", "bbox"} and repr(others["on"]) == repr(others["off"])


def test_five_examples_bring_words_that_mean_nothing_to_within_5_pq_of_the_true_names(segmenter):
    program = load_program(REPOSITORY / "tools" / "measure_teaching.py")
    unseen = [i for i, is_seen in enumerate(SHAPES.seen_by(segmenter.model.seen_vocabulary).tolist()) if not is_seen]
    renamed = program.nonsense(SHAPES, unseen)
    taught = program.teach(segmenter, {index: renamed.class_names[index] for index in unseen}, [5])
    ways = {"true": (SHAPES, {}), "nonsense": (renamed, {}), "taught": (renamed, taught[5])}
    model = program.RenamingModel(segmenter.model, ways)
    results = evaluated(segmenter, model, {way: way for way in ways})
    quality = SimpleNamespace(**{way: tasks["panoptic_seg"] for way, tasks in results.items()})
    assert quality.nonsense["PQ_unseen"] < 10
    assert quality.taught["PQ_unseen"] > quality.true["PQ_unseen"] - 5
    assert quality.taught["PQ"] > quality.true["PQ"] - 5
