"""The recorded outputs of the published Fusioner (tests/data/parity, weights by rule)."""

import gzip
import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fcclip.config import load_config
from fcclip.engine.schedule import GroupLR, fusioner
from fcclip.modeling import build_model
from fcclip.modeling.fusion import ConvDecoder, Fusion, binary_loss, cosine_logits
from fcclip.modeling.fusioner import Fusioner
from fcclip.modeling.windows import Windows
from fcclip.vocabulary import Vocabulary
from tests.modeling.test_parity import DATA, Deviations
from tests.parity_weights import seeded_image, seeded_tensor

SIZE = (224, 224)
# Elements of gradients, against their root mean square: a ReLU of the decoder whose input is a rounding error away from
# zero switches a pixel of one channel on or off. The worst recorded element is 5.1e-3 away in double precision, 5.4e-3
# in the published order of operations and 5.1e-3 in ours, and the last two differ by 7.4e-3 from each other. Switching
# two units by hand whose inputs are 6e-8 and 9e-7 leaves 3.0e-3 of the 5.1e-3. Norms are held to the 1e-4 asked for.
FLIP = 1e-2
# Losses before and after a step: the first step of Adam goes by the sign of each gradient, which a flip may change. In
# the published order of operations the second loss is 2.5e-5 away from the recording image after image, and 1.4e-4 in
# a batch; in ours it is 2.0e-4.
ITERATIONS = (1e-5, 5e-4)
NOISE = tuple(f"decoder.conv_{index}.bias" for index in range(4))  # no gradient in exact arithmetic: a norm follows


def published_config(setup=None):
    overrides = ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", "meta"]
    if setup is not None:
        mean, std = ([255 * value for value in values] for values in setup["normalisation"])
        overrides += ["MODEL.PIXEL_MEAN", str(mean), "MODEL.PIXEL_STD", str(std)]
    return load_config("fusioner/Base-Fusioner.yaml", overrides)


def published_name(key):
    return key.replace("backbone.clip_model.visual.", "img_model.").replace("backbone.clip_model.", "text_model.")


class TrainedParts(nn.Module):
    """Fusion and decoder with the weights of the recordings."""

    def __init__(self):
        super().__init__()
        self.fusion = Fusion(vision_dim=768, text_dim=768, width=512, num_layers=12, heads=8)
        self.decoder = ConvDecoder(width=512)
        self.load_state_dict({key: seeded_tensor(key, tuple(value.shape)) for key, value in self.state_dict().items()})

    def forward(self, visual, text):
        """Tokens (B, 256, 768) and (B, N, 768) -> logits (B, N, 224, 224)."""
        patches, classes = self.fusion(visual, text)
        pixels = self.decoder(patches.transpose(1, 2).unflatten(-1, (16, 16)))
        return cosine_logits(pixels, classes, SIZE, temperature=0.07)


def unit(array):
    tensor = torch.from_numpy(array.astype(np.float32))
    return tensor / tensor.norm(dim=-1, keepdim=True)


def visual_tokens(seed, batch=1):
    return unit(np.random.RandomState(seed).standard_normal((batch, 256, 768)))


def text_vector(word):
    return unit(np.random.RandomState(zlib.crc32(word.encode())).standard_normal(768))


