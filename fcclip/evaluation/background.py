"""Evaluation while the network runs: threads look at the pictures, results are kept in the order of the pictures."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fcclip.evaluation.pictures import Evaluator, Picture

_FOR_THE_USER = (ValueError, OSError)  # keep their kind; everything else is a fault of ours or of the machine


class Background:
    """Hands pictures to evaluators in threads.

    Decoding, counting and encoding happen in the threads and mostly without Python's global lock, so that the next
    forward pass does not wait. What comes of them is kept by the calling thread, picture after picture in the order
    they came, so the numbers do not depend on timing.

    Args:
        evaluators: mode -> the evaluators of its outputs.
        num_threads: how many pictures are looked at at once.
        num_waiting: how many may be under way while the network works on the next; their outputs stay in memory.

    Example:
        with Background(evaluators) as background:
            for record, outputs in ...:
                background.process(Picture(record), outputs)
    """

    def __init__(
        self, evaluators: Mapping[str, Sequence[Evaluator]], *, num_threads: int | None = None, num_waiting: int = 2
    ) -> None:
        num_threads = min(2, os.cpu_count() or 1) if num_threads is None else num_threads
        if num_threads < 1 or num_waiting < 1:
            raise ValueError(f"num_threads and num_waiting must be 1 or more, got {num_threads} and {num_waiting}")
        self.evaluators = evaluators
        self.num_waiting = num_waiting
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="evaluation")
        self._waiting: deque[tuple[Picture, Future]] = deque()

    def process(self, picture: Picture, outputs: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes in mode -> the model's output for one picture; waits while too many are under way.

        Raises:
            ValueError, OSError: what the evaluators refuse in this picture or in one before it, which is named.
            RuntimeError: any other failure there.
        """
        self._waiting.append((picture, self._pool.submit(self._measure, picture, outputs)))
        while self._waiting and (len(self._waiting) > self.num_waiting or self._waiting[0][1].done()):
            self._keep_first()

    def finish(self) -> None:
        """Waits for every picture; raises as `process` does."""
        while self._waiting:
            self._keep_first()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if error_type is None:
                self.finish()
        finally:
            self._waiting.clear()
            self._pool.shutdown(cancel_futures=True)

    def _measure(self, picture: Picture, outputs: Mapping[str, Mapping[str, Any]]) -> list[tuple[Evaluator, Any]]:
        return [
            (evaluator, evaluator.measure(picture, outputs[mode]))
            for mode, group in self.evaluators.items()
            for evaluator in group
        ]

    def _keep_first(self) -> None:
        picture, future = self._waiting.popleft()
        try:
            for evaluator, measured in future.result():
                evaluator.keep(picture.image_id, measured)
        except Exception as error:
            message = str(error)
            named = repr(picture.image_id) in message or any(
                str(value) in message for key, value in picture.record.items() if key.endswith("file_name")
            )
            if isinstance(error, _FOR_THE_USER) and named:
                raise
            where = f"picture {picture.image_id!r} ({picture.file_name})"
            if isinstance(error, ValueError):
                raise ValueError(f"{where}: {message}") from error
            raise RuntimeError(f"{where} could not be evaluated: {type(error).__name__}: {message}") from error
