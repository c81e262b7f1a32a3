"""What the documents name exists (files, links, make targets, flags, config keys), and commands and examples can be
pasted.
"""

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from fcclip import __version__
from fcclip.config import get_cfg, load_config
from fcclip.engine import scale_to_world_size
from tests.tools.conftest import load_program

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [path for folder in ("", "docs", "datasets") for path in sorted((REPOSITORY / folder).glob("*.md"))]
GETTING_STARTED = REPOSITORY / "GETTING_STARTED.md"
DETECTRON2 = REPOSITORY / "docs" / "detectron2.md"
COCO = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml"
CONFIG_KEY = re.compile(r"\b(?:MODEL|SOLVER|INPUT|TEST|DATASETS|DATALOADER|WANDB)(?:\.[A-Z0-9_]+)+")
SCRIPT = re.compile(r"(?:python|sbatch[^\n]*?) ((?:[\w/]+/)?\w+\.(?:py|sh))((?:[^\n]*\\\n)*[^\n]*)")
PARSED = (
    "train_net.py",
    "demo/app.py",
    "demo/demo.py",
    "tools/analyze_model.py",
    "tools/check.py",
    "tools/convert_checkpoint.py",
    "tools/export.py",
)


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def document(request):
    return request.param


def text_of(document):
    return document.read_text(encoding="utf-8")


def code_blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(document), re.DOTALL)


def commands(document):
    """(script, its words) of every command in a bash block; comments and line ends are taken off."""
    for block in code_blocks(document, "bash"):
        for script, rest in SCRIPT.findall(block):
            yield script, shlex.split(rest.replace("\\\n", " "), comments=True)


def anchors_of(document):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_files_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text_of(document)):
        if target.startswith("https://"):
            continue
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"


def test_commands_name_scripts_and_flags_that_exist(document):
    for script, words in commands(document):
        assert (REPOSITORY / script).is_file(), script
        sources = [REPOSITORY / ("train_net.py" if script.endswith(".sh") else script)]
        if script.startswith("datasets/"):  # which share their command line
            sources += sorted((REPOSITORY / "fcclip" / "preparation").glob("*.py"))
        if script == "tools/benchmark.py":  # its parts are files beside it
            sources += sorted((REPOSITORY / "tools").glob("benchmark_*.py"))
        source = "\n".join(text_of(path) for path in sources)
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in source, f"{script} {flag}"


def test_commands_can_be_read_by_their_scripts_and_keys_take_the_values(document):
    for script, words in commands(document):
        name = "train_net.py" if script == "tools/slurm/train.sh" else script
        if name not in PARSED or "..." in words:
            continue
        args = load_program(REPOSITORY / name).parse_arguments(words)
        if args.config_file:
            load_config(args.config_file, args.opts)


def test_scripts_that_are_named_exist(document):
    for name in re.findall(r"\b(?:tools|tests|benchmarks|demo|fcclip)/[\w/-]+\.(?:py|sh)\b", text_of(document)):
        assert (REPOSITORY / name).is_file(), name


def test_extras_that_are_named_exist(document):
    known = re.findall(r"^(\w+) = \[", text_of(REPOSITORY / "pyproject.toml"), re.MULTILINE)
    for extras in re.findall(r"(?:'\.|fcclip)\[([\w,]+)\]'", text_of(document)):
        for extra in extras.split(","):
            assert extra in known, extra


def test_environment_variables_that_are_named_are_read(document):
    places = [*(REPOSITORY / "fcclip").rglob("*.py"), REPOSITORY / "tests" / "modeling" / "backbones" / "test_clip.py"]
    source = "\n".join(text_of(path) for path in places)
    for name in set(re.findall(r"\bFCCLIP_[A-Z_]+", text_of(document))):
        assert name in source, name


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


def test_python_examples_are_python_and_import_what_exists(document):
    for block in code_blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fcclip":
                public = public_names(node.module)
                assert all(alias.name in public for alias in node.names), f"from {node.module} import ..."


def public_names(module):
    """What a module hands out; of one that needs a library which is absent, what it says in `__all__`."""
    try:
        return dir(importlib.import_module(module)) + ["Segmenter"] * (module == "fcclip")
    except ImportError:
        source = text_of(REPOSITORY / module.replace(".", "/") / "__init__.py")
        return re.findall(r'"(\w+)"', source.split("__all__")[1])


def test_the_recipes_for_fewer_gpus_are_those_of_the_config():
    rows = re.findall(
        r"^\| (\d) \| (?:nothing|`SOLVER.ACCUMULATE (\d)`) \| batch (\d+), rate ([\d.]+), ([\d,]+) iterations \|$",
        text_of(GETTING_STARTED),
        re.MULTILINE,
    )
    assert [int(row[0]) for row in rows] == [8, 4, 2, 1]
    cfg = load_config(COCO, ["SOLVER.REFERENCE_WORLD_SIZE", "8"])
    for processes, parts, batch, rate, iterations in rows:
        assert cfg.SOLVER.IMS_PER_BATCH // int(processes) // int(parts or 1) == 2  # images at once on a GPU
        solver = scale_to_world_size(cfg, int(processes)).SOLVER
        assert int(batch) == solver.IMS_PER_BATCH and int(iterations.replace(",", "")) == solver.MAX_ITER
        assert float(rate) == pytest.approx(solver.BASE_LR)


def test_the_cost_of_the_large_model_is_the_one_that_is_told():
    report = load_program(REPOSITORY / "tools" / "analyze_model.py").analyse(
        load_config(COCO), height=1024, width=1024, segments=12
    )
    flops = sum(part["flops"] for part in report["inference"]["parts"].values())
    inference, training = (report[name]["memory"]["total"] / 2**30 for name in ("inference", "training"))
    told = re.search(r"takes\s+([\d,]+) GFLOPs and ([\d.]+) GiB for an image, ([\d.]+) GiB", text_of(GETTING_STARTED))
    found = [flops / 1e9, inference, training]
    assert [float(number.replace(",", "")) for number in told.groups()] == pytest.approx(found, rel=0.02)


def test_the_detectron2_example_finds_what_the_document_says(monkeypatch):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    section = text_of(DETECTRON2)
    program, told = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "text"))
    monkeypatch.chdir(REPOSITORY)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, str(DETECTRON2), "exec"), {})
    found, told = ([line.rsplit(maxsplit=2) for line in text.splitlines()] for text in (printed.getvalue(), told))
    assert [line[0] for line in found] == [line[0] for line in told]
    for (_, score, area), (_, told_score, told_area) in zip(found, told):
        assert float(score) == pytest.approx(float(told_score), abs=0.02)
        assert int(area) == pytest.approx(int(told_area), rel=0.01)


def test_no_number_is_left_to_be_filled_in(document):
    assert "FILL" not in text_of(document)


def test_no_document_knows_the_machine_it_was_written_on(document):
    assert not re.search(r"/(?:home|root|Users|work)/", text_of(document))


def test_the_citation_and_the_changelog_know_the_version():
    assert f"version: {__version__}\n" in text_of(REPOSITORY / "CITATION.cff")
    assert f"## {__version__}" in text_of(REPOSITORY / "CHANGELOG.md")
