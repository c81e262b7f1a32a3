"""Everything that a run of train_net.py would find out later, in the order in which it would."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fcclip.checks.data import check_test_set, check_training_set
from fcclip.checks.frozen import check_frozen
from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.checks.machine import check_disk, check_machine, check_output_folder
from fcclip.checks.training import check_evaluation, check_settings
from fcclip.checks.vocabulary import check_vocabularies
from fcclip.checks.weights import check_model, check_weights
from fcclip.config import load_config, told_without_effect, with_values
from fcclip.data import distinct_datasets
from fcclip.engine import scale_to_world_size
from fcclip.finetuning import check_finetuning
from fcclip.finetuning.replay import with_replay_mapper
from fcclip.weights import frozen_parts


def check_run(
    config: str,
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    training: bool = True,
    world_size: int = 1,
) -> Issues:
    """Looks at everything that a run would read, without running it.

    Args:
        config: a YAML file, or the name of a shipped one.
        overrides: KEY, VALUE, ...
        weights: instead of the config's MODEL.WEIGHTS.
        training: the run trains; else it only evaluates, and what training alone needs is a warning.
        world_size: processes of the run.
    """
    issues = Issues()
    cfg = model = file = vocabulary = None
    with issues.section("config"):
        cfg = load_config(config, overrides)
        issues.add(OK, f"{config}: {len(overrides) // 2} keys overridden" if overrides else f"{config}: read")
        if unused := told_without_effect(config):
            issues.add(NOTE, f"keys without effect: {unused}")
    if cfg is None:
        return issues
    if weights:
        cfg = with_values(cfg, {"MODEL.WEIGHTS": weights})
    former = dict.fromkeys(cfg.FINETUNE.REPLAY_DATASETS) if training and cfg.FINETUNE.METHOD == "replay" else {}
    train, test = dict.fromkeys(cfg.DATASETS.TRAIN), dict.fromkeys(cfg.DATASETS.TEST)
    with issues.section("machine"):
        with issues.attempt():
            check_machine(issues, cfg)
        check_output_folder(issues, cfg)
    with issues.section("model"):
        model = check_model(issues, cfg)
    with issues.section("weights"):
        file = check_weights(issues, cfg, model, training=training)
    with issues.section("vocabulary"):
        names = list({**train, **test, **former})
        vocabulary = check_vocabularies(issues, cfg, names, weights=file, training=training)
    for prefix, part in frozen_parts(model).items() if model is not None else ():
        with issues.section(part.notes_key.upper()):
            check_frozen(issues, cfg, prefix, part, file)
    if training:
        with issues.section("training"):
            check_settings(issues, cfg, model=model, vocabulary=vocabulary, world_size=world_size)
            if model is not None:
                check_disk(issues, cfg, model)
    for name in train:
        with issues.section("training data", about=name):
            check_training_set(issues, cfg, name, ERROR if training else WARNING)
    before = issues.count(ERROR)
    for name in former:
        with issues.section("former training data", about=name):
            check_training_set(issues, with_replay_mapper(cfg), name, ERROR)
    if training and cfg.FINETUNE.METHOD and issues.count(ERROR) == before:  # it would name missing data once more
        with issues.section("fine-tuning"):
            check_finetuning(scale_to_world_size(cfg, world_size), world_size=world_size)
            issues.add(OK, f"FINETUNE.METHOD {cfg.FINETUNE.METHOD} can start")
    for name in test:
        with issues.section("test data", about=name):
            check_test_set(issues, cfg, name)
    with issues.section("test data"):
        distinct_datasets(cfg.DATASETS.TEST)
    with issues.section("evaluation"):
        check_evaluation(issues, cfg, training=training)
    with issues.section("data in full"):
        text = "this program looks at the annotations and a few images of each data set"
        issues.add(
            NOTE, text, f"for every file: python tools/check_dataset.py {shlex.join({**train, **former, **test})}"
        )
    return issues
