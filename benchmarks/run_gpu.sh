#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under ten minutes on one H200: the tests that skip without one, then the
# benchmarks, whose results are to be committed from the folder $OUT (default: benchmarks).
#
#   benchmarks/run_gpu.sh            PYTHON=python3.12 chooses the interpreter, whose packages must be installed
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
convnext=configs/coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml

gpu=$("$python" - <<'PYTHON'
import torch

print(torch.cuda.get_device_name().lower().replace(" ", "_").replace("/", "_"))
PYTHON
)
"$python" -m pytest -m gpu
for dtype in float16 bfloat16; do
    "$python" tools/benchmark.py training-step --config-file "$convnext" --batch 2 8 --size 1024 \
        --output "$out/training_step_${gpu}_$dtype.json" MODEL.DEVICE cuda SOLVER.AMP.DTYPE "$dtype"
done
"$python" tools/benchmark.py training-step --config-file "$convnext" --batch 16 --largest --size 1024 --steps 5 \
    --output "$out/training_step_${gpu}_largest.json" MODEL.DEVICE cuda
