"""Multi-scale deformable attention: one operator in two forms, one dispatcher, its engines; and outputs on a CPU.

ms_deform_attn.py   ms_deform_attn (locations and weights) and ms_deform_attn_fused (offsets and logits of the network)
library.py          torch.ops.fcclip.*: the operator for compilers, autograd and autocast; every check of its inputs
engines.py          ENGINES, select_engine: which engine runs
torch_engine.py     plain PyTorch, the truth that every other engine is tested against
cpp_engine.py       C++ for the CPU, from csrc/ms_deform_attn_cpu.cpp
output_maps.py      what outputs are made of, in C++ (csrc/output_maps_cpu.cpp) where that engine is built
cuda_engine.py      CUDA, from csrc/ms_deform_attn.cu
gather_engine.py    plain PyTorch without grid_sample, for exports to runtimes that have none
triton_engine.py    Triton, for GPUs without nvcc; its kernels are in triton_kernels.py
availability.py     Availability: whether an engine can run on a device
builder.py          builds compiled engines into the user's cache folder and loads them
build.py            `python -m fcclip.ops.build`

An engine is a module and one line in `ENGINES` (and its place in `AUTO`). It has

    DEVICES: tuple[str, ...]                          # kinds of devices it computes on; () means any
    available(device) -> Availability                 # builds nothing, is cheap, does not raise
    forward(fused, value, shapes, points, weights) -> output
    backward(fused, grad_output, value, shapes, points, weights) -> (grad_value, grad_points, grad_weights)
    EXTENSION: Extension                              # only where something must be compiled

where `fused` says whether points and weights are offsets and logits, or locations and weights. It gets, checked by
library.py: `shapes` as pairs of Python ints, tensors of the shapes that `ms_deform_attn` names, of one of the four
float types, on one device, contiguous, without empty dimensions and without autograd. It returns fresh tensors of the
dtype of `value`. What all engines share, so that they can be exchanged:

- pixel x = location_x * W - 0.5; fused: (i + 0.5) / W_own * W - 0.5 + offset_x for column i of the query's own level.
- A sample counts when -1 <= x < W and -1 <= y < H. Corners outside the level are 0; at whole pixels the derivative is
  that to the right. This is grid_sample; the published kernel has -1 < x, which differs in one subgradient alone.
- A location that is not finite contributes 0 and gets gradients of 0, as in the published kernel (grid_sample does the
  same on GPUs and gives NaN on CPUs). It hides no network that diverges: a logit that is NaN reaches the output through
  the samples whose locations are finite. Of a query whose offsets and logits are all NaN, torch and triton
  give NaN and the compiled engines 0; in the network that query is NaN by itself, which the output is added to.
- Half types are computed in fp32 (coordinates, softmax, sums) and rounded once, fp64 in fp64, fp32 in full fp32.
"""

from fcclip.ops.engines import ENGINES, build_advice, select_engine
from fcclip.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ENGINES", "build_advice", "ms_deform_attn", "ms_deform_attn_fused", "select_engine"]
