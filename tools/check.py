"""Whether config, weights, words, data and machine fit together: in seconds, before a GPU is taken.

    python tools/check.py --config-file configs/shapes/fcclip_shapes.yaml [--eval-only] [--weights FILE]
        [--num-gpus N] [--json FILE] [KEY VALUE ...]

Takes the arguments of train_net.py and looks at everything that such a run would read, without running it: the model is
built on torch's meta device, nothing is downloaded, nothing is written. Every mismatch is named, with what to do about
it. What training alone needs is a warning with --eval-only. Of a data set it reads the annotations and one image, and
looks whether some other files are there.

Leaves with 0, with 1 if anything is wrong, with 2 when the command line cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import torch
import yaml
from fvcore.common.config import CfgNode
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fcclip.config import (
    find_config,
    flatten,
    keys_that,
    keys_without_effect,
    load_config,
    lookup,
    resolve_device,
    resolve_file,
)
from fcclip.data import (
    Dataset,
    build_test_mapper,
    build_train_mapper,
    dataset_vocabulary,
    distinct_datasets,
    get_dataset,
    joined,
    root_folder,
)
from fcclip.data.datasets.cityscapes import CITYSCAPES, instance_ids_file
from fcclip.data.datasets.files import WHERE_DATA_IS
from fcclip.data.samplers import SAMPLERS
from fcclip.data.vocabularies import PUBLISHED_FILES
from fcclip.engine import build_multiplier, build_optimizer, check_training, scale_to_world_size
from fcclip.engine.optimizer import build_clip as build_gradient_clip
from fcclip.engine.trainer import amp_dtype
from fcclip.errors import InputError
from fcclip.evaluation import build_evaluators
from fcclip.evaluation.cityscapes import read_instance_ids
from fcclip.evaluation.ground_truth import GroundTruth
from fcclip.evaluation.runner import EVALUATORS
from fcclip.files import write_atomically
from fcclip.finetuning import check_finetuning
from fcclip.finetuning.replay import with_replay_mapper
from fcclip.finetuning.start import former_vocabulary
from fcclip.modeling import FCCLIP, build_model
from fcclip.modeling import build as parts
from fcclip.modeling.augmentation import build_variants
from fcclip.modeling.backbones.clip import FROZEN_PREFIX, CLIPBackbone, set_quick_gelu, tag_has_quick_gelu
from fcclip.modeling.backbones.fingerprint import adopt_activation, clip_weights_hash
from fcclip.ops import build_advice, select_engine
from fcclip.ops.engines import automatic_engine
from fcclip.vocabulary import TEMPLATES, Vocabulary, prompts
from fcclip.weights import initialise_from, is_mask2former, load_state, trained_vocabulary
from fcclip.weights.checkpoint import FORMER
from fcclip.weights.files import WeightFile, read_weight_file

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
_MARKS = {OK: ("✓", "green"), NOTE: ("·", "dim"), WARNING: ("!", "yellow"), ERROR: ("✗", "bold red")}
_PLAIN = {OK: "ok", NOTE: "note", WARNING: "warn", ERROR: "ERROR"}

_CLIP_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pkl")
_CLIP_CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SPOT_CHECKS = 64  # records of a data set whose files are looked for
_INSTANCE_IDS = "instance_ids_file"  # field of a record of Cityscapes, here alone
_CLIP_KEY = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a command line of train_net.py and returns the exit code."""
    args = parse_arguments(arguments)
    began = time.perf_counter()
    report = check(args)
    print_report(report, Console(highlight=False, soft_wrap=not sys.stdout.isatty()), time.perf_counter() - began)
    if args.json:
        try:
            write_atomically(args.json, lambda file: file.write(json.dumps(report.as_dict(), indent=2).encode()))
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 1 if report.count(ERROR) else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or the name of a shipped one")
    parser.add_argument("--eval-only", action="store_true", help="the run is to evaluate; training needs less then")
    parser.add_argument("--weights", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings there")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys that override the file"
    )
    args = parser.parse_args(arguments)
    late = [word for word in args.opts if word.startswith("--")]
    if late:
        parser.error(f"{late[0]} must come before KEY VALUE")
    return args


# ---- findings ----


@dataclass(frozen=True)
class Finding:
    """One line of the report: `level` is ok, note, warning or error; `remedy` what to do, where `text` does not say."""

    section: str
    level: str
    text: str
    remedy: str = ""


class Report:
    """Collects findings; what is raised or logged inside `section` and `attempt` becomes one."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._section, self._about = "", ""

    def add(self, level: str, text: str, remedy: str = "") -> None:
        """Adds a finding to the present section; what is wrong is said once."""
        text = text.strip()
        if level in (WARNING, ERROR) and any(text in one.text and one.level == level for one in self.findings):
            return
        if self._about and self._about not in text:
            text = f"{self._about}: {text}"
        self.findings.append(Finding(self._section, level, text, remedy))

    def count(self, level: str) -> int:
        """How many findings there are of a level."""
        return sum(finding.level == level for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        counts = {f"{level}s": self.count(level) for level in (ERROR, WARNING)}
        return {"schema": 1, **counts, "findings": [asdict(finding) for finding in self.findings]}

    @contextlib.contextmanager
    def section(self, name: str, about: str = "") -> Iterator[None]:
        """Findings inside belong to `name`; warnings that fcclip logs are findings, and so is an error. Their texts
        name what they are `about`."""
        self._section, self._about = name, about
        logger, handler = logging.getLogger("fcclip"), _Findings(self)
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            with self.attempt():
                yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate

    @contextlib.contextmanager
    def attempt(self, level: str = ERROR) -> Iterator[None]:
        """An error inside ends the block and becomes a finding."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            self.add(level, str(error) or type(error).__name__)
        except Exception as error:
            self.add(level, f"{type(error).__name__}: {error}", "this is no message of fcclip; please report it")


