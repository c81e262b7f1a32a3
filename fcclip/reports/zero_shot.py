"""The table of the model zoo: what each benchmark is evaluated with, what was published, and how far apart they are.

Published figures of each backbone and their tolerances stand in `published_results.json`; sizes of a data set's images,
their number and what tables call it stand in its `Dataset`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from fcclip.config import load_config
from fcclip.data import Dataset, get_dataset
from fcclip.errors import InputError
from fcclip.evaluation.predictions import deciding_settings
from fcclip.evaluation.results import format_value
from fcclip.evaluation.runner import build_evaluators
from fcclip.vocabulary import Vocabulary

WIDTH = 100  # columns of text
PASS, FAIL, NOT_COMPARABLE, NOT_PUBLISHED = "pass", "FAIL", "not comparable", "not published"
MIOU_RULE = (
    "mIoU is the mean over classes with ground truth (detectron2 since 2022-07-06); mIoU_union in results.json counts "
    "classes that are only predicted as 0 (before). Cityscapes: class IoU and AP of cityscapesScripts."
)
# Columns of data sets without published figures: label -> task and metric.
_COLUMNS = {"PQ": ("panoptic_seg", "PQ"), "AP": ("segm", "AP"), "mIoU": ("sem_seg", "mIoU")}
_SWITCHES = {
    "panoptic": "MODEL.MASK_FORMER.TEST.PANOPTIC_ON",
    "instance": "MODEL.MASK_FORMER.TEST.INSTANCE_ON",
    "semantic": "MODEL.MASK_FORMER.TEST.SEMANTIC_ON",
}
_QUICK_GELU = "MODEL.FC_CLIP.QUICK_GELU"
_SHOWN = 4  # reasons for which something is not comparable


@functools.lru_cache(maxsize=1)
def published_results() -> dict[str, Any]:
    """The content of `published_results.json`."""
    return json.loads(Path(__file__).with_name("published_results.json").read_text(encoding="utf-8"))


def benchmark(name: str) -> dict[str, Any] | None:
    """What was published about a data set; None: nothing."""
    return next((one for one in published_results()["benchmarks"] if one["data_set"] == name), None)


@dataclass(frozen=True)
class Plan:
    """A data set and what it is evaluated with.

    Args:
        dataset: the data set.
        cfg: the config with the settings of the data set.
        num_images: all that it has.
    """

    dataset: Dataset
    cfg: CfgNode
    num_images: int


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
    wanted = default_sets(cfg) if names is None else list(names)
    plans, missing = [], {}
    for name in wanted:
        dataset = get_dataset(name)
        if dataset.name in [plan.dataset.name for plan in plans]:
            raise InputError(f"data set '{dataset.name}' is asked for twice; leave one out")
        place = _place(dataset)
        if names is None and place and not Path(place).exists():
            missing[dataset.name] = place
            continue
        settings = set_config(cfg, dataset, given=given)
        plan = Plan(dataset, settings, len(dataset.records()))
        build_evaluators(settings, dataset, modes=["check"])  # says now what it would say after an hour
        plans.append(plan)
    return plans, missing


def default_sets(cfg: CfgNode) -> list[str]:
    """The benchmarks of a model trained on COCO, in the order of the table; else the config's DATASETS.TEST."""
    if not cfg.DATASETS.TRAIN or cfg.DATASETS.TRAIN[0] == published_results()["training_set"]:
        return [one["data_set"] for one in published_results()["benchmarks"]]
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
        settings = {key: False for head, key in _SWITCHES.items() if head not in dataset.evaluators}
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([word for key, value in settings.items() if key not in given for word in (key, value)])
    cfg.freeze()
    return cfg


def published_settings(dataset: Dataset) -> dict[str, Any]:
    """What a benchmark was published with: sizes of its images, and an output for each of its columns."""
    tasks = {column["task"] for column in benchmark(dataset.name)["columns"].values()}
    outputs = {"panoptic": "panoptic_seg" in tasks, "instance": "segm" in tasks, "semantic": "sem_seg" in tasks}
    sizes = dict(zip(("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"), dataset.test_size))
    return {**{key: outputs[head] for head, key in _SWITCHES.items()}, **sizes}


