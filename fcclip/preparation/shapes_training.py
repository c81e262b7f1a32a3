"""What the programs that train encoders on the shapes world share: images in memory, and weights in half precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from safetensors.torch import save
from torch import nn

from fcclip.errors import InputError
from fcclip.files import write_atomically
from fcclip.preparation.programs import processes
from fcclip.preparation.shapes_world import render_image

GATE_SEED = 0  # world that encoders are measured on, the one that is shipped


@dataclass(frozen=True)
class Pool:
    """Rendered images to cut crops from."""

    images: np.ndarray  # (N, 256, 256, 3) uint8
    piece_maps: np.ndarray  # (N, 256, 256) uint8, the piece at every pixel; grounds come first
    piece_classes: list[np.ndarray]  # per image, (pieces,) class index
    piece_areas: list[np.ndarray]  # per image, (pieces,) visible pixels
    piece_centres: list[np.ndarray]  # per image, (pieces, 2) row and column of the middle of the box around the piece


def _render_for_pool(task: tuple[int, str, int]) -> tuple[np.ndarray, ...]:
    pixels = render_image(*task)
    _, jpeg = cv2.imencode(".jpg", pixels.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1]
    places = [np.nonzero(pixels.piece_map == i) for i in range(len(pixels.pieces))]
    centres = np.array(
        [[(rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2] for rows, columns in places]
    )
    classes = np.array([piece.category_id - 1 for piece in pixels.pieces])
    return image, pixels.piece_map, classes, np.array([piece.visible_area for piece in pixels.pieces]), centres


def render_pool(*, seed: int, rule_name: str, num_images: int, workers: int) -> Pool:
    """The first images of a set of the world of this seed."""
    with processes(workers) as run_each:
        rendered = list(run_each(_render_for_pool, [(seed, rule_name, i) for i in range(num_images)]))
    images, piece_maps, *lists = map(list, zip(*rendered, strict=True))
    return Pool(np.stack(images), np.stack(piece_maps), *lists)


def check_training(seed: int, output: Path) -> None:
    """Before a training: whether it has a world of its own and a place to write to."""
    if seed == GATE_SEED:
        raise InputError(f"--seed is {GATE_SEED}, the seed of the gate, which needs images of its own")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}")


def save_half(module: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes half-precision weights as safetensors, with JSON values beside them."""
    tensors = {name: weight.detach().half().contiguous() for name, weight in module.state_dict().items()}
    content = save(tensors, {key: json.dumps(value) for key, value in metadata.items()})
    write_atomically(path, lambda file: file.write(content))
