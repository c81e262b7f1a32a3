"""The program that compares FC-CLIP and FrozenSeg; its trainings take minutes and are not run here."""

import json

import torch

from fcclip.config import load_config
from fcclip.data.training_set import training_vocabulary
from fcclip.modeling import build_model
from tests.conftest import DATA, TINY
from tests.tools.conftest import REPOSITORY, load_program

program = load_program(REPOSITORY / "tools" / "compare_frozenseg.py")
TINY_SAM = {"MODEL.SAM_NAME": str(DATA / "tiny_sam.json"), "MODEL.SAM_WEIGHTS": ""}
OPTS = [str(word) for pair in {**TINY, **TINY_SAM}.items() if pair[0] != "SEED" for word in pair]


def parts_of(config, keys):
    model = build_model(load_config(REPOSITORY / program.CONFIGS / config, [*keys, *OPTS]))
    injectors = [name for name in model.state_dict() if name.startswith(getattr(model, "added_parts", ("-",)))]
    return getattr(model, "sam", None) is not None, bool(injectors)


def test_the_trainings_are_the_ablations_of_the_paper():
    assert {name: parts_of(*training) for name, training in program.TRAININGS.items()} == {
        "fcclip": (False, False),
        "query": (True, False),
        "both": (True, True),
    }


def test_every_row_is_evaluated_as_it_was_trained_and_interrupted_runs_go_on(root, tmp_path, monkeypatch, capsys):
    called = []

    def call(script, *arguments):
        called.append(script)
        words = [str(word) for word in arguments]
        if script == "tools/train_shapes_sam.py":
            load_program(REPOSITORY / script).main([*words, "--workers", "1"])
        elif script == "train_net.py":
            config, *keys = words[words.index("--config-file") + 1 :]
            cfg = load_config(REPOSITORY / config, keys)
            model = build_model(cfg, train_vocabulary=training_vocabulary(cfg))
            torch.save({"model": model.state_dict()}, path := tmp_path / "out" / words[-1] / "model_final.pth")
            assert cfg.SEED == 2 and path.is_file()

    monkeypatch.setattr(program, "call", call)
    for name in program.TRAININGS:
        (tmp_path / "out" / f"{name}_2").mkdir(parents=True)
    (tmp_path / "out" / "world").symlink_to(root)
    words = ["--output", str(tmp_path / "out"), "--first", "1", "--seeds", "2", "--", *OPTS]
    assert program.main(words) == 0
    results = (tmp_path / "out" / "results.json").read_text()
    rows = json.loads(results)["rows"]
    assert {label: set(seeds) for label, seeds in rows.items()} == {label: {"2"} for label in program.ROWS}
    assert "PQ" in rows["FC-CLIP"]["2"] and "PQ" not in rows["FC-CLIP, ensemble"]["2"]
    assert program.main(words) == 0
    assert called.count("train_net.py") == 3 and called.count("tools/train_shapes_sam.py") == 1
    assert (tmp_path / "out" / "results.json").read_text() == results
    table = capsys.readouterr().out
    assert all(label in table for label in program.ROWS)


def test_a_row_has_mean_and_standard_deviation_of_each_group():
    column = {"mIoU": [40.0, 20.0]}
    table = program.format_rows({"a": {"1": column, "2": {"mIoU": [42.0, 20.0]}}, "b": {"1": column}})
    first, second = table.splitlines()[2:]
    assert "41.0 ± 1.4 / 20.0 ± 0.0" in first and "40.0 / 20.0" in second and second.count("–") == 5
