"""A web page that segments images with the class names you type.

    python demo/app.py                                  # the shipped weights of the shapes world
    python demo/app.py --weights fcclip_cocopan.pth \\
        --config-file coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml

Only this machine sees the page, unless --host or --share say otherwise. Images travel inside messages and results stand
inside the page, so none is written to the disk; a result is kept in memory for its own session alone, to be named anew,
and so are the examples of words that the session taught.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import html
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fcclip import Segmenter
from fcclip.data.images import opened, upright_rgb
from fcclip.errors import InputError, NotInstalledError, UserError, run_program
from fcclip.segmenter import NamedSegment, Segmentation, read_vocabulary
from fcclip.segmenter.examples import ExampleBank
from fcclip.segmenter.result import KINDS
from fcclip.segmenter.segments import named_segments

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError as error:
    gr, missing = None, error

MAX_BYTES = 20_000_000  # of an image file
MAX_PIXELS = 50_000_000  # of an image, asked before it is decoded
MAX_SIDE = 2048  # pixels; larger images are scaled down
MAX_NAMES = 1000  # with synonyms
SESSIONS, MINUTES = 16, 30  # results that are kept, and for how long; one of a photograph takes about 60 MB
RESTS = {  # what becomes of masks that other names fit better -> arguments of the segmenter
    "nearest of your names": {"unknown": False, "others": False},
    "unknown": {"unknown": True, "others": False},
    "left out": {"unknown": False, "others": True},
}
EXAMPLES = {  # of demo/images
    "shapes_1.jpg": "red circle; blue star, azure star; sand:stuff",
    "shapes_3.jpg": "heart; star; cross; square; triangle; hay:stuff",
    "shapes_4.jpg": "white triangle; red star; orange star; blue square; pink circle; water:stuff",
}
SECURITY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # nothing comes from or goes to other hosts
NOTHING = f"No image: choose one, or an example. Results are kept for {MINUTES} minutes."
FILES = Path(__file__).parent


# ---- an image and names in, HTML out ----


def read_upload(content: str) -> np.ndarray:
    """(h, w, 3) uint8 RGB, no side above `MAX_SIDE`, from a data URL.

    Raises:
        ValueError: too large, or not an image.
    """
    if content == "too large" or len(content) > 4 / 3 * MAX_BYTES + 100:
        raise InputError(f"the file is too large; give one of at most {MAX_BYTES // 10**6} MB")
    with opened(io.BytesIO(base64.b64decode(content.partition(",")[2])), if_broken="Choose another file.") as image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"the image has {image.width} x {image.height} pixels; give one of at most "
                f"{MAX_PIXELS // 10**6} million"
            )
        image = upright_rgb(image)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return np.array(image)


def check_names(names: str) -> str:
    """The same names.

    Raises:
        ValueError: none, or too many.
    """
    number = sum(map(len, read_vocabulary(names).synonyms))
    if number > MAX_NAMES:
        raise InputError(f"{number} names are too many; give at most {MAX_NAMES}, synonyms included")
    return names


def with_word(names: str, word: str, *, isthing: bool) -> str:
    """The names, and a word that was taught if it is not among them.

    Raises:
        ValueError: not a single name.
    """
    if not word or any(sign in word for sign in ";,:"):
        raise InputError(f"teach one name at a time, without ; , and : in it; got '{word}'")
    if any(word in synonyms for synonyms in read_vocabulary(names).synonyms):
        return names
    return f"{names.rstrip('; ')}; {word}{'' if isthing else ':stuff'}"


@contextlib.contextmanager
def knowing(segmenter: Segmenter, bank: ExampleBank | None) -> Iterator[ExampleBank]:
    """Within it the segmenter knows the examples of one session alone; requests come one after the other."""
    own, encoder = segmenter.examples, segmenter.model.text_encoder
    segmenter.examples = bank or ExampleBank(segmenter.model)
    encoder.shown = segmenter.examples.words
    try:
        yield segmenter.examples
    finally:
        segmenter.examples, encoder.shown = own, own.words


def segments_of(result: Segmentation, kind: str) -> tuple[NamedSegment, ...]:
    """What a tab shows; of the semantic map one segment a class."""
    if kind == "panoptic":
        return result.segments
    if kind == "instances":
        return result.instances
    classes, areas = np.unique(result.semantic, return_counts=True)
    records = [
        {"id": c + 1, "category_id": c, "isthing": result.vocabulary.classes[c].thing, "score": 1.0, "area": area}
        for c, area in zip(classes.tolist(), areas.tolist())
    ]
    return named_segments(result.semantic + 1, records, result.class_names)


def outline(segment: NamedSegment) -> str:
    """The mask of a segment as an SVG path, in pixels of the image."""
    left, top, right, bottom = segment.box
    mask = segment.mask[top:bottom, left:right].astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top))
    return "".join(f"M{' '.join(f'{x} {y}' for x, y in points[:, 0].tolist())}Z" for points in contours)


def escaped(text: str) -> str:
    """Text as HTML, which gradio's templates leave alone."""
    return html.escape(text).translate({ord(letter): f"&#{ord(letter)};" for letter in "{}$`\\"})


