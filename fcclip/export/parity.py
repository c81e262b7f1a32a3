"""What an exported graph gives, beside what its model gives in PyTorch."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fcclip.data import resize_image
from fcclip.deploy import Result, Runner
from fcclip.deploy.metadata import Metadata
from fcclip.deploy.runner import GRAPH, SMALLEST, runtime
from fcclip.evaluation.panoptic import class_quality, compare_segments
from fcclip.export.folder import vocabulary_file
from fcclip.modeling import FCCLIP, ScoredMasks
from fcclip.segmenter import Segmenter
from fcclip.vocabulary import Vocabulary

Nodes = Mapping[str, Mapping[str, Mapping[str, int]]]  # provider asked for -> where -> kind of node -> how many
SCALES = (1.0, 0.75)  # of the size of the test images


@dataclass(frozen=True)
class Case:
    """One image at one size with one vocabulary on one provider.

    Args:
        image, size, classes, provider: which.
        probability, probability_999: largest difference of class probabilities, and that of 99.9 % of them.
        mask, mask_999: the same of mask logits, as shares of their spread, highest less lowest.
        sign_flips: share of mask logits with another sign.
        argmax: share of queries with the same best class, percent.
        pixels: share of pixels with the same segment id, percent.
        pq: panoptic quality of the exported map, the model's being the truth, percent.
        seconds, model_seconds: of the graph and of the network in PyTorch.
    """

    image: str
    size: str
    classes: int
    provider: str
    probability: float
    probability_999: float
    mask: float
    mask_999: float
    sign_flips: float
    argmax: float
    pixels: float
    pq: float
    seconds: float
    model_seconds: float


@dataclass(frozen=True)
class Limits:
    """What every case must keep; None: reported only."""

    probability: float | None = 1e-4
    mask: float | None = 1e-3
    argmax: float | None = 99.9
    pq: float = 99.5

    @classmethod
    def of(cls, precision: str) -> Limits:
        """Those of a graph in single or in half precision."""
        return cls() if precision == "float32" else cls(None, None, None, 98.0)

    def missed(self, case: Case) -> list[str]:
        """The values of a case that miss their limit, in words."""
        most = {name: getattr(self, name) for name in ("probability", "mask")}
        least = {name: getattr(self, name) for name in ("argmax", "pq")}
        values = asdict(case)
        # written so that NaN misses every limit
        wrong = [f"{name} {values[name]:.2g} > {m:g}" for name, m in most.items() if m and not values[name] <= m]
        wrong += [f"{name} {values[name]:.2f} < {m:g}" for name, m in least.items() if m and not values[name] >= m]
        return [f"{case.image} at {case.size}, {case.classes} classes, {case.provider}: {text}" for text in wrong]


def made_up_images() -> dict[str, np.ndarray]:
    """Two images (h, w, 3) uint8 of rectangles on a ground, for exports without images of the user."""
    images = {}
    for seed, (height, width) in enumerate(((480, 640), (600, 400))):
        rng = np.random.default_rng(seed)
        image = np.tile(rng.integers(0, 256, 3, np.uint8), (height, width, 1))
        for _ in range(12):
            (top, left), (h, w) = rng.integers(0, (height, width)), rng.integers(20, 200, 2)
            image[top : top + h, left : left + w] = rng.integers(0, 256, 3)
        images[f"made up {seed}"] = image
    return images


@torch.no_grad()
def measure(
    segmenter: Segmenter,
    folder: Path,
    images: dict[str, np.ndarray],
    vocabularies: Sequence[Vocabulary],
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> list[Case]:
    """Every image at every size with every vocabulary on every provider.

    Args:
        segmenter: of the model, on the CPU.
        folder: what was exported of it.
        images: (h, w, 3) uint8 RGB by name.
        vocabularies: classes to look for.
        providers: of onnxruntime.
    """
    files = {vocabulary: vocabulary_file(segmenter.model, vocabulary) for vocabulary in vocabularies}
    cases = []
    for provider in providers:
        runner = Runner(folder, providers=[provider], threads=torch.get_num_threads())
        fixed = fixed_size(runner.session)
        for (name, image), scale in itertools.product(images.items(), SCALES[: 1 if fixed else None]):
            size = [max(1, round(side * scale)) for side in runner.resized(*image.shape[:2])]
            pixels = np.ascontiguousarray(resize_image(image, *fixed or size))  # both see these
            for vocabulary, file in files.items():
                times = [time.perf_counter()]
                result = runner.look(pixels, file, output_size=image.shape[:2])
                times.append(time.perf_counter())
                scored = _scored(segmenter.model, pixels, image, vocabulary, runner.metadata.channel_order)
                times.append(time.perf_counter())
                about = {"image": name, "size": f"{pixels.shape[0]}x{pixels.shape[1]}", "classes": len(vocabulary)}
                about |= {"provider": provider, "seconds": times[1] - times[0], "model_seconds": times[2] - times[1]}
                cases.append(Case(**about, **compared(segmenter.model, scored, result)))
    return cases


def placement(folder: Path, provider: str) -> dict[str, dict[str, int]]:
    """How many nodes of each kind ran where, by provider, after onnxruntime's own changes of the graph; those that
    `provider` does not know run on the CPU."""
    onnxruntime = runtime([provider])
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as beside:
        options.profile_file_prefix = str(Path(beside) / "profile")
        session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=[provider])
        size = fixed_size(session) or (SMALLEST, SMALLEST)
        session.run(None, {"image": np.zeros((1, 3, *size), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["name"]: event["args"] for event in events if "provider" in event.get("args", {})}
    counts = Counter((node["provider"], node["op_name"]) for node in ran.values())
    where = {}
    for (name, op), number in sorted(counts.items()):
        where.setdefault(name, {})[op] = number
    return where


def fixed_size(session: Any) -> tuple[int, int] | None:
    """(height, width) of a graph that takes one size; `session` is onnxruntime's."""
    size = session.get_inputs()[0].shape[2:]
    return tuple(size) if all(isinstance(side, int) for side in size) else None


