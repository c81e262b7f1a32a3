"""The shapes world: images of coloured, textured shapes (things) on textured grounds (stuff).

`render_image(seed, rule_name, index)` is a pure function: the same three values give the same image in any process.
Lengths are in pixels of the 256 x 256 image, colours are RGB in 0..1 while rendering, areas are counted in pixels. A
shape never crosses the image's border: its visible part is what later shapes left of it.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

WORLD_VERSION = 1  # another number means other images for the same seed
IMAGE_SIZE = 256
# Of the image, for the whole shape; the visible part obeys the lower bound as well.
MIN_AREA_SHARE, MAX_AREA_SHARE = 0.0205, 0.115
MAX_EXTENT_PX = 88  # before turning and stretching
MIN_VISIBLE_SHARE = 0.45  # of the shape
MIN_GROUND_SHARE = 0.02  # of the image
MIN_NOISE_SIGMA, MAX_NOISE_SIGMA = 6.5 / 255, 9.5 / 255

COLOURS: dict[str, tuple[tuple[float, float, float], str]] = {  # name: (RGB, synonym)
    "red": ((0.84, 0.10, 0.12), "crimson"),
    "orange": ((0.97, 0.52, 0.06), "tangerine"),
    "yellow": ((0.97, 0.87, 0.14), "golden"),
    "green": ((0.13, 0.72, 0.24), "emerald"),
    "blue": ((0.12, 0.30, 0.90), "azure"),
    "purple": ((0.50, 0.16, 0.70), "violet"),
    "pink": ((0.98, 0.52, 0.76), "rose"),
    "white": ((0.95, 0.95, 0.95), "ivory"),
}
# Name: synonym, or nothing.
SHAPES = {"circle": "disc", "square": "box", "triangle": "", "star": "", "heart": "", "cross": "plus"}
GROUNDS: dict[str, str] = {
    "sand": "beach",
    "grass": "lawn",
    "water": "sea",
    "brick": "bricks",
    "wood": "planks",
    "gravel": "pebbles",
    "tiles": "tiling",
    "carpet": "rug",
    "snow": "ice",
    "mud": "soil",
    "marble": "veined stone",
    "hay": "straw",
}
UNSEEN_GROUNDS = ("water", "gravel", "tiles", "carpet")
# Training shows these colours on circles only, and no white cross: harder to compose than pairs scattered evenly
# over the table of colours and shapes.
CIRCLES_ONLY = ("orange", "green", "purple")
ALSO_UNSEEN = ("white", "cross")


@dataclass(frozen=True)
class WorldClass:
    """One class of the world."""

    id: int  # category id in every file, from 1; things first
    name: str
    synonyms: tuple[str, ...]  # without the name
    thing: bool
    seen: bool  # present in the training images
    colour: str = ""  # things only
    shape: str = ""  # things only


def world_classes() -> tuple[WorldClass, ...]:
    """All classes in the order of their ids.

    A third of the colour-shape pairs is unseen; every colour and every shape is seen in other pairs.

    Example:
        >>> classes = world_classes()
        >>> len(classes), sum(c.thing for c in classes), sum(c.thing and not c.seen for c in classes)
        (60, 48, 16)
        >>> classes[0].name, classes[0].synonyms
        ('red circle', ('crimson circle', 'red disc'))
    """
    classes = []
    for (colour, (_, colour_synonym)), (shape, shape_synonym) in itertools.product(COLOURS.items(), SHAPES.items()):
        synonyms = (f"{colour_synonym} {shape}",)
        if shape_synonym:
            synonyms += (f"{colour} {shape_synonym}",)
        seen = shape == "circle" if colour in CIRCLES_ONLY else (colour, shape) != ALSO_UNSEEN
        classes.append(WorldClass(len(classes) + 1, f"{colour} {shape}", synonyms, True, seen, colour, shape))
    for ground, synonym in GROUNDS.items():
        classes.append(WorldClass(len(classes) + 1, ground, (synonym,), False, ground not in UNSEEN_GROUNDS))
    return tuple(classes)


@dataclass(frozen=True)
class Rule:
    """What may be in an image."""

    num_shapes: tuple[int, ...]  # drawn from with equal chance
    unseen_things: float | None = None  # chance of an unseen class for each shape; None: all classes alike
    at_least_one_unseen: bool = False
    unseen_grounds: bool = True
    num_grounds: tuple[int, ...] = (1, 2, 2, 2, 3)


_MANY = (3, 4, 4, 5, 5, 6, 7)
SETS: dict[str, Rule] = {
    "train": Rule(_MANY, unseen_things=0.0, unseen_grounds=False),
    "tune": Rule(_MANY),
    "val": Rule(_MANY),
    "val_seen": Rule(_MANY, unseen_things=0.0, unseen_grounds=False),
    "val_unseen": Rule(_MANY, unseen_things=0.5, at_least_one_unseen=True),
}
RULES: dict[str, Rule] = SETS | {"clip": Rule((1, 1, 1, 2, 3, 4, 4, 5, 6, 7)), "single": Rule((1,), num_grounds=(1,))}


@dataclass(frozen=True)
class Piece:
    """One segment of an image: a shape, or all of one ground."""

    category_id: int
    thing: bool
    full_area: int  # of the whole shape, hidden part included; for a ground what is visible
    visible_area: int


@dataclass(frozen=True)
class RenderedImage:
    image: np.ndarray  # (256, 256, 3) uint8 RGB
    piece_map: np.ndarray  # (256, 256) uint8, the piece each pixel belongs to: index into `pieces`
    pieces: tuple[Piece, ...]  # grounds, then shapes from back to front


def render_image(seed: int, rule_name: str, index: int) -> RenderedImage:
    """Renders image number `index` of a set; attempts in which a segment comes out too small are drawn again."""
    rule = RULES[rule_name]
    for attempt in itertools.count():
        rng = np.random.default_rng([seed, zlib.crc32(rule_name.encode()), index, attempt])
        image = _render(rng, rule)
        if image is not None:
            return image


# ---------------------------------------------------------------------------------------------------------------- scene


def _render(rng: np.random.Generator, rule: Rule) -> RenderedImage | None:
    classes = world_classes()
    grounds = [c for c in classes if not c.thing and (c.seen or rule.unseen_grounds)]
    grounds = [grounds[i] for i in rng.permutation(len(grounds))[: rng.choice(rule.num_grounds)]]
    things = _choose_things(rng, rule, [c for c in classes if c.thing])
    canvas, piece_map = _draw_grounds(rng, grounds)
    areas = []
    for index, thing in enumerate(things, start=len(grounds)):
        area = _place_shape(rng, thing, canvas, piece_map, index, areas)
        if area is None:
            return None
        areas.append(area)
    visible = np.bincount(piece_map.ravel(), minlength=len(grounds) + len(things))
    if visible[: len(grounds)].min() < MIN_GROUND_SHARE * IMAGE_SIZE**2:
        return None
    pieces = [Piece(c.id, False, int(v), int(v)) for c, v in zip(grounds, visible)]
    pieces += [Piece(c.id, True, a, int(v)) for c, a, v in zip(things, areas, visible[len(grounds) :], strict=True)]
    return RenderedImage(_develop(rng, canvas), piece_map, tuple(pieces))


def _choose_things(rng: np.random.Generator, rule: Rule, things: list[WorldClass]) -> list[WorldClass]:
    pools = {True: [c for c in things if not c.seen], False: [c for c in things if c.seen]}
    chosen = []
    for _ in range(rng.choice(rule.num_shapes)):
        pool = things if rule.unseen_things is None else pools[bool(rng.random() < rule.unseen_things)]
        chosen.append(pool[rng.integers(len(pool))])
    if rule.at_least_one_unseen and all(c.seen for c in chosen):
        chosen[rng.integers(len(chosen))] = pools[True][rng.integers(len(pools[True]))]
    return chosen


def _place_shape(
    rng: np.random.Generator, thing: WorldClass, canvas: np.ndarray, piece_map: np.ndarray, index: int, areas: list[int]
) -> int | None:
    """Paints one shape where it hides no earlier one too much; returns its area, or None where no place was found."""
    num_grounds = index - len(areas)
    before = np.bincount(piece_map.ravel(), minlength=index)[num_grounds:]
    least = np.maximum(np.array(areas) * MIN_VISIBLE_SHARE, MIN_AREA_SHARE * IMAGE_SIZE**2)
    overlap_wanted = rng.random() < 0.15
    for trial in range(40):
        coverage, local = _shape_coverage(rng, thing.shape)
        size = coverage.shape[0]
        inside = coverage > 0.5
        area = int(inside.sum())
        if not MIN_AREA_SHARE <= area / IMAGE_SIZE**2 <= MAX_AREA_SHARE:
            continue
        top, left = rng.integers(0, IMAGE_SIZE - size + 1, size=2)
        window = np.s_[top : top + size, left : left + size]
        hidden = np.bincount(piece_map[window][inside], minlength=index)[num_grounds:]
        if areas and trial < 25 and (hidden.sum() < 0.1 * area if overlap_wanted else hidden.any()):
            continue
        if areas and (before - hidden < least).any():
            continue
        _paint_shape(rng, thing.colour, canvas, coverage, local, top, left)
        piece_map[window][inside] = index
        return area
    return None


# --------------------------------------------------------------------------------------------------------------- shapes


def _outline(shape: str) -> np.ndarray:
    """(N, 2) float corners of a shape, about as large as the unit circle, y downwards."""
    if shape == "circle":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        return np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.86
    if shape == "triangle":
        return np.array([[0, -1.08], [1.08, 0.82], [-1.08, 0.82]])
    if shape == "star":
        t = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.15, 0.5)
        return np.stack([radius * np.cos(t), radius * np.sin(t)], 1)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 15.5, -(y + 2.5) / 15.0], 1)
    assert shape == "cross", shape
    a, b = 0.36, 1.05
    return np.array(
        [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
    )


def _shape_coverage(rng: np.random.Generator, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """A shape of random size, turn and stretch.

    Returns:
        Coverage (n, n) float 0..1 with soft edges, and the place of every pixel along the shape's own axes (n, n, 2).
    """
    corners = _outline(shape)
    x, y = corners.T
    unit_area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    share = math.exp(rng.uniform(math.log(0.027), math.log(0.095)))
    radius = min(math.sqrt(share * IMAGE_SIZE**2 / unit_area), MAX_EXTENT_PX / np.ptp(corners, 0).max())
    stretch = math.exp(rng.uniform(-0.08, 0.08))
    turn = math.radians(rng.uniform(-36, 36) if shape == "star" else rng.uniform(-22, 22))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    corners = corners * (radius * stretch, radius / stretch) @ rotation.T
    corners -= (corners.min(0) + corners.max(0)) / 2
    size = min(math.ceil(2 * np.abs(corners).max()) + 3, IMAGE_SIZE)
    fine = 4
    canvas = np.zeros((size * fine, size * fine), np.uint8)
    cv2.fillPoly(canvas, [np.round((corners + size / 2) * fine * 16 - 8).astype(np.int32)], 255, shift=4)
    coverage = canvas.reshape(size, fine, size, fine).mean((1, 3), dtype=np.float32) / 255
    centred = np.arange(size, dtype=np.float32) + 0.5 - size / 2
    grid = np.stack(np.meshgrid(centred, centred), -1) @ rotation.astype(np.float32)
    return coverage, grid


def _paint_shape(
    rng: np.random.Generator,
    colour: str,
    canvas: np.ndarray,
    coverage: np.ndarray,
    local: np.ndarray,
    top: int,
    left: int,
) -> None:
    size = coverage.shape[0]
    _cast_shadow(canvas, coverage, top, left)
    rgb = np.array(COLOURS[colour][0], np.float32)
    rgb = np.clip(rgb + rng.normal(0, 0.02, 3).astype(np.float32), 0, 1) * np.float32(rng.uniform(0.9, 1.03))
    shade = 1 + np.float32(rng.uniform(0.08, 0.16)) * _shape_texture(rng, local)
    light = rng.uniform(0, 2 * math.pi)
    shade *= 1 + np.float32(rng.uniform(0.0, 0.12)) * (
        local @ np.array([math.cos(light), math.sin(light)], np.float32)
    ) * (2 / size)
    depth = cv2.distanceTransform((coverage > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    shade *= 1 - 0.38 * np.clip(1.6 - 0.5 * depth, 0, 1)  # a dark rim: equal shapes stay apart where they overlap
    window = canvas[top : top + size, left : left + size]
    window += coverage[..., None] * (np.clip(rgb * shade[..., None], 0, 1) - window)


def _cast_shadow(canvas: np.ndarray, coverage: np.ndarray, top: int, left: int) -> None:
    reach = coverage.shape[0] + 11  # 3 px to the right and down
    shadow = cv2.GaussianBlur(np.pad(coverage, 8), (0, 0), 2.5)[5 : 5 + reach, 5 : 5 + reach]
    bottom, right = min(top + reach, IMAGE_SIZE), min(left + reach, IMAGE_SIZE)
    canvas[top:bottom, left:right] *= 1 - 0.35 * shadow[: bottom - top, : right - left, None]


def _shape_texture(rng: np.random.Generator, local: np.ndarray) -> np.ndarray:
    """A pattern in -1..1 along the shape's own axes."""
    period = rng.uniform(9, 16)
    x, y = np.moveaxis(local * np.float32(2 * math.pi / period), -1, 0)
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros_like(x)
    if kind == 1:
        return np.tanh(3 * np.sin(x + y if rng.random() < 0.5 else x))
    if kind == 2:
        return np.tanh(4 * (np.cos(x) + np.cos(y) - 0.9))
    if kind == 3:
        return np.tanh(4 * np.sin(x * 0.7) * np.sin(y * 0.7))
    return _noise(rng, local.shape[0], int(rng.integers(5, 9)))


