"""Fine-tuning: what it refuses, what it keeps, and that nothing else changes."""

import importlib
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from fcclip import Segmenter
from fcclip.engine import REQUEUE_EXIT_CODE, load_checkpoint
from fcclip.finetuning import comparison
from fcclip.finetuning.start import begin_finetuning, build_teacher, check_finetuning, former_vocabulary
from fcclip.losses import SetCriterion
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights, trained_vocabulary, vocabulary_note, write_safetensors
from tests.engine.test_accumulation import assert_same_steps
from tests.modeling.test_fcclip import training_sample
from tests.weight_files import save_weights

# Of sums in float32 that are taken in another order. What a student loses against its teacher is the difference of two
# numbers near 1, so its rounding is larger than that of the other losses: 2e-6 of it.
TOLERANCE = 1e-5
ROOT = Path(__file__).resolve().parents[2]


# ---- what is refused ----


@pytest.fixture
def start(tmp_path, tiny_cfg, tiny_model) -> Path:
    """Weights of FC-CLIP that know the words "cat; person; grass"."""
    words = Vocabulary.from_names("cat; person; grass:stuff", name="pets")
    path = tmp_path / "start.safetensors"
    save_weights(tiny_model(cfg=tiny_cfg), path, {"vocabulary": vocabulary_note(words)}, dtype=None, full=True)
    return path


@pytest.fixture
def tuned_cfg(tiny_cfg, start, shapes_world, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_world))
    tiny_cfg.MODEL.WEIGHTS, tiny_cfg.FINETUNE.METHOD = str(start), "distill"
    return tiny_cfg


