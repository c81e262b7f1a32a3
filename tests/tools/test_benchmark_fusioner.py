"""tools/benchmark_fusioner.py, tiny: the published loop written out gives the same loss and gradients."""

import json

from tests.conftest import DATA
from tests.tools.conftest import REPOSITORY, load_program

tool = load_program(REPOSITORY / "tools" / "benchmark_fusioner.py")


def test_both_ways_give_the_same_and_are_timed(tmp_path, capsys):
    tiny = ["MODEL.FUSIONER.WIDTH", "16", "MODEL.FUSIONER.LAYERS", "1", "MODEL.FUSIONER.HEADS", "2"]
    sizes = ["MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "8", "INPUT.IMAGE_SIZE", "32"]
    report = tmp_path / "report.json"
    words = ["--batch", "3", "--rounds", "1", "--clip", str(DATA / "tiny_vit.json"), "--json", str(report)]
    assert tool.main([*words, *tiny, *sizes]) == 0
    assert "images a second" in capsys.readouterr().out
    assert set(json.loads(report.read_text())["images_per_second"]) == {"published loop", "this package"}
