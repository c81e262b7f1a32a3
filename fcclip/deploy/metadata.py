"""What an exported graph says of itself, as the strings that ONNX files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fcclip.errors import InputError

FORMAT = 1  # changes when an older runner could not run a newer graph


@dataclass(frozen=True)
class Metadata:
    """Everything that turns the outputs of a graph into maps, and where the graph comes from.

    Args:
        fingerprint: of what vocabulary files hold of the model: text tower, void, classes of the training.
        clip: names, hash and features of the frozen CLIP (`CLIPBackbone.fingerprint`).
        num_queries, embed_dim: Q and D.
        size_divisibility: sides of the input are multiples of it.
        pixel_mean, pixel_std: of the channels; the graph normalises, and padding has the colour `pixel_mean`.
        min_size, max_size, square, channel_order: how images are resized; INPUT.*_TEST and INPUT.FORMAT.
        decoder_scale, clip_scale: factors of both classifiers' cosines.
        alpha, beta, ensemble_on_valid_mask: of the geometric ensemble.
        object_mask_threshold, overlap_threshold, topk, masks_first: of the outputs (`OutputSettings`).
        training_vocabulary: names of each class that counts as seen, the best first.
        config_sha256, weights_sha256: of the model.
        precision: "float32" or "float16".
        opset, versions: of ONNX, and of the libraries that wrote the graph.
        license: of the weights, in a line.
    """

    fingerprint: str
    clip: Mapping[str, Any]
    num_queries: int
    embed_dim: int
    size_divisibility: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    min_size: int
    max_size: int
    square: int
    channel_order: str
    decoder_scale: float
    clip_scale: float
    alpha: float
    beta: float
    ensemble_on_valid_mask: bool
    object_mask_threshold: float
    overlap_threshold: float
    topk: int
    masks_first: bool
    training_vocabulary: tuple[tuple[str, ...], ...]
    config_sha256: str
    weights_sha256: str
    precision: str
    opset: int
    versions: Mapping[str, str]
    license: str
    format: int = FORMAT

    def strings(self) -> dict[str, str]:
        """JSON by field."""
        return {name: json.dumps(value, ensure_ascii=False) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, strings: Mapping[str, str], *, source: str) -> Metadata:
        """The reverse of `strings`.

        Raises:
            ValueError: fields are missing, or the format is another; `source` names the file.
        """
        missing = [field.name for field in fields(cls) if field.name not in strings]
        if missing:
            raise InputError(f"'{source}' was not written by tools/export.py: its metadata lacks {', '.join(missing)}")
        values = {field.name: _frozen(json.loads(strings[field.name])) for field in fields(cls)}
        if values["format"] != FORMAT:
            raise InputError(
                f"'{source}' has format {values['format']}, this fcclip runs format {FORMAT}: export the model again, "
                f"or install the fcclip that wrote it ({values['versions'].get('fcclip', 'unknown')})"
            )
        return cls(**values)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
