"""Every key with its default and meaning, and by its mark what it affects (see marks.py).

Keys and defaults are those of detectron2, DeepLab's additions, Mask2Former and FC-CLIP as far as the published files
touch them (`CfgNode`s merge a released YAML unchanged), followed by our own keys, whose defaults are the published
behaviour.
"""

from __future__ import annotations

from fvcore.common.config import CfgNode

from fcclip.config.marks import (
    Keys,
    changes_meaning,
    changes_model,
    changes_prediction,
    changes_shapes,
    changes_training,
    chooses_clip,
    chooses_clip_weights,
    harmless,
    without_effect,
)

frozen_backbone = without_effect("the backbone is the frozen CLIP")
of_deeplab = without_effect("of DeepLab")
unread = without_effect("published key that nothing reads")


# Groups and keys of detectron2's other models, which its dumped configs hold, and of the training of OVRCOAT.
OTHER_MODELS = (
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", "GLOBAL",
    "MODEL.ANCHOR_GENERATOR", "MODEL.FPN", "MODEL.PANOPTIC_FPN", "MODEL.PROPOSAL_GENERATOR", "MODEL.RESNETS",
    "MODEL.RETINANET", "MODEL.ROI_BOX_CASCADE_HEAD", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_HEADS", "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.OVRCOAT", "MODEL.ROI_MASK_HEAD", "MODEL.RPN", "MODEL.SWIN", "TEST.KEYPOINT_OKS_SIGMAS", "VIS_PERIOD",
)  # fmt: skip


def get_cfg() -> CfgNode:
    """A fresh tree of all keys at their defaults."""
    return all_keys().tree()


def all_keys() -> Keys:
    """Every key with its default and its mark."""
    cfg = Keys()
    cfg.VERSION = 2  # version of the key names; 2 is the only one read
    cfg.OUTPUT_DIR = harmless("./output")  # where a run writes
    cfg.SEED = -1  # negative: drawn at random and logged; else the rank is added to it
    cfg.CUDNN_BENCHMARK = harmless(False)  # let cuDNN time its algorithms at the start of training
    cfg.FLOAT32_PRECISION = ""  # "", "highest", "high" or "medium": torch.set_float32_matmul_precision
    cfg.DETERMINISTIC = harmless(False)  # operations without a deterministic form raise
    cfg.WANDB = Keys(harmless)
    cfg.WANDB.PROJECT = ""  # record the training at Weights & Biases too; "": no
    cfg.WANDB.NAME = ""  # of the run; "": theirs
    cfg.WANDB.ENTITY = ""  # team or user; "": the user's own
    cfg.MODEL = _model()
    cfg.DATASETS = Keys()
    # Names, or paths of YAML files that describe data sets (GETTING_STARTED, Your own data).
    cfg.DATASETS.TRAIN = ()  # the first one's vocabulary is the training vocabulary, also at evaluation
    cfg.DATASETS.TEST = harmless(())  # each is evaluated with its own vocabulary
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = unread(())
    cfg.DATASETS.PROPOSAL_FILES_TEST = unread(())
    cfg.DATALOADER = _dataloader()
    cfg.INPUT = _input()
    cfg.SOLVER = _solver()
    cfg.FINETUNE = _finetune()
    cfg.TEST = _test()
    return cfg