def refusal(cfg, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check_finetuning(cfg, world_size=1, **options)
    return str(error.value)


def test_an_unknown_method_is_named_with_its_neighbour(tuned_cfg):
    tuned_cfg.FINETUNE.METHOD = "destill"
    assert "unknown FINETUNE.METHOD 'destill'. Did you mean 'distill'?" in refusal(tuned_cfg)


def test_a_fine_tuning_from_nothing_is_refused(tuned_cfg):
    tuned_cfg.MODEL.WEIGHTS = ""
    text = refusal(tuned_cfg)
    assert "FINETUNE.METHOD is 'distill', but MODEL.WEIGHTS is empty" in text and 'FINETUNE.METHOD ""' in text


def test_a_fine_tuning_from_a_clip_is_refused(tuned_cfg, tmp_path):
    write_safetensors(tmp_path / "clip.safetensors", {"visual.proj": torch.ones(2, 2)}, {})
    tuned_cfg.MODEL.WEIGHTS = str(tmp_path / "clip.safetensors")
    assert "holds no weights of FC-CLIP (there is no void_embedding)" in refusal(tuned_cfg)


def test_a_start_that_does_not_name_its_classes_asks_for_them(tuned_cfg, tmp_path, tiny_model):
    save_weights(tiny_model(), tmp_path / "silent.safetensors", full=True)
    tuned_cfg.MODEL.WEIGHTS = str(tmp_path / "silent.safetensors")
    assert "does not say which classes it was trained on. Name them with FINETUNE.VOCABULARY" in refusal(tuned_cfg)
    tuned_cfg.FINETUNE.VOCABULARY = "shapes_trian"
    assert "Did you mean 'shapes_train'" in refusal(tuned_cfg)
    tuned_cfg.FINETUNE.VOCABULARY = str(tmp_path / "words.txt")
    assert "words.txt' does not exist" in refusal(tuned_cfg)
    tuned_cfg.FINETUNE.VOCABULARY = "shapes_train"
    check_finetuning(tuned_cfg, world_size=1)
    tuned_cfg.FINETUNE.VOCABULARY, tuned_cfg.FINETUNE.METHOD = "", "replay"
    tuned_cfg.FINETUNE.REPLAY_DATASETS = ("shapes_train",)
    check_finetuning(tuned_cfg, world_size=1)  # the words of the former data are those of the start


def test_replay_without_former_data_is_refused(tuned_cfg, monkeypatch, tmp_path):
    tuned_cfg.FINETUNE.METHOD = "replay"
    assert "needs FINETUNE.REPLAY_DATASETS" in refusal(tuned_cfg) and "distill" in refusal(tuned_cfg)
    tuned_cfg.FINETUNE.REPLAY_DATASETS = ("shapes_trian",)
    assert "unknown data set 'shapes_trian'. Did you mean 'shapes_train'?" in refusal(tuned_cfg)
    tuned_cfg.FINETUNE.REPLAY_DATASETS = ("shapes_train",)
    tuned_cfg.FINETUNE.REPLAY_SHARE = 0.3
    assert "FINETUNE.REPLAY_SHARE is 0.3" in refusal(tuned_cfg)
    tuned_cfg.FINETUNE.REPLAY_SHARE = 0.5
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert "panoptic_train.json does not exist" in refusal(tuned_cfg)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_weights_that_are_none_are_refused(tuned_cfg, weight):
    tuned_cfg.FINETUNE.DISTILL_WEIGHT = weight
    assert "FINETUNE.DISTILL_WEIGHT must be a finite number, 0 or more" in refusal(tuned_cfg)


def test_a_resumed_fine_tuning_needs_its_start_for_distillation_alone(tuned_cfg):
    tuned_cfg.MODEL.WEIGHTS, tuned_cfg.FINETUNE.METHOD = "", "plain"
    check_finetuning(tuned_cfg, world_size=1, resumes=True)
    tuned_cfg.FINETUNE.METHOD = "distill"
    assert "MODEL.WEIGHTS is empty" in refusal(tuned_cfg, resumes=True)


# ---- the former classes ----


def test_the_former_words_are_those_of_the_checkpoint_unless_they_are_named(tuned_cfg, tmp_path):
    pets = {"vocabulary": vocabulary_note(Vocabulary.from_names("cat; dog, hound", name="pets"))}
    assert former_vocabulary(tuned_cfg, pets).synonyms == (("cat",), ("dog", "hound"))
    assert former_vocabulary(tuned_cfg, {"vocabulary": "shapes_seen"}) == Vocabulary.builtin("shapes_seen")
    (tmp_path / "words.txt").write_text("1:cow\n2:pig,swine\n")
    tuned_cfg.FINETUNE.VOCABULARY = str(tmp_path / "words.txt")
    assert former_vocabulary(tuned_cfg, pets).synonyms == (("cow",), ("pig", "swine"))


def test_a_second_fine_tuning_remembers_what_the_first_one_knew():
    first, second = Vocabulary.from_names("cat; dog"), Vocabulary.from_names("cow; dog, hound")
    notes = {"vocabulary": vocabulary_note(second), "former_vocabulary": vocabulary_note(first)}
    assert trained_vocabulary(notes).synonyms == (("cat",), ("dog", "hound"), ("cow",))
    words = Vocabulary.from_names("cat; grass, lawn:stuff")
    assert trained_vocabulary({"vocabulary": vocabulary_note(words)}) == words
    assert trained_vocabulary({}) is None and trained_vocabulary({"vocabulary": "another package's"}) is None
    with pytest.raises(ValueError, match="note on the vocabulary of the weights is broken"):
        trained_vocabulary({"vocabulary": {"classes": [[]]}})


# ---- forgetting ----


def fine_tune(model, batch, *, steps=25):
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()


@torch.no_grad()
def distance(model, batch) -> float:
    model.extra_losses = []
    return float(sum(model(batch).values()))


def test_less_is_forgotten_with_each_method_than_without(tiny_cfg, tiny_model):
    former_words = Vocabulary.from_names("cat; person; grass:stuff", name="former")
    former = [{**training_sample(seed), "point_seed": seed} for seed in range(2)]
    first = tiny_model().train()
    fine_tune(first, former, steps=60)
    new = [{**training_sample(seed, labels=(0,)), "point_seed": seed} for seed in (5, 6)]
    found, learnt = {"start": distance(first, former)}, {"start": None}
    for method in ("plain", "replay", "distill"):
        model = tiny_model(train_words="red circle; water:stuff").train()
        model.load_state_dict(first.state_dict())
        learnt["start"] = distance(model, new)
        batch = new
        if method == "replay":
            batch = [*new, *({**sample, "vocabulary": former_words} for sample in former)]
        elif method == "distill":
            model.extra_losses = [build_teacher(tiny_cfg, model, former_words)]
        fine_tune(model, batch)
        learnt[method] = distance(model, new)
        model.train_vocabulary = former_words
        found[method] = distance(model, former)
    lost = {method: found[method] - found["start"] for method in ("plain", "replay", "distill")}
    assert lost["plain"] > 5 and lost["replay"] < 0.3 * lost["plain"] and lost["distill"] < 0.6 * lost["plain"], lost
    assert all(learnt[method] < 0.7 * learnt["start"] for method in lost), learnt


# ---- two processes, and parts of a batch ----


@pytest.fixture(scope="module")
def processes():
    """finetuning_processes.py, which started processes find by that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "engine")
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("finetuning_processes")


@pytest.fixture(scope="module")
def steps_of_two(processes, tmp_path_factory):
    from fcclip.engine import launch

    folder = tmp_path_factory.mktemp("finetuned")
    launch(processes.both, str(folder), num_processes=2)
    return lambda method, rank: torch.load(Path(folder, f"{method}_{rank}.pth"))


@pytest.mark.parametrize("method", ["replay", "distill"])
def test_two_processes_step_like_one(processes, steps_of_two, method):
    assert_same_steps(steps_of_two(method, 0), processes.three_steps(method), TOLERANCE)
    assert steps_of_two(method, 0)["losses"] == steps_of_two(method, 1)["losses"]


@pytest.mark.parametrize("method", ["replay", "distill"])
def test_parts_of_a_batch_step_like_the_whole(processes, method):
    whole = processes.three_steps(method)
    assert_same_steps(processes.three_steps(method, **{"SOLVER.ACCUMULATE": 2}), whole, TOLERANCE)
    assert "loss_distill_ce" in whole["losses"] or method == "replay"


# ---- the command line ----


@pytest.fixture
def command(tmp_path, tiny_cfg, shapes_world, monkeypatch, train_net):
    """Function (*words, out="out") -> exit code of a training on six images in which five shapes are labelled."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_world))
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 64, 64
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 2, 4, (3,)
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    tiny_cfg.DATASETS.TEST = ("shapes_val",)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())

    def run(*words, out="out") -> int:
        return train_net.main(["--config-file", str(path), *map(str, words), "OUTPUT_DIR", str(tmp_path / out)])

    return run