def _place(dataset: Dataset) -> str:
    """The file or folder that tells whether a data set is there ("": none does); a lack of others is an error."""
    keys = ("panoptic_json", "json_file", "sem_seg_root", "image_root")
    return next((dataset.metadata[key] for key in keys if dataset.metadata.get(key)), "")


# ---- comparison ----


def backbone_of(cfg: CfgNode) -> dict[str, Any] | None:
    """The published backbone that a config builds; None: none of them."""
    for one in published_results()["backbones"]:
        if one["clip"] == cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME:
            return one
    return None


@functools.cache
def _published_config(name: str) -> CfgNode:
    """A shipped config, without the log telling of keys in it that do nothing: nobody asked for it."""
    told = logging.getLogger("fcclip.config")
    level = told.level
    told.setLevel(logging.WARNING)
    try:
        return load_config(name)
    finally:
        told.setLevel(level)


def backbone_of_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """The published backbone that weights of these shapes were trained on; None: none of them.

    Args:
        shapes: key -> shape of the tensor.
    """
    channels = [
        shape[1]
        for key, shape in shapes.items()
        if key.startswith("sem_seg_head.pixel_decoder.input_proj.0.0.") and len(shape) == 4
    ]
    embed_dim = [shape[-1] for key, shape in shapes.items() if key == "void_embedding.weight"]
    for one in published_results()["backbones"]:
        if channels == [one["res5_channels"]] and embed_dim == [one["embed_dim"]]:
            return one
    return None


def differences(
    plan: Plan, *, vocabulary: Vocabulary, training: Vocabulary | None, num_images: int, extra: Sequence[str] = ()
) -> list[str]:
    """Why the figures of a data set cannot be compared with the published ones; empty: they can.

    Args:
        plan: the data set and its config.
        vocabulary: the words that were looked for.
        training: the words that the model was trained on.
        num_images: that were evaluated.
        extra: further reasons.
    """
    known, backbone = benchmark(plan.dataset.name), backbone_of(plan.cfg)
    if known is None:
        return ["nothing was published for this data set"]
    reasons = []
    if not vocabulary.is_published:
        reasons.append("vocabulary: fcclip (not the published one)")
    if training is not None and not training.is_published:
        reasons.append("vocabulary of the training: fcclip (not the published one)")
    if num_images != plan.dataset.published_count:
        reasons.append(f"{num_images} images, published {plan.dataset.published_count}")
    if backbone is None:
        reasons.append(f"no published figures for the CLIP '{plan.cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME}'")
    else:
        published = _published_config(backbone["config"]).clone()
        published.defrost()
        published.merge_from_list([word for pair in published_settings(plan.dataset).items() for word in pair])
        there, here = deciding_settings(published), deciding_settings(plan.cfg)
        if published.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS == "openai":
            there[_QUICK_GELU] = "on"  # what "auto" makes of that tag; weights from a file need it to be said
            here[_QUICK_GELU] = "on" if here[_QUICK_GELU] == "auto" else here[_QUICK_GELU]
        different = [key for key in here if here[key] != there.get(key)]
        reasons += [f"{key} {here[key]}, published {there.get(key)}" for key in different]
    if plan.cfg.TEST.MODE != "ensemble":
        reasons.append(f"TEST.MODE {plan.cfg.TEST.MODE}, published ensemble")
    return [*reasons, *extra]


@dataclass(frozen=True)
class Cell:
    """One figure of the table.

    Args:
        data_set, label: of the data set, and what the table calls it.
        column: PQ, AP or mIoU.
        task, metric: where it stands in the results.
        values: mode -> percent, NaN where it was not evaluated.
        published: percent, NaN where nothing was.
        tolerance: in points.
        verdict: of the first mode.
    """

    data_set: str
    label: str
    column: str
    task: str
    metric: str
    values: Mapping[str, float]
    published: float = math.nan
    tolerance: float = math.nan
    verdict: str = NOT_PUBLISHED

    @property
    def difference(self) -> float:
        """Of the first mode to the published figure, in points."""
        return next(iter(self.values.values()), math.nan) - self.published