def view(result: Segmentation, kind: str) -> str:
    """The drawing, regions that name themselves under the pointer, a list of the segments, and both downloads."""
    segments = segments_of(result, kind)
    texts = [segment.name if kind == "semantic" else f"{segment.name} {segment.score:.2f}" for segment in segments]
    order = sorted(range(len(segments)), key=lambda index: -segments[index].area)  # small ones lie on top
    regions = "".join(
        f'<path d="{outline(segments[index])}" data-segment="{index}" data-text="{escaped(texts[index])}"/>'
        for index in order
    )
    chips = "".join(f'<li tabindex="0" data-segment="{index}">{escaped(text)}</li>' for index, text in enumerate(texts))
    content = json.loads(result.to_json())
    content["segments"] = [segment.record() for segment in segments]
    if kind == "semantic":  # the best class of a pixel has no score of its own
        content["segments"] = [{k: v for k, v in record.items() if k != "score"} for record in content["segments"]]
    height, width = result.image.shape[:2]
    return (
        f'<div class="view"><div class="canvas"><img alt="{kind} segments" src="{_drawing(result, kind)}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" fill-rule="evenodd">{regions}</svg>'
        f'<span class="tip" hidden></span></div><ul>{chips or "<li>nothing found</li>"}</ul>'
        f'<p><a class="image" download="segments.jpg" href="#">Download image</a> '
        f'<a download="segments.json" href="{_data_url("application/json", json.dumps(content).encode())}">'
        "Download JSON</a></p></div>"
    )


