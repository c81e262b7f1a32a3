"""The table of the model zoo: what each benchmark is evaluated with, what was published, and how far apart they are.

Published figures of each backbone and their tolerances stand in `published_results.json`; sizes of a data set's images,
their number and what tables call it stand in its `Dataset`.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from fcclip.config import load_config, with_values
from fcclip.data import Dataset, get_dataset
from fcclip.errors import InputError
from fcclip.evaluation.evaluators import build_evaluators
from fcclip.evaluation.predictions import deciding_settings
from fcclip.evaluation.results import HEADLINES, format_change, format_value
from fcclip.files import listed, read_json, without_nan
from fcclip.modeling import options_of
from fcclip.vocabulary import Vocabulary

WIDTH = 100  # columns of text
PASS, FAIL, NOT_COMPARABLE, NOT_PUBLISHED = "pass", "FAIL", "not comparable", "not published"
MIOU_RULE = (
    "mIoU is the mean over classes with ground truth (detectron2 since 2022-07-06); mIoU_union in results.json counts "
    "classes that are only predicted as 0 (before). Cityscapes: class IoU and AP of cityscapesScripts."
)
_QUICK_GELU = "MODEL.FC_CLIP.QUICK_GELU"

Modes = Mapping[str, Mapping[str, Mapping[str, float]]]  # mode -> task -> metric -> percent


@functools.lru_cache(maxsize=1)
def published_results() -> dict[str, Any]:
    """The content of `published_results.json`."""
    return read_json(Path(__file__).with_name("published_results.json"))


def benchmark(name: str) -> dict[str, Any] | None:
    """What was published about a data set; None: nothing."""
    return next((entry for entry in published_results()["benchmarks"] if entry["data_set"] == name), None)


@dataclass(frozen=True)
class Plan:
    """A data set and what it is evaluated with."""

    dataset: Dataset
    cfg: CfgNode  # with the settings of the data set
    num_images: int  # all that it has


def plan_sets(
    cfg: CfgNode, names: Sequence[str] | None = None, *, given: Collection[str] = ()
) -> tuple[list[Plan], dict[str, str]]:
    """What to evaluate, each data set with the settings it was published with; files are looked for, not evaluated.

    Args:
        cfg: the config of the model.
        names: data sets or YAML files; None: every benchmark for a model trained on its training set, else the
            config's DATASETS.TEST.
        given: config keys that the user set, which win over the published settings.

    Returns:
        The plans of what is there, and name -> where it was looked for of what is not.

    Raises:
        FileNotFoundError: a data set that was asked for is not there, or one lacks some of its files.
        ValueError: an unknown name, a broken file, twice the same name.
    """
    plans, missing = [], {}
    for name in default_sets(cfg) if names is None else names:
        dataset = get_dataset(name)
        if dataset.name in [plan.dataset.name for plan in plans]:
            raise InputError(f"data set '{dataset.name}' is asked for twice; leave one out")
        place = _place(dataset)
        if names is None and place and not Path(place).exists():
            missing[dataset.name] = place
            continue
        plans.append(Plan(dataset, set_config(cfg, dataset, given=given), len(dataset.records())))
        build_evaluators(plans[-1].cfg, dataset, modes=["check"])  # says now what it would say after an hour
    return plans, missing


def default_sets(cfg: CfgNode) -> list[str]:
    """The benchmarks of a model trained on COCO, in the order of the table; else the config's DATASETS.TEST."""
    if not cfg.DATASETS.TRAIN or cfg.DATASETS.TRAIN[0] == published_results()["training_set"]:
        return [entry["data_set"] for entry in published_results()["benchmarks"]]
    return list(cfg.DATASETS.TEST)