class _Findings(logging.Handler):
    """Turns log records of warnings into findings."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.add(WARNING, record.getMessage())


def check(args: argparse.Namespace) -> Report:
    """Everything that a run with these arguments would find out later."""
    report = Report()
    cfg, model, trained_words, weights = None, None, None, None
    with report.section("config"):
        cfg = check_config(report, args.config_file, args.opts)
    if cfg is None:
        return report
    if args.weights:
        cfg.defrost()
        cfg.MODEL.WEIGHTS = args.weights
        cfg.freeze()
    training = not args.eval_only
    needed = ERROR if training else WARNING  # what training alone needs
    with report.section("machine"):
        with report.attempt():
            check_machine(report, cfg)
        check_output_folder(report, cfg)
    with report.section("model"):
        model = check_model(report, cfg)
    with report.section("weights"):
        weights = check_weights(report, cfg, model, training)
    with report.section("words"):
        trained_words = check_same_classes(report, cfg, model, weights, training)
    with report.section("CLIP"):
        check_clip(report, cfg, model, weights)
    if training:
        with report.section("training"):
            check_settings(report, cfg, model, trained_words, args.num_gpus)
            check_disk(report, cfg, model)
    for name in dict.fromkeys(cfg.DATASETS.TRAIN):
        with report.section("training data", about=name):
            check_training_set(report, cfg, name, needed)
    before = report.count(ERROR)
    for name in dict.fromkeys(former_sets(cfg, training)):
        with report.section("former training data", about=name):
            check_training_set(report, with_replay_mapper(cfg), name, ERROR)
    if training and cfg.FINETUNE.METHOD and report.count(ERROR) == before:  # it would name missing data once more
        with report.section("fine-tuning"):
            check_finetuning(scale_to_world_size(cfg, max(args.num_gpus, 1)), world_size=max(args.num_gpus, 1))
            report.add(OK, f"FINETUNE.METHOD {cfg.FINETUNE.METHOD} can start")
    for name in dict.fromkeys(cfg.DATASETS.TEST):
        with report.section("test data", about=name):
            check_test_set(report, cfg, name)
    with report.section("test data"):
        distinct_datasets(cfg.DATASETS.TEST)
    with report.section("evaluation"):
        check_evaluation(report, cfg, training)
    with report.section("data in full"):
        name_next_check(report, cfg, training)
    return report


def former_sets(cfg: CfgNode, training: bool) -> tuple[str, ...]:
    """The data sets whose images a fine-tuning would show again."""
    return tuple(cfg.FINETUNE.REPLAY_DATASETS) if training and cfg.FINETUNE.METHOD == "replay" else ()


# ---- config ----


def check_config(report: Report, path: str, overrides: Sequence[str]) -> CfgNode | None:
    """The config as far as it can be read; keys that cannot are findings and stay at their defaults."""
    try:
        cfg = load_config(path, overrides)
    except ValueError as error:
        cfg = _load_what_is_right(report, path, overrides)
        if not report.count(ERROR):
            report.add(ERROR, str(error))
    else:
        report.add(OK, f"{path}: {len(overrides) // 2} keys overridden" if overrides else f"{path}: read")
    if cfg is not None:
        reasons: dict[str, list[str]] = {}
        for key, why in keys_without_effect(path).items():
            reasons.setdefault(why, []).append(key)
        for why, keys in reasons.items():
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            report.add(NOTE, f"without effect, because {why}: {', '.join(keys[:3])}{more}")
    return cfg


def _load_what_is_right(report: Report, path: str, overrides: Sequence[str]) -> CfgNode | None:
    """Tries every key by itself, so that all wrong ones are named and not the first alone."""
    try:
        pairs = list(_pairs(find_config(path)))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # not a matter of keys; the error of load_config says what is wrong
    if len(overrides) % 2:
        report.add(ERROR, f"KEY VALUE come in pairs, got {len(overrides)} words: {' '.join(overrides)}")
    pairs += [("command line", *pair) for pair in zip(overrides[::2], overrides[1::2])]
    right: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.yaml")
        empty.write_text("")
        for place, key, value in pairs:
            try:
                load_config(empty, [key, value])
            except ValueError as error:
                report.add(ERROR, f"{place}: {str(error).removeprefix('command line: ')}")
            else:
                right += [key, value]
        return load_config(empty, right)


def _pairs(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(file, key, value) of a YAML file, those of its bases first."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: no mapping of keys")
    bases = content.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _pairs(path.parent / Path(base).expanduser())
    for key, value in flatten(content).items():
        yield str(path), key, value


# ---- machine ----


def check_machine(report: Report, cfg: CfgNode) -> None:
    """The device that the config names is there."""
    try:
        device = resolve_device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise InputError(f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', which is no device of torch: {error}") from error
    name = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    report.add(OK, f"device {device}{name}, torch {torch.__version__}, open_clip {version('open_clip_torch')}")
    with report.attempt():
        engine = select_engine(cfg.MODEL.MSDA_ENGINE, device)
        auto = engine == "auto"
        engine = automatic_engine(device.type) if auto else engine
        text = f"deformable attention runs on the engine '{engine}'{' (the fastest of those that can)' if auto else ''}"
        report.add(OK, text)
        if auto and (advice := build_advice(device)):
            report.add(NOTE, advice)
    if cfg.FLOAT32_PRECISION:
        lookup("FLOAT32_PRECISION", cfg.FLOAT32_PRECISION, dict.fromkeys(("highest", "high", "medium")))


def check_output_folder(report: Report, cfg: CfgNode) -> None:
    """OUTPUT_DIR can be written; it is not made."""
    folder = Path(cfg.OUTPUT_DIR).absolute()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    remedy = "choose a folder that you may write: OUTPUT_DIR /some/folder"
    if not there.is_dir():
        return report.add(ERROR, f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' is no folder: {there} is a file", remedy)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return report.add(ERROR, f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be written ({error.strerror or error})", remedy)
    report.add(OK, f"OUTPUT_DIR {folder} can be written")
    if (folder / "last_checkpoint").is_file():
        report.add(
            NOTE, "OUTPUT_DIR holds the checkpoints of an earlier run", "--resume continues it; else they are replaced"
        )
    return None


# ---- model ----


def check_model(report: Report, cfg: CfgNode) -> FCCLIP | None:
    """The model as shapes only, or None when the config cannot be built."""
    shapes = cfg.clone()
    shapes.defrost()
    shapes.MODEL.DEVICE, shapes.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS = "meta", ""
    anything = Vocabulary.from_names("anything")
    try:
        with torch.device("meta"):
            model = build_model(shapes, train_vocabulary=anything, test_vocabulary=anything)
    except (ValueError, OSError) as error:
        _name_all_faults(report, shapes)
        if not report.findings or report.findings[-1].section != "model":
            report.add(ERROR, str(error))
        return None
    counts = Counter()
    for weight in model.parameters():
        counts["trainable" if weight.requires_grad else "frozen"] += weight.numel()
    report.add(
        OK,
        f"{cfg.MODEL.META_ARCHITECTURE} on {cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME}: {sum(counts.values()) / 1e6:,.1f} M "
        f"parameters, of which {counts['trainable'] / 1e6:,.1f} M learn; "
        f"{cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES} queries",
    )
    return model


def _name_all_faults(report: Report, cfg: CfgNode) -> None:
    """Builds part after part, so that the fault of one does not hide those of the others."""
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    for kind, name, known in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, parts.META_ARCHITECTURES),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, parts.BACKBONES),
        ("MODEL.SEM_SEG_HEAD.NAME", head.NAME, parts.SEM_SEG_HEADS),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", head.PIXEL_DECODER_NAME, parts.PIXEL_DECODERS),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", former.TRANSFORMER_DECODER_NAME, parts.TRANSFORMER_DECODERS),
    ):
        with report.attempt():
            lookup(kind, name, known)
    backbone: CLIPBackbone | None = None
    with torch.device("meta"):
        with report.attempt():
            backbone = parts.build_clip_backbone(cfg)
        builders: list[Callable[[], Any]] = [
            lambda: parts.build_criterion(cfg),
            lambda: parts.build_inference_settings(cfg),
            lambda: parts.check_decoder_input(cfg),
        ]
        if backbone is not None:
            builders += [
                lambda: parts.check_embed_dim(cfg, backbone),
                lambda: parts.build_pixel_decoder(cfg, backbone),
                lambda: parts.build_mask_decoder(cfg, backbone),
            ]
        for build in builders:
            with report.attempt():
                build()


# ---- words ----


def check_same_classes(
    report: Report, cfg: CfgNode, model: FCCLIP | None, weights: WeightFile | None, training: bool
) -> Vocabulary | None:
    """Vocabularies of all data sets, the training one first, which is returned; those that the weights know."""
    needed = ERROR if training else WARNING
    trained: Vocabulary | None = None
    former = former_words(report, cfg, weights, training)
    context = int(model.backbone.clip_model.positional_embedding.shape[0]) if model is not None else 77
    if not cfg.DATASETS.TRAIN:
        report.add(ERROR, "DATASETS.TRAIN is empty; its data set decides which classes are seen", "name a data set")
    sets: list[Dataset] = []  # to train on
    found: dict[str, list[str]] = {}  # what a vocabulary is -> data sets
    ours: list[str] = []
    cut: dict[str, int] = {}
    names = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *former_sets(cfg, training)))
    for index, name in enumerate(names):
        with report.attempt():
            dataset = get_dataset(name)
            vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
            if name in cfg.DATASETS.TRAIN:
                sets.append(dataset)
            if index == 0 and cfg.DATASETS.TRAIN:
                trained = vocabulary
            found.setdefault(_described(vocabulary, trained, former), []).append(name)
            if dataset.vocabulary in PUBLISHED_FILES and not vocabulary.is_published:
                ours.append(name)
            cut |= long_prompts(vocabulary, context)
    for text, names in found.items():
        report.add(OK, f"{', '.join(names)}: {text}")
    if ours:
        report.add(
            NOTE,
            f"{', '.join(ours)}: not the published words, so numbers cannot be compared with published ones",
            "put the published files into a folder and name it in MODEL.FC_CLIP.VOCABULARIES (datasets/README.md)",
        )
    for word, tokens in cut.items():
        report.add(
            WARNING,
            f"the longest prompt of '{word}' has {tokens} tokens, but CLIP reads {context}: the rest is cut off",
            "shorten the word",
        )
    if sets:
        with report.attempt(needed):
            joined(sets)
    if weights is not None and trained is not None:
        with report.attempt():
            _compare_words(report, cfg, weights, trained, former, training)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if trained is not None and len(trained) != classes and needed == WARNING:  # training has a check of its own
        report.add(
            NOTE,
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {classes}, the training vocabulary has {len(trained)}; evaluation does "
            "not read the key",
        )
    return trained


def former_words(report: Report, cfg: CfgNode, weights: WeightFile | None, training: bool) -> Vocabulary | None:
    """Words that count as seen beside those of DATASETS.TRAIN: of a fine-tuning's start, or of fine-tuned weights."""
    if weights is None:
        return None
    with report.attempt():
        if training and cfg.FINETUNE.METHOD:
            with contextlib.suppress(ValueError, OSError):  # the section on fine-tuning says why
                return former_vocabulary(cfg, weights.rest)
        elif not training and FORMER in weights.rest:
            return trained_vocabulary(weights.rest)
    return None


