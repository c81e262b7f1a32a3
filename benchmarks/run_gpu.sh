#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under ten minutes on one H200: the engines of deformable attention are
# built and tested, then come the benchmarks and the other tests that skip without a GPU. Results are to be committed
# from the folder $OUT (default: benchmarks); each file is written when its part ends, the most wanted first, so that a
# call that is cut off leaves those. A part that fails or takes longer than its seconds does not stop the next; when all
# seconds are used up, the rest is left out. The call then ends with status 1 and names what failed.
#
#   benchmarks/run_gpu.sh            PYTHON=python3.12 chooses the interpreter, whose packages must be installed
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
convnext=configs/coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml
whole=590 # seconds
failed=()

# part NAME SECONDS COMMAND...
part() {
    local name=$1 seconds=$2 began=$SECONDS status=0
    shift 2
    echo "== $name"
    if ((whole - SECONDS < 5)); then
        failed+=("$name (no time left)")
        return
    fi
    ((seconds < whole - SECONDS)) || seconds=$((whole - SECONDS))
    timeout --kill-after=10 "$seconds" "$@" || status=$?
    ((status == 0)) || failed+=("$name (status $status)")
    echo "== $name: status $status after $((SECONDS - began)) s"
}

gpu=$("$python" - <<'PYTHON'
import torch

print(torch.cuda.get_device_name().lower().replace(" ", "_").replace("/", "_"))
PYTHON
) || exit 1
ops=("$python" tools/benchmark.py ops --device cuda)
inference=("$python" tools/benchmark.py inference --device cuda --models ConvNeXt-L --size 1024 1024 --kept 160 --rounds 5)
step=("$python" tools/benchmark.py training-step --config-file "$convnext" --size 1024)
gpu_tests=("$python" -m pytest -m gpu)

part "build" 120 "$python" -m fcclip.ops.build cuda
part "tests of the CUDA engine" 150 "${gpu_tests[@]}" tests/ops -k "not triton"
part "operator, the goal" 120 "${ops[@]}" --sizes 1024x1024 --batch 2 --output "$out/ops_${gpu}_1024_batch_2.json"
part "inference beside the published steps, fp32" 75 "${inference[@]}" --memory \
    --output "$out/inference_${gpu}_convnext_l.json"
part "training beside the published steps, fp16" 75 "$python" tools/benchmark.py train --device cuda --models ConvNeXt-L \
    --size 1024 --segments 12 --rounds 5 --memory --output "$out/training_${gpu}_convnext_l.json"
part "inference, ours in bf16 and compiled" 200 "${inference[@]}" --memory \
    --output "$out/inference_${gpu}_convnext_l_bf16_compiled.json" TEST.AMP.ENABLED True MODEL.COMPILE all
part "training step, fp16" 60 "${step[@]}" --batch 2 8 --output "$out/training_step_${gpu}_float16.json" \
    MODEL.DEVICE cuda SOLVER.AMP.DTYPE float16
part "other tests" 120 "${gpu_tests[@]}" tests --ignore tests/ops
part "operator, all sizes" 120 "${ops[@]}" --rounds 5 --output "$out/ops_${gpu}.json"
part "tests of the Triton engine" 90 "${gpu_tests[@]}" tests/ops/test_on_gpu.py -k triton
part "training step, bf16" 60 "${step[@]}" --batch 2 8 --output "$out/training_step_${gpu}_bfloat16.json" \
    MODEL.DEVICE cuda SOLVER.AMP.DTYPE bfloat16
part "training step, batch 16" 60 "${step[@]}" --batch 16 --steps 5 \
    --output "$out/training_step_${gpu}_batch_16.json" MODEL.DEVICE cuda

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
