"""tools/convert_checkpoint.py: nothing is lost, or it is said by name."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fcclip.engine import save_checkpoint
from fcclip.errors import run_program
from fcclip.modeling.backbones.clip import build_clip
from fcclip.weights import load_weights, model_weights
from fcclip.weights.files import read_weight_file
from tests.tools.conftest import REPOSITORY, load_program

CLIP = "backbone.clip_model."


@pytest.fixture
def tool():
    module = load_program(REPOSITORY / "tools" / "convert_checkpoint.py")
    main, module.main = module.main, lambda argv: run_program(lambda: main(argv))
    return module


@pytest.fixture
def config(tiny_cfg, tmp_path):
    """The tiny config as a file, its CLIP with weights of its own."""
    torch.manual_seed(7)
    clip = build_clip(tiny_cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME).clip_model
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    tiny_cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS = str(tmp_path / "clip.safetensors")
    (tmp_path / "config.yaml").write_text(tiny_cfg.dump())
    return str(tmp_path / "config.yaml")


@pytest.fixture
def published(config, tiny_model, tmp_path):
    """A file as published: no CLIP, mixed dtypes, numbers that a careless conversion changes, versions of modules."""
    state = OrderedDict(model_weights(tiny_model()))
    state["sem_seg_head.predictor.query_feat.weight"].view(-1)[:2] = torch.tensor([-0.0, 1e-42])
    state["sem_seg_head.predictor.query_embed.weight"] = state["sem_seg_head.predictor.query_embed.weight"].half()
    state["void_embedding.weight"] = state["void_embedding.weight"].bfloat16()
    state["sem_seg_head.pixel_decoder.mask_features.weight"] = torch.randn(32, 32, 1, 1).transpose(0, 1)  # not in order
    state._metadata = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 2}})
    torch.save({"model": state}, tmp_path / "published.pth")
    return tmp_path / "published.pth"


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: Path, other: Path) -> None:
    """The same names, dtypes, shapes, bits and versions of modules."""
    first, second = read_weight_file(one), read_weight_file(other)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(bits(value) == bits(second.tensors[name]) for name, value in first.tensors.items())
    assert first.versions == second.versions


# ---- round trips ----


@pytest.mark.parametrize(
    ("layout", "between"),
    [(None, "a.safetensors"), ("published", "a.safetensors"), ("published", "a.pth"), (None, "a.pt")],
)
def test_published_to_ours_and_back_keeps_every_bit(tool, published, tmp_path, layout, between):
    options = ["--layout", layout] if layout else []
    assert tool.main([str(published), str(tmp_path / between), *options]) == 0
    assert tool.main([str(tmp_path / between), str(tmp_path / "back.pth"), "--layout", "published"]) == 0
    assert_same(published, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["model"] and back["model"]["sem_seg_head.predictor.logit_scale"].shape == ()
    assert back["model"]._metadata == OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 2}})


@pytest.mark.parametrize("layout", ["trainable", "full"])
def test_what_a_layout_leaves_out_or_adds_comes_back_with_the_config(tool, published, config, tmp_path, layout):
    between = tmp_path / "a.safetensors"
    assert tool.main([str(published), str(between), "--layout", layout, "--config-file", config]) == 0
    names = set(load_file(between))
    assert any(name.startswith(CLIP) for name in names) == (layout == "full")
    assert ("criterion.empty_weight" in names) == (layout == "full")
    arguments = [str(between), str(tmp_path / "back.pth"), "--layout", "published", "--config-file", config]
    assert tool.main(arguments) == 0
    assert_same(published, tmp_path / "back.pth")


@pytest.mark.parametrize("layout", ["full", "published", "trainable"])
def test_a_full_file_needs_no_other_clip(tool, published, config, tmp_path, layout):
    full, output = tmp_path / "full.pth", tmp_path / "output.pth"
    assert tool.main([str(published), str(full), "--layout", "full", "--config-file", config]) == 0
    (tmp_path / "clip.safetensors").unlink()  # as a tag of open_clip where there is no network
    assert tool.main([str(full), str(output), "--layout", layout, "--config-file", config]) == 0
    names = [name for name in read_weight_file(output).tensors if name.startswith(CLIP)]
    assert bool(names) == (layout == "full")


def test_nan_payloads_and_odd_numbers_survive(tool, tmp_path):
    odd = torch.tensor([0x7FC01234, 0x7F800001, -0x80000000, 1], dtype=torch.int64).to(torch.int32).view(torch.float32)
    weights = {"a": odd, "b": torch.tensor(-0.0), "c": torch.zeros(0, 2), "d": torch.tensor([True]), "e": odd.half()}
    torch.save(weights, tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]) == 0
    assert tool.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth")]) == 0
    assert_same(tmp_path / "a.pth", tmp_path / "c.pth")


def test_a_view_of_a_large_tensor_is_stored_alone(tool, tmp_path):
    torch.save({"a": torch.zeros(1_000_000)[:2]}, tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]) == 0
    assert (tmp_path / "b.pth").stat().st_size < 10_000


def test_a_full_file_stands_alone_and_computes_what_the_parts_did(tool, published, config, tiny_model, tmp_path):
    assert tool.main([str(published), str(tmp_path / "full.pth"), "--layout", "full", "--config-file", config]) == 0
    apart = tiny_model()
    load_weights(apart, published)
    alone = tiny_model(seed=3)
    alone.backbone.clip_model.load_state_dict(build_clip(alone.backbone.architecture).clip_model.state_dict())
    rest = load_weights(alone, tmp_path / "full.pth")
    assert rest["clip"]["weights"] == apart.backbone.weights_hash()
    for name, value in apart.state_dict().items():
        assert torch.equal(alone.state_dict()[name], value), name


def test_pickles_and_prefixed_files_become_published_ones(tool, published, tmp_path):
    weights = read_weight_file(published).tensors
    weights = {name: value.float() for name, value in weights.items()}
    arrays = {f"module.{name}": value.numpy() for name, value in weights.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    assert tool.main([str(tmp_path / "a.pkl"), str(tmp_path / "b.pth"), "--layout", "published"]) == 0
    found = torch.load(tmp_path / "b.pth", weights_only=True)
    assert found["__author__"] == "x"
    assert all(bits(value) == bits(weights[name]) for name, value in found["model"].items())


def test_openais_archive_becomes_safetensors_and_keeps_its_activation(tool, tiny_cfg, tmp_path):
    name = str(REPOSITORY / "tests" / "data" / "tiny_resnet.json")
    clip = build_clip(name).clip_model.eval()
    with torch.no_grad():
        inputs = (torch.randn(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.int64))
        torch.jit.trace(clip, inputs, check_trace=False).save(str(tmp_path / "RN.pt"))
    assert tool.main([str(tmp_path / "RN.pt"), str(tmp_path / "RN.safetensors")]) == 0
    for file in ("RN.pt", "RN.safetensors"):
        assert build_clip(name, str(tmp_path / file)).quick_gelu
    assert_same(tmp_path / "RN.pt", tmp_path / "RN.safetensors")


# ---- what stands beside the weights ----


@pytest.fixture
def training(published, tmp_path):
    """A checkpoint of a training."""
    content = torch.load(published, weights_only=True)
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "scheduler": {"last_epoch": 3},
        "random": [{"torch": torch.zeros(3, dtype=torch.uint8)}],
        "iteration": 3,
        "config": "MODEL:\n  WEIGHTS: ''\n",
        "vocabulary": {"name": "shapes", "classes": [["cat", "kitten"]]},
        "seed": 0,
    }
    save_checkpoint(tmp_path / "training.pth", {**content, **state})
    return tmp_path / "training.pth"


def test_the_state_of_a_training_goes_along_from_pth_to_pth(tool, training, tmp_path):
    assert tool.main([str(training), str(tmp_path / "b.pth"), "--layout", "trainable"]) == 0
    before, after = (read_weight_file(path).rest for path in (training, tmp_path / "b.pth"))
    assert list(before) == list(after) and "optimizer" in after
    assert str(after) == str(before)


def test_the_state_of_a_training_is_never_lost_silently(tool, training, tmp_path, capsys):
    assert tool.main([str(training), str(tmp_path / "b.safetensors")]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: INPUT holds the state of a training (optimizer, random)")
    assert "--weights-only" in text and not (tmp_path / "b.safetensors").exists()
    assert tool.main([str(training), str(tmp_path / "b.safetensors"), "--weights-only"]) == 0
    assert "left out (3): optimizer, scheduler, random\n" in capsys.readouterr().out
    found = read_weight_file(tmp_path / "b.safetensors")
    assert found.rest == {
        "iteration": 3,
        "config": "MODEL:\n  WEIGHTS: ''\n",
        "vocabulary": {"name": "shapes", "classes": [["cat", "kitten"]]},
        "seed": 0,
    }
    assert tool.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth")]) == 0
    assert read_weight_file(tmp_path / "c.pth").rest == found.rest


def test_notes_of_safetensors_stay_as_other_programs_read_them(tool, tmp_path):
    notes = {"format": "pt", "number": "3", "text": '"3"', "list": "[1, 2]", "words": '"two words"'}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", notes)
    assert tool.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == notes


# ---- what it says ----


def test_it_says_what_it_read_wrote_added_and_left_out(tool, published, config, tmp_path, capsys):
    content = torch.load(published, weights_only=True)
    content["model"] |= {"pixel_mean": torch.zeros(3, 1, 1), CLIP + "attn_mask": torch.zeros(77, 77)}
    torch.save({**content, "iteration": 9}, published)
    arguments = [str(published), str(tmp_path / "a.pth"), "--layout", "full", "--config-file", config]
    assert tool.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"read  {published}: torch file, ")
    assert lines[0].endswith("MB, bfloat16, float16, float32, published layout; with iteration")
    assert lines[1].startswith(f"wrote {tmp_path / 'a.pth'}: ") and "full layout (" in lines[1]
    assert lines[2].startswith("added from the config (") and f"{CLIP}* (" in lines[2]
    assert lines[3] == f"left out (2): pixel_mean, {CLIP}attn_mask"


def test_a_smaller_dtype_says_what_was_rounded(tool, published, tmp_path, capsys):
    assert tool.main([str(published), str(tmp_path / "a.safetensors"), "--dtype", "float16"]) == 0
    found = load_file(tmp_path / "a.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16}
    text = capsys.readouterr().out
    assert "rounded to float16 (" in text and "query_feat" in text and "query_embed" not in text
    save_file({"a": torch.tensor([1e30])}, tmp_path / "b.safetensors")
    assert tool.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pth"), "--dtype", "float16"]) == 1
    assert "'a' has numbers too large for --dtype float16" in capsys.readouterr().err


def test_nothing_is_overwritten_without_force(tool, published, tmp_path, capsys):
    before = published.read_bytes()
    assert tool.main([str(published), str(published), "--weights-only"]) == 1
    assert "exists; it is overwritten with --force only" in capsys.readouterr().err and published.read_bytes() == before
    assert tool.main([str(published), str(published), "--force", "--dtype", "float32"]) == 0
    assert read_weight_file(published).tensors["void_embedding.weight"].dtype is torch.float32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.pth", "{out}/a.pth"], "INPUT 'nowhere.pth' not found"),
        (["{in}", "{out}/a.bin"], "OUTPUT must end in .pth, .pt, .safetensors"),
        (["{in}", "{out}"], "OUTPUT must end in"),
        (["{in}", "{out}/none/a.pth"], "the folder of OUTPUT, .* does not exist"),
        (["{in}", "{out}/a.pth", "SEED", "1"], "KEY VALUE needs --config-file"),
        (["{in}", "{out}/a.pth", "--layout", "full"], "lacks visual., token_embedding., .*; give the --config-file"),
        (
            ["{in}", "{out}/a.pth", "--layout", "full", "--config-file", "{config}",
             "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""],
            "that of the config has random weights; set MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS",
        ),
        (
            ["{in}", "{out}/a.pth", "--config-file", "{config}", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "9"],
            "trained with 8 queries, the model has 9",
        ),
        (["{clip}", "{out}/a.pth", "--layout", "published"], "is for weights of FC-CLIP, .* it holds 'ln_final.bias'"),
        (["{trainable}", "{out}/a.pth", "--layout", "published"], "needs 'criterion.empty_weight'"),
    ],
)  # fmt: skip
def test_mistakes_are_said_and_write_nothing(tool, published, config, tmp_path, capsys, arguments, says):
    trainable = tmp_path / "trainable.pth"
    assert tool.main([str(published), str(trainable), "--layout", "trainable"]) == 0
    (tmp_path / "out").mkdir()
    names = {"in": published, "out": tmp_path / "out", "config": config, "clip": tmp_path / "clip.safetensors",
             "trainable": trainable}  # fmt: skip
    capsys.readouterr()
    assert tool.main([argument.format(**names) for argument in arguments]) == 1
    text = capsys.readouterr().err
    assert re.search(f"^error: (.|\n)*{says}", text, re.MULTILINE), text
    assert list((tmp_path / "out").iterdir()) == []


def test_a_malicious_file_is_one_line_too(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'touch trap'\ntR.")
    assert tool.main(["a.pkl", "b.pth"]) == 1
    assert capsys.readouterr().err.startswith("error: INPUT 'a.pkl' wants to call 'os.system'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl"]
