"""BERT as a frozen text encoder that never saw an image (Fusioner, table 2), by the package transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError, NotInstalledError
from fcclip.modeling.text import TextEncoder
from fcclip.vocabulary import prompts
from fcclip.weights.frozen import FrozenPart

_KEY = "MODEL.FUSIONER.BERT"


class Bert(FrozenPart):
    """A frozen BERT of a local folder with `config.json`, a vocabulary and weights, as transformers saves them.

    Raises:
        InputError: no such folder, or one that cannot be read; nothing is downloaded.
        NotInstalledError: transformers is missing.
    """

    notes_key = "bert"
    config_keys = (_KEY,)

    def __init__(self, folder: str) -> None:
        super().__init__()
        if not folder or not Path(folder).expanduser().is_dir():
            raise InputError(f"{_KEY} must be a folder with config.json, vocab.txt and weights of BERT, got '{folder}'")
        try:
            import transformers  # an extra, and slow to import
        except ImportError as error:
            raise NotInstalledError(f"{_KEY} needs transformers ({error}): pip install 'fcclip[bert]'") from error
        path = Path(folder).expanduser()
        try:
            with torch.device("cpu"):  # transformers reads weights into no other kind of tensor
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
                self.bert = transformers.AutoModel.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{_KEY}: '{folder}' cannot be read: {error}") from error
        self.bert.requires_grad_(False).eval()
        self.name = path.name

    def load_named(self, name: str, weights: str) -> None:
        """See `FrozenPart`."""
        self.bert = Bert(weights).bert

    def train(self, mode: bool = True) -> Bert:
        super().train(mode)
        self.bert.eval()
        return self

    @torch.no_grad()
    def forward(self, sentences: Sequence[str]) -> Tensor:
        """(n, D) float32: the mean of the last states of a sentence's tokens; the paper does not say how it pools."""
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt").to(
            self.bert.device
        )
        states, mask = self.bert(**tokens).last_hidden_state.float(), tokens["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    def fingerprint(self) -> dict[str, Any]:
        return {"architecture": self.name, "pretrained": self.name, "weights": self.weights_hash()}


class BertTextEncoder(TextEncoder):
    """`TextEncoder` with BERT in the place of CLIP; `options` are its own."""

    @property
    def dim(self) -> int:
        return int(self.model.bert.config.hidden_size)

    @property
    def context_length(self) -> int:
        return int(self.model.bert.config.max_position_embeddings)

    def weights(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters())

    def weights_hash(self) -> str:
        return self.model.weights_hash()

    def compute(self, names: Sequence[str]) -> Tensor:
        with torch.autocast(self.model.bert.device.type, enabled=False):
            vectors = torch.cat([F.normalize(self.model(prompts([name], self.templates)), dim=-1) for name in names])
        return F.normalize(vectors.unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)
