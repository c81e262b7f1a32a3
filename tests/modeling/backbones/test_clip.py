"""The frozen CLIP of both families, and its weights."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from fcclip.modeling.backbones.clip import (
    as_backbone,
    build_clip,
    has_quick_gelu,
    tag_has_quick_gelu,
)

DATA = Path(__file__).parents[2] / "data"
TINY = {"convnext": str(DATA / "tiny_convnext.json"), "resnet": str(DATA / "tiny_resnet.json")}


@pytest.fixture(params=TINY)
def backbone(request):
    torch.manual_seed(0)
    return build_clip(TINY[request.param])


def test_levels_have_the_stated_channels_and_strides(backbone):
    features = backbone(torch.randn(2, 3, 64, 96))
    assert set(features.levels) == {"stem", "res2", "res3", "res4", "res5"}
    for name, channels in backbone.channels.items():
        stride = backbone.strides[name]
        assert features.levels[name].shape == (2, channels, 64 // stride, 96 // stride), name
    assert torch.equal(features.dense, features.levels["res5"])


def test_everything_is_frozen_and_stays_in_evaluation_mode(backbone):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.train()
    features = backbone(torch.randn(2, 3, 64, 64))
    assert backbone.training and not any(module.training for module in backbone.clip_model.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not features.levels["res5"].requires_grad
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_the_low_precision_copy_gives_the_numbers_of_autocast_and_is_made_once(backbone):
    images = torch.randn(2, 3, 64, 64)
    keys = list(backbone.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = backbone(images)  # in evaluation mode: the original, cast at every use
        found = backbone.train()(images)
        copy_of_weights = backbone._cast.module
        backbone(images)
    assert backbone._cast.module is copy_of_weights
    assert torch.equal(found.dense, expected.dense)
    for name, value in expected.levels.items():
        assert torch.equal(found.levels[name], value) and found.levels[name].dtype == value.dtype, name
    assert list(backbone.state_dict()) == keys
    kinds = {
        type(module).__name__: module.weight.dtype for module in copy_of_weights.modules() if hasattr(module, "weight")
    }
    assert kinds["Conv2d"] == torch.bfloat16
    assert all(dtype == torch.float32 for kind, dtype in kinds.items() if "Norm" in kind)
    assert all(weight.dtype == torch.float32 for weight in backbone.parameters())


def test_the_low_precision_copy_follows_new_weights_and_full_precision_never_uses_it(backbone):
    images = torch.randn(1, 3, 64, 64)
    full = backbone(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone.train()(images)
        with torch.no_grad():
            for weight in backbone.parameters():
                weight.mul_(1.5)
        changed = backbone(images).levels["res5"]
        assert torch.equal(changed, backbone.eval()(images).levels["res5"])
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.div_(1.5)
    torch.testing.assert_close(backbone.train()(images).dense, full.dense)


def test_quick_gelu_follows_the_key():
    def activation(**options):
        return type(build_clip(TINY["resnet"], **options).clip_model.transformer.resblocks[0].mlp.gelu)

    assert activation() is torch.nn.GELU
    assert activation(quick_gelu="on") is QuickGELU
    with pytest.raises(ValueError, match="QUICK_GELU must be"):
        build_clip(TINY["resnet"], quick_gelu="yes")


def test_quick_gelu_follows_the_name_of_the_architecture(tmp_path):
    architecture = json.loads(Path(TINY["resnet"]).read_text()) | {"quick_gelu": True}
    (tmp_path / "quick.json").write_text(json.dumps(architecture))
    backbone = build_clip(str(tmp_path / "quick.json"))
    assert backbone.quick_gelu and "quick.json" in backbone.activation_source


@pytest.mark.parametrize("tag", ["openai", "yfcc15m", "cc12m"])
def test_every_tag_of_openais_resnets_is_known_to_have_quick_gelu_in_every_version(tag):
    assert tag_has_quick_gelu("RN50", tag)
    assert not tag_has_quick_gelu("convnext_large_d_320", "laion2b_s29b_b131k_ft_soup")


@pytest.mark.parametrize(("tag", "expected"), [("openai", True), ("laion", False)])
def test_weights_of_a_tag_come_with_the_activation_of_the_tag(tag, expected, tmp_path, monkeypatch):
    state = build_clip(TINY["resnet"]).clip_model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "clip.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: [tag])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": "https://example.org"})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "clip.safetensors"))
    backbone = build_clip(TINY["resnet"], tag)
    assert backbone.quick_gelu == expected
    assert has_quick_gelu(backbone.clip_model) == expected
    assert backbone.activation_source == f"'{tag}' says so"


def test_an_open_clip_that_builds_another_activation_than_asked_for_is_an_error(monkeypatch):
    real = open_clip.model.CLIP
    monkeypatch.setattr(open_clip.model, "CLIP", lambda quick_gelu, **parts: real(quick_gelu=False, **parts))
    with pytest.raises(RuntimeError, match="without QuickGELU although it was asked for the other"):
        build_clip(TINY["resnet"], quick_gelu="on")


def test_an_unknown_activation_is_refused():
    backbone = build_clip(TINY["resnet"])
    backbone.clip_model.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()
    with pytest.raises(ValueError, match="must have GELU or QuickGELU in every block, got .*ReLU"):
        has_quick_gelu(backbone.clip_model)


def test_openais_archive_is_read_as_halves_with_quick_gelu_and_without_running_code(tmp_path, monkeypatch):
    torch.manual_seed(1)
    source = build_clip(TINY["resnet"], quick_gelu="on").clip_model.half().float()
    example = (torch.zeros(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.int64))
    torch.jit.trace(copy.deepcopy(source), example, check_trace=False).half().save(str(tmp_path / "RN50.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("the archive's code was loaded"))
    backbone = build_clip(TINY["resnet"], str(tmp_path / "RN50.pt"))
    assert backbone.quick_gelu
    for key, value in source.state_dict().items():
        loaded = backbone.clip_model.state_dict()[key]
        assert loaded.dtype == value.dtype and torch.equal(loaded, value), key
    with pytest.raises(ValueError, match="do not fit CLIP"):
        build_clip(TINY["convnext"], str(tmp_path / "RN50.pt"))


def test_the_clip_inside_a_whole_model_is_taken_with_its_activation(tmp_path):
    torch.manual_seed(1)
    source = build_clip(TINY["resnet"], quick_gelu="on")
    whole = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    whole["sem_seg_head.predictor.query_feat.weight"] = torch.zeros(3, 4)
    torch.save({"model": whole, "clip": source.fingerprint()}, tmp_path / "full.pth")
    backbone = build_clip(TINY["resnet"], str(tmp_path / "full.pth"))
    assert backbone.quick_gelu
    assert backbone.weights_hash() == source.weights_hash()
    torch.save({"model": whole}, tmp_path / "published.pth")
    with pytest.raises(ValueError, match="set MODEL.FC_CLIP.QUICK_GELU to 'on'"):
        build_clip(TINY["resnet"], str(tmp_path / "published.pth"))
    torch.save({"model": {"sem_seg_head.predictor.query_feat.weight": torch.zeros(3, 4)}}, tmp_path / "trained.pth")
    with pytest.raises(ValueError, match="a segmenter without its CLIP: it belongs in MODEL.WEIGHTS"):
        build_clip(TINY["resnet"], str(tmp_path / "trained.pth"))


def test_weights_of_a_local_file_are_taken(tmp_path):
    torch.manual_seed(1)
    source = build_clip(TINY["convnext"]).clip_model
    save_file(
        {key: value.half().contiguous() for key, value in source.state_dict().items()}, tmp_path / "clip.safetensors"
    )
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "clip.pt"
    )
    for name in ("clip.safetensors", "clip.pt"):
        loaded = build_clip(TINY["convnext"], str(tmp_path / name)).clip_model
        for key, value in source.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, atol=2e-3, rtol=1e-3)
            assert loaded.state_dict()[key].dtype == value.dtype


def test_resnet_weights_that_do_not_tell_their_activation_are_refused(tmp_path):
    state = build_clip(TINY["resnet"]).clip_model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="set MODEL.FC_CLIP.QUICK_GELU to 'on'"):
        build_clip(TINY["resnet"], str(tmp_path / "clip.safetensors"))
    build_clip(TINY["resnet"], str(tmp_path / "clip.safetensors"), quick_gelu="off")


def test_weights_that_do_not_fit_are_refused_by_key(tmp_path):
    state = build_clip(TINY["convnext"]).clip_model.state_dict()
    state.pop("ln_final.bias")
    state["text_projection"] = torch.zeros(3, 3)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "clip.safetensors")
    with pytest.raises(
        ValueError, match=r"do not fit .* Missing key.*ln_final\.bias.* size mismatch for text_projection"
    ):
        build_clip(TINY["convnext"], str(tmp_path / "clip.safetensors"))


def test_unknown_names_tags_and_files_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="knows no architecture 'convnext_huge'.*RN50"):
        build_clip("convnext_huge")
    with pytest.raises(ValueError, match="'laion9b' is no open_clip tag of 'RN50' .*openai"):
        build_clip("RN50", "laion9b")
    with pytest.raises(FileNotFoundError, match="CLIP_PRETRAINED_WEIGHTS '.*gone.pt' not found"):
        build_clip("RN50", str(tmp_path / "gone.pt"))
    with pytest.raises(FileNotFoundError, match="CLIP_MODEL_NAME 'gone.json' not found"):
        build_clip("gone.json")


def test_a_tag_that_cannot_be_downloaded_says_how_to_go_on(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(
        ConnectionError, match=r"not on this machine and could not be downloaded \(OSError: Name or.*the path"
    ):
        build_clip("convnext_large_d_320", "laion2b_s29b_b131k_ft_soup")


def test_a_tower_that_is_not_convolutional_is_refused():
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-32", pretrained=None, device="meta")
    with pytest.raises(ValueError, match="image tower VisionTransformer; supported are"):
        as_backbone(model, name="ViT-B-32")


OTHER_VERSIONS = [Path(folder) for folder in os.environ.get("FCCLIP_OPEN_CLIPS", "").split(os.pathsep) if folder]
REPEATED = ("../test_parity.py", "../test_text.py", "test_fingerprint.py", "test_clip.py")


@pytest.mark.skipif(not OTHER_VERSIONS, reason="FCCLIP_OPEN_CLIPS names no folders with other versions of open_clip")
@pytest.mark.parametrize("folder", OTHER_VERSIONS, ids=lambda folder: folder.name)
def test_other_versions_of_open_clip_give_the_recorded_numbers(folder):
    """In a process of its own, which imports open_clip from `folder`."""
    program = (
        "import sys, importlib.metadata, open_clip, pytest;"
        f"assert open_clip.__file__.startswith({str(folder)!r}), open_clip.__file__;"
        "print('open_clip', importlib.metadata.version('open_clip_torch'));"
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', '--durations=0', *sys.argv[1:]]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "FCCLIP_OPEN_CLIPS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    tests = [str(Path(__file__).parent / name) for name in REPEATED]
    done = subprocess.run([sys.executable, "-c", program, *tests], env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