def set_config(cfg: CfgNode, dataset: Dataset, *, given: Collection[str] = ()) -> CfgNode:
    """The config with the published settings of a data set: sizes of the images, and which outputs are computed.

    Of a data set without published settings, outputs that it has no ground truth for are not computed.

    Args:
        cfg: the config of the model.
        dataset: the data set.
        given: config keys that stay as they are.
    """
    if benchmark(dataset.name) is not None:
        settings = published_settings(dataset)
    else:
        others = [head for head in ("panoptic", "instance", "semantic") if head not in dataset.evaluators]
        settings = {f"MODEL.MASK_FORMER.TEST.{head.upper()}_ON": False for head in others}
    return with_values(cfg, {key: value for key, value in settings.items() if key not in given})


def published_settings(dataset: Dataset) -> dict[str, Any]:
    """What a benchmark was published with: sizes of its images, an output for each column, keys of its own."""
    known = benchmark(dataset.name)
    tasks = {column["task"] for column in known["columns"].values()}
    outputs = {"panoptic": "panoptic_seg" in tasks, "instance": "segm" in tasks, "semantic": "sem_seg" in tasks}
    sizes = dict(zip(("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"), dataset.test_size))
    heads = {f"MODEL.MASK_FORMER.TEST.{head.upper()}_ON": is_on for head, is_on in outputs.items()}
    return heads | sizes | known.get("settings", {})


def _place(dataset: Dataset) -> str:
    """The file or folder that tells whether a data set is there ("": none does); a lack of others is an error."""
    keys = ("panoptic_json", "json_file", "sem_seg_root", "image_root")
    return next((dataset.metadata[key] for key in keys if dataset.metadata.get(key)), "")


# ---- comparison ----


def backbone_of(cfg: CfgNode) -> dict[str, Any] | None:
    """The published backbone that a config builds; None: none of them."""
    built = (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME)
    backbones = published_results()["backbones"]
    return next((entry for entry in backbones if (_architecture(entry), entry["clip"]) == built), None)


def _architecture(backbone: Mapping[str, Any]) -> str:
    return backbone.get("architecture", "FCCLIP")


_published_config = functools.cache(load_config)


def backbone_of_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """The published backbone that weights of these shapes were trained on; None: none of them.

    Args:
        shapes: key -> shape of the tensor.
    """
    projection = shapes.get("sem_seg_head.pixel_decoder.input_proj.0.0.weight", ())
    void = shapes.get("void_embedding.weight", ())
    architecture = "FrozenSeg" if any("_attention_layers_sam." in key for key in shapes) else "FCCLIP"
    for backbone in published_results()["backbones"]:
        if _architecture(backbone) != architecture:
            continue
        if list(projection[1:2]) == [backbone["res5_channels"]] and list(void[-1:]) == [backbone["embed_dim"]]:
            return backbone
    return None


@dataclass(frozen=True)
class Outcome:
    """What came of the evaluation of a data set."""

    plan: Plan
    vocabulary: Vocabulary  # what was looked for
    num_images: int  # that were evaluated
    results: Modes


def differences(outcome: Outcome, *, training: Vocabulary | None, extra: Sequence[str] = ()) -> list[str]:
    """Why the figures of a data set cannot be compared with the published ones; empty: they can.

    Args:
        outcome: of the data set.
        training: what the model was trained on.
        extra: further reasons.
    """
    plan = outcome.plan
    known, backbone = benchmark(plan.dataset.name), backbone_of(plan.cfg)
    if known is None:
        return ["nothing was published for this data set"]
    reasons = []
    if not outcome.vocabulary.is_published:
        reasons.append("vocabulary: fcclip (not the published one)")
    if training is not None and not training.is_published:
        reasons.append("vocabulary of the training: fcclip (not the published one)")
    if outcome.num_images != plan.dataset.published_count:
        reasons.append(f"{outcome.num_images} images, published {plan.dataset.published_count}")
    if backbone is None:
        reasons.append(f"no published figures for the CLIP '{plan.cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME}'")
    else:
        published = with_values(_published_config(backbone["config"]), published_settings(plan.dataset))
        settings, here = deciding_settings(published), deciding_settings(plan.cfg)
        if published.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS == "openai":
            settings[_QUICK_GELU] = "on"  # what "auto" makes of that tag; weights from a file need it to be said
            here[_QUICK_GELU] = "on" if here[_QUICK_GELU] == "auto" else here[_QUICK_GELU]
        reasons += [f"{key} {here[key]}, published {settings[key]}" for key in here if here[key] != settings[key]]
    if plan.cfg.TEST.MODE != "ensemble":
        reasons.append(f"TEST.MODE {plan.cfg.TEST.MODE}, published ensemble")
    return [*reasons, *extra]