@pytest.fixture
def first(command, tmp_path) -> Path:
    """The checkpoint of a training on the seen shapes."""
    assert command("DATASETS.TEST", "()", out="first") == 0
    return tmp_path / "first" / "model_final.pth"


OWN = ("DATASETS.TRAIN", "('shapes_tune',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 60)


def weights(folder: Path) -> dict:
    return load_checkpoint(folder / "model_final.pth")["model"]


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_methods_that_do_nothing_are_ordinary_trainings_bit_for_bit(command, first, tmp_path):
    methods = {
        "ordinary": (),
        "plain": ("FINETUNE.METHOD", "plain"),
        "replay": ("FINETUNE.METHOD", "replay", "FINETUNE.REPLAY_DATASETS", "('shapes_train',)"),
        "distill": ("FINETUNE.METHOD", "distill"),
    }
    nothing = ("FINETUNE.REPLAY_SHARE", 0.0, "FINETUNE.DISTILL_WEIGHT", 0.0)
    for name, words in methods.items():
        assert command(*OWN, "MODEL.WEIGHTS", first, *words, *nothing, out=name) == 0
        assert_equal_weights(weights(tmp_path / name), weights(tmp_path / "ordinary"))
    assert not (tmp_path / "ordinary" / "finetune.json").exists()
    assert "former_vocabulary" not in load_checkpoint(tmp_path / "ordinary" / "model_final.pth")


@pytest.mark.parametrize(
    "words",
    [
        ("FINETUNE.METHOD", "replay", "FINETUNE.REPLAY_DATASETS", "('shapes_train',)"),
        ("FINETUNE.METHOD", "distill"),
    ],
    ids=["replay", "distill"],
)
def test_a_resumed_fine_tuning_ends_as_one_that_was_not_stopped(command, first, tmp_path, capsys, words):
    words = (*OWN, "MODEL.WEIGHTS", first, *words)
    assert command(*words, out="whole") == 0
    printed = capsys.readouterr().out
    assert "before and after the fine-tuning" in printed
    assert not _equal(weights(tmp_path / "whole"), load_checkpoint(first)["model"])

    original, calls = SetCriterion.forward, itertools.count()

    def break_off(*arguments, **options):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SetCriterion, "forward", break_off)
        assert command(*words, out="out") == 130
    before = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert before["after"] is None and (tmp_path / "out" / "model_0000001.pth").is_file()
    capsys.readouterr()
    assert command("--resume", *words, out="out") == 0
    printed = capsys.readouterr().out
    assert "evaluating before the first iteration" not in printed and "resumed from" in printed
    assert_equal_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    whole, resumed = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("whole", "out"))
    assert whole == resumed and resumed["before"] == before["before"]


