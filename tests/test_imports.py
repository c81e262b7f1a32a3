"""Each room imports only rooms to its left, inside functions too. Scripts outside the package are exempt."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import fcclip

ARROW = (
    "version", "allocator", "errors", "files", "deploy", "comm", "structures", "config", "vocabulary", "data",
    "preparation",
    "visualization", "ops", "losses", "weights", "modeling", "engine", "evaluation", "reports", "finetuning",
    "checks", "segmenter", "export", "integrations",
)  # fmt: skip
PACKAGE = Path(__file__).resolve().parents[1] / "fcclip"


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file of `package` imports; relative imports are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def broken_arrows(source: str, file: str, room: str, package: tuple[str, ...]) -> list[str]:
    """One sentence per import of `source` that goes from `room` to its right, or to a room that does not exist."""
    sentences = []
    for line, name in imported_modules(ast.parse(source, file), package):
        parts = name.split(".")
        if parts[0] != "fcclip" or len(parts) < 2 or parts[1] == room:
            continue
        target = "segmenter" if parts[1] == "Segmenter" else parts[1].strip("_")
        if target not in ARROW:
            sentences.append(f"{file}:{line}: imports {name}, but there is no room '{target}'")
        elif ARROW.index(target) > ARROW.index(room):
            sentences.append(f"{file}:{line}: {room} imports {name}, but {target} stands to the right of {room}")
    return sentences


def files_of_rooms() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":  # the public face, which hands out Segmenter
            yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_import_goes_to_the_left():
    sentences = []
    for path, room in files_of_rooms():
        file = str(path.relative_to(PACKAGE.parent))
        package = path.relative_to(PACKAGE.parent).parts[:-1]
        assert room in ARROW, f"{file} is in no room of {', '.join(ARROW)}"
        sentences += broken_arrows(path.read_text(encoding="utf-8"), file, room, package)
    assert not sentences, "\n".join(sentences)


@pytest.mark.parametrize(
    "statement",
    [
        "import fcclip.engine",
        "from fcclip import engine",
        "from fcclip.engine.train import Trainer",
        "def later():\n    from fcclip.engine import Trainer",
        "from ..engine import Trainer",
        "from .. import engine",
        "from fcclip import Segmenter",
    ],
)
def test_an_import_to_the_right_is_found_and_its_line_is_named(statement):
    (sentence,) = broken_arrows("\n" + statement, "fcclip/modeling/x.py", "modeling", ("fcclip", "modeling"))
    assert sentence.startswith(f"fcclip/modeling/x.py:{statement.count(chr(10)) + 2}: modeling imports fcclip.")


@pytest.mark.parametrize(
    "statement",
    ["import torch", "from fcclip.data import DATASETS", "from .parts import Part", "from fcclip import __version__"],
)
def test_an_import_to_the_left_or_within_the_room_is_fine(statement):
    assert broken_arrows(statement, "fcclip/modeling/x.py", "modeling", ("fcclip", "modeling")) == []


def test_every_room_lists_its_files_in_its_docstring():
    missing = []
    for init in sorted(PACKAGE.glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        for path in sorted(init.parent.glob("*.py")):
            if path != init and path.name not in docstring:
                missing.append(f"{init.relative_to(PACKAGE.parent)} does not mention {path.name}")
    assert not missing, "\n".join(missing)


def test_importing_the_package_alone_does_not_import_torch():
    code = "import fcclip, sys; assert fcclip.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_an_unknown_attribute_of_the_package_is_named():
    import fcclip

    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        fcclip.Segmentor  # noqa: B018


def test_the_published_names_stand_at_the_top_or_say_where_to_look():
    names = fcclip._PUBLISHED
    assert len(names) == 10
    for name in names:
        if find_spec("detectron2") is not None and name != "SemanticSegmentorWithTTA":
            assert getattr(fcclip, name).__name__ == name
        else:
            with pytest.raises(ImportError, match="detectron2|TEST.AUG.ENABLED"):
                getattr(fcclip, name)