@dataclass(frozen=True)
class Cell:
    """One figure of the table."""

    data_set: str
    label: str  # what the table calls the data set
    column: str  # PQ, AP or mIoU
    task: str  # and metric: where it stands in the results
    metric: str
    values: Mapping[str, float]  # mode -> percent, NaN where it was not evaluated
    published: float = math.nan  # percent, NaN where nothing was
    tolerance: float = math.nan  # in points
    verdict: str = NOT_PUBLISHED  # of the first mode

    @property
    def here(self) -> float:
        """The value of the first mode."""
        return next(iter(self.values.values()), math.nan)

    @property
    def difference(self) -> float:
        """Of the first mode to the published figure, in points."""
        return self.here - self.published


def cells_of(
    name: str,
    modes: Modes,
    *,
    backbone: Mapping[str, Any] | None,
    reasons: Sequence[str],
) -> list[Cell]:
    """The figures of one data set; without `modes` it was not evaluated.

    Args:
        name: of the data set.
        modes: its results.
        backbone: that the published figures are of; None: of none.
        reasons: why they cannot be compared.
    """
    known = benchmark(name)
    if known is None:
        return [
            Cell(name, name, column, task, metric, _values(modes, task, metric))
            for column, (task, metric) in HEADLINES.items()
            if any(task in tasks for tasks in modes.values())
        ]
    cells, label = [], get_dataset(name).benchmark
    for column, place in known["columns"].items():
        task, metric, tolerance = place["task"], place["metric"], place["tolerance"]
        published = math.nan
        if backbone is not None:
            rounded = backbone["table"].get(name, {}).get(column, math.nan)
            published = backbone["log"].get(name, {}).get(task, {}).get(metric, rounded)
        cell = Cell(name, label, column, task, metric, _values(modes, task, metric), published, tolerance)
        if not modes:
            verdict = "missing"
        elif reasons or math.isnan(published):
            verdict = NOT_COMPARABLE
        else:
            verdict = PASS if abs(cell.difference) <= tolerance else FAIL  # NaN fails
        cells.append(replace(cell, verdict=verdict))
    return cells