# -------------------------------------------------------------------------------------------------------------- grounds


def _draw_grounds(rng: np.random.Generator, grounds: list[WorldClass]) -> tuple[np.ndarray, np.ndarray]:
    """Canvas (256, 256, 3) float 0..1 and the map of pieces (256, 256) uint8, cut by wavy lines."""
    canvas = _GROUND_PAINTERS[grounds[0].name](rng)
    piece_map = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    direction = rng.uniform(0, 2 * math.pi)
    for index, ground in enumerate(grounds[1:], start=1):
        angle = direction + (rng.uniform(-0.4, 0.4) if index == 1 else math.pi + rng.uniform(-0.5, 0.5))
        offset = rng.uniform(-30, 30) if len(grounds) == 2 else rng.uniform(22, 55)
        along, across = _axes(angle)
        wave = 9 * np.sin(along / rng.uniform(14, 30) + rng.uniform(0, 6)) + 5 * np.sin(
            along / rng.uniform(6, 12) + rng.uniform(0, 6)
        )
        distance = across - np.float32(offset) + wave  # about pixels from the border line
        cover = np.clip(distance + 0.5, 0, 1)[..., None]
        canvas += cover * (_GROUND_PAINTERS[ground.name](rng) - canvas)
        piece_map[cover[..., 0] > 0.5] = index
    return canvas, piece_map


