"""The fourteen prompt templates of ViLD, as FC-CLIP uses them (capitals and full stops as published)."""

from __future__ import annotations

from collections.abc import Iterable

TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)


def prompts(synonyms: Iterable[str]) -> list[str]:
    """Every template filled with every synonym, templates fastest: 14 sentences a synonym."""
    return [template.format(synonym) for synonym in synonyms for template in TEMPLATES]