def _described(vocabulary: Vocabulary, trained: Vocabulary | None, former: Vocabulary | None) -> str:
    words = sum(map(len, vocabulary.synonyms))
    origin = "published" if vocabulary.is_published else "of fcclip"
    text = f"'{vocabulary.name}' ({origin}), {len(vocabulary)} classes, {words} words"
    if trained is None or trained is vocabulary:
        return text
    seen = int(vocabulary.seen_by(trained if former is None else former.joined(trained)).sum())
    return f"{text}; {seen} classes seen in training, {len(vocabulary) - seen} unseen"


def long_prompts(vocabulary: Vocabulary, context: int) -> dict[str, int]:
    """word -> tokens of its longest prompt, for words whose prompts are longer than the context of the text tower."""
    words = list(dict.fromkeys(word for synonyms in vocabulary.synonyms for word in synonyms))
    lengths = _token_counts(prompts(["word"]), context)
    longest = TEMPLATES[lengths.index(max(lengths))]
    counts = _token_counts([longest.format(word) for word in words], context)
    return {word: count for word, count in zip(words, counts) if count > context}


def _token_counts(texts: Sequence[str], context: int) -> list[int]:
    """Tokens of each text with start and end, up to eight times the context."""
    tokens = open_clip.tokenize(list(texts), context_length=8 * context)
    return (tokens.argmax(dim=-1) + 1).tolist()  # the end has the largest id