def sample(item):
    """Visual tokens, text vector, truth and ignored pixels of a training sample of the recordings."""
    image = seeded_image(*SIZE, item["mask"])
    truth = (image[0] // 64 + 1 == item["class"]) & (image[1] <= 200)
    return visual_tokens(item["tokens"])[0], text_vector(item["word"])[None], truth[None].float(), image[1] > 200


@pytest.fixture(scope="module")
def recorded():
    deviations = Deviations("fusioner_tokens_51")
    yield deviations
    deviations.report()


@pytest.fixture(scope="module")
def parts():
    return TrainedParts()


def test_the_state_dict_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = build_model(published_config())
    manifest = json.loads(gzip.decompress((DATA / "state_dicts" / "manifest_fusioner.json.gz").read_bytes()))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    ours = {
        published_name(key): (list(value.shape), "trainable" if key in trained else "frozen")
        for key, value in model.state_dict().items()
    }
    assert ours == {key: (entry["shape"], entry["kind"]) for key, entry in manifest.items()}
    assert sum(weight.numel() for weight in model.fusion.parameters()) == 39_145_984
    assert sum(weight.numel() for weight in model.decoder.parameters()) == 9_701_888


def test_fusion_decoder_and_head_agree_within_1e_4(parts, recorded):
    setup = recorded.info["_setup"]
    visual, text = visual_tokens(51, setup["b"]), torch.stack([text_vector(word) for word in setup["words"]])
    text = text.expand(setup["b"], -1, -1)
    with torch.no_grad():
        patches, classes = parts.fusion(visual, text)
        first = parts.fusion.visual_proj(visual)
        block = parts.fusion.blocks[0](torch.cat([first, parts.fusion.text_proj(text) + parts.fusion.cls_emb], 1))
        pixels = parts.decoder(patches.transpose(1, 2).unflatten(-1, (16, 16)))
        logits = cosine_logits(pixels, classes, SIZE, temperature=0.07)
    resized = F.interpolate(pixels, size=SIZE, mode="bilinear", align_corners=False)
    for name, value in {
        "tokens.visual": visual,
        "fusion.visual_proj": first,
        "fusion.block0": block,
        "fusion.patches": patches,
        "fusion.classes": classes,
        "decoder.pixels": resized,
        "logits": logits,
    }.items():
        assert recorded.of(name, value).max() < 1e-4, name


def test_loss_and_gradients_of_a_batch_agree(parts, recorded):
    train = recorded.info["train"]
    visual, text, truth, ignored = zip(*map(sample, train["items"]))
    logits = parts(torch.stack(visual), torch.stack(text))
    losses = [binary_loss(*image) for image in zip(logits, truth, ignored)]
    assert [int(pixels.sum()) for pixels in ignored] == [item["ignored"] for item in train["items"]]
    assert [loss.item() for loss in losses] == pytest.approx([item["loss"] for item in train["items"]], rel=1e-5)
    loss = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(train["loss"], rel=1e-5)
    first, everything = train["items"][0], torch.ones_like(ignored[0])
    target = (seeded_image(*SIZE, first["mask"])[0] // 64 + 1 == first["class"])[None].float()
    for pixels in (everything, ~everything):
        assert binary_loss(logits[0], target, pixels).item() == pytest.approx(train["loss_all_ignored"], rel=1e-5)
    loss.backward()
    for name, weight in parts.named_parameters():
        key = f"grad.{name}"
        if name not in NOISE:
            assert float(weight.grad.norm()) == pytest.approx(recorded.info[key]["norm"], rel=1e-4), name
            assert recorded_elements(recorded, key, weight.grad).max() < FLIP, name
    parts.zero_grad()


def recorded_elements(recorded, key, gradient):
    """Deviation of each recorded element, against their root mean square."""
    values = recorded.arrays[key].reshape(-1)
    flat = gradient.flatten()[:: recorded.info[key]["step"]][: len(values)].double().numpy()
    return np.abs(flat - values) / np.sqrt((values**2).mean())


@pytest.mark.slow
def test_a_step_of_the_published_recipe_leaves_the_recorded_loss(parts, recorded):
    """Two more steps are recorded, which cost half a minute and are less sharp: they agreed within 1e-3 and 1e-2, and
    what each tensor moved in all four within 1e-2."""
    iterations, before = recorded.info["iterations"], {key: w.detach().clone() for key, w in parts.named_parameters()}
    groups = Fusioner.parameter_groups(parts, lr=1e-3, decoder_lr=1e-3, weight_decay=0.01, decay_end=0.4)
    optimizer = torch.optim.AdamW(groups)
    schedule = GroupLR(optimizer, fusioner(max_iter=510, warm_up=10, end=2e-3), max_iter=510)
    visual, text, truth, ignored = zip(
        *[sample(recorded.info["train"]["items"][index]) for index in iterations["items"]]
    )
    for step, tolerance in zip(iterations["steps"], ITERATIONS):
        decayed, plain, decoder = optimizer.param_groups
        assert [decayed["lr"], plain["lr"], decoder["lr"]] == pytest.approx([step["fusion_lr"]] * 2 + [1e-3], rel=1e-9)
        assert [decayed["weight_decay"], plain["weight_decay"]] == pytest.approx(step["fusion_wd"], rel=1e-9)
        with torch.set_grad_enabled(step["iteration"] == 0):
            logits = parts(torch.stack(visual), torch.stack(text))
            loss = torch.stack([binary_loss(*image) for image in zip(logits, truth, ignored)]).mean()
        assert loss.item() == pytest.approx(step["loss"], rel=tolerance)
        if step["iteration"] == 0:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    parts.load_state_dict(before)


def test_rates_and_decays_are_the_published_ones():
    recorded = json.loads((DATA / "fusioner_schedules.json").read_text())
    for per_epoch, values in recorded["schedules"].items():
        length, warm_up = (int(per_epoch) * recorded[key] for key in ("epochs", "warmup_epochs"))
        rate = fusioner(max_iter=length, warm_up=warm_up, end=2e-6 / 1e-3)
        decay = fusioner(max_iter=length, warm_up=0, end=0.0)
        assert length == values["length"]
        for iteration, lr, weight_decay in zip(
            [*values["iterations"], length + 5],
            [*values["fusion_lr"], values["after_the_end"][0]],
            [*values["weight_decay"], values["after_the_end"][1]],
        ):
            assert 1e-3 * rate(iteration) == pytest.approx(lr, rel=1e-9, abs=0)
            assert 0.4 - 0.39 * decay(iteration) == pytest.approx(weight_decay, rel=1e-9)


@pytest.fixture(scope="module")
def windows():
    return Deviations("fusioner_windows_55")


def test_reference_windows_stand_where_the_published_ones_do(windows):
    for size, expected in windows.info["_setup"]["windows"].items():
        boxes = Windows(224, "pad").boxes(*map(int, size.split("x")))
        assert [([y.start, y.stop], [x.start, x.stop]) for y, x in boxes] == [
            (window["y"], window["x"]) for window in expected
        ]


def test_reference_windows_pad_and_average_as_published(windows):
    rows, columns = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")

    def network(image):
        return image.mean(0, keepdim=True) + 0.01 * rows + 0.003 * columns

    setup = windows.info["_setup"]
    for height, width in setup["sizes"]:
        image = (seeded_image(height, width, setup["seed"]) / 255 - 0.45) / 0.12
        result = Windows(224, "pad").mean(image, network)
        assert windows.of(f"averaged.{height}x{width}", result[None]).max() < 1e-5


@pytest.mark.slow
def test_the_whole_model_with_both_clip_towers_agrees():
    """Minutes on a core: CLIP ViT-L/14 has 428 million weights."""
    recorded = Deviations("fusioner_full_52")
    setup = recorded.info["_setup"]
    with torch.device("meta"):
        model = build_model(published_config(setup), test_vocabulary=Vocabulary.from_names(setup["words"]))
    state = {key: seeded_tensor(published_name(key), tuple(value.shape)) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for name, buffer in build_buffers(model, published_config(setup)).items():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    assert model.backbone.quick_gelu
    with torch.no_grad():
        images, _ = model.preprocess([{"image": seeded_image(*SIZE, setup["seeds"][0])}])
        dense = model.backbone(images).dense
        text = model.text_encoder.encode(model.test_vocabulary)
        pixels, classes = model.fuse(dense, text.vectors[None])
        logits = cosine_logits(pixels, classes, SIZE, temperature=model.temperature)
    tokens = dense.flatten(2).transpose(1, 2)
    for name, value in {
        "image": images,
        "img_model": tokens,
        "visual": F.normalize(tokens, dim=-1),
        "text": text.vectors,
        "fusion.classes": classes,
    }.items():
        assert recorded.of(name, value).max() < 1e-4, name
    assert recorded.of("logits", logits).max() < 1e-3
    prediction = torch.cat([torch.full((1, *SIZE), 0.5), logits[0].sigmoid()]).argmax(0).numpy()
    assert (prediction == recorded.arrays["prediction"][0]).mean() >= 0.999
    recorded.report()


def build_buffers(model, cfg):
    """What the state dict leaves out, with values: the statistics of the pixels and CLIP's causal mask."""
    context = model.backbone.clip_model.context_length
    return {
        "pixel_mean": torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1),
        "pixel_std": torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1),
        "backbone.clip_model.attn_mask": torch.full((context, context), -torch.inf).triu(1),
    }