def _model() -> Keys:
    model = Keys(changes_model)
    model.DEVICE = harmless("auto")  # auto: the first of cuda, mps, cpu; or a torch device
    model.META_ARCHITECTURE = "GeneralizedRCNN"  # FCCLIP or FrozenSeg in every published file
    model.WEIGHTS = harmless("")  # checkpoint; "" starts from freshly initialised heads
    # In the order of INPUT.FORMAT, 0..255; published files set CLIP's.
    model.PIXEL_MEAN = changes_meaning([103.53, 116.28, 123.675])
    model.PIXEL_STD = changes_meaning([1.0, 1.0, 1.0])
    model.MASK_ON = unread(False)
    model.KEYPOINT_ON = unread(False)
    model.LOAD_PROPOSALS = unread(False)
    model.MSDA_ENGINE = harmless("auto")  # of multi-scale deformable attention; the variable FCCLIP_MSDA overrides
    # Parts for torch.compile, with commas: backbone, pixel_decoder, mask_decoder, classifier; or all
    model.COMPILE = harmless("")

    model.BACKBONE = Keys()
    model.BACKBONE.NAME = "build_resnet_backbone"  # CLIP in every published file
    model.BACKBONE.FREEZE_AT = frozen_backbone(2)

    model.RESNETS = _resnets()
    model.FC_CLIP = _fc_clip()  # published files of FrozenSeg call it MODEL.FROZEN_SEG
    model.FUSIONER = _fusioner()
    adapter = model.MASK_ADAPTER = Keys()
    adapter.NUM_CHANNELS = changes_shapes(768)
    adapter.MASK_IN_CHANNELS = changes_shapes(16)
    adapter.NUM_OUTPUT_MAPS = changes_shapes(16)  # attention maps a mask
    adapter.MASK_THRESHOLD = changes_prediction(0.5)  # probability; 0.40 and 0.45 on MAFT+ L and B
    adapter.QUERY_CHUNK = harmless(32)  # masks looked at at once, for memory
    adapter.TRAIN = changes_training("")  # it alone: warmup, with true masks; then mixed, with predicted ones too
    adapter.USE_CHECKPOINT = without_effect("activations are few with QUERY_CHUNK")(False)
    model.SAM_NAME = changes_meaning("vit_b")  # of FrozenSeg: vit_b, vit_l, vit_h, or a JSON (backbones/sam.py)
    # Of SAM: a file, or the folder with Meta's; "" for random weights, or where MODEL.WEIGHTS hold SAM too.
    model.SAM_WEIGHTS = harmless("pretrained_checkpoint")
    model.SAM_RESIZE = changes_meaning("squash")  # images become squares: squash (published) | pad, which keeps aspect
    # Keeps what SAM sees of evaluated images, rounded to half precision, 2 MiB each; "": nothing.
    model.SAM_CACHE_DIR = changes_prediction("")
    model.SEM_SEG_HEAD = _sem_seg_head()
    model.MASK_FORMER = _mask_former()
    model.SWIN = _swin()
    return model


def _resnets() -> Keys:
    resnets = Keys(frozen_backbone)  # of the bases; FC-CLIP's backbone is CLIP
    resnets.DEPTH = 50
    resnets.STEM_TYPE = "deeplab"
    resnets.STEM_OUT_CHANNELS = 64
    resnets.STRIDE_IN_1X1 = False
    resnets.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    resnets.RES4_DILATION = 1
    resnets.RES5_DILATION = 1
    resnets.RES5_MULTI_GRID = [1, 2, 4]
    resnets.NUM_GROUPS = 1
    resnets.WIDTH_PER_GROUP = 64
    resnets.NORM = "FrozenBN"
    resnets.RES2_OUT_CHANNELS = 256
    return resnets


def _fc_clip() -> Keys:
    fc_clip = Keys()
    fc_clip.CLIP_MODEL_NAME = chooses_clip("convnext_large_d_320")  # of open_clip, or the path of an open_clip JSON
    # open_clip tag, a local file, or "" for random weights
    fc_clip.CLIP_PRETRAINED_WEIGHTS = chooses_clip_weights("laion2b_s29b_b131k_ft_soup")
    fc_clip.EMBED_DIM = changes_shapes(768)  # width of the joint image-text space; must be the CLIP's
    fc_clip.GEOMETRIC_ENSEMBLE_ALPHA = changes_prediction(0.4)  # share of the out-of-vocabulary part, seen classes
    fc_clip.GEOMETRIC_ENSEMBLE_BETA = changes_prediction(0.8)  # the same, unseen classes
    # Void trust (docs/beyond.md): where the frozen CLIP is sure of a class, void loses up to this share. 0: FC-CLIP.
    fc_clip.CLIP_TRUST_WEIGHT = changes_prediction(0.0)
    fc_clip.CLIP_TRUST_SCOPE = changes_prediction("unseen")  # where the best class is unseen; all (published, OVRCOAT)
    fc_clip.CLIP_TRUST_HEADS = changes_prediction(("panoptic",))  # outputs: panoptic, semantic, instances
    # mask_pool, masked_attention_pool, mask_adapter (MODEL.MASK_ADAPTER); "": as published for the CLIP
    fc_clip.OUT_OF_VOCABULARY_CLASSIFIER = changes_prediction("")
    # MAFT+: panoptic or semantic, as the weights were trained; "": as MASK_FORMER.TEST.PANOPTIC_ON is (published)
    fc_clip.CDT_FORM = changes_meaning("")
    fc_clip.ENSEMBLE_ON_VALID_MASK = changes_prediction(False)  # not for queries whose mask is empty at stride 32
    # Folder of published vocabulary files; "": $DETECTRON2_DATASETS/vocabularies, else ours.
    fc_clip.VOCABULARIES = harmless("")
    fc_clip.TEXT_CACHE_DIR = harmless("")  # text features on disk; "": the user's cache folder
    fc_clip.QUICK_GELU = chooses_clip("auto")  # auto | on | off: activation of the CLIP; auto: on for OpenAI weights
    return fc_clip


