"""One of several processes that resume an evaluation: FOLDER OUTPUT RANK WORLD_SIZE BEFORE. It is killed before its
image number BEFORE; rank 0 prints the results."""

import os
import signal
import sys
import time
from pathlib import Path

import tiny_world
import torch.distributed


class KilledModel(tiny_world.GreyModel):
    def __init__(self, before: int, lines: Path) -> None:
        super().__init__()
        self.before, self.lines = before, lines

    def score(self, inputs, vocabulary=None):
        if self.calls == self.before:
            for _ in range(200):  # until the background has written one of them
                if self.lines.is_file() and self.lines.stat().st_size:
                    break
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(inputs, vocabulary)


def main(folder: str, output: str, rank: str, world_size: str, before: str) -> None:
    processes = {"rank": int(rank), "world_size": int(world_size)}
    if processes["world_size"] > 1:
        rendezvous = f"file://{output}.rendezvous.{before}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, **processes)
    lines = Path(output, "tiny_val", "out_of_vocabulary", "predictions", f"images.{rank}.jsonl")
    results = tiny_world.evaluate(
        KilledModel(int(before), lines),
        tiny_world.config(),
        tiny_world.dataset(Path(folder)),
        modes=tiny_world.MODES,
        training_vocabulary=tiny_world.TRAINING,
        vocabulary=tiny_world.VOCABULARY,
        progress=False,
        output_dir=output,
        save_predictions=True,
        resume=True,
    )
    if results:
        print(repr(results))
    if processes["world_size"] > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