def cells_of(
    name: str,
    modes: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    backbone: Mapping[str, Any] | None,
    reasons: Sequence[str],
) -> list[Cell]:
    """The figures of one data set.

    Args:
        name: of the data set.
        modes: mode -> task -> metric -> percent; empty: it was not evaluated.
        backbone: whose published figures are meant; None: nobody's.
        reasons: why they cannot be compared.
    """
    known = benchmark(name)
    if known is None:
        present = [
            (column, *place) for column, place in _COLUMNS.items() if any(place[0] in one for one in modes.values())
        ]
        return [
            Cell(name, name, column, task, metric, _values(modes, task, metric)) for column, task, metric in present
        ]
    cells, label = [], get_dataset(name).benchmark
    for column, place in known["columns"].items():
        task, metric = place["task"], place["metric"]
        values, published, tolerance = _values(modes, task, metric), math.nan, place["tolerance"]
        if backbone is not None:
            rounded = backbone["table"][name][column]
            published = backbone["log"].get(name, {}).get(task, {}).get(metric, rounded)
        value = next(iter(values.values()), math.nan)
        if not modes:
            verdict = "missing"
        elif reasons or math.isnan(published):
            verdict = NOT_COMPARABLE
        else:
            verdict = PASS if abs(value - published) <= tolerance else FAIL  # NaN fails
        cells.append(Cell(name, label, column, task, metric, values, published, tolerance, verdict))
    return cells