def _fusioner() -> Keys:
    fusioner = Keys()  # the vision encoder is MODEL.BACKBONE.NAME: CLIP, that of FC_CLIP, or timm
    fusioner.TIMM_MODEL = changes_shapes("vit_base_patch16_224")  # a vision transformer
    fusioner.TIMM_WEIGHTS = harmless("dino")  # tag of timm, a local file, or "" for random weights
    fusioner.TEXT_ENCODER = changes_meaning("CLIP")  # that of FC_CLIP; or BERT (extra bert)
    fusioner.BERT = harmless("")  # its folder: config.json, vocab.txt, weights
    fusioner.TEMPLATES = changes_meaning("fusioner")  # prompts of a class name: fusioner (32) or vild (14)
    fusioner.WIDTH = changes_shapes(512)  # of fusion and decoder
    fusioner.LAYERS = changes_shapes(12)  # of the fusion
    fusioner.HEADS = changes_meaning(8)
    fusioner.DROPOUT = changes_training(0.0)
    fusioner.DROP_PATH_RATE = changes_training(0.0)  # stochastic depth of the last layer
    fusioner.TEMPERATURE = changes_meaning(0.07)  # that divides cosines
    # Predictions look at windows of this side, pixels; 0: at the whole image, position embeddings resized.
    fusioner.WINDOW = changes_prediction(0)
    fusioner.WINDOW_BORDER = changes_prediction("shift")  # the last window ends with the image; or pad (published)
    return fusioner


def _sem_seg_head() -> Keys:
    head = Keys()
    head.NAME = "SemSegFPNHead"  # FCCLIPHead or FrozenSegHead in every published file
    head.IN_FEATURES = changes_meaning(["p2", "p3", "p4", "p5"])  # backbone levels given to the pixel decoder
    head.IGNORE_VALUE = 255  # label of pixels without a class
    head.NUM_CLASSES = 54  # training classes: size of the class loss; logits follow the vocabulary
    head.CONVS_DIM = changes_shapes(128)  # width of the pixel decoder
    head.MASK_DIM = 256  # channels of the mask features; must equal MASK_FORMER.HIDDEN_DIM
    head.COMMON_STRIDE = 4  # stride of the mask features
    head.NORM = "GN"  # norm of the top-down convolutions: GN, or "" for none
    head.LOSS_WEIGHT = unread(1.0)
    head.PIXEL_DECODER_NAME = "BasePixelDecoder"  # MSDeformAttnPixelDecoder in every published file
    head.TRANSFORMER_ENC_LAYERS = changes_shapes(0)  # deformable encoder layers
    head.TRANSFORMER_ENC_DIM_FEEDFORWARD = 1024  # hidden width of those layers; fixed in the published code
    head.USE_CHECKPOINT = harmless(False)  # encoder layers are computed again for the gradient: less memory, more time
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = changes_meaning(["res3", "res4", "res5"])
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4  # must be 4, the number that is built
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = without_effect("the heads are MODEL.MASK_FORMER.NHEADS")(8)
    head.LOSS_TYPE = of_deeplab("hard_pixel_mining")
    head.PROJECT_FEATURES = of_deeplab(["res2"])
    head.PROJECT_CHANNELS = of_deeplab([48])
    head.ASPP_CHANNELS = of_deeplab(256)
    head.ASPP_DILATIONS = of_deeplab([6, 12, 18])
    head.ASPP_DROPOUT = of_deeplab(0.1)
    head.USE_DEPTHWISE_SEPARABLE_CONV = of_deeplab(False)
    return head