def logged_figures(
    name: str, results: Mapping[str, Mapping[str, float]], backbone: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Every figure of the published log of a data set beside ours; nothing is judged by those that are not in the row.

    Args:
        name: of the data set.
        results: task -> metric -> percent.
        backbone: that the log is of; None: of none.
    """
    log = backbone["log"].get(name, {}) if backbone else {}
    figures = []
    for task, metrics in log.items():
        for metric, published in metrics.items():
            here = results.get(task, {}).get(metric, math.nan)
            figure = {"task": task, "metric": metric, "here": here, "published": published}
            figures.append(figure | {"difference": here - published})
    return figures


def _values(modes: Modes, task: str, metric: str) -> dict[str, float]:
    return {mode: tasks.get(task, {}).get(metric, math.nan) for mode, tasks in modes.items()}


# ---- text ----


@dataclass(frozen=True)
class Report:
    """All that is told about an evaluation."""

    cells: Sequence[Cell]  # every figure, sets in the order of the table
    reasons: Mapping[str, Sequence[str]]  # data set -> why it cannot be compared
    missing: Mapping[str, str]  # data set -> where it was looked for
    notes: Mapping[str, str]  # name -> text, what was evaluated and with what
    backbone: str  # that the published figures beside are of; "": of none
    options: Sequence[str] = ()  # what was turned on beyond the published model
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # data set -> what results.json says of it

    @property
    def verdict(self) -> str:
        """FAIL if any figure fails, else pass if any passes, else not comparable."""
        verdicts = {cell.verdict for cell in self.cells}
        return FAIL if FAIL in verdicts else PASS if PASS in verdicts else NOT_COMPARABLE

    def rows(self) -> list[tuple[str, list[str]]]:
        """(name, text of each cell): one row a mode, then the published figures and the difference."""
        modes = list(dict.fromkeys(mode for cell in self.cells for mode in cell.values))
        rows = [
            (
                ", ".join(["here" if len(modes) == 1 else mode.replace("_", " "), *self.options]),
                [format_value(cell.values.get(mode, math.nan)) for cell in self.cells],
            )
            for mode in modes
        ]
        if any(cell.verdict != NOT_PUBLISHED for cell in self.cells):
            rows.append(("published", [format_value(cell.published) for cell in self.cells]))
            rows.append(("difference", [format_change(cell.difference) for cell in self.cells]))
        return rows

    def text(self) -> str:
        """What a terminal of 100 columns shows."""
        lines = [*format_row(self.cells, self.rows()), ""]
        judged = [cell for cell in self.cells if cell.verdict in (PASS, FAIL)]
        lines += [
            f"FAIL  {cell.label} {cell.column}: {cell.here:.2f}, published {cell.published:.2f}, difference "
            f"{format_change(cell.difference, 2)}, tolerance {cell.tolerance}"
            for cell in judged
            if cell.verdict == FAIL
        ]
        if judged:
            passed = sum(cell.verdict == PASS for cell in judged)
            lines.append(f"{passed} of {len(judged)} comparable figures are those of {self.backbone} within tolerance")
        paragraphs = {
            f"not comparable: {name}": listed(reasons, 4, separator="; ")
            for name, reasons in self.reasons.items()
            if reasons and benchmark(name) is not None
        }
        for name, text in (paragraphs | self._missing_and_notes()).items():
            lines += textwrap.wrap(
                f"{name}: {text}", WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
            )
        return "\n".join(lines)

    def _missing_and_notes(self) -> dict[str, str]:
        return {f"missing: {name}": f"there is no {path}" for name, path in self.missing.items()} | dict(self.notes)

    def markdown(self) -> str:
        """The same as a Markdown file, with a line for each figure."""
        columns = ["data set", "figure", "here", "published", "difference", "tolerance", "verdict"]
        figures = [
            [
                cell.data_set,
                f"{cell.task}/{cell.metric}",
                _number(cell.here),
                _number(cell.published),
                format_change(cell.difference, 2),
                _number(cell.tolerance),
                cell.verdict,
            ]
            for cell in self.cells
        ]
        head = ["", *(f"{cell.label} {cell.column}" for cell in self.cells)]
        notes = {f"not comparable: {name}": "; ".join(why) for name, why in self.reasons.items() if why}
        lines = ["# Zero-shot evaluation", "", f"Verdict: **{self.verdict}**", ""]
        lines += [*_markdown_table(head, [[name, *values] for name, values in self.rows()]), ""]
        lines += [*_markdown_table(columns, figures), ""]
        lines += [f"- **{name}**: {text}" for name, text in (notes | self._missing_and_notes()).items()]
        return "\n".join([*lines, ""])

    def as_dict(self) -> dict[str, Any]:
        """JSON values, null where undefined."""
        return without_nan(
            {
                "schema": 1,
                "verdict": self.verdict,
                "backbone": self.backbone,
                "options": self.options,
                "row": [asdict(cell) | {"difference": cell.difference} for cell in self.cells],
                "sets": self.sets,
                "not_comparable": {name: why for name, why in self.reasons.items() if why},
                "missing": self.missing,
                "notes": self.notes,
            }
        )


def report_of(
    outcomes: Sequence[Outcome],
    *,
    training: Vocabulary | None,
    missing: Mapping[str, str],
    notes: Mapping[str, str],
    changes: Sequence[str] = (),
) -> Report:
    """The table of what was evaluated, with a place for what is missing.

    Args:
        outcomes: one or more, in the order of the table.
        training: what the model was trained on.
        missing: data set -> where it was looked for.
        notes: name -> text.
        changes: what makes every figure incomparable.
    """
    cfg = outcomes[0].plan.cfg
    backbone = backbone_of(cfg)
    cells, reasons, sets, vocabularies = {}, {}, {}, {}
    for outcome in outcomes:
        name, vocabulary, results = outcome.plan.dataset.name, outcome.vocabulary, outcome.results
        reasons[name] = differences(outcome, training=training, extra=changes)
        cells[name] = cells_of(name, results, backbone=backbone, reasons=reasons[name])
        sets[name] = {
            "images": outcome.num_images,
            "vocabulary": vocabulary.name,
            "vocabulary_sha256": vocabulary.hash,
            "published_vocabulary": vocabulary.is_published,
            "results": results,
            "log": logged_figures(name, next(iter(results.values())), backbone),
        }
        source = "published" if vocabulary.is_published else "fcclip (not the published one)"
        note = f"{source} '{vocabulary.name}', {len(vocabulary)} classes, sha256 {vocabulary.hash[:12]}"
        vocabularies.setdefault(note, []).append(name)
    cells |= {name: cells_of(name, {}, backbone=backbone, reasons=["it is missing"]) for name in missing}
    order = [name for name in default_sets(cfg) if name in cells] if missing else cells
    vocabulary_note = "; ".join(f"{note} ({', '.join(names)})" for note, names in vocabularies.items())
    return Report(
        cells=[cell for name in order for cell in cells[name]],
        reasons=reasons,
        missing=missing,
        notes={**notes, "vocabulary": vocabulary_note},
        backbone=backbone["name"] if backbone else "",
        options=options_of(cfg),
        sets=sets,
    )


def format_row(cells: Sequence[Cell], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The rows as lines of text, data sets side by side and in further blocks below where they do not fit into `WIDTH`.

    Args:
        cells: what the columns are, those of a data set together.
        rows: (name, text of each cell).
    """
    members_of: dict[str, list[int]] = {}  # data set -> indices of its cells
    for index, cell in enumerate(cells):
        members_of.setdefault(cell.data_set, []).append(index)
    names = max((len(name) for name, _ in rows), default=0)
    blocks: list[list[list[str]]] = [[]]
    for members in members_of.values():
        widths = [max(len(cells[index].column), *(len(values[index]) for _, values in rows)) for index in members]
        label = cells[members[0]].label
        total = max(len(label), sum(widths) + len(widths) - 1)
        column = [label.center(total)]
        for texts in ([cell.column for cell in cells], *(values for _, values in rows)):
            column.append(" ".join(texts[index].rjust(wide) for index, wide in zip(members, widths)).center(total))
        taken = names + sum(len(other[0]) + 1 for other in blocks[-1])
        if blocks[-1] and taken + 1 + total > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines = []
    for number, block in enumerate(blocks):
        lines += [""] * (number > 0)
        for line, name in enumerate(["", "", *(name for name, _ in rows)]):
            lines.append("│".join([name.ljust(names), *(column[line] for column in block)]).rstrip())
            if line == 1:
                lines.append("┼".join(["─" * names, *("─" * len(column[0]) for column in block)]))
    return lines


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}".rstrip("0").rstrip(".")


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(texts)} |" for texts in (head, ["---"] * len(head), *rows)]
