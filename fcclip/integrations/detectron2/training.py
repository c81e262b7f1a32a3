"""detectron2's DefaultTrainer for fcclip's models: mapper, optimiser, schedule, checkpoints and evaluators."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from fcclip.config import with_values
from fcclip.data import EVALUATORS
from fcclip.engine import amp_dtype, build_gradient_clipping, build_lr_scheduler, build_optimizer, check_training
from fcclip.engine.optimizer import trainable_parameters
from fcclip.errors import InputError
from fcclip.evaluation.evaluators import enabled_tasks
from fcclip.files import read_json
from fcclip.integrations.detectron2.catalog import DatasetMapper, catalog_vocabulary
from fcclip.integrations.detectron2.checkpoint import Checkpointer
from fcclip.integrations.detectron2.config import check_config, check_unread
from fcclip.vocabulary import Vocabulary
from fcclip.weights import unnamed_parts, unwrap, vocabulary_note

# Keys of fcclip's own training and evaluation that detectron2's loops do not know.
UNREAD = (
    "SOLVER.ACCUMULATE",
    "SOLVER.NON_FINITE",
    "SOLVER.BEST.METRIC",
    "WANDB.PROJECT",
    "DETERMINISTIC",
    "TEST.BATCH_SIZE",
    "FINETUNE.METHOD",
)


class Trainer(DefaultTrainer):
    """detectron2's trainer for fcclip's models.

    Losses, schedule, optimiser and clipping are those of `fcclip.engine`; the loop, hooks, writers and evaluators are
    detectron2's.

    Raises:
        ValueError: training sets whose classes differ or are not NUM_CLASSES many, or a key that detectron2's loop
            would ignore.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_config(cfg)
        check_unread(cfg, UNREAD, "detectron2's training loop does not know it (fcclip's train_net.py does)")
        check_training(cfg, _training_vocabulary(cfg), world_size=comm.get_world_size())
        dtype = amp_dtype(cfg, torch.device(cfg.MODEL.DEVICE))
        if cfg.SOLVER.AMP.ENABLED and dtype is None:  # detectron2 would stop at the first step
            cfg = with_values(cfg, {"SOLVER.AMP.ENABLED": False})
        super().__init__(cfg)
        if isinstance(self._trainer, AMPTrainer):
            self._trainer.precision = dtype

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks around fcclip's checkpointer, which keeps SOLVER.CHECKPOINT_KEEP files."""
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            full=self.cfg.SOLVER.CHECKPOINT_FULL or bool(unnamed_parts(unwrap(self.model), self.cfg)),
            notes={
                "config": self.cfg.dump(),
                "vocabulary": vocabulary_note(unwrap(self.model).train_vocabulary),  # a fine-tuning asks for it
            },
            trainer=weakref.proxy(self),
        )
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = self.cfg.SOLVER.CHECKPOINT_KEEP or None
        return built

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's; a training knows the classes of DATASETS.TRAIN alone, also where its weights were fine-tuned
        from others."""
        super().resume_or_load(resume)
        model = unwrap(self.model)
        model.seen_vocabulary = model.train_vocabulary

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Endless batches of the mapper that INPUT.DATASET_MAPPER_NAME names."""
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """One image a batch; no ground truth is opened."""
        return build_detection_test_loader(cfg, dataset_name, mapper=DatasetMapper(cfg, is_train=False))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """fcclip's optimiser; each step clips the gradients first, as SOLVER.CLIP_GRADIENTS says."""
        optimizer = build_optimizer(cfg, model)
        clip = build_gradient_clipping(cfg)

        def clip_gradients(stepping: torch.optim.Optimizer, *_: Any) -> None:
            clip(trainable_parameters(stepping))

        optimizer.register_step_pre_hook(clip_gradients)
        # A loss scaler hands scaled gradients to an optimiser that says it can divide them itself: clipping needs the
        # true ones, so the scaler has to divide before the step.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """fcclip's schedules, which include WarmupPolyLR."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """See `build_evaluator` of this module."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> Mapping[str, Any]:
        """detectron2's evaluation of each data set of DATASETS.TEST, each with its own vocabulary.

        Returns:
            task -> metric -> value of the only data set; of several, these by data set name.
        """
        names, results = cfg.DATASETS.TEST, {}
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise InputError(f"{len(evaluators)} evaluators for the {len(names)} data sets of DATASETS.TEST")
        own = unwrap(model)
        vocabulary = own.test_vocabulary
        try:
            for index, name in enumerate(names):
                own.set_metadata(MetadataCatalog.get(name))
                own_cfg = with_values(cfg, {"DATASETS.TEST": (name,)})
                results[name] = super().test(own_cfg, model, evaluators and evaluators[index : index + 1])
        finally:
            own.test_vocabulary = vocabulary
        return next(iter(results.values())) if len(results) == 1 else results