def _mask_former() -> Keys:
    former = Keys()
    former.DEEP_SUPERVISION = True  # losses after every decoder layer
    former.NO_OBJECT_WEIGHT = 0.1  # weight of void in the class loss
    former.CLASS_WEIGHT = 1.0  # weight of the class loss, and of the class cost in matching
    former.MASK_WEIGHT = 20.0  # the same for the per-pixel mask loss
    former.DICE_WEIGHT = 1.0  # the same for the dice loss
    former.NHEADS = changes_meaning(8)  # heads of decoder attention and of deformable attention
    former.DROPOUT = 0.1  # of the deformable encoder; the decoder has none
    former.DIM_FEEDFORWARD = changes_shapes(2048)  # of the decoder; the deformable encoder has its own
    former.ENC_LAYERS = without_effect("the encoder's depth is MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS")(0)
    former.DEC_LAYERS = changes_shapes(6)  # decoder layers that are built, plus one for the start queries
    former.PRE_NORM = changes_meaning(False)  # normalise before attention instead of after it
    former.HIDDEN_DIM = changes_shapes(256)  # width of the decoder
    former.NUM_OBJECT_QUERIES = changes_shapes(100)  # masks proposed per image, before any filtering
    former.TRANSFORMER_IN_FEATURE = "res5"  # multi_scale_pixel_decoder in every published file; nothing else is built
    former.ENFORCE_INPUT_PROJ = False  # 1x1 projections in the decoder even where the widths agree
    former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    # Network input is padded to a multiple of it; negative: only to the largest of the batch.
    former.SIZE_DIVISIBILITY = changes_meaning(32)
    former.TRAIN_NUM_POINTS = 12544  # points sampled per mask, in matching and in the mask losses
    former.OVERSAMPLE_RATIO = 3.0  # candidates drawn per point
    former.IMPORTANCE_SAMPLE_RATIO = 0.75  # share of points that are the most uncertain candidates
    # Level of the decoder, 0..2 coarse to fine, after whose layers queries take what SAM sees in their masks; 3: none.
    former.SAM_QUERY_FUSE_LAYER = changes_meaning(2)
    former.SAM_FEATURE_FUSE_LAYER = changes_shapes(0)  # level whose memory looks at SAM's features; 3: none
    former.TEST = Keys(changes_prediction)
    former.TEST.SEMANTIC_ON = True
    former.TEST.INSTANCE_ON = False
    former.TEST.PANOPTIC_ON = False
    former.TEST.RECALL_ON = False  # also the recall of masks, whatever they are called
    former.TEST.OBJECT_MASK_THRESHOLD = 0.0  # panoptic: queries must score more
    former.TEST.OVERLAP_THRESHOLD = 0.0  # panoptic: share of a mask that must stay visible
    # Resize mask logits, not class scores; implied by the other two heads.
    former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False
    return former


def _swin() -> Keys:
    swin = Keys(without_effect("there is no Swin backbone"))  # accepted so that third-party files merge
    swin.PRETRAIN_IMG_SIZE = 224
    swin.PATCH_SIZE = 4
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    swin.MLP_RATIO = 4.0
    swin.QKV_BIAS = True
    swin.QK_SCALE = None
    swin.DROP_RATE = 0.0
    swin.ATTN_DROP_RATE = 0.0
    swin.DROP_PATH_RATE = 0.3
    swin.APE = False
    swin.PATCH_NORM = True
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    swin.USE_CHECKPOINT = False
    return swin


def _dataloader() -> Keys:
    loader = Keys()
    loader.NUM_WORKERS = harmless(4)  # processes per rank; 0 loads in the training process
    # Leave out images whose `annotations` are all crowd; panoptic records have no annotations.
    loader.FILTER_EMPTY_ANNOTATIONS = True
    loader.ASPECT_RATIO_GROUPING = True  # batches of wide or of tall images
    loader.SAMPLER_TRAIN = "TrainingSampler"  # or RepeatFactorTrainingSampler, which shows rare classes more often
    loader.REPEAT_THRESHOLD = 0.0
    loader.REPEAT_SQRT = True
    return loader


