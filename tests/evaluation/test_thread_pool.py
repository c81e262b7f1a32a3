"""Evaluation in threads: the order, the limit and the failures."""

import threading
import time

import pytest

from fcclip.errors import InputError
from fcclip.evaluation import EvaluationThreads, Evaluator, GroundTruth


class Slow(Evaluator):
    """Keeps what it was given; takes longer for earlier images, and fails where the output is an error."""

    def __init__(self):
        self.kept, self.running, self.most = [], 0, 0
        self.lock = threading.Lock()

    def measure(self, ground_truth, output):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.02 / (1 + ground_truth.image_id))
        with self.lock:
            self.running -= 1
        if isinstance(output, Exception):
            raise output
        return output

    def keep(self, image_id, measured):
        assert threading.current_thread() is threading.main_thread()
        self.kept.append((image_id, measured))

    def state(self):
        return self.kept

    def merge(self, state):
        self.kept += state

    def results(self):
        return {}


def ground_truth(number):
    return GroundTruth({"image_id": number, "file_name": f"photos/{number}.jpg"})


@pytest.mark.parametrize("num_threads", [1, 4])
def test_images_are_kept_in_the_order_they_came_whatever_takes_longest(num_threads):
    first, second = Slow(), Slow()
    with EvaluationThreads({"a": [first], "b": [second]}, num_threads=num_threads) as threads:
        for number in range(20):
            threads.process(ground_truth(number), {"a": number, "b": -number})
    assert first.kept == [(number, number) for number in range(20)]
    assert second.kept == [(number, -number) for number in range(20)]
    assert first.most <= num_threads


def test_no_more_images_wait_than_may():
    evaluator, started, release = Slow(), [], threading.Event()
    evaluator.measure = lambda ground_truth, output: (started.append(ground_truth.image_id), release.wait(5))
    with EvaluationThreads({"": [evaluator]}, num_threads=1, num_waiting=2) as threads:
        for number in range(2):
            threads.process(ground_truth(number), {"": None})
        third = threading.Thread(target=threads.process, args=(ground_truth(2), {"": None}), daemon=True)
        evaluator.keep = lambda *_: None
        third.start()
        third.join(0.1)
        assert third.is_alive() and started == [0]
        release.set()
        third.join(5)
        assert not third.is_alive()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("photos/3.jpg: no map"), InputError, r"^photos/3\.jpg: no map$"),
        (InputError("too large"), InputError, r"^image 3 \(photos/3\.jpg\): too large$"),
        (FileNotFoundError("image 3: no file"), FileNotFoundError, "^image 3: no file$"),
        (ValueError("shapes"), RuntimeError, "^image 3 .* could not be evaluated: ValueError: shapes$"),
        (KeyError("area"), RuntimeError, r"^image 3 \(photos/3\.jpg\) could not be evaluated: KeyError: 'area'$"),
    ],
)
def test_a_failure_names_the_image_and_stops_everything(error, kind, message):
    evaluator = Slow()
    with pytest.raises(kind, match=message), EvaluationThreads({"": [evaluator]}, num_threads=2) as threads:
        for number in range(50):
            threads.process(ground_truth(number), {"": error if number == 3 else None})
    assert [number for number, _ in evaluator.kept] == [0, 1, 2]
    assert not any(thread.name.startswith("evaluation") for thread in threading.enumerate())


def test_a_failure_is_told_with_the_next_image_not_when_the_queue_is_full():
    evaluator, second_begun = Slow(), threading.Event()

    def measure(ground_truth, output):
        if ground_truth.image_id == 0:
            raise InputError("bad")
        second_begun.set()

    evaluator.measure = measure
    options = {"num_threads": 1, "num_waiting": 99}
    with pytest.raises(ValueError, match="image 0"), EvaluationThreads({"": [evaluator]}, **options) as threads:
        for number in range(2):
            threads.process(ground_truth(number), {"": None})
        second_begun.wait(5)
        threads.process(ground_truth(2), {"": None})
        pytest.fail("told too late")


def test_a_failure_elsewhere_ends_the_threads_without_looking_at_what_waits():
    evaluator, begun = Slow(), []
    evaluator.measure = lambda ground_truth, output: (begun.append(ground_truth.image_id), time.sleep(0.05))
    options = {"num_threads": 1, "num_waiting": 99}
    with pytest.raises(KeyboardInterrupt), EvaluationThreads({"": [evaluator]}, **options) as threads:
        for number in range(20):
            threads.process(ground_truth(number), {"": None})
        raise KeyboardInterrupt
    assert len(begun) < 5 and evaluator.kept == []
    assert not any(thread.name.startswith("evaluation") for thread in threading.enumerate())