def _equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one if name != "criterion.empty_weight")


def test_a_fine_tuned_file_knows_all_the_words_that_count_as_seen(command, first, tmp_path, tiny_cfg, capsys):
    words = tmp_path / "former.txt"
    words.write_text("1:moon\n2:red circle,scarlet ring\n")
    tuning = ("FINETUNE.METHOD", "plain", "FINETUNE.VOCABULARY", words)
    assert command(*OWN, "MODEL.WEIGHTS", first, *tuning, out="tuned") == 0
    tuned = tmp_path / "tuned" / "model_final.pth"
    stored = load_checkpoint(tuned)
    assert stored["former_vocabulary"]["classes"] == [["moon"], ["red circle", "scarlet ring"]]
    assert stored["vocabulary"]["name"] == "shapes" and stored["finetuned_from"]

    model = Segmenter(tiny_cfg, weights=tuned).model  # whatever DATASETS.TRAIN of its config is
    asked = Vocabulary.from_names("moon; scarlet ring; water; cheese")
    assert asked.seen_by(model.seen_vocabulary).tolist() == [True, True, True, False]
    own = Segmenter(tiny_cfg, weights=first).model
    assert own.seen_vocabulary is own.train_vocabulary
    load_weights(model, first)
    assert model.seen_vocabulary is model.train_vocabulary

    capsys.readouterr()
    assert command("--eval-only", "MODEL.WEIGHTS", tuned, out="again") == 0
    trained, again = (
        json.loads((tmp_path / name / "inference" / "shapes_val" / "results.json").read_text())["results"]
        for name in ("tuned", "again")
    )
    assert trained == again
    after = json.loads((tmp_path / "tuned" / "finetune.json").read_text())["after"]["shapes_val"]
    assert after["PQ"]["all"] == again["ensemble"]["panoptic_seg"]["PQ"]


def test_an_ordinary_training_from_a_fine_tuned_file_is_an_ordinary_training(command, first, tmp_path):
    assert command(*OWN, "MODEL.WEIGHTS", first, "FINETUNE.METHOD", "plain", out="tuned") == 0
    assert command(*OWN, "MODEL.WEIGHTS", tmp_path / "tuned" / "model_final.pth", out="next") == 0
    assert "former_vocabulary" not in load_checkpoint(tmp_path / "next" / "model_final.pth")


def test_a_second_fine_tuning_starts_from_all_former_words(command, first, tmp_path):
    tuning = ("DATASETS.TEST", "()", "FINETUNE.METHOD", "plain")
    assert command(*OWN, "MODEL.WEIGHTS", first, *tuning, out="one") == 0
    assert command("MODEL.WEIGHTS", tmp_path / "one" / "model_final.pth", *tuning, out="two") == 0
    assert len(load_checkpoint(tmp_path / "two" / "model_final.pth")["former_vocabulary"]["classes"]) == 60


def test_what_does_not_fit_is_told_before_anything_starts(command, first, capsys):
    def told(*words) -> str:
        assert command(*words) == 1
        text = capsys.readouterr().err
        assert text.startswith("error: ") and "Traceback" not in text
        return text

    tuning = ("MODEL.WEIGHTS", first, "FINETUNE.METHOD", "distill")
    text = told("DATASETS.TRAIN", "('shapes_tune',)", *tuning)
    assert "has 60 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 40. Set it to 60" in text
    assert "MODEL.WEIGHTS is empty" in told("FINETUNE.METHOD", "distill")
    assert "needs FINETUNE.REPLAY_DATASETS" in told("MODEL.WEIGHTS", first, "FINETUNE.METHOD", "replay")


def test_a_resume_refuses_other_keys_and_another_start(command, first, tmp_path, capsys):
    words = (*OWN, "DATASETS.TEST", "()", "FINETUNE.METHOD", "distill")
    assert command(*words, "MODEL.WEIGHTS", first) == 0
    changed = ("MODEL.WEIGHTS", first, "FINETUNE.DISTILL_WEIGHT", 2.0)
    assert command("--resume", *words, *changed, "SOLVER.MAX_ITER", 6) == 1
    assert "FINETUNE.DISTILL_WEIGHT: 1.0 -> 2.0" in capsys.readouterr().err
    earlier = tmp_path / "first" / "model_0000001.pth"
    assert command("--resume", *words, "MODEL.WEIGHTS", earlier, "SOLVER.MAX_ITER", 6) == 1
    assert "began with other weights than MODEL.WEIGHTS" in capsys.readouterr().err
    assert command("--resume", *words, "MODEL.WEIGHTS", first, "SOLVER.MAX_ITER", 6) == 0


