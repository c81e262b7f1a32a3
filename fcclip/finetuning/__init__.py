"""Fine-tuning without forgetting. No other room imports it.

start.py         begin_finetuning: what a fine-tuning starts from and must not forget
replay.py        build_replay_loader: former images among the new ones
teacher.py       Teacher: the frozen start
distillation.py  DistillationLoss: the distance of a student's answers from the teacher's
extras.py        begin: all that a training script asks of a fine-tuning, as one value
comparison.py    Comparison: before and after, as a table and as finetune.json
"""

from fcclip.finetuning.comparison import Comparison, figures_of, format_comparison, grouped_figures
from fcclip.finetuning.distillation import DistillationLoss
from fcclip.finetuning.extras import BuildLoader, Extras, begin
from fcclip.finetuning.replay import build_replay_loader, replayed_images
from fcclip.finetuning.start import begin_finetuning, check_finetuning, replay_sets
from fcclip.finetuning.teacher import Teacher

__all__ = [
    "BuildLoader",
    "Comparison",
    "DistillationLoss",
    "Extras",
    "Teacher",
    "begin",
    "begin_finetuning",
    "build_replay_loader",
    "check_finetuning",
    "figures_of",
    "format_comparison",
    "grouped_figures",
    "replay_sets",
    "replayed_images",
]
