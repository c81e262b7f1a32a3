import functools
import http.server
import queue
import shutil
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest

from fcclip.segmenter import Camera, VideoFile, VideoWriter

av = pytest.importorskip("av", reason="needs PyAV (extra video)")


def pictures(number, height=48, width=64):
    """Flat grey images, each a little lighter."""
    return [np.full((height, width, 3), 40 + 4 * index, np.uint8) for index in range(number)]


def written(path, images, rate=25, seconds=None):
    with VideoWriter(path, rate=rate) as video:
        for index, image in enumerate(images):
            video.write(image, index / rate if seconds is None else seconds[index])
    return video.path


def test_what_is_written_is_read(tmp_path):
    images = pictures(40)
    video = VideoFile(written(tmp_path / "grey.mp4", images))
    frames = list(video)
    assert (len(frames), video.num_frames, video.rate, video.num_unreadable) == (40, 40, 25, 0)
    for index, (frame, image) in enumerate(zip(frames, images)):
        assert frame.seconds == pytest.approx(index / 25, abs=1e-3)
        assert abs(frame.image.mean() - image.mean()) < 3
    assert len(list(video)) == 40  # a second pass


def test_the_file_is_one_that_browsers_play(tmp_path):
    path = written(tmp_path / "grey.mp4", pictures(3))
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is there as a whole


def test_odd_sides_grow_by_a_pixel(tmp_path):
    [frame] = VideoFile(written(tmp_path / "odd.mp4", pictures(1, 241, 321)))
    assert frame.image.shape == (242, 322, 3)


def test_times_between_frames_need_not_be_equal(tmp_path):
    seconds = [0, 0.1, 0.5, 0.52, 2]
    path = written(tmp_path / "uneven.mp4", pictures(5), seconds=seconds)
    assert [frame.seconds for frame in VideoFile(path)] == pytest.approx(seconds, abs=1e-3)


def test_without_h264_it_is_vp9(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    path = written(tmp_path / "grey.mp4", pictures(3))
    assert path.name == "grey.webm"
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name in ("vp9", "libvpx-vp9")
    assert len(list(VideoFile(path))) == 3


def test_without_both_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"gif"})
    with pytest.raises(ValueError, match="this build of FFmpeg has none of libx264, libvpx-vp9"):
        VideoWriter(tmp_path / "grey.mp4", rate=25)


def test_a_file_that_is_left_early_holds_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "grey.mp4", rate=25) as video:
        for image in pictures(5):
            video.write(image, 0)
        raise KeyboardInterrupt
    assert len(list(VideoFile(tmp_path / "grey.mp4"))) == 5


def test_a_video_of_a_camera_held_sideways_is_upright(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32, 0] = 255  # red on the left
    path = written(tmp_path / "phone.mp4", [image] * 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"\x00\x01\x00\x00" + bytes(12) + b"\x00\x01\x00\x00", content.index(b"tkhd"))
    turned = b"".join((value % 2**32).to_bytes(4, "big") for value in (0, 65536, 0, -65536, 0))
    content[matrix : matrix + 20] = turned  # shown turned to the right by a quarter
    path.write_bytes(content)
    frame = next(iter(VideoFile(path)))
    assert frame.image.shape == (64, 48, 3)
    assert frame.image[8, 24, 0] > 200  # what was left is above
    assert frame.image[56, 24, 0] < 50


def noise(number):
    return np.random.default_rng(0).integers(0, 255, (number, 48, 64, 3), dtype=np.uint8)


def test_of_a_file_that_is_cut_off_the_readable_frames_are_given(tmp_path):
    path = written(tmp_path / "cut.mp4", noise(30))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    video = VideoFile(path)
    assert 5 < len(list(video)) == 30 - video.num_unreadable < 30


def test_a_damaged_frame_is_counted_and_the_others_are_given(tmp_path):
    path = written(tmp_path / "bad.webm", noise(30))
    with av.open(str(path)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0)][10]
    content = bytearray(path.read_bytes())
    content[place + 12 : place + size] = bytes(size - 12)
    path.write_bytes(content)
    video = VideoFile(path)
    assert (len(list(video)), video.num_unreadable) == (29, 1)


@pytest.mark.parametrize("content", [b"no video at all" * 99, b""])
def test_a_file_that_is_no_video_is_named(tmp_path, content):
    path = tmp_path / "notes.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="notes.mp4' cannot be read as a video"):
        VideoFile(path)


def test_a_file_without_a_video_in_it_is_named(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="has no video in it"):
        VideoFile(path)


def test_an_unknown_codec_is_named(tmp_path):
    path = written(tmp_path / "grey.mp4", pictures(3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"qqqq"))
    with pytest.raises(ValueError, match="codec that this build of FFmpeg does not know"):
        VideoFile(path)


def test_a_missing_file_and_an_ending_that_is_no_video_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="video 'none.mp4' does not exist"):
        VideoFile("none.mp4")
    with pytest.raises(ValueError, match="cannot write '.*out.qqq'"):
        VideoWriter(tmp_path / "out.qqq", rate=25)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'fcclip\[video\]'"):
        VideoWriter(tmp_path / "out.mp4", rate=25)


def test_a_camera_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no camera 99, or another program uses it"):
        Camera(99)


def test_a_camera_gives_rgb_frames_with_their_times_until_it_is_gone(monkeypatch):
    class Capture:
        def __init__(self, index):
            self.left = 2

        def isOpened(self):
            return True

        def set(self, *_):
            return True

        def get(self, _):
            return 0.0

        def release(self):
            self.left = 0

        def read(self):
            self.left -= 1
            return self.left >= 0, np.full((4, 6, 3), (255, 0, 0), np.uint8)

    monkeypatch.setattr("cv2.VideoCapture", Capture)
    frames = iter(Camera())
    first, second = next(frames), next(frames)
    assert first.image[0, 0].tolist() == [0, 0, 255]
    assert (first.seconds, second.seconds >= 0) == (0, True)
    with pytest.raises(ValueError, match="camera 0 gives no more images"):
        next(frames)


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = """<video muted></video><script>
const video = document.querySelector("video"), say = text => fetch("/said?" + text);
video.onended = () => say(video.getVideoPlaybackQuality().totalVideoFrames + " frames");
video.onerror = () => say(video.error.message);
video.src = location.hash.slice(1);
video.play().catch(error => say(error));
</script>"""


class Page(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and hears what the page of it says."""

    def __init__(self, *arguments, said, **options):
        self.said = said
        super().__init__(*arguments, **options)

    def do_GET(self):
        if self.path.startswith("/said?"):
            self.said.put(urllib.parse.unquote(self.path[6:]))
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("name", ["grey.mp4", "grey.webm"])
def test_chromium_plays_it_to_the_end(tmp_path, name):
    written(tmp_path / name, pictures(40))
    (tmp_path / "page.html").write_text(PAGE)
    said = queue.Queue()
    handler = functools.partial(Page, directory=str(tmp_path), said=said)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")
        apart = ("--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}")  # the former keeps it open
        address = f"http://127.0.0.1:{server.server_port}/page.html#{name}"
        browser = subprocess.Popen([CHROMIUM, *flags, *apart, address], stderr=subprocess.DEVNULL)
        try:
            assert said.get(timeout=60) == "40 frames"
        finally:
            browser.terminate()
            browser.wait(timeout=20)
            server.shutdown()
