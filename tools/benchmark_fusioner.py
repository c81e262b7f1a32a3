"""A training step of Fusioner against that of the published loop, in turn, on the same images and weights.

    python tools/benchmark_fusioner.py [--batch 4] [--rounds 3] [--clip ViT-L-14-quickgelu] [--json FILE]

The published loop is written out below: image after image, with the 32 prompts of its class encoded anew, all 77 tokens
of each, and maps of the decoder upsampled before each convolution. Both must give the same loss and gradients. Weights
are random; they cost the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.config import load_config
from fcclip.errors import run_program
from fcclip.files import write_json
from fcclip.modeling import build_model
from fcclip.modeling.fusioner import Fusioner
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary, prompts

NAMES = ("aeroplane", "dog", "tvmonitor", "sheep")
TOLERANCE = 1e-3  # of gradients, against their norm: a ReLU may switch (tests/modeling/test_fusioner_parity.py)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    args = parse_arguments(arguments)
    overrides = ["MODEL.FC_CLIP.CLIP_MODEL_NAME", args.clip, "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""]
    cfg = load_config(
        "fusioner/Base-Fusioner.yaml",
        [*overrides, "MODEL.FUSIONER.WINDOW", "0", "MODEL.DEVICE", args.device, *args.opts],
    )
    torch.manual_seed(0)
    model = build_model(cfg, train_vocabulary=Vocabulary.from_names(list(NAMES))).train()
    batch = samples(args.batch, cfg.INPUT.IMAGE_SIZE)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(lr=1e-3, decoder_lr=1e-3, weight_decay=0.01, decay_end=0.4), lr=0.0, fused=True
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # weights stay
    ways = {"published loop": published_gradients, "this package": gradients}
    losses, norms = compare(model, batch, ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    # Seconds of this process: on a busy machine those of the clock tell how busy it was.
    clock = time.process_time if model.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = clock()
            optimizer.zero_grad()
            way(model, batch)
            optimizer.step()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    rates = {name: args.batch / min(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<16} {rate:.3f} images a second (steps of {', '.join(f'{t:.1f}' for t in seconds[name])} s)")
    ratio = rates["this package"] / rates["published loop"]
    print(f"{ratio:.2f} x; loss {losses[0]:.6f} and {losses[1]:.6f}, gradients differ by {norms:.1e} of their norm")
    if args.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "batch": args.batch, "clip": args.clip}
        write_json(args.json, {**facts, "images_per_second": rates, "ratio": ratio, "seconds": seconds}, indent=2)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, default=4)
    add("--rounds", type=int, default=3)
    add("--clip", default="ViT-L-14-quickgelu", help="architecture of open_clip")
    add("--device", default="cpu")
    add("--json", type=Path, metavar="FILE")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys")
    return parser.parse_args(arguments)


def samples(number: int, side: int) -> list[dict]:
    """Training samples of one class each."""
    result = []
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
        id_map = (torch.rand(side, side, generator=generator) > 0.7).int()
        targets = Targets(labels=torch.tensor([0]), id_map=id_map, ids=torch.tensor([1]))
        name = NAMES[index % len(NAMES)]
        ignored = torch.rand(side, side, generator=generator) > 0.95
        result.append(
            {"image": image, "targets": targets, "ignored": ignored, "vocabulary": Vocabulary.from_names([name])}
        )
    return result


def gradients(model: Fusioner, batch: Sequence[dict]) -> float:
    """Leaves the gradients of a batch; returns its loss."""
    loss = model(batch)["loss_bce"]
    loss.backward()
    return float(loss.detach())


# ---- the published loop ----


def published_gradients(model: Fusioner, batch: Sequence[dict]) -> float:
    """The same, one image after the other."""
    total = 0.0
    for sample in batch:
        [name] = sample["vocabulary"].class_names
        image = (sample["image"].to(model.device).float() - model.pixel_mean) / model.pixel_std
        with torch.no_grad():
            text = published_text(model, name)
            visual = F.normalize(model.backbone(image[None]).dense, dim=1)
        patches, classes = model.fusion(visual.flatten(2).transpose(1, 2), text[None])
        pixels = published_decoder(model, patches.transpose(1, 2).unflatten(-1, visual.shape[-2:]))
        pixels = F.interpolate(pixels, size=image.shape[-2:], mode="bilinear", align_corners=False)
        logits = torch.einsum("bdhw,bnd->bnhw", F.normalize(pixels, dim=1), F.normalize(classes, dim=-1))
        truth = sample["targets"].expand().to(model.device).float()[None]
        losses = F.binary_cross_entropy_with_logits(logits / model.temperature, truth, reduction="none")
        valid = (~sample["ignored"]).to(model.device)
        loss = (losses * valid).sum() / valid.sum() / len(batch)
        loss.backward()
        total += float(loss.detach())
    return total


def published_text(model: Fusioner, name: str) -> Tensor:
    """(1, D): 32 prompts through the whole context."""
    tokens = open_clip.tokenize(prompts([name], model.text_encoder.templates)).to(model.device)
    vectors = F.normalize(model.text_encoder.model.encode_text(tokens).float(), dim=-1)
    return F.normalize(vectors.mean(0, keepdim=True), dim=-1)


def published_decoder(model: Fusioner, x: Tensor) -> Tensor:
    """Upsamples, then convolves."""
    decoder = model.decoder
    for index, conv in enumerate((decoder.conv_0, decoder.conv_1, decoder.conv_2, decoder.conv_3)):
        x = F.relu(F.instance_norm(conv(x)))
        if index < 3:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return decoder.conv_4(x)


def compare(
    model: Fusioner, batch: Sequence[dict], ways: dict[str, Callable[[Fusioner, Sequence[dict]], float]]
) -> tuple[list[float], float]:
    """The losses of both ways, and how far their gradients are apart; also the warm-up.

    Raises:
        RuntimeError: they are not the same.
    """
    losses, vectors = [], []
    for way in ways.values():
        model.zero_grad()
        losses.append(way(model, batch))
        vectors.append(torch.cat([w.grad.flatten() for _, w in sorted(model.named_parameters()) if w.grad is not None]))
    distance = float((vectors[0] - vectors[1]).norm() / vectors[0].norm())
    if abs(losses[0] / losses[1] - 1) > 1e-5 or distance > TOLERANCE:
        raise RuntimeError(f"the two ways differ: losses {losses}, gradients by {distance:.1e} of their norm")
    return losses, distance


if __name__ == "__main__":
    sys.exit(run_program(main))
