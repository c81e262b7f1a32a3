// Multi-scale deformable attention as the published CUDA operator parallelises it (Deformable DETR): the peer that
// fcclip/ops/csrc/ms_deform_attn.cu is measured against. Written from the description of what it does, not from it.
//
// Forward: one thread for each output number, which walks over all samples and computes place and coefficients of each
// by itself. Backward: one block of D threads for each query and head; four atomic additions for each sample and
// channel; the three other gradients of a sample are summed in shared memory, by thread 0 alone up to 32 channels.
//
// Half types, which the published operator does not have, are computed in fp32, with the gradient of the values fp32.
// Legend: B images, S cells of all levels, M heads, D channels of a head, N queries, L levels, P points.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

extern __shared__ int4 fcclip_shared_memory[];

namespace {

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void narrow(float x, float& result) { result = x; }
__device__ void narrow(double x, double& result) { result = x; }
__device__ void narrow(float x, __half& result) { result = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16& result) { result = __float2bfloat16_rn(x); }

template <typename T>
using Acc = typename std::conditional<std::is_same<T, double>::value, double, float>::type;

// What one thread knows of a sample and channel.
template <typename A>
struct Sampled {
  A corner[4];
  A share_x, share_y;  // of the right and of the lower corners
  int at[4];           // of the corners in `value`, -1 outside
};

template <typename T>
__device__ Sampled<Acc<T>> sample(const T* value, int height, int width, int cell_stride, int first, Acc<T> y,
                                  Acc<T> x) {
  using A = Acc<T>;
  Sampled<A> found;
  const int top = static_cast<int>(floor(y)), left = static_cast<int>(floor(x));
  found.share_x = x - left;
  found.share_y = y - top;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = top + i / 2, column = left + i % 2;
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    found.at[i] = inside ? first + (row * width + column) * cell_stride : -1;
    found.corner[i] = inside ? widen(value[found.at[i]]) : A(0);
  }
  return found;
}

template <typename T, typename C>
__global__ void forward(int count, const T* value, const int64_t* shapes, const int64_t* starts, const C* locations,
                        const C* weights, int S, int M, int D, int N, int L, int P, T* output) {
  using A = Acc<T>;
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const int c = index % D, m = index / D % M, b = index / D / M / N;
  int at = index / D * L * P;
  A sum = 0;
  for (int l = 0; l < L; ++l) {
    const int height = static_cast<int>(shapes[2 * l]), width = static_cast<int>(shapes[2 * l + 1]);
    const int first = ((b * S + static_cast<int>(starts[l])) * M + m) * D + c;
    for (int p = 0; p < P; ++p, ++at) {
      const A x = widen(locations[2 * at]) * width - A(0.5), y = widen(locations[2 * at + 1]) * height - A(0.5);
      if (y > -1 && x > -1 && y < height && x < width) {
        const Sampled<A> found = sample(value, height, width, M * D, first, y, x);
        const A high = 1 - found.share_y, left = 1 - found.share_x;
        sum += widen(weights[at]) *
               (high * left * found.corner[0] + high * found.share_x * found.corner[1] +
                found.share_y * left * found.corner[2] + found.share_y * found.share_x * found.corner[3]);
      }
    }
  }
  narrow(sum, output[index]);
}

template <typename T, typename C>
__global__ void backward(const T* grad_output, const T* value, const int64_t* shapes, const int64_t* starts,
                         const C* locations, const C* weights, int S, int M, int D, int N, int L, int P,
                         Acc<T>* grad_value, C* grad_locations, C* grad_weights) {
  using A = Acc<T>;
  A* of_x = reinterpret_cast<A*>(fcclip_shared_memory);
  A* of_y = of_x + D;
  A* of_weight = of_y + D;
  const int c = threadIdx.x, m = blockIdx.x % M, b = blockIdx.x / M / N;
  const A grad = widen(grad_output[blockIdx.x * D + c]);
  int at = blockIdx.x * L * P;
  for (int l = 0; l < L; ++l) {
    const int height = static_cast<int>(shapes[2 * l]), width = static_cast<int>(shapes[2 * l + 1]);
    const int first = ((b * S + static_cast<int>(starts[l])) * M + m) * D + c;
    for (int p = 0; p < P; ++p, ++at) {
      const A x = widen(locations[2 * at]) * width - A(0.5), y = widen(locations[2 * at + 1]) * height - A(0.5);
      of_x[c] = of_y[c] = of_weight[c] = 0;
      if (y > -1 && x > -1 && y < height && x < width) {
        const Sampled<A> found = sample(value, height, width, M * D, first, y, x);
        const A share[4] = {(1 - found.share_y) * (1 - found.share_x), (1 - found.share_y) * found.share_x,
                            found.share_y * (1 - found.share_x), found.share_y * found.share_x};
        const A weighted = grad * widen(weights[at]);
        A sampled = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (found.at[i] >= 0) atomicAdd(grad_value + found.at[i], share[i] * weighted);
          sampled += share[i] * found.corner[i];
        }
        const A above = found.corner[1] - found.corner[0], below = found.corner[3] - found.corner[2];
        const A left = found.corner[2] - found.corner[0], right = found.corner[3] - found.corner[1];
        of_x[c] = width * weighted * ((1 - found.share_y) * above + found.share_y * below);
        of_y[c] = height * weighted * ((1 - found.share_x) * left + found.share_x * right);
        of_weight[c] = grad * sampled;
      }
      __syncthreads();
      if (D < 64 && (D <= 32 || (D & (D - 1)) != 0)) {
        if (c == 0)
          for (int other = 1; other < D; ++other) {
            of_x[0] += of_x[other];
            of_y[0] += of_y[other];
            of_weight[0] += of_weight[other];
          }
      } else {
        for (int left = D; left > 1;) {
          const int half = (left + 1) / 2;
          if (c < left - half) {
            of_x[c] += of_x[c + half];
            of_y[c] += of_y[c + half];
            of_weight[c] += of_weight[c + half];
          }
          left = half;
          __syncthreads();
        }
      }
      if (c == 0) {
        narrow(of_x[0], grad_locations[2 * at]);
        narrow(of_y[0], grad_locations[2 * at + 1]);
        narrow(of_weight[0], grad_weights[at]);
      }
      __syncthreads();
    }
  }
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t left_behind = cudaGetLastError();
  return status != cudaSuccess ? status : left_behind;
}

