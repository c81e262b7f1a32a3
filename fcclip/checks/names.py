"""Names of classes that cannot be told apart."""

from __future__ import annotations

from fcclip.checks.issue import NOTE, Issues
from fcclip.files import listed
from fcclip.vocabulary import Vocabulary

_AS_WRITTEN = {"level": NOTE, "remedy": "nothing: the names are as they were written"}


def spelling(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def check_names(issues: Issues, vocabulary: Vocabulary, *, is_own: bool) -> None:
    """Classes of the same name or synonym. The user's (`is_own`) can be changed, others are as they were written."""
    file, changes = f"vocabulary '{vocabulary.name}'", {} if is_own else _AS_WRITTEN
    spelled: dict[str, int] = {}
    owners: dict[str, dict[str, None]] = {}
    for index, (name, synonyms) in enumerate(zip(vocabulary.class_names, vocabulary.synonyms)):
        other = spelled.setdefault(spelling(name), index)
        if other != index:
            what = f"'{vocabulary.class_names[other]}' and '{name}': classes {other} and {index}"
            issues.add_kind("similar-names", file, what, **changes)
        for synonym in synonyms:
            owners.setdefault(synonym, {})[name] = None
    shared = [f"'{synonym}' ({', '.join(names)})" for synonym, names in owners.items() if len(names) > 1]
    if shared:
        issues.add_kind("shared-synonym", file, listed(shared, 12))


def check_seen_names(issues: Issues, vocabulary: Vocabulary, training: Vocabulary, *, is_own: bool) -> None:
    """Classes that count as unseen although training has nearly the same name."""
    known = {spelling(name): name for names in training.synonyms for name in names}
    for names, seen in zip(vocabulary.synonyms, vocabulary.seen_by(training).tolist()):
        almost = next((name for name in names if spelling(name) in known), None)
        if not seen and almost is not None:
            what = f"'{names[0]}': '{almost}' is '{known[spelling(almost)]}' in training"
            issues.add_kind("almost-seen", f"vocabulary '{vocabulary.name}'", what, **({} if is_own else _AS_WRITTEN))
