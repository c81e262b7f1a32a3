"""Class names become vectors through CLIP's text tower, once (FC-CLIP, section 3.2; prompts of ViLD)."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fcclip.files import write_atomically
from fcclip.structures import TextEmbeddings
from fcclip.vocabulary import TEMPLATES, Vocabulary, prompts

logger = logging.getLogger(__name__)

_CHUNK = 256  # prompts encoded at once; a memory knob
_SHORT = 40  # bytes of a name that fits into the text tower with every template
_KEEP = 16  # vocabularies held in memory
_SLICED = threading.Lock()  # the text tower runs with sliced positions, one thread at a time


class TextEncoder:
    """Encodes vocabularies with one text tower, a CLIP's; results are kept in memory and, with a folder, on disk.

    Both caches know the text tower's weights: loading other weights, or moving them, never serves old vectors.

    Args:
        model: an open_clip model; it is not copied.
        cache_dir: folder for vectors on disk; None keeps them in memory only.
        templates: the sentences that a class name is put into.
    """

    def __init__(
        self, model: nn.Module, *, cache_dir: Path | None = None, templates: Sequence[str] = TEMPLATES
    ) -> None:
        self.model = model
        self.cache_dir = cache_dir
        self.templates = tuple(templates)
        self.shown: Mapping[str, Tensor] = {}  # names with a vector (D,) of their own, which are not read as text
        self._memory: OrderedDict[tuple, TextEmbeddings] = OrderedDict()
        self._weights: tuple[tuple, str] | None = None

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.model.text_projection.shape[-1])

    @property
    def context_length(self) -> int:
        """Tokens of a prompt that are read."""
        return int(self.model.positional_embedding.shape[0])

    def weights(self) -> list[tuple[str, Tensor]]:
        """All that a vector depends on."""
        return _text_weights(self.model)

    def weights_hash(self) -> str:
        """Tells one text tower from another."""
        return text_weights_hash(self.model)

    def compute(self, names: Sequence[str]) -> Tensor:
        """(len(names), D) float32, unit length; see `encode`."""
        return encode_class_names(self.model, names, self.templates)

    @torch.inference_mode(mode=False)  # what is kept must serve training too
    def encode(self, vocabulary: Vocabulary) -> TextEmbeddings:
        """One unit vector a synonym: the mean of its unit-length prompt embeddings, normalised; fp32, no gradient."""
        names = tuple(name for synonyms in vocabulary.synonyms for name in synonyms)
        counts = tuple(len(synonyms) for synonyms in vocabulary.synonyms)
        shown = {name: vector for name, vector in self.shown.items() if name in names}
        key = (self._version(), names, counts, *(vector.numpy().tobytes() for vector in shown.values()))
        embeddings = self._memory.get(key)
        if embeddings is None:
            unique = list(dict.fromkeys(name for name in names if name not in shown))
            warn_of_cut_names(unique, self.context_length)
            rows = self._encode_or_read(unique) if unique else torch.zeros(0, self.dim)
            if shown:
                unique, rows = [*unique, *shown], torch.cat([rows, torch.stack(list(shown.values()))])
            position = {name: index for index, name in enumerate(unique)}
            device = self.weights()[0][1].device
            vectors = rows[[position[name] for name in names]].to(device)
            classes = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
            embeddings = self._memory[key] = TextEmbeddings(vectors, classes, len(counts))
            while len(self._memory) > _KEEP:
                self._memory.popitem(last=False)
        return embeddings

    def _encode_or_read(self, names: list[str]) -> Tensor:
        path = self._cache_path(names)
        if path is not None and path.is_file():
            try:
                return load_file(path)["vectors"]
            except (SafetensorError, KeyError, OSError) as error:
                logger.warning("text cache %s is unreadable (%s); encoding %d names again", path, error, len(names))
        vectors = self.compute(names).cpu()
        if path is not None:
            _write(path, vectors)
        return vectors

    def _version(self) -> tuple:
        """Changes whenever a text weight is written, replaced or moved."""
        return tuple((weight.data_ptr(), weight._version) for _, weight in self.weights())

    def _cache_path(self, names: list[str]) -> Path | None:
        if self.cache_dir is None:
            return None
        version = self._version()
        if self._weights is None or self._weights[0] != version:
            self._weights = (version, self.weights_hash())
        digest = hashlib.sha256("\n".join([self._weights[1], *self.templates, *names]).encode()).hexdigest()
        return self.cache_dir / f"text-{digest[:32]}.safetensors"


def text_weights_hash(clip_model: nn.Module) -> str:
    """SHA-256 of everything a text embedding depends on: weights, activation and depth of the text tower."""
    digest = hashlib.sha256(repr([type(module).__name__ for module in clip_model.transformer.modules()]).encode())
    for name, weight in _text_weights(clip_model):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _text_weights(clip_model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in clip_model.named_parameters() if not name.startswith("visual.")]


def warn_of_cut_names(names: Sequence[str], context_length: int) -> None:
    """Says which names CLIP does not read to their end, with the number of their tokens."""
    long = [name for name in names if len(name.encode()) > _SHORT]
    tokenizer = open_clip.SimpleTokenizer() if long else None
    for name in long:
        num_tokens = max(len(tokenizer.encode(prompt)) for prompt in prompts([name])) + 2  # start and end of text
        if num_tokens > context_length:
            logger.warning(
                "the class name '%s' makes %d tokens with its prompt, CLIP reads %d: its end is cut off. Shorten it.",
                *(name if len(name) < 80 else f"{name[:60]} … {name[-15:]}", num_tokens, context_length),
            )


@torch.no_grad()
def encode_class_names(clip_model: nn.Module, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """(len(names), D) float32, unit length, on the model's device; see `TextEncoder.encode`."""
    device = clip_model.text_projection.device
    tokens = open_clip.tokenize(prompts(names, templates), context_length=int(clip_model.positional_embedding.shape[0]))
    with torch.autocast(device.type, enabled=False):
        chunks = [encode_tokens(clip_model, chunk.to(device)) for chunk in tokens.split(_CHUNK)]
        embeddings = torch.cat(chunks).float()
        embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
        means = embeddings.unflatten(0, (len(names), len(templates))).mean(dim=1)
        return F.normalize(means, dim=-1, eps=0)


class _EncodeText(nn.Module):
    """`encode_text` as a module's forward, so that `functional_call` can lend it sliced positions."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)


def encode_tokens(clip_model: nn.Module, tokens: Tensor) -> Tensor:
    """CLIP's text embeddings, not normalised; positions behind the last end of text of the batch are left out.

    Attention is causal and the embedding is read at the end of text, so what follows cannot change it.

    Args:
        clip_model: an open_clip model.
        tokens: (n, context length) int64, the end of text being the largest id of a row.

    Returns:
        (n, D) float.
    """
    length = int(tokens.argmax(dim=-1).max()) + 1
    lent = {
        "clip.positional_embedding": clip_model.positional_embedding[:length],
        "clip.attn_mask": clip_model.attn_mask[:length, :length],
    }
    with _SLICED:
        return torch.func.functional_call(_EncodeText(clip_model), lent, (tokens[:, :length],))


def _write(path: Path, vectors: Tensor) -> None:
    """Whole or not at all; a folder that cannot be written costs only the cache."""
    content = save({"vectors": vectors.contiguous()})
    own = path.with_name(f"{path.name}.{os.getpid()}")  # the processes of a training encode the same names
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(own, lambda file: file.write(content))
        os.replace(own, path)
    except OSError as error:
        logger.warning(
            "text embeddings could not be kept in %s (%s); they will be computed again next time", path.parent, error
        )