// Calls `body` with null pointers of the types of values, and of locations and weights.
template <typename F>
int dispatch(int dtype, bool wide, const F& body) {
  float* fp32 = nullptr;
  double* fp64 = nullptr;
  __half* fp16 = nullptr;
  __nv_bfloat16* bf16 = nullptr;
  switch (dtype) {
    case 0: return body(fp32, fp32);
    case 1: return body(fp64, fp64);
    case 2: return wide ? body(fp16, fp32) : body(fp16, fp16);
    case 3: return wide ? body(bf16, fp32) : body(bf16, bf16);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

// sizes: B, S, M, D, N, L, P; shapes (L, 2) and starts (L) int64 in the memory of the GPU; dtype: 0 fp32, 1 fp64,
// 2 fp16, 3 bf16; grad_value fp32 for the half types, and if `wide` also locations, weights and their gradients.
// Everything that is written must be zeros. Return a cudaError_t.
extern "C" {

int32_t published_forward(int32_t dtype, int32_t wide, const int64_t* sizes, void* stream, const void* value,
                          const void* shapes, const void* starts, const void* locations, const void* weights,
                          void* output) {
  const int B = static_cast<int>(sizes[0]), S = static_cast<int>(sizes[1]), M = static_cast<int>(sizes[2]);
  const int D = static_cast<int>(sizes[3]), N = static_cast<int>(sizes[4]), L = static_cast<int>(sizes[5]);
  const int P = static_cast<int>(sizes[6]);
  const int count = B * N * M * D;
  return dispatch(dtype, wide != 0, [&](auto* of_values, auto* of_samples) {
    using T = typename std::remove_pointer<decltype(of_values)>::type;
    using C = typename std::remove_pointer<decltype(of_samples)>::type;
    return launch(forward<T, C>, (count + 1023) / 1024, 1024, 0, stream, count, static_cast<const T*>(value),
                  static_cast<const int64_t*>(shapes), static_cast<const int64_t*>(starts),
                  static_cast<const C*>(locations), static_cast<const C*>(weights), S, M, D, N, L, P,
                  static_cast<T*>(output));
  });
}

int32_t published_backward(int32_t dtype, int32_t wide, const int64_t* sizes, void* stream, const void* grad_output,
                           const void* value, const void* shapes, const void* starts, const void* locations,
                           const void* weights, void* grad_value, void* grad_locations, void* grad_weights) {
  const int B = static_cast<int>(sizes[0]), S = static_cast<int>(sizes[1]), M = static_cast<int>(sizes[2]);
  const int D = static_cast<int>(sizes[3]), N = static_cast<int>(sizes[4]), L = static_cast<int>(sizes[5]);
  const int P = static_cast<int>(sizes[6]);
  return dispatch(dtype, wide != 0, [&](auto* of_values, auto* of_samples) {
    using T = typename std::remove_pointer<decltype(of_values)>::type;
    using C = typename std::remove_pointer<decltype(of_samples)>::type;
    return launch(backward<T, C>, B * N * M, D, 3 * D * sizeof(Acc<T>), stream, static_cast<const T*>(grad_output),
                  static_cast<const T*>(value), static_cast<const int64_t*>(shapes),
                  static_cast<const int64_t*>(starts), static_cast<const C*>(locations),
                  static_cast<const C*>(weights), S, M, D, N, L, P, static_cast<Acc<T>*>(grad_value),
                  static_cast<C*>(grad_locations), static_cast<C*>(grad_weights));
  });
}

}  // extern "C"