def test_a_stop_before_the_first_iteration_loses_nothing(command, first, tmp_path):
    words = (*OWN, "MODEL.WEIGHTS", first, "FINETUNE.METHOD", "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.Comparison, "measure", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert command(*words) == REQUEUE_EXIT_CODE
    assert not (tmp_path / "out" / "last_checkpoint").exists()
    assert command("--resume", *words) == 0


def test_figures_that_are_gone_are_not_measured_again(command, first, tmp_path, capsys):
    words = (*OWN, "MODEL.WEIGHTS", first, "FINETUNE.METHOD", "plain")
    assert command(*words) == 0
    (tmp_path / "out" / "finetune.json").unlink()
    capsys.readouterr()
    assert command("--resume", *words, "SOLVER.MAX_ITER", 6) == 0
    assert "finetune.json does not exist" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert content["before"] == {} and content["after"]["shapes_val"]


def test_a_dry_run_of_a_fine_tuning_writes_nothing(command, first, tmp_path):
    tuning = ("MODEL.WEIGHTS", first, "FINETUNE.METHOD", "distill")
    assert command("--dry-run", *OWN, *tuning) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt"}


# ---- what is measured before ----


def test_the_start_is_evaluated_with_what_it_had_seen(command, first, tmp_path, monkeypatch, train_net):
    evaluate, measure, seen = comparison.evaluate, comparison.Comparison.measure, []

    def evaluate_by_chance(model, *arguments, **options):
        torch.rand(3)
        seen.append(model.seen_vocabulary.name)
        return evaluate(model, *arguments, **options)

    def measure_and_look(self, model):
        random = torch.get_rng_state()
        measure(self, model)
        assert torch.equal(torch.get_rng_state(), random)
        assert model.seen_vocabulary.seen_by(model.train_vocabulary).any()

    monkeypatch.setattr(comparison, "evaluate", evaluate_by_chance)
    monkeypatch.setattr(comparison.Comparison, "measure", measure_and_look)
    assert command(*OWN, "MODEL.WEIGHTS", first, "FINETUNE.METHOD", "plain") == 0
    assert seen[0] == "shapes_seen"
    assert command("--eval-only", "MODEL.WEIGHTS", first, out="eval") == 0
    expected = json.loads((tmp_path / "eval" / "inference" / "shapes_val" / "results.json").read_text())["results"]
    before = json.loads((tmp_path / "out" / "finetune.json").read_text())["before"]["shapes_val"]
    tasks = expected["ensemble"]
    assert before["PQ"]["all"] == tasks["panoptic_seg"]["PQ"]
    assert before["PQ"]["seen"] == tasks["panoptic_seg"]["PQ_seen"]
    assert before["AP"]["own"] == tasks["segm"]["AP_unseen"] and before["AP"]["unseen"] is None
    assert before["mIoU"]["own"] == tasks["sem_seg"]["mIoU_unseen"]


def test_mixed_precision_runs_in_both_methods(tiny_cfg, tiny_model):
    model = tiny_model().train()
    model.extra_losses = [build_teacher(tiny_cfg, model, Vocabulary.from_names("star; cat", name="former"))]
    batch = [training_sample(0), {**training_sample(1, labels=(1,)), "vocabulary": Vocabulary.from_names("sea; sky")}]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(value.dtype is torch.float32 and value.isfinite() for value in losses.values())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_begin_gives_the_model_its_teacher_and_its_former_words(tuned_cfg, tiny_model):
    model = tiny_model(train_words="cat; moon")
    former, notes = begin_finetuning(tuned_cfg, model)
    assert former.name == "pets" and former.seen_by(model.seen_vocabulary).all()
    assert model.extra_losses[0].vocabularies == (former,)
    assert set(notes) == {"former_vocabulary", "finetuned_from"}
    with pytest.raises(ValueError, match="the checkpoint that is resumed from is of no fine-tuning"):
        begin_finetuning(tuned_cfg, model, resumed={"vocabulary": {}})