def _drawing(result: Segmentation, kind: str) -> str:
    encoded = io.BytesIO()
    Image.fromarray(result.draw(kind)).save(encoded, "JPEG", quality=92)
    return _data_url("image/jpeg", encoded.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- the page ----


def told(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """What the user can fix becomes a message on the page, which stays as it is."""

    @functools.wraps(function)
    def tells(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except UserError as error:
            gr.Warning(escaped(str(error)))
            return gr.skip()

    return tells


def answers(segmenter: Segmenter) -> tuple[Callable[..., list[Any]], ...]:
    """What an image, other names and an example of a word do."""
    own = segmenter.model.ensemble

    def options_of(score: float, alpha: float, beta: float, rest: str) -> dict[str, Any]:
        return {"min_score": score, "ensemble": replace(own, alpha=alpha, beta=beta), **RESTS[rest]}

    def shown(result: Segmentation, kind: str, start: float, how: str) -> list[Any]:
        views = [view(result, kind) if name == kind else "" for name in KINDS]
        return [result, f"{time.perf_counter() - start:.2f} s, {how}", *views]

    @told
    def look(event: gr.EventData, bank: ExampleBank | None, names: str, kind: str, *how: Any) -> list[Any]:
        start = time.perf_counter()
        image = read_upload(str(event.image))
        names = str(event.names or names)
        with knowing(segmenter, bank):
            result = segmenter(image, check_names(names), **options_of(*how))
            return [names, *shown(result, kind, start, f"{image.shape[1]} x {image.shape[0]} pixels")]

    @told
    def relabel(result: Segmentation | None, bank: ExampleBank | None, names: str, kind: str, *how: Any) -> list[Any]:
        start = time.perf_counter()
        check_names(names)
        if result is None:
            return [None, NOTHING, *[""] * len(KINDS)]
        with knowing(segmenter, bank):
            result = result.relabel(names, **options_of(*how))
            return shown(result, kind, start, "named anew without the network")

    @told
    def teach(
        event: gr.EventData, result: Segmentation | None, bank: ExampleBank | None, names: str, kind: str, *how: Any
    ) -> list[Any]:
        start, word = time.perf_counter(), str(event.word).strip()
        if result is None:
            raise InputError(NOTHING)
        with knowing(segmenter, bank) as bank:
            segment = segments_of(result, kind)[int(event.segment)]
            names = check_names(with_word(names, word, isthing=segment.isthing))
            segmenter.teach(word, result, segment.mask)
            number = len(bank.classes[word].regions)
            said = f"{escaped(word)} has {number} example{'s' if number > 1 else ''}; named anew without the network"
            return [bank, "", names, *shown(result.relabel(names, **options_of(*how)), kind, start, said)]

    return look, relabel, teach


def build_page(segmenter: Segmenter) -> gr.Blocks:
    """The page; everything that computes waits for its turn, and every session has its own result."""
    own, (look, relabel, teach) = segmenter.model.ensemble, answers(segmenter)

    def forget(result: Segmentation | None) -> None:
        """Drops all of the session that holds a result; gradio alone would keep the last drawing."""
        sessions = page.state_holder.session_data
        for name, session in list(sessions.items()):
            if result is not None and session.state_data.get(kept._id) is result:
                del sessions[name]

    with gr.Blocks(title="fcclip", analytics_enabled=False) as page:
        script = (FILES / "app.js").read_text()
        kept = gr.State(time_to_live=60 * MINUTES, delete_callback=forget)
        bank = gr.State()  # goes with the session
        kind = gr.Radio(list(KINDS), value=KINDS[0], visible="hidden")  # the page's, so that no lost session changes it
        gr.Markdown("# Any image, any class names")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.HTML(_upload_html(), js_on_load=script, elem_id="upload")
                names = gr.Textbox(
                    next(iter(EXAMPLES.values())),
                    label="Class names",
                    info="; between classes, a comma between synonyms, :stuff after what is not countable",
                    max_lines=6,
                    elem_id="names",
                )
                rests = gr.Radio(
                    list(RESTS),
                    value=next(iter(RESTS)),
                    label="What fits none of your names",
                    info="as far as the names of the training tell",
                    visible=segmenter.model.seen_vocabulary is not None,
                    elem_id="rest",
                )
                apply = gr.Button("Use these names", variant="primary", elem_id="apply")
                word = gr.Textbox(
                    label="Teach a word",
                    info="type it, then click what it means in the result; again for more examples",
                    placeholder="any word",
                    max_lines=1,
                    interactive=True,
                    elem_id="teach",
                )
            with gr.Column(scale=5, min_width=320):
                with gr.Tabs():
                    tabs = {name: gr.Tab(name.capitalize()) for name in KINDS}
                views = []
                for tab in tabs.values():
                    with tab:
                        views.append(gr.HTML(elem_classes="result", js_on_load=script))
                status = gr.Markdown(NOTHING, elem_id="status")
                with gr.Row():
                    score = _slider("Threshold", 0.5, "of things")
                    alphas = _slider("Alpha", own.alpha, "CLIP's share, trained classes")
                    betas = _slider("Beta", own.beta, "CLIP's share, other classes")
        options = {"concurrency_id": "model", "api_visibility": "private", "trigger_mode": "always_last"}
        settings, outputs = [bank, names, kind, score, alphas, betas, rests], [kept, status, *views]
        upload.upload(look, settings, [names, *outputs], **options)
        changes = [names.submit, apply.click, score.change, alphas.change, betas.change, rests.change]
        gr.on(changes, relabel, [kept, *settings], outputs, **options)
        gr.on([each.select for each in views], teach, [kept, *settings], [bank, word, names, *outputs], **options)
        for name, tab in tabs.items():
            chosen = tab.select(None, None, kind, js=f"() => '{name}'")
            chosen.then(relabel, [kept, *settings], outputs, **options)
    return page


def _slider(label: str, value: float, info: str) -> gr.Slider:
    return gr.Slider(0, 1, value, step=0.01, label=label, info=info, min_width=220, elem_id=label.lower())


def _upload_html() -> str:
    examples = "".join(
        f'<button data-names="{escaped(names)}"><img alt="{escaped(names)}" '
        f'src="{_data_url("image/jpeg", (FILES / "images" / file).read_bytes())}"></button>'
        for file, names in EXAMPLES.items()
    )
    return (
        f'<label class="drop"><input type="file" accept="image/*" data-max="{MAX_BYTES}">'
        f'Choose, drop or paste an image</label><div class="examples">{examples}</div>'
    )


class Guard:
    """Middleware: the browser talks to this server alone, nobody sends more than an image, and those addresses of
    gradio that write files are closed."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].rstrip("/").endswith(("/upload", "/deep_link")):
            return await PlainTextResponse("closed", status_code=403)(scope, receive, send)
        headers = dict(scope["headers"])
        size = headers.get(b"content-length", b"" if b"transfer-encoding" in headers else b"0")
        if not size.isdigit() or int(size) > 2 * MAX_BYTES:
            return await PlainTextResponse("too large", status_code=413)(scope, receive, send)

        async def secured(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", SECURITY.encode())]
            await send(message)

        return await self.app(scope, receive, secured)


def launch(page: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Starts the server.

    Args:
        page: of `build_page`.
        options: of `gr.Blocks.launch`.
    """
    return page.queue(max_size=32).launch(
        css_paths=FILES / "app.css",
        show_error=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        state_session_capacity=SESSIONS,
        app_kwargs={"middleware": [Middleware(Guard)]},
        **options,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default="shapes", metavar="NAME", help="a shipped name, file, folder or hub id (default: shapes)")
    add("--config-file", metavar="FILE", help="YAML file, for weights that do not bring one")
    add("--device", default="auto", help="a torch device (default: the fastest of this machine)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in (default: %(default)s)")
    add("--port", type=int, default=7860, help="(default: %(default)s)")
    add("--share", action="store_true", help="a public address through gradio's servers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if gr is None:
        raise NotInstalledError(f"the page needs gradio ({missing}); install it: pip install 'fcclip[web]'")
    segmenter = Segmenter.from_pretrained(args.weights, config=args.config_file, device=args.device)
    launch(build_page(segmenter), server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
