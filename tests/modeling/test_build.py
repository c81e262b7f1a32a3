"""MODEL.COMPILE: compiled parts change nothing but the speed."""

import shutil

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fcclip.modeling.build import COMPILABLE, _say_compile_times, build_model
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary
from tests.conftest import tiny_fusioner

TRAINED = [name for name in COMPILABLE if name != "classifier"]  # parts that take part in training


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What other tests compiled counts against torch's limit of recompilations."""
    torch._dynamo.reset()
    _say_compile_times.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch) -> list:
    """Compiling only traces: the graphs found so far, which run as they are."""
    found, real = [], torch.compile

    def backend(graph, example_inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    return found


@pytest.fixture
def build(tiny_model, tiny_cfg):
    """Function (parts) -> a model with these parts compiled; always the same weights."""

    def build(parts: str = ""):
        tiny_cfg.MODEL.COMPILE = parts
        return tiny_model(cfg=tiny_cfg)

    return build


def image(height: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(height * width)
    return {"image": torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)}


def training_images() -> list[dict]:
    """Two images, of three segments and of none."""
    samples = []
    for index, labels in enumerate(([0, 2, 1], [])):
        id_map = torch.arange(4).repeat_interleave(16)[:, None].expand(-1, 64).int().contiguous()
        targets = Targets(torch.tensor(labels, dtype=torch.long), id_map=id_map, ids=torch.arange(len(labels)))
        samples.append({**image(64, 64), "targets": targets, "point_seed": index})
    return samples


def gradients(model) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_training(compiled, plain) -> None:
    """Losses and gradients within the rounding of operations that are taken in another order."""
    samples = training_images()
    compiled.zero_grad()
    plain.zero_grad()
    found, wanted = compiled(samples), plain(samples)
    sum(found.values()).backward()
    sum(wanted.values()).backward()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0, msg=name)
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(compiled)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def assert_equal_outputs(compiled, plain, samples, **words) -> None:
    for found, wanted in zip(compiled(samples, **words), plain(samples, **words)):
        torch.testing.assert_close(found["sem_seg"], wanted["sem_seg"], rtol=1e-4, atol=1e-5)


def test_an_unknown_part_is_refused_with_its_neighbour(build):
    with pytest.raises(ValueError, match="unknown part in MODEL.COMPILE 'mask_decodr'. Did you mean 'mask_decoder'"):
        build("backbone,mask_decodr")
    cfg = tiny_fusioner()
    cfg.MODEL.COMPILE = "pixel_decoder"
    with pytest.raises(ValueError, match="'pixel_decoder', which Fusioner has not"):
        build_model(cfg)


def test_only_the_named_parts_are_compiled_and_the_time_is_said(build, graphs, caplog):
    build("")([image(64, 64)])
    assert not graphs
    with caplog.at_level("INFO"):
        build(" mask_decoder ,")([image(64, 64)])
    (graph,) = graphs
    assert len([line for line in caplog.messages if line.startswith("torch.compile took")]) == 1
    named = [name for name, _ in graph.named_parameters()] + [node.name for node in graph.graph.nodes]
    assert any("query_feat" in name for name in named) and not any("mask_features_weight" in name for name in named)


@pytest.mark.parametrize("part", TRAINED)
def test_every_part_is_one_graph_with_the_same_losses_and_gradients(build, graphs, part):
    compiled, plain = build(part).train(), build().train()
    assert_equal_training(compiled, plain)
    assert len(graphs) == 1


def test_all_are_the_parts_that_an_architecture_has(caplog):
    cfg = tiny_fusioner()
    cfg.MODEL.COMPILE = "all"
    with caplog.at_level("INFO"):
        build_model(cfg)
    assert [line.split(":")[0] for line in caplog.messages if "compiled by torch" in line] == ["backbone"]


def test_images_of_changing_sizes_and_words_need_few_graphs(build, graphs):
    compiled, plain = build("all"), build()
    cases = [((64, 64), "cat; dog"), ((96, 128), "cat, kitty; bird; sand:stuff")]
    more = [((128, 96), "a; b"), ((40, 70), "a, b, c, d")]
    for size, words in (*cases, *more):
        vocabulary = Vocabulary.from_names(words)
        assert_equal_outputs(compiled, plain, [image(*size)], vocabulary=vocabulary)
    assert len(graphs) <= 3 * len(COMPILABLE)  # sizes and numbers of words become variables


def test_training_and_evaluation_may_alternate_and_keys_stay(build, graphs):
    compiled, plain = build("all"), build()
    for _ in range(2):
        assert_equal_training(compiled.train(), plain.train())
        assert_equal_outputs(compiled.eval(), plain.eval(), [image(64, 64)])
    assert len(graphs) == 2 * len(TRAINED) + 1
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_the_low_precision_copy_of_the_backbone_is_one_graph_and_follows_the_weights(build, graphs):
    compiled, plain = build("backbone").train(), build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_training(compiled, plain)
        with torch.no_grad():
            for model in (compiled, plain):
                for parameter in model.backbone.parameters():
                    parameter.mul_(1.01)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_equal_training(compiled, plain)
    assert len(graphs) == 1


def test_compiled_parts_work_below_distributed_data_parallel(build, graphs, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        compiled, plain = (DistributedDataParallel(build(parts).train()) for parts in ("all", ""))
        assert_equal_training(compiled, plain)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("part", ["pixel_decoder", "mask_decoder"])
def test_graphs_of_forward_and_backward_pass_have_the_same_gradients(build, part, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))
    assert_equal_training(build(part).train(), build().train())


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_generated_code_has_the_same_outputs(build, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_equal_outputs(build("mask_decoder"), build(), [image(64, 64)])