def _scored(
    model: FCCLIP, pixels: np.ndarray, image: np.ndarray, vocabulary: Vocabulary, channel_order: str
) -> ScoredMasks:
    channels = pixels[..., ::-1] if channel_order == "BGR" else pixels
    sample = {"image": torch.from_numpy(channels.transpose(2, 0, 1).copy())}
    [scored] = model.score([{**sample, "height": image.shape[0], "width": image.shape[1]}], vocabulary)
    return scored


def compared(model: FCCLIP, scored: ScoredMasks, result: Result) -> dict[str, float]:
    """The numbers of a case: what the model gives for an image, and what the graph gives."""
    probabilities = scored.class_logits(model.ensemble).softmax(-1).numpy()
    mask_logits = scored.masks.mask_logits.numpy()
    difference = np.abs(probabilities - result.probabilities)
    spread = float(mask_logits.max() - mask_logits.min()) or 1.0
    mask_difference = np.abs(mask_logits - result.masks.logits) / spread
    ids, records = model.outputs(scored, heads=("panoptic",))["panoptic_seg"]
    own = [{"id": segment.id, "category_id": segment.category_id} for segment in result.segments]
    classes = range(probabilities.shape[1] - 1)
    counts = compare_segments(ids.numpy(), records, result.panoptic, own, categories=classes)
    qualities = [class_quality(count).pq for count in counts.values()]
    return {
        "probability": float(difference.max()),
        "probability_999": float(np.quantile(difference, 0.999)),
        "mask": float(mask_difference.max()),
        "mask_999": float(np.quantile(mask_difference, 0.999)),
        "sign_flips": float(((mask_logits > 0) != (result.masks.logits > 0)).mean()),
        "argmax": 100 * float((probabilities.argmax(-1) == result.probabilities.argmax(-1)).mean()),
        "pixels": 100 * float((ids.numpy() == result.panoptic).mean()),
        "pq": 100 * statistics.mean(qualities) if qualities else 100.0,
    }


def as_table(cases: Sequence[Case], nodes: Nodes) -> Table:
    """A row a case; below, where the nodes ran."""
    places = [(asked, where, sum(ops.values())) for asked, own in nodes.items() for where, ops in own.items()]
    told = "; ".join(f"asked for {asked}, {number} nodes ran on {where}" for asked, where, number in places)
    table = Table(title="exported graph beside PyTorch", caption=told)
    for column in ("image", "size", "classes", "provider"):
        table.add_column(column)
    for column in ("|Δp|", "|Δmask|", "flips", "argmax %", "pixels %", "PQ", "s", "s torch"):
        table.add_column(column, justify="right")
    for case in cases:
        numbers = (f"{case.probability:.1e}", f"{case.mask:.1e}", f"{case.sign_flips:.1e}", f"{case.argmax:.2f}")
        numbers += (f"{case.pixels:.2f}", f"{case.pq:.2f}", f"{case.seconds:.2f}", f"{case.model_seconds:.2f}")
        table.add_row(
            case.image, case.size, str(case.classes), case.provider.removesuffix("ExecutionProvider"), *numbers
        )
    return table


def as_record(cases: Sequence[Case], limits: Limits, metadata: Metadata, nodes: Nodes) -> dict[str, Any]:
    """The content of `parity.json`; `nodes`: `placement` of each provider."""
    missed = [text for case in cases for text in limits.missed(case)]
    graph = {name: getattr(metadata, name) for name in ("precision", "opset", "weights_sha256", "versions")}
    told = {"schema": 1, "graph": graph, "limits": asdict(limits), "missed": missed}
    return {**told, "nodes": nodes, "cases": list(map(asdict, cases))}