# ---- weights ----


def check_weights(report: Report, cfg: CfgNode, model: FCCLIP | None, training: bool) -> WeightFile | None:
    """MODEL.WEIGHTS: readable, all keys and shapes those of the model, and made for the same settings."""
    name = cfg.MODEL.WEIGHTS
    if not name:
        if training:
            report.add(NOTE, "MODEL.WEIGHTS is empty: training starts with freshly initialised heads")
        else:
            report.add(ERROR, "nothing to evaluate: MODEL.WEIGHTS is empty", "--weights FILE, or MODEL.WEIGHTS FILE")
        return None
    path = resolve_file(name, what="MODEL.WEIGHTS")
    file = read_weight_file(path, what="MODEL.WEIGHTS")
    held = sum(key.startswith(FROZEN_PREFIX) for key in file.tensors)
    size = _size(path.stat().st_size)
    report.add(OK, f"{name}: {file.kind}, {size}, {len(file.tensors)} tensors, {held} of them CLIP's")
    if model is not None:
        with report.attempt(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that tensors without values are not written to
            _check_fit(report, file, model, name, training)
    _compare_configs(report, cfg, file, training)
    return file


def _check_fit(report: Report, file: WeightFile, model: FCCLIP, name: str, training: bool) -> None:
    """The heads of the file in those of the model, by the code that loads; the model has no values to overwrite."""
    heads = nn.Module()
    heads.backbone = nn.Module()  # the CLIP has a section of its own
    for part in ("sem_seg_head", "void_embedding", "criterion"):
        heads.add_module(part, getattr(model, part))
    if training and is_mask2former(file.tensors):
        start = initialise_from(heads, file.tensors, versions=file.versions, source=name)
        report.add(OK, f"a start from Mask2Former: {len(start.taken)} tensors taken, {len(start.fresh)} stay fresh")
        return
    own = {key: value for key, value in file.tensors.items() if not key.startswith(FROZEN_PREFIX)}
    load_state(heads, own, source=name)
    report.add(OK, "keys and shapes are those of the model")


def _compare_configs(report: Report, cfg: CfgNode, file: WeightFile, training: bool) -> None:
    """Settings stored beside the weights against those of this config."""
    stored = file.rest.get("config")
    with contextlib.suppress(yaml.YAMLError):
        stored = yaml.safe_load(stored) if isinstance(stored, str) else stored
    if not isinstance(stored, Mapping):
        text = f"it was trained with {stored}" if stored else "it does not say with which settings it was trained"
        return report.add(NOTE, text)
    stored, here = flatten(stored), flatten(cfg)
    levels = {"changes_meaning": WARNING if training else ERROR, "changes_shapes": WARNING}
    if not file.rest.get("clip"):  # else that fingerprint is compared instead of names
        levels["chooses_clip"] = WARNING
    for fact, level in levels.items():
        for key in keys_that(fact):
            there = stored.get(key)
            if there is not None and there != here[key]:
                text = f"{key} is {here[key]!r}, but the weights were trained with {there!r}"
                report.add(level, text, f"{key} {there!r}")


def _compare_words(
    report: Report, cfg: CfgNode, file: WeightFile, trained: Vocabulary, former: Vocabulary | None, training: bool
) -> None:
    """The vocabulary stored beside the weights against that of DATASETS.TRAIN, which decides what counts as seen."""
    if training and cfg.FINETUNE.METHOD:
        if former is not None:
            new = int((~trained.seen_by(former)).sum())
            report.add(
                OK,
                f"the weights know {len(former)} classes ('{former.name}'), which stay seen; {new} of the "
                f"{len(trained)} classes of DATASETS.TRAIN are new to them",
            )
        return
    stored = file.rest.get("vocabulary")
    if not stored:
        return
    remedy = "set DATASETS.TRAIN and MODEL.FC_CLIP.VOCABULARIES as in the training"
    if training:
        remedy += "; for a fine-tuning set FINETUNE.METHOD"
    if former is not None:  # of fine-tuned weights: all that they know counts as seen
        new = [words for words, known in zip(trained.synonyms, trained.seen_by(former).tolist()) if not known]
        if not new:
            report.add(OK, f"the weights were fine-tuned: all {len(former)} classes that they know count as seen")
            return
        examples = "; ".join(", ".join(words[:3]) for words in new[:3])
        text = f"{len(new)} classes of DATASETS.TRAIN ('{trained.name}') are unknown to the weights ({examples})"
        report.add(WARNING, f"{text}: they would count as seen", remedy)
        return
    if isinstance(stored, str):
        if stored != trained.name:
            text = f"trained on the words '{stored}', but those of DATASETS.TRAIN are '{trained.name}'"
            report.add(WARNING, f"{text}: seen and unseen classes would be told wrongly", remedy)
        return
    if stored.get("sha256") == trained.hash:
        report.add(OK, f"trained on the words of DATASETS.TRAIN, '{trained.name}'")
        return
    theirs = {tuple(words) for words in stored.get("classes", ())}
    ours = set(trained.synonyms)
    lost, new = sorted(theirs - ours), sorted(ours - theirs)
    examples = "; ".join(", ".join(words[:3]) for words in (lost + new)[:3])
    report.add(
        WARNING,
        f"trained on other words ('{stored.get('name')}', {len(theirs)} classes) than those of DATASETS.TRAIN "
        f"('{trained.name}', {len(ours)} classes): {len(lost)} classes are no more, {len(new)} are new ({examples}); "
        "seen and unseen classes would be told wrongly",
        remedy,
    )


# ---- CLIP ----


def check_clip(report: Report, cfg: CfgNode, model: FCCLIP | None, weights: WeightFile | None) -> None:
    """The CLIP's weights: there, readable, of the architecture, with a known activation, and the one trained on."""
    name, pretrained = cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME, cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS
    if model is None:
        return report.add(NOTE, "not looked at, because the model cannot be built")
    wanted = model.backbone.clip_model.state_dict()
    fingerprint = weights.rest.get("clip") if weights is not None else None
    held = clip_tensors(weights.tensors) if weights is not None else {}
    complete = bool(held) and _compare_clip(report, held, wanted, "MODEL.WEIGHTS", partly=True)
    if not pretrained:
        _without_clip_file(report, name, held, wanted, complete=complete, trained_on_one=bool(fingerprint))
    else:
        _check_clip_file(report, cfg, model, fingerprint, compare=not held)
    if any(not key.startswith("visual.") for key in held):
        adopt_activation(fingerprint, model, source="MODEL.WEIGHTS")
    return None


def _check_clip_file(
    report: Report, cfg: CfgNode, model: FCCLIP, fingerprint: Mapping | str | None, *, compare: bool
) -> None:
    """The weights that the config names; with `compare` they must be those of the fingerprint."""
    fc_clip, backbone = cfg.MODEL.FC_CLIP, model.backbone
    name, pretrained = fc_clip.CLIP_MODEL_NAME, fc_clip.CLIP_PRETRAINED_WEIGHTS
    path, quick_gelu = find_clip(name, pretrained)
    tensors: dict[str, Tensor] = {}
    if path is None:
        report.add(
            WARNING,
            f"{name}: the weights of tag '{pretrained}' are not on this machine; the run would download them",
            f"without a network, download them elsewhere and set {_CLIP_KEY} to the file",
        )
        _compare_names(report, cfg, fingerprint)
    else:
        tensors, kind, said = read_clip(path)
        quick_gelu = said if quick_gelu is None else quick_gelu
    if backbone.activation_source == "default" and quick_gelu is not None:
        set_quick_gelu(backbone, quick_gelu, source=f"'{pretrained}' says so")
    if backbone.activation_source == "default" and backbone.needs_activation:
        report.add(
            ERROR,
            f"nothing says whether the ResNet weights in '{pretrained}' are OpenAI's, whose text tower has QuickGELU",
            "set MODEL.FC_CLIP.QUICK_GELU to 'on' (OpenAI's weights) or 'off' (all others)",
        )
    if tensors and _compare_clip(report, tensors, backbone.clip_model.state_dict(), f"'{pretrained}'", partly=False):
        report.add(OK, f"{name}: the weights '{pretrained}' ({kind}) fit")
        if fingerprint and compare:
            _compare_fingerprint(report, model, fingerprint, path, pretrained)


def _without_clip_file(
    report: Report,
    name: str,
    held: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    complete: bool,
    trained_on_one: bool,
) -> None:
    """The findings where the config names no CLIP weights and MODEL.WEIGHTS holds all, some or none."""
    remedy = f"set {_CLIP_KEY} to the CLIP of the training"
    if complete:
        report.add(OK, f"{name}: its weights are those in MODEL.WEIGHTS")
    elif held:
        text = f"MODEL.WEIGHTS holds {len(held)} of the CLIP's {len(wanted)} tensors, and {_CLIP_KEY} is empty"
        report.add(ERROR, f"{text}: the others would be random", remedy)
    elif trained_on_one:
        report.add(
            ERROR, f"{name}: {_CLIP_KEY} is empty, so MODEL.WEIGHTS would be put on a CLIP of random weights", remedy
        )
    else:
        remedy = f"set {_CLIP_KEY} to a tag of open_clip or to a file"
        report.add(WARNING, f"{name}: random weights, which recognise nothing", remedy)


def find_clip(name: str, pretrained: str) -> tuple[Path | None, bool | None]:
    """The file of CLIP weights, None when only a download would bring it; and whether their tag says QuickGELU.

    Raises:
        ValueError: no tag of this architecture.
        FileNotFoundError: no such file.
    """
    if Path(pretrained).suffix in _CLIP_SUFFIXES or "/" in pretrained:
        return resolve_file(pretrained, what=_CLIP_KEY), None
    known = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in known:
        raise InputError(
            f"{_CLIP_KEY}: '{pretrained}' is no open_clip tag of '{name}' (its tags: {', '.join(known) or 'none'}) and "
            f"no weights file ({', '.join(_CLIP_SUFFIXES)})"
        )
    return cached_clip(open_clip.get_pretrained_cfg(name, pretrained)), tag_has_quick_gelu(name, pretrained)


def cached_clip(tag: Mapping[str, Any]) -> Path | None:
    """The file behind an open_clip tag where an earlier download has put it, or None."""
    if tag.get("file"):
        return Path(tag["file"])
    repository, file_name = os.path.split(tag.get("hf_hub", ""))
    names = (Path(file_name).with_suffix(".safetensors").name, file_name) if file_name else _HUB_FILES
    for one in names if repository else ():
        found = huggingface_hub.try_to_load_from_cache(repository, one)
        if isinstance(found, str):
            return Path(found)
    path = Path("~/.cache/clip").expanduser() / os.path.basename(tag.get("url", ""))
    return path if path.is_file() else None


def read_clip(path: Path) -> tuple[dict[str, Tensor], str, bool | None]:
    """The CLIP's tensors in a file, its kind, and whether it says QuickGELU; of safetensors only shapes are read.

    Raises:
        ValueError: unreadable or unsafe, or without a CLIP.
    """
    try:
        if path.suffix != ".safetensors":
            raise SafetensorError
        tensors, notes, kind = *_header(path), "safetensors"
    except SafetensorError:  # this reader also says what is wrong with a file
        file = read_weight_file(path, what="CLIP weights")
        tensors, notes, kind = file.tensors, file.rest.get("clip"), file.kind
    if any(key.startswith("sem_seg_head.") for key in tensors) and not clip_tensors(tensors):
        raise InputError(
            f"'{path}' holds a segmenter without its CLIP: it belongs in MODEL.WEIGHTS, not in {_CLIP_KEY}"
        )
    said = notes.get("quick_gelu") if isinstance(notes, Mapping) else None
    bare = {key: value for key, value in tensors.items() if key not in _CLIP_CONSTANTS}
    return clip_tensors(tensors) or bare, kind, True if kind == "torchscript" else said


def _header(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(tensors without values, the stored fingerprint) of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        prefix = "module." if all(name.startswith("module.") for name in names) else ""
        shapes = {name.removeprefix(prefix): file.get_slice(name).get_shape() for name in names}
        notes = (file.metadata() or {}).get("clip", "null")
    with contextlib.suppress(json.JSONDecodeError):
        notes = json.loads(notes)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, notes


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the CLIP in a whole model, under its own names, without constants."""
    found = {key.removeprefix(FROZEN_PREFIX): one for key, one in tensors.items() if key.startswith(FROZEN_PREFIX)}
    return {key: value for key, value in found.items() if key not in _CLIP_CONSTANTS}


def _compare_clip(
    report: Report, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, *, partly: bool
) -> bool:
    """Whether the tensors are a whole CLIP of this architecture; with `partly` some may be missing."""
    wrong = [key for key in wanted if key in tensors and wanted[key].shape != tensors[key].shape]
    unknown = [key for key in tensors if key not in wanted]
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    faults = {"of another shape": wrong, "unknown to it": unknown, "missing": [] if partly else missing}
    named = [
        f"{len(keys)} {what} (e.g. {_with_shapes(keys[0], tensors, wanted)})" for what, keys in faults.items() if keys
    ]
    if named:
        report.add(
            ERROR,
            f"the CLIP in {source} is not of the architecture that MODEL.FC_CLIP.CLIP_MODEL_NAME names: "
            f"{', '.join(named)}",
            "set MODEL.FC_CLIP.CLIP_MODEL_NAME to the architecture of the weights",
        )
    return not named and not missing


def _with_shapes(key: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    shapes = [(place, tuple(one[key].shape)) for place, one in (("file", tensors), ("model", wanted)) if key in one]
    return f"{key}: {', '.join(f'{place} {shape}' for place, shape in shapes)}"


class _Values(nn.Module):
    """A state dict in the place of a model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors."""
        return self.tensors


def _compare_fingerprint(report: Report, model: FCCLIP, stored: Mapping | str, path: Path, pretrained: str) -> None:
    """The CLIP that the weights were trained on against the one they would be put on, by a sample of its values."""
    stored = {"weights": stored} if isinstance(stored, str) else stored
    tensors = read_weight_file(path, what="CLIP weights").tensors
    tensors = clip_tensors(tensors) or {key: one for key, one in tensors.items() if key not in _CLIP_CONSTANTS}
    here = clip_weights_hash(_Values({FROZEN_PREFIX + key: value for key, value in tensors.items()}))
    there, quick_gelu = str(stored.get("weights")), model.backbone.quick_gelu
    if here != there:
        known = f" ({stored['architecture']}, '{stored.get('pretrained')}')" if "architecture" in stored else ""
        text = f"MODEL.WEIGHTS were trained on another CLIP{known} than '{pretrained}'"
        remedy = f"set MODEL.FC_CLIP.CLIP_MODEL_NAME and {_CLIP_KEY} to the CLIP of the training"
        report.add(ERROR, f"{text}: fingerprint {there[:12]}, here {here[:12]}", remedy)
    elif stored.get("quick_gelu", quick_gelu) != quick_gelu:
        words = ("with", "without") if quick_gelu is False else ("without", "with")
        text = f"MODEL.WEIGHTS were trained on this CLIP {words[0]} QuickGELU, but here it is built {words[1]} it"
        report.add(ERROR, text, f"MODEL.FC_CLIP.QUICK_GELU {'off' if quick_gelu else 'on'}")
    else:
        report.add(OK, "it is the CLIP that MODEL.WEIGHTS were trained on")


def _compare_names(report: Report, cfg: CfgNode, stored: Mapping | str | None) -> None:
    """What is left to compare while the CLIP's weights are not here."""
    if not isinstance(stored, Mapping):
        return
    fc_clip = cfg.MODEL.FC_CLIP
    for key, there in (
        ("CLIP_MODEL_NAME", stored.get("architecture")),
        ("CLIP_PRETRAINED_WEIGHTS", stored.get("pretrained")),
    ):
        here = os.path.basename(fc_clip[key])
        if there and there != here:
            report.add(
                WARNING,
                f"MODEL.WEIGHTS were trained with MODEL.FC_CLIP.{key} '{there}', the config says '{here}'",
                f"MODEL.FC_CLIP.{key} {there}",
            )


# ---- training ----


def check_settings(
    report: Report, cfg: CfgNode, model: FCCLIP | None, trained: Vocabulary | None, num_gpus: int
) -> None:
    """What SOLVER, INPUT and DATALOADER ask for exists and goes together."""
    scaled = cfg
    with report.attempt():
        scaled = scale_to_world_size(cfg, max(num_gpus, 1))
    checks: list[Callable[[], Any]] = [
        lambda: build_multiplier(scaled),
        lambda: build_gradient_clip(cfg),
        lambda: build_train_mapper(cfg),
        lambda: lookup("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS),
    ]
    with contextlib.suppress(ValueError, RuntimeError):  # the section on the machine says so
        device = resolve_device(cfg.MODEL.DEVICE)
        checks.append(lambda: amp_dtype(cfg, device))
    if model is not None:
        checks.append(lambda: build_optimizer(cfg, model))
    if trained is not None:
        checks.append(lambda: check_training(scaled, trained, world_size=max(num_gpus, 1)))
    before = report.count(ERROR)
    for one in checks:
        with report.attempt():
            one()
    if report.count(ERROR) == before:
        solver = scaled.SOLVER
        report.add(
            OK,
            f"{solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH} images on {max(num_gpus, 1)} process(es), "
            f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}, {cfg.INPUT.DATASET_MAPPER_NAME}",
        )


def check_disk(report: Report, cfg: CfgNode, model: FCCLIP | None) -> None:
    """Room for the checkpoints of the run: weights and both moments of the optimiser, in float32."""
    if model is None:
        return
    solver = cfg.SOLVER
    sizes = {True: 0, False: 0}  # learns -> bytes
    for weight in model.parameters():
        sizes[weight.requires_grad] += weight.numel() * 4
    whole = solver.CHECKPOINT_FULL or not cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS
    each = 3 * sizes[True] + (sizes[False] if whole else 0)
    periodic = solver.MAX_ITER // solver.CHECKPOINT_PERIOD if solver.CHECKPOINT_PERIOD > 0 else 0
    count = min(periodic, solver.CHECKPOINT_KEEP or periodic) + 2  # the final one, and one that is being written
    folder = Path(cfg.OUTPUT_DIR).absolute()
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.is_dir())).free
    text = f"{count} checkpoints of {_size(each)}; {_size(free)} are free in OUTPUT_DIR"
    level = OK if free > count * each else WARNING if free > each else ERROR
    report.add(level, text, "" if level == OK else "free some, or lower SOLVER.CHECKPOINT_KEEP")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