class InstanceSegEvaluator(COCOEvaluator):
    """COCO average precision where things are any of the classes, not the first ones (ADE20K has them interleaved).

    The published name; arguments as of detectron2's `COCOEvaluator`, which insists on thing indices 0..n-1 and on a
    file whose categories are just the things. Here it may lack things, whose AP is then left out, and have others.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset_name, *args, **kwargs)
        things = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if things is None:
            raise InputError(
                f"data set '{dataset_name}' has no thing_dataset_id_to_contiguous_id in its metadata, so nothing says "
                "what the category ids of its instances file are"
            )
        names = self._metadata.get("stuff_classes") or self._metadata.thing_classes
        self._rank = {index: rank for rank, index in enumerate(sorted(things.values()))}
        self._metadata = Metadata(
            name=dataset_name,
            json_file=self._metadata.json_file,
            thing_dataset_id_to_contiguous_id={key: self._rank[index] for key, index in things.items()},
            # the protocol sorts by dataset id
            thing_classes=[names[things[key]] for key in sorted(self._coco_api.getCatIds()) if key in things],
        )
        content = self._coco_api.dataset
        content["categories"] = [category for category in content["categories"] if category["id"] in things]

    def process(self, inputs: Sequence[Mapping], outputs: Sequence[Mapping]) -> None:
        """Takes in the instances of a batch.

        Raises:
            ValueError: an instance of a class that is not a thing of the data set.
        """
        super().process(inputs, [{**output, "instances": self._ranked(output["instances"])} for output in outputs])

    def _ranked(self, instances: Instances) -> Instances:
        classes = instances.pred_classes
        stuff = sorted(set(classes.tolist()) - self._rank.keys())
        if stuff:
            raise InputError(f"instances of the classes {stuff}, which are not things of '{self._metadata.name}'")
        ranks = torch.tensor([self._rank[index] for index in classes.tolist()], dtype=torch.int64)
        fields = {**instances.get_fields(), "pred_classes": ranks.to(classes.device)}
        return Instances(instances.image_size, **fields)


def _training_vocabulary(cfg: CfgNode) -> Vocabulary:
    """The vocabulary of all data sets of DATASETS.TRAIN, whose labels mean the same classes."""
    folder = cfg.MODEL.FC_CLIP.VOCABULARIES
    vocabularies = {name: catalog_vocabulary(name, folder=folder) for name in cfg.DATASETS.TRAIN}
    if not vocabularies:
        raise InputError("DATASETS.TRAIN is empty; its first data set decides the training classes")
    if len({vocabulary.synonyms for vocabulary in vocabularies.values()}) > 1:
        sizes = {name: len(vocabulary) for name, vocabulary in vocabularies.items()}
        raise InputError(
            f"the data sets of DATASETS.TRAIN have different classes, so a label would mean several (number of "
            f"classes: {sizes}). Train on data sets with the same classes in the same order."
        )
    return vocabularies[cfg.DATASETS.TRAIN[0]]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """detectron2's evaluators for a kind of data set, as far as MODEL.MASK_FORMER.TEST asks for them.

    Args:
        cfg: says which heads are on.
        dataset_name: of detectron2's catalog.
        output_folder: for files; None: OUTPUT_DIR/inference/<data set>.

    Raises:
        ValueError: a kind that there is no evaluator for, no head on that it is evaluated for, missing ground truth.
    """
    check_config(cfg)
    metadata = MetadataCatalog.get(dataset_name)
    kind = getattr(metadata, "evaluator_type", None)
    if kind is None:
        raise InputError(
            f"data set '{dataset_name}' has no evaluator_type in its metadata, so nothing says how to evaluate it. Set "
            f'MetadataCatalog.get("{dataset_name}").evaluator_type to one of {", ".join(EVALUATORS)}, or pass '
            "evaluators to Trainer.test."
        )
    folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)
    tasks = enabled_tasks(cfg, dataset_name, kind)
    if kind == "cityscapes_panoptic_seg" and tasks != ["panoptic"]:
        raise InputError(
            f"'{dataset_name}': the Cityscapes evaluators of detectron2 import a package that is internal to Meta "
            "(since December 2024) and cannot run. Set MODEL.MASK_FORMER.TEST.SEMANTIC_ON and INSTANCE_ON False to "
            "evaluate panoptic quality alone."
        )
    builders = {"panoptic": _panoptic, "instance": _instance, "semantic": _semantic}
    evaluators = [builders[task](dataset_name, metadata, folder) for task in tasks]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _semantic(name: str, metadata: Metadata, folder: str) -> DatasetEvaluator:
    if getattr(metadata, "sem_seg_root", "") is None:
        raise InputError(
            f"data set '{name}' has no semantic label maps, and detectron2's evaluator paints none from its segments "
            "(fcclip.evaluation does); set MODEL.MASK_FORMER.TEST.SEMANTIC_ON False"
        )
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


def _panoptic(name: str, metadata: Metadata, folder: str) -> DatasetEvaluator:
    try:
        import panopticapi  # noqa: F401 (detectron2 needs it once every image has been computed)
    except ModuleNotFoundError as error:
        raise InputError(
            f"detectron2 needs panopticapi for the panoptic quality of '{name}': pip install "
            "git+https://github.com/cocodataset/panopticapi.git, or turn MODEL.MASK_FORMER.TEST.PANOPTIC_ON off. "
            "fcclip.evaluation computes the same numbers without it."
        ) from error
    path = getattr(metadata, "panoptic_json", None)
    if getattr(metadata, "yaml_file", None) and Path(path).is_file():  # fcclip reads what is a thing from the YAML
        categories = read_json(path).get("categories", ())
        unsaid = [category["name"] for category in categories if "isthing" not in category]
        if unsaid:
            raise InputError(
                f"{path}: {len(unsaid)} of {len(categories)} categories do not say 'isthing' (e.g. '{unsaid[0]}'), "
                f"which panopticapi needs for the panoptic quality of '{name}'. Add it, or evaluate with fcclip's "
                "train_net.py --eval-only."
            )
    return COCOPanopticEvaluator(name, folder)


def _instance(name: str, metadata: Metadata, folder: str) -> DatasetEvaluator:
    if getattr(metadata, "json_file", "") is None:
        raise InputError(
            f"data set '{name}' has no instances file, so AP cannot be evaluated; set "
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
        )
    evaluator = LVISEvaluator if metadata.evaluator_type == "lvis" else InstanceSegEvaluator
    return evaluator(name, output_dir=folder)
