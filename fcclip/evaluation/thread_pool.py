"""Evaluation while the network runs: threads look at the images, results are kept in the order of the images."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fcclip.errors import InputError, is_users
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth


class EvaluationThreads:
    """Hands images to evaluators in threads.

    Decoding, counting and encoding happen in the threads and mostly without Python's global lock, so that the next
    forward pass does not wait. What comes of them is kept by the calling thread, image after image in the order
    they came, so the numbers do not depend on timing.

    Args:
        evaluators: mode -> the evaluators of its outputs.
        num_threads: how many images are looked at at once.
        num_waiting: how many may be under way while the network works on the next; their outputs stay in memory.

    Example:
        with EvaluationThreads(evaluators) as threads:
            for record, outputs in ...:
                threads.process(GroundTruth(record), outputs)
    """

    def __init__(
        self, evaluators: Mapping[str, Sequence[Evaluator]], *, num_threads: int | None = None, num_waiting: int = 2
    ) -> None:
        num_threads = min(2, os.cpu_count() or 1) if num_threads is None else num_threads
        self.evaluators = evaluators
        self.num_waiting = num_waiting
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="evaluation")
        self._waiting: deque[tuple[GroundTruth, Future]] = deque()

    def process(self, ground_truth: GroundTruth, outputs: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes in mode -> the model's output for one image; waits while too many are under way.

        Raises:
            UserError, OSError: what the evaluators refuse in this image or in one before it, which is named.
            RuntimeError: any other failure there.
        """
        self._waiting.append((ground_truth, self._pool.submit(self._measure, ground_truth, outputs)))
        while self._waiting and (len(self._waiting) > self.num_waiting or self._waiting[0][1].done()):
            self._keep_first()

    def finish(self) -> None:
        """Waits for every image; raises as `process` does."""
        while self._waiting:
            self._keep_first()

    def __enter__(self) -> EvaluationThreads:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if error_type is None:
                self.finish()
        finally:
            self._waiting.clear()
            self._pool.shutdown(cancel_futures=True)

    def _measure(
        self, ground_truth: GroundTruth, outputs: Mapping[str, Mapping[str, Any]]
    ) -> list[tuple[Evaluator, Any]]:
        return [
            (evaluator, evaluator.measure(ground_truth, outputs[mode]))
            for mode, group in self.evaluators.items()
            for evaluator in group
        ]

    def _keep_first(self) -> None:
        ground_truth, future = self._waiting.popleft()
        try:
            for evaluator, measured in future.result():
                evaluator.keep(ground_truth.image_id, measured)
        except Exception as error:
            where, message = f"image {ground_truth.image_id!r} ({ground_truth.file_name})", str(error)
            if not is_users(error):
                raise RuntimeError(f"{where} could not be evaluated: {type(error).__name__}: {message}") from error
            files = [str(value) for key, value in ground_truth.record.items() if key.endswith("file_name")]
            if any(name in message for name in (repr(ground_truth.image_id), *files)):
                raise
            raise InputError(f"{where}: {message}") from error