# ---- data sets ----


def check_training_set(report: Report, cfg: CfgNode, name: str, needed: str) -> None:
    """Folders and annotations are there, and one image becomes a training sample."""
    dataset = _dataset(report, name)
    if dataset is None:
        return
    records = read_records(report, dataset, ("panoptic_json", "image_root", "panoptic_root"), needed)
    if not records:
        return
    record = records[0]
    with report.attempt(needed):
        sample = build_train_mapper(cfg, dataset.metadata)(record, np.random.default_rng(0))
        height, width = sample["image"].shape[1:]
        made = f"the first becomes a sample of {height} x {width} with {len(sample['targets'])} segments"
        report.add(OK, f"{len(records):,} images; {made}")
    files = [key for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name") if key in record]
    spot_check(report, records, files, needed)


def check_test_set(report: Report, cfg: CfgNode, name: str) -> None:
    """Folders, annotations and evaluators are there, and ground truth of one image fits it."""
    dataset = _dataset(report, name)
    if dataset is None:
        return
    kind = dataset.metadata["evaluator_type"]
    test = cfg.MODEL.MASK_FORMER.TEST
    on = {"panoptic": test.PANOPTIC_ON, "instance": test.INSTANCE_ON, "semantic": test.SEMANTIC_ON}
    tasks = [task for task in EVALUATORS.get(kind, ()) if on[task]]
    idle = [
        task for task, wanted in on.items() if wanted and task not in EVALUATORS.get(kind, ()) and kind in EVALUATORS
    ]
    if idle:
        report.add(
            NOTE,
            f"{', '.join(idle)} outputs are computed and not evaluated on this kind of data ({kind})",
            " ".join(f"MODEL.MASK_FORMER.TEST.{task.upper()}_ON False" for task in idle),
        )
    places = ["panoptic_json", "image_root"]
    files = ["file_name"]
    of_instances, of_labels = ("json_file", None), ("sem_seg_root", "sem_seg_file_name")
    if kind == CITYSCAPES:  # both are evaluated with the files of instance ids beside the label maps
        of_instances = of_labels = ("sem_seg_root", _INSTANCE_IDS)
    for task, (place, key) in {
        "panoptic": ("panoptic_root", "pan_seg_file_name"),
        "instance": of_instances,
        "semantic": of_labels,
    }.items():
        if task in tasks:
            places.append(place)
            files += [key] if key else []
    records = read_records(report, dataset, dict.fromkeys(places), ERROR)
    if records and _INSTANCE_IDS in files:
        records = [{**record, _INSTANCE_IDS: instance_ids_file(record)} for record in records]
    files = [key for key in dict.fromkeys(files) if records and key in records[0]]
    before = report.count(ERROR)
    if records is not None or kind not in EVALUATORS or not tasks:
        with report.attempt():
            build_evaluators(cfg, dataset, modes=("check",))
    if not records or report.count(ERROR) > before:
        return
    with report.attempt():
        sample = build_test_mapper(cfg)(records[0])
        size = (sample["height"], sample["width"])
        check_truth(report, dataset, records[0], files, size)
        height, width = sample["image"].shape[1:]
        tested = f"the first, {size[0]} x {size[1]} as its ground truth, is tested at {height} x {width}"
        report.add(OK, f"{len(records):,} images; {tested}; evaluated for {', '.join(tasks)} ({kind})")
    spot_check(report, records, files, ERROR)


def _dataset(report: Report, name: str) -> Dataset | None:
    with contextlib.suppress(ValueError, FileNotFoundError):  # the section on words says that there is none
        return get_dataset(name)
    report.add(NOTE, "not looked at, because it is no data set")
    return None


def read_records(report: Report, dataset: Dataset, places: Iterable[str], level: str) -> list[dict] | None:
    """The records of a data set, or None with findings: everything missing at once, or what is wrong with a file."""
    wanted = [Path(dataset.metadata[place]) for place in places if dataset.metadata.get(place)]
    missing = [path for path in wanted if not path.exists()]
    root = root_folder()
    if missing:
        found = "none" if len(missing) == len(wanted) else f"only {len(wanted) - len(missing)}"
        named = ", ".join(map(_below_root, missing))
        place = os.environ.get("DETECTRON2_DATASETS")
        where = f"$DETECTRON2_DATASETS, {root}" if place else f"'{root}' ($DETECTRON2_DATASETS is not set)"
        if not root.is_dir():
            where += ", which is no folder"
        where, remedy = f"below {where}", WHERE_DATA_IS
        described = dataset.metadata.get("yaml_file")
        if described:
            where = f"where {described} says"
            remedy = f"paths in it are relative to its folder, {Path(described).absolute().parent}"
        report.add(level, f"{found} of {len(wanted)} files and folders found {where}; missing: {named}", remedy)
        return None
    with report.attempt(level):
        records = dataset.annotations()
        if not records:
            raise InputError(f"data set '{dataset.name}' has no records: {', '.join(map(str, wanted))}")
        return records
    return None


def _below_root(path: str | Path) -> str:
    path, root = Path(path), root_folder()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def check_truth(
    report: Report, dataset: Dataset, record: Mapping[str, Any], files: Sequence[str], size: tuple[int, int]
) -> None:
    """Ground truth of one image: of its size, with ids and classes that are known.

    Raises:
        ValueError, OSError: a file that cannot be read.
    """
    ground_truth = GroundTruth(record)
    truths = {}
    if "pan_seg_file_name" in files:
        known = {segment["id"] for segment in record["segments_info"]} | {0}
        truths["pan_seg_file_name"] = (ground_truth.id_map, known, "segment ids that its annotation does not list")
    if "sem_seg_file_name" in files:
        known = {*range(len(dataset.metadata["stuff_classes"])), dataset.metadata["ignore_label"]}
        truths["sem_seg_file_name"] = (ground_truth.labels, known, "labels that are no class")
    if _INSTANCE_IDS in files:
        ids = read_instance_ids(ground_truth)  # refuses ids that Cityscapes does not have
        truths[_INSTANCE_IDS] = (ids, {*np.unique(ids).tolist()}, "")
    for key, (values, known, what) in truths.items():
        if values.shape != size:
            shapes = [f"{height} x {width}" for height, width in (values.shape, size)]
            text = f"{record[key]} is {shapes[0]} (height x width), its image {shapes[1]}"
            report.add(ERROR, text, "prepare the ground truth again for this image")
        strange = sorted(set(np.unique(values).tolist()) - known)
        if strange:
            report.add(ERROR, f"{record[key]} has {what}: {strange[:5]}", "prepare the ground truth again")


def spot_check(report: Report, records: Sequence[Mapping[str, Any]], files: Sequence[str], level: str) -> None:
    """Looks for the files of some records, from the first to the last."""
    step = max(1, (len(records) - 1) // (_SPOT_CHECKS - 1))
    chosen = [*records[::step], records[-1]]
    for key in files:
        names = dict.fromkeys(record[key] for record in chosen)
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            report.add(
                level,
                f"{len(missing)} of {len(names)} files that were looked for do not exist, e.g. {missing[0]}",
                "the data set is not complete: unpack or prepare it again",
            )


# ---- evaluation ----


def check_evaluation(report: Report, cfg: CfgNode, training: bool) -> None:
    """What TEST asks for."""
    if not cfg.DATASETS.TEST:
        text, remedy = "DATASETS.TEST is empty: nothing is evaluated", "name data sets"
        return report.add(NOTE if training else ERROR, text, remedy)
    with report.attempt():
        build_test_mapper(cfg)
    if cfg.TEST.BATCH_SIZE < 1:
        report.add(ERROR, f"TEST.BATCH_SIZE must be at least 1, got {cfg.TEST.BATCH_SIZE}", "TEST.BATCH_SIZE 1")
    wrong = [row for row in cfg.TEST.EXPECTED_RESULTS if not isinstance(row, (list, tuple)) or len(row) != 4]
    if wrong:
        report.add(ERROR, f"TEST.EXPECTED_RESULTS: {wrong[0]!r}", "a row is [task, metric, value, tolerance]")
    if cfg.TEST.AUG.ENABLED:
        variants = build_variants(cfg)
        report.add(OK, f"TEST.AUG: a second evaluation with {len(variants)} variants of each image")
        if training:
            report.add(NOTE, "TEST.AUG.ENABLED has an effect with --eval-only alone")
    report.add(
        OK,
        f"shorter side {cfg.INPUT.MIN_SIZE_TEST}, longer at most {cfg.INPUT.MAX_SIZE_TEST}; "
        f"{cfg.TEST.MODE}, alpha {cfg.MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_ALPHA:g}, "
        f"beta {cfg.MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_BETA:g}",
    )
    return None


# ---- what comes next ----


def name_next_check(report: Report, cfg: CfgNode, training: bool) -> None:
    """The program that looks at every file of these data sets."""
    names = []
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *former_sets(cfg, training), *cfg.DATASETS.TEST)):
        with contextlib.suppress(ValueError, FileNotFoundError):  # the section on words says that there is none
            get_dataset(name)
            names.append(name)
    if names:
        text = "this program looks at the annotations and a few images of each data set"
        report.add(NOTE, text, f"for every file: python tools/check_dataset.py {shlex.join(names)}")


