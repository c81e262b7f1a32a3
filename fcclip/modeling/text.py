"""Class names become vectors through CLIP's text tower, once (FC-CLIP, section 3.2; prompts of ViLD)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
_PIECE = 2**24  # bytes of weights that are hashed at once


class TextEncoder:
    """Encodes vocabularies with one text tower, a CLIP's; results are kept in memory and, with a folder, on disk.

    Both caches know the text tower's weights: loading other weights, or moving them, never serves old vectors. They
    keep whole vocabularies, because the rounding of a vector depends on the names that are encoded with it: the same
    classes give the same bits whatever was asked before.

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
    pieces = []
    for name, weight in _text_weights(clip_model):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        content = memoryview(weight.detach().float().cpu().flatten().numpy()).cast("B")
        pieces += [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing holds no lock of Python
        for piece in threads.map(hashlib.sha256, pieces):
            digest.update(piece.digest())
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
        embeddings = _encode_prompts(clip_model, tokens.to(device).unflatten(0, (len(names), len(templates)))).float()
        embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return F.normalize(embeddings.mean(dim=1), dim=-1, eps=0)


def encode_tokens(clip_model: nn.Module, tokens: Tensor) -> Tensor:
    """CLIP's text embeddings, not normalised; positions behind the last end of text of the batch are left out.

    Attention is causal and the embedding is read at the end of text, so what follows cannot change it.

    Args:
        clip_model: an open_clip model.
        tokens: (n, context length) int64, the end of text being the largest id of a row.

    Returns:
        (n, D) float.
    """
    ends = tokens.argmax(dim=-1)
    positions = torch.arange(int(ends.max()) + 1, device=tokens.device)
    states, _ = _read(clip_model, tokens[:, : len(positions)], positions, positions <= positions[:, None])
    return _embedding_at(clip_model, states, ends)


def _encode_prompts(clip_model: nn.Module, tokens: Tensor) -> Tensor:
    """As `encode_tokens` for (names, templates, context length), which gives (names, templates, D).

    What a template says before the name is read once, and its keys and values serve every name.
    """
    ends = tokens.argmax(dim=-1)
    shared = (
        (tokens == tokens[:1]).all(dim=0).int().cumprod(dim=-1).sum(dim=-1)
    )  # of each template, tokens before names
    shared = torch.minimum(shared, ends.amin(dim=0))  # a prompt keeps its end of text
    before = torch.arange(int(shared.max()), device=tokens.device)
    _, known = _read(clip_model, tokens[0, :, : len(before)], before, before <= before[:, None])

    template = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0])
    tokens, ends = tokens.flatten(0, 1), ends.flatten() - shared[template]
    parts, order = [], ends.argsort(stable=True)  # prompts of the same length together
    for rows in order.split(_CHUNK):
        own = torch.arange(int(ends[rows].max()) + 1, device=tokens.device)
        start, which = shared[template[rows]], template[rows]
        positions = (start[:, None] + own).clamp(max=tokens.shape[1] - 1)
        visible = torch.cat(
            [
                (before < start[:, None])[:, None, None].expand(-1, -1, len(own), -1),
                (own <= own[:, None]).expand(len(rows), 1, -1, -1),
            ],
            dim=-1,
        )
        earlier = [(keys[which], values[which]) for keys, values in known]
        states, _ = _read(clip_model, tokens[rows].gather(1, positions), positions, visible, earlier)
        parts.append(_embedding_at(clip_model, states, ends[rows]))
    return torch.cat(parts)[order.argsort()].unflatten(0, (-1, len(shared)))


def _read(
    clip_model: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    visible: Tensor,
    earlier: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The text transformer of open_clip over a part of prompts.

    Args:
        clip_model: whose.
        tokens: (n, s) int64.
        positions: (s,) or (n, s) int64, theirs in the prompts.
        visible: (s, e + s) or (n, 1, s, e + s) bool, which tokens each one looks at.
        earlier: of each block the keys and values (n, heads, e, ·) of the e tokens that were read before.

    Returns:
        the states (n, s, width) and of each block the keys and values (n, heads, s, ·) of these tokens.
    """
    dtype = clip_model.transformer.get_cast_dtype()
    x = clip_model.token_embedding(tokens).to(dtype) + clip_model.positional_embedding[positions].to(dtype)
    made = []
    for index, block in enumerate(clip_model.transformer.resblocks):
        attention = block.attn
        projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        queries, keys, values = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
        )
        made.append((keys, values))
        if earlier is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(earlier[index], (keys, values)))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        x = x + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, made


def _embedding_at(clip_model: nn.Module, states: Tensor, ends: Tensor) -> Tensor:
    """States (n, s, width) at the end of each text, (n,) int64 -> (n, D)."""
    last = states[torch.arange(len(ends), device=ends.device), ends]
    return clip_model.ln_final(last) @ clip_model.text_projection


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