def logged_figures(
    name: str, results: Mapping[str, Mapping[str, float]], backbone: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Every figure of the published log of a data set beside ours; nothing is judged by those that are not in the row.

    Args:
        name: of the data set.
        results: task -> metric -> percent.
        backbone: whose log is meant; None: nobody's.
    """
    log = backbone["log"].get(name, {}) if backbone else {}
    figures = []
    for task, metrics in log.items():
        for metric, published in metrics.items():
            here = results.get(task, {}).get(metric, math.nan)
            figure = {"task": task, "metric": metric, "here": here, "published": published}
            figures.append({**figure, "difference": here - published})
    return figures


def _values(modes: Mapping[str, Mapping[str, Mapping[str, float]]], task: str, metric: str) -> dict[str, float]:
    return {mode: tasks.get(task, {}).get(metric, math.nan) for mode, tasks in modes.items()}


def verdict_of(cells: Sequence[Cell]) -> str:
    """FAIL if any figure fails, else pass if any passes, else not comparable."""
    found = {cell.verdict for cell in cells}
    return FAIL if FAIL in found else PASS if PASS in found else NOT_COMPARABLE


# ---- text ----


@dataclass(frozen=True)
class Report:
    """All that is told about an evaluation.

    Args:
        cells: every figure, sets in the order of the table.
        reasons: data set -> why it cannot be compared.
        missing: data set -> where it was looked for.
        notes: name -> text, what was evaluated and with what.
        backbone: whose published figures stand beside; "": nobody's.
        sets: data set -> what results.json says of it.
    """

    cells: Sequence[Cell]
    reasons: Mapping[str, Sequence[str]]
    missing: Mapping[str, str]
    notes: Mapping[str, str]
    backbone: str
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """See `verdict_of`."""
        return verdict_of(self.cells)

    def rows(self) -> list[tuple[str, list[str]]]:
        """(name, text of each cell): one row a mode, then the published figures and the difference."""
        modes = list(dict.fromkeys(mode for cell in self.cells for mode in cell.values))
        rows = [
            (
                "here" if len(modes) == 1 else mode.replace("_", " "),
                [format_value(cell.values.get(mode, math.nan)) for cell in self.cells],
            )
            for mode in modes
        ]
        if any(cell.verdict != NOT_PUBLISHED for cell in self.cells):
            rows.append(("published", [format_value(cell.published) for cell in self.cells]))
            rows.append(("difference", [_signed(cell.difference) for cell in self.cells]))
        return rows

    def text(self) -> str:
        """What a terminal of 100 columns shows."""
        lines = [*format_row(self.cells, self.rows()), ""]
        judged = [cell for cell in self.cells if cell.verdict in (PASS, FAIL)]
        for cell in judged:
            if cell.verdict == FAIL:
                here = next(iter(cell.values.values()), math.nan)
                lines.append(
                    f"FAIL  {cell.label} {cell.column}: {here:.2f}, published {cell.published:.2f}, difference "
                    f"{_signed(cell.difference, 2)}, tolerance {cell.tolerance}"
                )
        if judged:
            passed = sum(cell.verdict == PASS for cell in judged)
            lines.append(f"{passed} of {len(judged)} comparable figures are those of {self.backbone} within tolerance")
        for name, reasons in self.reasons.items():
            if reasons and benchmark(name) is not None:
                more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
                lines += _wrapped(f"not comparable: {name}", "; ".join([*reasons[:_SHOWN], *more]))
        for name, path in self.missing.items():
            lines += _wrapped(f"missing: {name}", f"there is no {path}")
        for name, text in self.notes.items():
            lines += _wrapped(name, text)
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same as a Markdown file, with a line for each figure."""
        head = [f"{cell.label} {cell.column}" for cell in self.cells]
        lines = ["# Zero-shot evaluation", "", f"Verdict: **{self.verdict}**", ""]
        lines += [_markdown_row(["", *head]), _markdown_row(["---"] * (len(head) + 1))]
        lines += [_markdown_row([name, *values]) for name, values in self.rows()]
        lines += ["", "| data set | figure | here | published | difference | tolerance | verdict |"]
        lines.append(_markdown_row(["---"] * 7))
        for cell in self.cells:
            here = next(iter(cell.values.values()), math.nan)
            figures = [_number(value) for value in (here, cell.published)]
            row = [cell.data_set, f"{cell.task}/{cell.metric}", *figures, _signed(cell.difference, 2)]
            lines.append(_markdown_row([*row, _number(cell.tolerance), cell.verdict]))
        logged = [(name, figure) for name, one in self.sets.items() for figure in one.get("log", ())]
        if logged:
            lines += ["", "All figures of the published log:", ""]
            lines += ["| data set | figure | here | published | difference |", _markdown_row(["---"] * 5)]
        for name, figure in logged:
            numbers = [_number(figure[key]) for key in ("here", "published")]
            place = f"{figure['task']}/{figure['metric']}"
            lines.append(_markdown_row([name, place, *numbers, _signed(figure["difference"], 2)]))
        listed = {f"not comparable: {name}": "; ".join(why) for name, why in self.reasons.items() if why}
        listed |= {f"missing: {name}": f"there is no {path}" for name, path in self.missing.items()}
        lines += ["", *(f"- **{name}**: {text}" for name, text in {**listed, **self.notes}.items()), ""]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, null where undefined."""
        return _without_nan(
            {
                "schema": 1,
                "verdict": self.verdict,
                "backbone": self.backbone,
                "row": [
                    {
                        "data_set": cell.data_set,
                        "label": cell.label,
                        "column": cell.column,
                        "task": cell.task,
                        "metric": cell.metric,
                        "values": dict(cell.values),
                        "published": cell.published,
                        "difference": cell.difference,
                        "tolerance": cell.tolerance,
                        "verdict": cell.verdict,
                    }
                    for cell in self.cells
                ],
                "sets": {name: dict(one) for name, one in self.sets.items()},
                "not_comparable": {name: list(why) for name, why in self.reasons.items() if why},
                "missing": dict(self.missing),
                "notes": dict(self.notes),
            }
        )


def format_row(cells: Sequence[Cell], rows: Sequence[tuple[str, Sequence[str]]], *, width: int = WIDTH) -> list[str]:
    """The rows as lines of text, data sets side by side and in further blocks below where they do not fit.

    Args:
        cells: what the columns are, those of a data set together.
        rows: (name, text of each cell).
        width: columns of the text; a single data set may take more.
    """
    names = max(len(name) for name, _ in rows) if rows else 0
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(cell.data_set, []).append(index)
    blocks: list[list[list[str]]] = [[]]
    for members in groups.values():
        widths = [max(len(cells[one].column), *(len(values[one]) for _, values in rows)) for one in members]
        label = cells[members[0]].label
        total = max(len(label), sum(widths) + len(widths) - 1)
        column = [label.center(total)]
        for texts in ([cell.column for cell in cells], *(values for _, values in rows)):
            column.append(" ".join(texts[one].rjust(wide) for one, wide in zip(members, widths)).center(total))
        taken = names + sum(len(one[0]) + 1 for one in blocks[-1])
        if blocks[-1] and taken + 1 + total > width:
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


def _wrapped(name: str, text: str) -> list[str]:
    """`name  text`, broken at spaces and indented where it goes on."""
    lines, line = [], f"{name}: "
    for word in text.split(" "):
        if len(line) + len(word) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = "    "
        line += f"{word} "
    return [*lines, line.rstrip()]


def _signed(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:+.{digits}f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}".rstrip("0").rstrip(".")


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
