"""What the documents name exists: files, links, make targets, flags, config keys."""

import ast
import re
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from fcclip import __version__
from fcclip.config import get_cfg

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), REPOSITORY / "datasets" / "README.md"]
CONFIG_KEY = re.compile(r"\b(?:MODEL|SOLVER|INPUT|TEST|DATASETS|DATALOADER)(?:\.[A-Z0-9_]+)+")
SCRIPT = re.compile(r"python ((?:[\w/]+/)?\w+\.py)((?:[^\n]*\\\n)*[^\n]*)")


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def document(request):
    return request.param


def text_of(document):
    return document.read_text(encoding="utf-8")


def code_blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(document), re.DOTALL)


def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(document)):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_commands_name_scripts_and_flags_that_exist(document):
    for block in code_blocks(document, "bash"):
        for script, rest in SCRIPT.findall(block):
            assert (REPOSITORY / script).is_file(), script
            sources = [REPOSITORY / script]
            if script == "train_net.py":
                sources += sorted((REPOSITORY / "fcclip" / "engine").glob("*.py"))
            source = "\n".join(text_of(path) for path in sources)
            for flag in re.findall(r"(?<=\s)--[\w-]+", rest.split("  #")[0]):
                assert f'"{flag}"' in source, f"{script} {flag}"


def test_configs_that_are_named_exist(document):
    for name in re.findall(r"configs/[\w/-]+\.yaml", text_of(document)):
        assert (REPOSITORY / name).is_file(), name


def test_make_targets_that_are_named_exist(document):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^|\s)make ([a-z]+)(?=[\s`])", "\n".join(code_blocks(document, "bash"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_config_keys_that_are_named_exist(document):
    for key in set(CONFIG_KEY.findall(text_of(document))):
        node = get_cfg()
        for part in key.split("."):
            assert isinstance(node, CfgNode) and part in node, key
            node = node[part]


def test_python_examples_are_python(document):
    for block in code_blocks(document, "python"):
        ast.parse(block)


def test_no_number_is_left_to_be_filled_in(document):
    assert "FILL" not in text_of(document)


def test_no_document_knows_the_machine_it_was_written_on(document):
    assert not re.search(r"/(?:home|root|Users|work)/", text_of(document))


def test_the_citation_and_the_changelog_know_the_version():
    assert f"version: {__version__}\n" in text_of(REPOSITORY / "CITATION.cff")
    assert f"## {__version__}" in text_of(REPOSITORY / "CHANGELOG.md")