def _input() -> Keys:
    inputs = Keys()
    inputs.FORMAT = changes_meaning("BGR")  # channel order of the images given to the model
    # How a record becomes a training sample: coco_panoptic_lsj, coco_instance_lsj, mask_former_semantic,
    # mask_former_panoptic, mask_former_instance or fusioner_pairs.
    inputs.DATASET_MAPPER_NAME = "mask_former_semantic"
    inputs.IMAGE_SIZE = 1024  # large-scale jitter: side of the square canvas, pixels
    inputs.MIN_SCALE = 0.1  # large-scale jitter: smallest scale
    inputs.MAX_SCALE = 2.0  # large-scale jitter: largest scale
    inputs.RANDOM_FLIP = "horizontal"  # or none
    inputs.MIN_SIZE_TEST = changes_prediction(800)  # evaluation: shorter side, pixels; 0 keeps the size
    inputs.MAX_SIZE_TEST = changes_prediction(1333)  # evaluation: limit of the longer side
    inputs.SQUARE_TEST = changes_prediction(0)  # evaluation: squash images to a square of this side; 0: do not
    inputs.MIN_SIZE_TRAIN = (800,)  # mask_former_* mappers
    inputs.MAX_SIZE_TRAIN = 1333
    inputs.MIN_SIZE_TRAIN_SAMPLING = "choice"
    inputs.COLOR_AUG_SSD = False
    inputs.SIZE_DIVISIBILITY = -1  # mask_former_* mappers: side of the padded square (a target size, not a divisor)
    inputs.MASK_FORMAT = without_effect("polygons and run-length codes are told by what they are")("polygon")
    inputs.PAIRS = Keys()  # fusioner_pairs; images become squares of IMAGE_SIZE
    inputs.PAIRS.AUG_PROB = 0.5  # probability of a crop of random size, and of colours, noise, flip and warps
    inputs.PAIRS.SCALE_RANGE = [0.5, 1.0]  # share of the image that such a crop has
    inputs.PAIRS.JITTER = 0.5  # of colours; published for COCO 0.2
    inputs.PAIRS.ROTATE = 20.0  # degrees; published for COCO 10
    inputs.PAIRS.BORDER = "ignore"  # label of pixels that a warp brings in; or background (published)
    inputs.CROP = Keys()
    inputs.CROP.ENABLED = False
    inputs.CROP.TYPE = "relative_range"
    inputs.CROP.SIZE = [0.9, 0.9]
    inputs.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    return inputs


def _solver() -> Keys:
    solver = Keys()
    solver.OPTIMIZER = "ADAMW"  # or SGD
    solver.IMS_PER_BATCH = 16  # images per step over all processes
    solver.BASE_LR = 0.001
    solver.MOMENTUM = 0.9  # SGD only
    solver.NESTEROV = without_effect("published SGD is built without it")(False)
    solver.WEIGHT_DECAY = 0.0001
    solver.WEIGHT_DECAY_END = -1.0  # Fusioner: the decay of matrices goes there along a cosine; negative: constant
    solver.WEIGHT_DECAY_NORM = 0.0  # of norm layers
    solver.WEIGHT_DECAY_EMBED = 0.0  # of nn.Embedding
    solver.WEIGHT_DECAY_BIAS = without_effect("biases decay like weights")(None)
    solver.BIAS_LR_FACTOR = without_effect("biases learn like weights")(1.0)
    solver.BACKBONE_MULTIPLIER = without_effect("no trainable parameter belongs to the backbone")(0.1)
    solver.DECODER_LR = 0.001  # Fusioner: constant rate of its decoder
    solver.LR_SCHEDULER_NAME = "WarmupMultiStepLR"  # or WarmupPolyLR, WarmupCosineLR; FusionerLR
    solver.MAX_ITER = 40000
    solver.STEPS = (30000,)  # iterations at which the learning rate is multiplied by GAMMA
    solver.GAMMA = 0.1
    solver.WARMUP_FACTOR = 0.001  # first learning rate as a share of BASE_LR
    solver.WARMUP_ITERS = 1000
    solver.WARMUP_METHOD = "linear"  # or constant
    solver.RESCALE_INTERVAL = False
    solver.BASE_LR_END = 0.0  # cosine only
    solver.NUM_DECAYS = 3
    solver.POLY_LR_POWER = 0.9
    solver.POLY_LR_CONSTANT_ENDING = 0.0
    solver.CHECKPOINT_PERIOD = harmless(5000)
    solver.CHECKPOINT_KEEP = harmless(3)  # newest periodic checkpoints kept
    solver.CHECKPOINT_FULL = harmless(False)  # store the frozen CLIP too
    solver.REFERENCE_WORLD_SIZE = 0  # processes that batch and learning rate were chosen for; 0: no scaling
    solver.ACCUMULATE = 1  # micro-batches that a step is cut into; same result, less memory
    solver.CE_NORM = "rank"  # class loss divided by the weights of the rank (published), or "global"
    # A loss or gradient that is not finite: raise | skip:N, leave out up to N steps in a row.
    solver.NON_FINITE = harmless("raise")
    solver.CLIP_GRADIENTS = Keys()
    solver.CLIP_GRADIENTS.ENABLED = False
    solver.CLIP_GRADIENTS.CLIP_TYPE = "value"  # or norm, per parameter; or full_model, one norm over all parameters
    solver.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    solver.CLIP_GRADIENTS.NORM_TYPE = 2.0  # of CLIP_TYPE norm; full_model always takes 2
    solver.AMP = Keys()
    solver.AMP.ENABLED = False  # mixed precision in training, where the device has it
    solver.AMP.DTYPE = "float16"  # or bfloat16
    solver.BEST = Keys(harmless)
    solver.BEST.DATASET = ""  # data set that chooses best.pth; "": no best.pth is kept
    solver.BEST.METRIC = "panoptic_seg/PQ"
    return solver


