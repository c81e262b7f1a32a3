import io
import json
import math

from fcclip.engine.metrics import History, JsonWriter, ProgressBar, TensorBoardWriter, duration


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_medians_forget_what_left_the_window():
    history = History(window=3)
    for value in (100.0, 1.0, 5.0, 3.0):
        history.add({"loss": value, "time": 2.0})
    assert history.medians() == {"loss": 3.0, "time": 2.0}


def test_a_second_writer_continues_the_file(tmp_path):
    path = tmp_path / "metrics.json"
    for iteration in (19, 39):
        writer = JsonWriter(path)
        writer.write(iteration, {"total_loss": 1.0, "grad_norm": math.inf})
        writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"grad_norm": None, "iteration": n, "total_loss": 1.0} for n in (19, 39)]


def test_a_line_is_on_the_disk_before_the_next_one_is_written(tmp_path):
    writer = JsonWriter(tmp_path / "metrics.json")
    writer.write(19, {"total_loss": 1.0})
    assert json.loads((tmp_path / "metrics.json").read_text())["iteration"] == 19
    writer.close()


def test_tensorboard_reads_the_scalars_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.write(19, {"total_loss": 2.5})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("total_loss")] == [(19, 2.5)]


def test_the_bar_shows_progress_and_losses_and_can_step_aside(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    bar = ProgressBar(max_iter=10, start=2, stream=stream)
    bar.write(4, {"total_loss": 3.5, "loss_ce": 1.25, "loss_ce_0": 9.0})
    bar.pause()
    bar.resume()
    bar.close()
    shown = stream.getvalue()
    assert "5/10" in shown and "loss 3.5  ce 1.25" in shown and "ce_0" not in shown


def test_durations_are_hours_minutes_seconds():
    assert duration(59.9) == "0:00:59" and duration(90061) == "25:01:01"
