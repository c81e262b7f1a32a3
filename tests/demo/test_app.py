"""The web page: its parts, and the whole in a headless Chromium."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcclip import Segmenter
from fcclip.errors import InputError, NotInstalledError

REPOSITORY = Path(__file__).parents[2]
IMAGES = REPOSITORY / "demo" / "images"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHIPS = ".view:visible li"
PATIENCE_MS = 60_000  # of a busy machine


def load_app():
    spec = importlib.util.spec_from_file_location("app_script", REPOSITORY / "demo" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def app():
    return load_app()


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter.from_pretrained("shapes", device="cpu")


def upload_of(app, content):
    return app._data_url("image/png", content)


def encoded(size):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


# ---- parts ----


def test_an_upload_becomes_pixels_no_larger_than_the_limit(app):
    assert app.read_upload(upload_of(app, encoded((30, 20)))).shape == (20, 30, 3)
    assert app.read_upload(upload_of(app, encoded((2 * app.MAX_SIDE, 10)))).shape[1] == app.MAX_SIDE
    assert (app.read_upload(upload_of(app, encoded((3, 2)))) == (200, 30, 30)).all()


def test_a_bad_upload_is_told(app, monkeypatch):
    with pytest.raises(InputError, match="no known image format. Choose another file"):
        app.read_upload(upload_of(app, b"these are words"))
    with pytest.raises(InputError, match="cannot be read as an image"):
        app.read_upload(upload_of(app, encoded((300, 300))[:-200]))
    with pytest.raises(InputError, match="at most 20 MB"):
        app.read_upload("x" * 30_000_000)
    monkeypatch.setattr(app, "MAX_PIXELS", 1_000_000)
    with pytest.raises(InputError, match="2000 x 1000 pixels; give one of at most 1 million"):
        app.read_upload(upload_of(app, encoded((2000, 1000))))


def test_too_many_names_are_told(app):
    assert app.check_names("cat; dog") == "cat; dog"
    with pytest.raises(InputError, match="1001 names are too many; give at most 1000"):
        app.check_names(";".join(f"class {index}" for index in range(1001)))


@pytest.mark.parametrize("kind", ["panoptic", "instances", "semantic"])
def test_a_view_has_a_region_and_an_entry_for_every_segment(app, segmenter, kind):
    result = segmenter(IMAGES / "shapes_1.jpg", "red circle; blue star; sand:stuff", min_score=0.5)
    shown = app.view(result, kind)
    assert shown.count("<path ") == shown.count("<li ") == len(app.segments_of(result, kind)) >= 2
    assert "red circle" in shown


def test_names_cannot_become_html_or_templates(app, segmenter):
    name = "<img src=x> {{value}} ${value} `\"'"
    shown = app.view(segmenter(IMAGES / "shapes_1.jpg", [name, "sand:stuff"]), "semantic")
    head = shown.partition("data:application/json")[0]
    assert "<img src=x" not in head and "{{" not in head and "${" not in head and "&lt;img src=x&gt;" in head


def test_a_taught_word_joins_the_names_once_and_is_a_single_name(app):
    assert app.with_word("cat; dog; ", "glorp", isthing=True) == "cat; dog; glorp"
    assert app.with_word("cat; sand:stuff", "glorp", isthing=False) == "cat; sand:stuff; glorp:stuff"
    assert app.with_word("cat, glorp; dog", "glorp", isthing=True) == "cat, glorp; dog"
    for word in ("", "glorp; wug", "glorp, wug", "glorp:stuff"):
        with pytest.raises(InputError, match="teach one name at a time"):
            app.with_word("cat", word, isthing=True)


def test_what_one_session_taught_is_known_in_its_turn_alone(app, segmenter):
    result = segmenter(IMAGES / "shapes_1.jpg", "red circle; sand:stuff")
    own, encoder = segmenter.examples, segmenter.model.text_encoder
    with app.knowing(segmenter, None) as bank:
        segmenter.teach("glorp", result, result.segments[0].mask)
    assert (segmenter.examples, encoder.shown, list(bank.classes)) == (own, {}, ["glorp"])
    with pytest.raises(KeyError), app.knowing(segmenter, bank):
        assert list(encoder.shown) == ["glorp"]
        raise KeyError
    with app.knowing(segmenter, None):
        assert encoder.shown == {}
    assert (segmenter.examples, encoder.shown) == (own, {})


def test_without_other_wishes_only_this_machine_sees_the_page(app):
    args = app.parse_arguments([])
    assert (args.weights, args.host, args.share) == ("shapes", "127.0.0.1", False)


def test_without_gradio_it_says_what_to_install(app, monkeypatch):
    monkeypatch.setattr(app, "gr", None)
    monkeypatch.setattr(app, "missing", "No module named 'gradio'", raising=False)
    with pytest.raises(NotInstalledError, match=r"pip install 'fcclip\[web\]'"):
        app.main([])


# ---- the page in a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright, not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Server:
    """A running page that counts how often the network looked at an image."""

    def __init__(self, segmenter, files, **settings):
        pytest.importorskip("gradio", reason="the page needs gradio, which is not installed")
        self.files, self.looks, self.asked = files, 0, []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(tempfile, "tempdir", str(files))
        self.patch.setenv("GRADIO_TEMP_DIR", str(files))
        score = segmenter.model.score

        def counted(*inputs, **options):
            self.looks += 1
            return score(*inputs, **options)

        self.patch.setattr(segmenter.model, "score", counted)
        app = load_app()
        for name, value in settings.items():
            setattr(app, name, value)
        self.page = app.build_page(segmenter)
        options = {"server_name": "127.0.0.1", "prevent_thread_lock": True, "quiet": True}
        _, self.url, _ = app.launch(self.page, **options)

    def close(self):
        self.page.close(verbose=False)
        self.patch.undo()

    def visit(self, browser, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        visitor = context.new_page()
        visitor.on("request", lambda request: self.asked.append(request.url))
        visitor.goto(self.url)
        visitor.wait_for_selector("#upload .drop")
        return visitor


@pytest.fixture(scope="module")
def server(segmenter, browser, tmp_path_factory):
    running = Server(segmenter, tmp_path_factory.mktemp("files"))
    yield running
    running.close()


@pytest.fixture
def visit(server, browser):
    yield functools.partial(server.visit, browser)
    for context in browser.contexts:
        context.close()


def upload(visitor, image="shapes_1.jpg"):
    visitor.set_input_files("#upload input[type=file]", IMAGES / image)


def labels(visitor, having):
    """The segments that are listed, once one of them has a text in it."""
    visitor.locator(CHIPS, has_text=having).first.wait_for()
    return [text.rpartition(" ")[0] for text in visitor.locator(CHIPS).all_inner_texts()]


def use_names(visitor, names):
    visitor.fill("#names textarea", names)
    visitor.click("#apply")


def test_names_and_sliders_are_changed_without_the_network(server, visit):
    visitor = visit()
    visitor.fill("#names textarea", "red circle; blue star; sand:stuff")
    upload(visitor)
    assert sorted(labels(visitor, "red circle")) == ["blue star", "red circle", "sand"]
    looks = server.looks
    use_names(visitor, "round sign, red circle; blue star; beach, sand:stuff")
    assert sorted(labels(visitor, "round sign")) == ["beach", "blue star", "round sign"]
    visitor.locator("#threshold input[type=range]").fill("1")
    visitor.locator(CHIPS, has_text="blue star").wait_for(state="detached")
    slider = visitor.locator("#threshold input[type=range]").bounding_box()
    visitor.mouse.move(slider["x"] + slider["width"] - 8, slider["y"] + slider["height"] / 2)
    visitor.mouse.down()
    visitor.mouse.move(slider["x"] + slider["width"] / 2, slider["y"] + slider["height"] / 2, steps=5)
    visitor.mouse.up()
    assert "blue star" in labels(visitor, "blue star")
    assert server.looks == looks


def test_what_fits_no_name_is_called_unknown_or_left_out(server, visit):
    visitor = visit()
    visitor.fill("#names textarea", "red circle; sand:stuff")
    upload(visitor)
    assert "red circle" in labels(visitor, "red circle")
    looks = server.looks
    visitor.get_by_label("unknown").check()
    assert sorted(set(labels(visitor, "unknown"))) == ["red circle", "sand", "unknown"]
    visitor.get_by_label("left out").check()
    visitor.locator(CHIPS, has_text="unknown").wait_for(state="detached")
    assert sorted(labels(visitor, "sand")) == ["red circle", "sand"]
    assert server.looks == looks


def test_a_word_is_taught_by_a_click_and_known_in_this_session_alone(server, visit):
    visitor, other = visit(), visit()
    visitor.fill("#names textarea", "red circle; blue star; sand:stuff")
    upload(visitor)
    labels(visitor, "red circle")
    looks = server.looks
    visitor.locator(CHIPS, has_text="red circle").click()  # without a word a click teaches nothing
    visitor.fill("#teach input", "glorp")
    number = visitor.locator(CHIPS, has_text="red circle").get_attribute("data-segment")
    visitor.locator(f".view:visible path[data-segment='{number}']").click()
    assert "glorp" in labels(visitor, "glorp")
    visitor.get_by_text("glorp has 1 example;").wait_for()
    assert visitor.input_value("#names textarea") == "red circle; blue star; sand:stuff; glorp"
    assert visitor.input_value("#teach input") == ""
    assert server.looks == looks
    use_names(visitor, "glorp; blue star; sand:stuff")
    visitor.locator(CHIPS, has_text="red circle").wait_for(state="detached")
    upload(visitor)  # a later image
    visitor.get_by_text("256 x 256 pixels").wait_for()
    assert sorted(labels(visitor, "glorp")) == ["blue star", "glorp", "sand"]
    assert server.looks == looks + 1
    visitor.fill("#teach input", "glorp")
    visitor.locator(CHIPS, has_text="glorp").click()
    visitor.get_by_text("glorp has 2 examples;").wait_for()
    visitor.fill("#teach input", "glorp; wug")
    visitor.locator(CHIPS, has_text="sand").click()
    visitor.get_by_text("teach one name at a time").first.wait_for()
    other.fill("#names textarea", "glorp; blue star; sand:stuff")
    upload(other)
    assert "glorp" not in labels(other, "sand")


def test_a_region_says_its_name_and_score_under_the_pointer(visit):
    visitor = visit()
    upload(visitor)
    number = visitor.locator(CHIPS, has_text="blue star").get_attribute("data-segment")
    visitor.hover(f".view:visible path[data-segment='{number}']")
    tip = visitor.locator(".view:visible .tip")
    tip.wait_for()
    assert tip.inner_text().startswith("blue star 0.") or tip.inner_text() == "blue star 1.00"
    assert "on" in visitor.locator(CHIPS, has_text="blue star").get_attribute("class")


@pytest.mark.parametrize("tab", ["Instances", "Semantic"])
def test_the_other_tabs_show_the_same_image(visit, tab):
    visitor = visit()
    upload(visitor)
    labels(visitor, "red circle")
    visitor.get_by_role("tab", name=tab).click()
    visitor.locator(f".view:visible img[alt='{tab.lower()} segments']").wait_for()
    visitor.locator(CHIPS, has_text="red circle").wait_for()


def test_image_and_json_can_be_downloaded(visit):
    visitor = visit()
    upload(visitor)
    labels(visitor, "red circle")
    with visitor.expect_download() as saved:
        visitor.click(".view:visible >> text=Download image")
    assert np.asarray(Image.open(saved.value.path())).shape == (768, 768, 3)
    with visitor.expect_download() as saved:
        visitor.click(".view:visible >> text=Download JSON")
    content = json.loads(Path(saved.value.path()).read_text())
    assert {segment["name"] for segment in content["segments"]} == {"red circle", "blue star", "sand"}


def test_an_example_brings_its_names(visit):
    visitor = visit()
    visitor.locator("#upload .examples button").nth(2).click()
    assert "white triangle" in labels(visitor, "white triangle")
    assert "pink circle" in visitor.input_value("#names textarea")


def test_an_image_can_be_pasted(visit):
    visitor = visit()
    content = list((IMAGES / "shapes_1.jpg").read_bytes())
    visitor.evaluate(
        """content => {
            const clipboardData = new DataTransfer()
            clipboardData.items.add(new File([new Uint8Array(content)], 'pasted.jpg', { type: 'image/jpeg' }))
            document.dispatchEvent(new ClipboardEvent('paste', { clipboardData }))
        }""",
        content,
    )
    assert "red circle" in labels(visitor, "red circle")


def test_a_bad_upload_and_no_names_give_a_message_and_the_page_goes_on(visit, tmp_path):
    visitor = visit()
    (tmp_path / "words.jpg").write_text("these are words")
    visitor.set_input_files("#upload input[type=file]", tmp_path / "words.jpg")
    visitor.get_by_text("no known image format").first.wait_for()
    upload(visitor)
    labels(visitor, "red circle")
    use_names(visitor, " ; ")
    visitor.get_by_text("no class names given").first.wait_for()
    assert "red circle" in labels(visitor, "red circle")


def test_two_users_do_not_see_each_others_names(visit):
    first, second = visit(), visit()
    upload(first)
    labels(first, "red circle")
    use_names(second, "secret square, blue square")
    use_names(first, "round sign, red circle; sand:stuff")
    assert set(labels(first, "round sign")) == {"round sign", "sand"}
    assert second.locator(CHIPS).count() == 0
    upload(second, "shapes_4.jpg")
    assert set(labels(second, "secret square")) == {"secret square"}


def test_on_a_phone_nothing_is_wider_than_the_screen(visit):
    visitor = visit(viewport={"width": 390, "height": 844})
    upload(visitor)
    labels(visitor, "red circle")
    assert visitor.evaluate("document.documentElement.scrollWidth") <= 390


def test_results_are_dropped_by_age_and_by_number(segmenter, browser, tmp_path):
    running = Server(segmenter, tmp_path, MINUTES=1 / 60, SESSIONS=2)
    try:
        visitor = running.visit(browser)
        upload(visitor)
        labels(visitor, "red circle")
        visitor.wait_for_timeout(3000)
        use_names(visitor, "round sign, red circle")
        visitor.get_by_text("No image").wait_for()
        upload(visitor)
        labels(visitor, "round sign")
        visitor.wait_for_timeout(3000)
        assert len(running.page.state_holder.session_data) == 0
        for _ in range(3):
            other = running.visit(browser)
            upload(other)
            labels(other, "red circle")
        assert len(running.page.state_holder.session_data) <= 2
    finally:
        for context in browser.contexts:
            context.close()
        running.close()


def test_nothing_stays_on_the_disk_and_nothing_leaves_the_machine(server, visit):
    visitor = visit()
    upload(visitor)
    labels(visitor, "red circle")
    assert [url for url in server.asked if not url.startswith((server.url, "data:", "blob:"))] == []
    for address in ("upload", "deep_link?session_hash=x"):  # those of gradio that would write files
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{server.url}gradio_api/{address}")
    with pytest.raises(urllib.error.HTTPError, match="413"):
        too_long = urllib.request.Request(f"{server.url}gradio_api/queue/join", headers={"Content-Length": "50000000"})
        urllib.request.urlopen(too_long)
    assert [path for path in server.files.rglob("*") if path.is_file()] == []