def _finetune() -> Keys:
    tuning = Keys()
    # What a training that starts from weights of FC-CLIP (MODEL.WEIGHTS) does against forgetting: "", nothing, and it
    # compares nothing (published) | plain, nothing, but results before and after are compared | replay, shows former
    # images too | distill, keeps what the start says of the same images and the former classes.
    tuning.METHOD = ""
    tuning.VOCABULARY = ""  # former classes: a data set or a vocabulary file; "": as the checkpoint says
    tuning.REPLAY_DATASETS = ()  # replay: former training sets; each image is trained with the classes of its own set
    tuning.REPLAY_SHARE = 0.5  # replay: share of the images of each batch that is theirs, 0 up to less than 1
    tuning.REPLAY_MAPPER = ""  # replay: INPUT.DATASET_MAPPER_NAME for them; "": the same
    tuning.DISTILL_WEIGHT = 1.0  # distill: factor of the losses towards the start, beside the ordinary ones
    return tuning


def _test() -> Keys:
    test = Keys(harmless)
    test.EVAL_PERIOD = 0  # iterations between evaluations while training; 0: only at the end
    test.DETECTIONS_PER_IMAGE = changes_prediction(100)  # (query, class) pairs kept as instances
    test.EXPECTED_RESULTS = []  # [[task, metric, expected, tolerance], ...], checked after evaluation
    test.MODE = "ensemble"  # or in_vocabulary (alpha = beta = 0), out_of_vocabulary (alpha = beta = 1)
    test.BATCH_SIZE = 1
    # FrozenSeg: automatic masks of SAM raise unseen classes in semantic maps (the OpenSeg ensemble). They lie in
    # SAM_MASKS_DIR/PKL_SAM_MODEL_NAME, one file an image (tools/precompute_sam_masks.py).
    test.USE_SAM_MASKS = changes_prediction(False)
    test.SAM_MASK_PRED_ALPHA = changes_prediction(0.2)  # their share in the scores of unseen classes
    test.SAM_MASKS_DIR = changes_prediction("output/SAM_masks_pred")
    test.PKL_SAM_MODEL_NAME = changes_prediction("vit_h")
    test.BOUNDARY_IOU = False  # of each class, beside mIoU
    test.AMP = Keys(changes_prediction)
    # The network pass in mixed precision, on CUDA and CPUs that multiply bfloat16: approximate (docs/performance.md).
    test.AMP.ENABLED = False
    test.AMP.DTYPE = "bfloat16"  # or float16, on CUDA
    test.AUG = Keys()
    test.AUG.ENABLED = False  # --eval-only: a second evaluation, semantic maps averaged over variants of each image
    test.AUG.MIN_SIZES = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)  # shorter sides of the resized input, pixels
    test.AUG.MAX_SIZE = 4000  # limit of the longer side
    test.AUG.FLIP = True  # each size mirrored too
    test.PRECISE_BN = Keys(without_effect("no batch norm is trained"))
    test.PRECISE_BN.ENABLED = False
    test.PRECISE_BN.NUM_ITER = 200
    return test