def _axes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of all pixels along a direction and across it, zero in the middle of the image."""
    centred = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5 - IMAGE_SIZE / 2
    x, y = centred[None, :], centred[:, None]
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * c + y * s, y * c - x * s


def _noise(rng: np.random.Generator, size: int, cell_px: int | tuple[int, int]) -> np.ndarray:
    """Smooth noise (size, size) in about -1..1; `cell_px` is its grain, as one length or (height, width)."""
    cell_height, cell_width = (cell_px, cell_px) if isinstance(cell_px, int) else cell_px
    rows, columns = size // cell_height + 3, size // cell_width + 3
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    fine = cv2.resize(coarse, (columns * cell_width, rows * cell_height), interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(0, cell_height + 1), rng.integers(0, cell_width + 1)
    return np.tanh(0.8 * fine[top + cell_height // 2 :, left + cell_width // 2 :][:size, :size])


def _tint(rng: np.random.Generator, rgb: tuple[float, float, float], shade: np.ndarray) -> np.ndarray:
    base = np.array(rgb, np.float32) + rng.normal(0, 0.015, 3).astype(np.float32)
    return np.clip(base * (shade * np.float32(rng.uniform(0.9, 1.1)))[..., None], 0, 1)


def _sand(rng: np.random.Generator) -> np.ndarray:
    _, across = _axes(rng.uniform(-0.5, 0.5))
    ripples = np.sin(across * (2 * math.pi / rng.uniform(11, 16)) + 2.2 * _noise(rng, IMAGE_SIZE, 40))
    grain = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    return _tint(rng, (0.80, 0.69, 0.49), 1 + 0.09 * ripples + 0.05 * grain)


def _grass(rng: np.random.Generator) -> np.ndarray:
    blades = _noise(rng, IMAGE_SIZE, (11, 3)) + 0.6 * _noise(rng, IMAGE_SIZE, (7, 2))
    canvas = _tint(rng, (0.29, 0.42, 0.17), 1 + 0.32 * blades + 0.12 * _noise(rng, IMAGE_SIZE, 48))
    canvas[..., 0] += 0.05 * np.maximum(blades, 0)
    return np.clip(canvas, 0, 1)


def _water(rng: np.random.Generator) -> np.ndarray:
    _, across = _axes(rng.uniform(-0.15, 0.15))
    waves = np.sin(across * (2 * math.pi / rng.uniform(16, 24)) + 3.2 * _noise(rng, IMAGE_SIZE, (14, 34)))
    crests = np.maximum(waves - 0.75, 0) * 3.2
    canvas = _tint(rng, (0.24, 0.46, 0.55), 1 + 0.14 * waves)
    return np.clip(canvas + crests[..., None] * 0.35, 0, 1)


def _brick(rng: np.random.Generator) -> np.ndarray:
    height, width = rng.uniform(15, 20), rng.uniform(32, 42)
    along, across = _axes(rng.uniform(-0.12, 0.12))
    row = np.floor(across / height)
    shifted = along / width + 0.5 * (row % 2)
    column = np.floor(shifted)
    table = rng.uniform(-0.16, 0.16, (64, 64)).astype(np.float32)
    tone = table[row.astype(int) % 64, column.astype(int) % 64]
    edge = np.minimum(
        np.minimum(across / height - row, 1 - across / height + row) * height,
        np.minimum(shifted - column, 1 - shifted + column) * width,
    )
    mortar = np.clip(2.1 - edge, 0, 1)[..., None]
    bricks = _tint(rng, (0.52, 0.30, 0.25), 1 + tone + 0.08 * _noise(rng, IMAGE_SIZE, 3))
    return bricks + mortar * (np.float32(0.66) - bricks)


def _wood(rng: np.random.Generator) -> np.ndarray:
    along, across = _axes(rng.choice([0.0, math.pi / 2]) + rng.uniform(-0.1, 0.1))
    width = rng.uniform(30, 42)
    plank = np.floor(across / width)
    tone = rng.uniform(-0.15, 0.15, 64).astype(np.float32)[plank.astype(int) % 64]
    bend = _noise(rng, IMAGE_SIZE, 36)
    grain = np.sin(across * (2 * math.pi / rng.uniform(6, 8)) + 3 * bend + plank * 2.1 + along * 0.02)
    gap = np.clip(1.6 - np.minimum(across / width - plank, 1 - across / width + plank) * width, 0, 1)
    return _tint(rng, (0.45, 0.30, 0.17), (1 + tone + 0.13 * grain) * (1 - 0.65 * gap))


def _gravel(rng: np.random.Generator) -> np.ndarray:
    noise = _noise(rng, IMAGE_SIZE, int(rng.integers(7, 10)))
    stones = np.clip(np.abs(noise) * 3.5, 0, 1)  # dark where the noise changes its sign
    return _tint(rng, (0.47, 0.48, 0.50), 0.45 + 0.6 * stones + 0.18 * noise)


def _tiles(rng: np.random.Generator) -> np.ndarray:
    size = rng.uniform(24, 34)
    along, across = _axes(rng.choice([0.0, math.pi / 4]) + rng.uniform(-0.1, 0.1))
    row, column = np.floor(across / size), np.floor(along / size)
    dark = (row + column) % 2
    edge = np.minimum(
        np.minimum(across / size - row, 1 - across / size + row),
        np.minimum(along / size - column, 1 - along / size + column),
    )
    joint = np.clip(1.5 - edge * size, 0, 1)
    shade = 1.12 - 0.34 * dark + 0.05 * _noise(rng, IMAGE_SIZE, 5)
    return _tint(rng, (0.62, 0.58, 0.66), shade * (1 - 0.5 * joint))


def _carpet(rng: np.random.Generator) -> np.ndarray:
    along, across = _axes(rng.uniform(-0.2, 0.2))
    period = 2 * math.pi / rng.uniform(8, 11)
    weave = np.sin(across * period) * np.sin(along * period)
    diamonds = np.abs(((along + across) / 34) % 2 - 1) + np.abs(((along - across) / 34) % 2 - 1)
    canvas = _tint(rng, (0.45, 0.20, 0.30), 1 + 0.22 * weave + 0.06 * _noise(rng, IMAGE_SIZE, 3))
    ornament = np.clip(6 * (0.55 - diamonds), 0, 1)[..., None]
    return np.clip(canvas + ornament * np.array((0.22, 0.20, 0.08), np.float32), 0, 1)


def _snow(rng: np.random.Generator) -> np.ndarray:
    drifts = _noise(rng, IMAGE_SIZE, (22, 60)) + 0.5 * _noise(rng, IMAGE_SIZE, (11, 26))
    canvas = _tint(rng, (0.80, 0.86, 0.93), 0.97 + 0.13 * drifts)
    sparkle = rng.random((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32) > 0.985
    return np.clip(canvas + 0.25 * sparkle[..., None], 0, 1)


def _mud(rng: np.random.Generator) -> np.ndarray:
    clods = _noise(rng, IMAGE_SIZE, 15) + 0.6 * _noise(rng, IMAGE_SIZE, 6)
    relief = clods - np.roll(clods, (2, 2), (0, 1))  # lit from the upper left
    return _tint(rng, (0.31, 0.23, 0.18), 1 + 0.9 * relief + 0.12 * clods)


def _marble(rng: np.random.Generator) -> np.ndarray:
    _, across = _axes(rng.uniform(0.3, 1.2))
    bend = _noise(rng, IMAGE_SIZE, 44) + 0.5 * _noise(rng, IMAGE_SIZE, 18)
    veins = 1 - np.abs(np.sin(across / rng.uniform(16, 24) + 3.5 * bend))
    return _tint(rng, (0.78, 0.77, 0.73), 1.02 - 0.55 * veins**5 + 0.05 * bend)


def _hay(rng: np.random.Generator) -> np.ndarray:
    stalks = _noise(rng, IMAGE_SIZE, (3, 22)) + 0.8 * _noise(rng, IMAGE_SIZE, (2, 14))
    crossed = _noise(rng, IMAGE_SIZE, (14, 3))
    return _tint(rng, (0.66, 0.55, 0.22), 1 + 0.26 * stalks + 0.14 * crossed)


_GROUND_PAINTERS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "sand": _sand,
    "grass": _grass,
    "water": _water,
    "brick": _brick,
    "wood": _wood,
    "gravel": _gravel,
    "tiles": _tiles,
    "carpet": _carpet,
    "snow": _snow,
    "mud": _mud,
    "marble": _marble,
    "hay": _hay,
}


def _develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Lights the scene from one side and adds the camera's noise."""
    along, _ = _axes(rng.uniform(0, 2 * math.pi))
    light = rng.uniform(0.88, 1.08) + rng.uniform(0.0, 0.14) * along / (IMAGE_SIZE / 2)
    sigma = rng.uniform(MIN_NOISE_SIGMA, MAX_NOISE_SIGMA)
    noisy = canvas * light[..., None].astype(np.float32) + np.float32(sigma) * rng.standard_normal(
        canvas.shape, dtype=np.float32
    )
    return np.round(np.clip(noisy, 0, 1) * 255).astype(np.uint8)
