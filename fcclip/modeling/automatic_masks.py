"""SAM's automatic masks of an image with soft logits, by the package segment-anything (FrozenSeg, section 3.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcclip.config import lookup, resolve_file
from fcclip.errors import NotInstalledError
from fcclip.modeling.output_masks import resize
from fcclip.weights.files import read_weight_file
from fcclip.weights.frozen import load_frozen

# What FrozenSeg changes of the package's settings.
SETTINGS = {"pred_iou_thresh": 0.8, "stability_score_thresh": 0.7, "min_mask_region_area": 100}
_PROMPTS = 16  # masks whose logits are asked for at once


def build_mask_generator(name: str, weights: str, *, device: torch.device, **settings: Any) -> AutomaticMasks:
    """A generator with Meta's weights.

    Args:
        name: vit_b, vit_l or vit_h.
        weights: Meta's file.
        device: where it runs.
        settings: of the package's generator, over `SETTINGS`.

    Raises:
        NotInstalledError: the package is missing.
        ValueError, FileNotFoundError: an unknown name, weights that are missing or of another SAM.
    """
    try:
        from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
    except ImportError as error:
        raise NotInstalledError(
            "automatic masks need the package segment-anything: pip install 'fcclip[sam]'"
        ) from error
    sam = lookup("SAM", name, {key: sam_model_registry[key] for key in ("vit_b", "vit_l", "vit_h")})()
    path = resolve_file(weights, what="weights of SAM")
    load_frozen(sam, read_weight_file(path, what="weights of SAM").tensors, source=str(path), what=f"SAM '{name}'")
    generator = SamAutomaticMaskGenerator(sam.to(device).eval(), output_mode="coco_rle", **SETTINGS | settings)
    return AutomaticMasks(generator)


class AutomaticMasks:
    """Masks of an image, the largest first.

    The package gives binary masks alone. For those that stay, it is asked a second time, with the prompt that each came
    from, so that the logits of all candidates need not be held until then.

    Args:
        generator: a `SamAutomaticMaskGenerator` with COCO's run lengths as output.
    """

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    @torch.no_grad()
    def __call__(self, image: np.ndarray, *, limit: int) -> tuple[Tensor, list[str]]:
        """image (H, W, 3) uint8 RGB -> logits (J, h, w) over the image, its longer side 256 cells, and the masks at the
        size of the image as COCO's compressed run lengths; J is at most `limit`."""
        predictor = self.generator.predictor
        forget, predictor.reset_image = predictor.reset_image, lambda: None  # the embedding is needed once more
        try:
            records = sorted(self.generator.generate(image), key=lambda record: -record["area"])[:limit]
            logits = [
                self._logits(predictor, records[start : start + _PROMPTS]) for start in range(0, len(records), _PROMPTS)
            ]
        finally:
            predictor.reset_image = forget
        size = [max(1, round(256 * side / max(image.shape[:2]))) for side in image.shape[:2]]
        maps = [resize(chunk, tuple(size)) for chunk in logits] or [torch.zeros(0, *size)]
        return torch.cat(maps), [record["segmentation"]["counts"] for record in records]

    @staticmethod
    def _logits(predictor: Any, records: list[dict]) -> Tensor:
        """Of each record's mask over the part of SAM's square that shows the image."""
        points = np.array([record["point_coords"][0] for record in records])
        coords = torch.as_tensor(predictor.transform.apply_coords(points, predictor.original_size))
        coords = coords.to(predictor.device, torch.float32)[:, None]
        labels = torch.ones(coords.shape[:2], dtype=torch.int, device=predictor.device)
        _, qualities, logits = predictor.predict_torch(coords, labels, multimask_output=True, return_logits=True)
        wanted = torch.tensor([record["predicted_iou"] for record in records], device=qualities.device)
        best = (qualities - wanted[:, None]).abs().argmin(1)  # of the three masks of a prompt
        chosen = logits[torch.arange(len(records), device=best.device), best]
        side = predictor.model.image_encoder.img_size
        height, width = predictor.input_size
        return resize(chosen, (side, side))[:, :height, :width]