# ---- printing ----


def print_report(report: Report, console: Console, seconds: float) -> None:
    """A list by section and one line that sums up; on a terminal with marks and colours, elsewhere a line a finding."""
    marked = console.is_terminal and console.encoding.startswith("utf")
    section = None
    for finding in report.findings:
        if finding.section != section:
            section = finding.section
            console.print(Text(section, style="bold"))
        sign, style = _MARKS[finding.level] if marked else (f"{_PLAIN[finding.level]:<5}", "")
        first, *more = finding.text.splitlines()
        lines = [(sign, first), *(("", f"  {line.strip()}") for line in more)]
        if finding.remedy:
            lines.append(("", f"{'→' if marked else '->'} {finding.remedy}"))
        grid = Table.grid(padding=(0, 1, 0, 0))
        for mark, line in lines:
            mark = f"  {mark:<{len(sign)}}"
            if console.is_terminal:  # long lines are wrapped beside the mark
                text = Text(line, style="dim" if finding.level == NOTE else "", overflow="fold")
                grid.add_row(Text(mark, style=style), text)
            else:
                console.print(Text(f"{mark} {line}"))
        if console.is_terminal:
            console.print(grid)
    counts = {level: report.count(level) for level in (ERROR, WARNING)}
    words = [f"{count} {level}{'s' if count != 1 else ''}" for level, count in counts.items() if count]
    verdict = ", ".join(words) or "everything fits together"
    style = "bold red" if counts[ERROR] else "yellow" if counts[WARNING] else "bold green"
    console.print(Text(f"{verdict} (checked in {seconds:.1f} s)", style=style if console.is_terminal else ""))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(main())
