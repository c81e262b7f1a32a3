"""The OpenSeg ensemble: automatic masks of SAM, named by CLIP, raise classes that training did not know (FrozenSeg,
section 3.4).

Masks are made beforehand, by `tools/precompute_sam_masks.py` or any other source, and lie in a folder in one file an
image, `<stem of the image's file>.npz`:

    logits      (J, h, w) float16, above 0 inside; they cover the whole image at any size
    image_size  (2,) int, height and width of the image in pixels
    rle         (J,) str, the masks at the size of the image as COCO's compressed run lengths; nothing here reads them

Legend: J masks, Q queries, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcclip.errors import InputError, MissingFileError
from fcclip.files import write_atomically
from fcclip.modeling.output_masks import OutputMasks, resize, resize_rows, semantic_blocks

THRESHOLD = 0.5  # of the best unseen class of a mask that counts
_ADVICE = "tools/precompute_sam_masks.py makes them"


@dataclass(frozen=True)
class OpenSegEnsemble:
    """What the ensemble needs besides an image.

    Args:
        folder: of the files.
        epsilon: share of SAM's masks in the scores of unseen classes, 0..1 (TEST.SAM_MASK_PRED_ALPHA).
    """

    folder: Path
    epsilon: float

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise InputError(f"TEST.SAM_MASK_PRED_ALPHA must lie in 0..1, got {self.epsilon}")


def save_sam_masks(path: Path, logits: Tensor, *, image_size: tuple[int, int], rle: Sequence[str]) -> None:
    """Writes the file of an image, whole or not at all; (J, h, w) logits are rounded to half precision."""
    arrays = {"logits": logits.half().cpu().numpy(), "image_size": np.array(image_size), "rle": np.array(rle, str)}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


@functools.lru_cache(maxsize=2)  # an image is asked for once a mode
def read_sam_masks(folder: Path, file_name: str, image_size: tuple[int, int]) -> Tensor:
    """The masks of an image: (J, h, w) float32 logits at any size.

    Raises:
        FileNotFoundError: there is no file of this image.
        ValueError: an image without a file name, a file of another form or of an image of another size.
    """
    if not file_name:
        raise InputError("TEST.USE_SAM_MASKS finds masks by the image's file, and this image comes from none")
    path = folder / f"{Path(file_name).stem}.npz"
    if not path.is_file():
        raise MissingFileError(f"there are no SAM masks of '{file_name}': '{path}' does not exist; {_ADVICE}")
    try:
        with np.load(path) as arrays:
            logits, size = arrays["logits"], tuple(arrays["image_size"].tolist())
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"'{path}' is no file of SAM masks ({error}); {_ADVICE}") from error
    if logits.ndim != 3 or 0 in logits.shape[1:]:
        raise InputError(f"'{path}': logits must be (masks, height, width), got {logits.shape}; {_ADVICE}")
    if size != tuple(image_size):
        raise InputError(
            f"'{path}' has masks of an image of {size} (height, width), but '{file_name}' has {image_size}"
        )
    return torch.from_numpy(logits.astype(np.float32))


def on_grid(logits: Tensor, masks: OutputMasks, grid: tuple[int, int]) -> Tensor:
    """SAM's masks on the dense features, by the pixel at the upper left corner of each cell, as published; cells of
    the padding are outside every mask.

    Args:
        logits: (J, h, w), over the image.
        masks: of the same image, whose sizes count.
        grid: (height, width) of the dense features, over the padded image.

    Returns:
        (J, *grid).
    """
    result = logits
    for dim, (cells, padded, side) in enumerate(zip(grid, masks.padded_size, masks.image_size), start=1):
        corners = torch.arange(cells, device=logits.device) * (padded / cells)  # pixels of the network input
        pixels = (corners * (logits.shape[dim] / side)).long().clamp(max=logits.shape[dim] - 1)
        inside = (corners < side).view(-1, *[1] * (2 - dim))
        result = torch.where(inside, result.index_select(dim, pixels), -1.0)
    return result


def unseen_shares(class_logits: Tensor, seen: Tensor) -> Tensor:
    """What masks say of unseen classes.

    Args:
        class_logits: (J, K + 1), void last.
        seen: (K,) bool.

    Returns:
        (J, K) probabilities; 0 for seen classes, and for masks of which no unseen class has more than `THRESHOLD`.
    """
    shares = class_logits.softmax(-1)[:, :-1] * ~seen
    return shares * (shares.amax(-1, keepdim=True) > THRESHOLD)


def ensembled_semantic(
    class_logits: Tensor,
    masks: OutputMasks,
    *,
    sam_logits: Tensor,
    sam_shares: Tensor,
    seen: Tensor,
    epsilon: float,
    masks_first: bool,
    labels: bool = False,
) -> Tensor:
    """Semantic scores in which a share of those of unseen classes comes from SAM's masks.

    Args:
        class_logits, masks, masks_first: as for `semantic_inference`.
        sam_logits: (J, ·, ·) over the image.
        sam_shares: (J, K) of `unseen_shares`.
        seen: (K,) bool.
        epsilon: the share.
        labels: the class with the highest score instead of all scores.

    Returns:
        (K, h, w) float; or (h, w) int64.
    """
    shares = class_logits.softmax(-1)[:, :-1] * torch.where(seen, 1.0, 1 - epsilon)
    if not masks_first:  # scores at the size of the input are resized, and so are these
        sam_logits = resize(sam_logits, masks.image_size)
    blocks = []
    for rows, scores in semantic_blocks(masks, shares, masks_first=masks_first):
        block = sam_logits if masks_first else sam_logits.sigmoid()
        block = resize_rows(block, range(rows.start, rows.stop), masks.output_size)
        block = block.sigmoid() if masks_first else block
        scores = scores + ((epsilon * sam_shares).T @ block.flatten(1)).unflatten(1, block.shape[1:])
        blocks.append(scores.max(0).indices if labels else scores)
    return torch.cat(blocks, dim=-2)
