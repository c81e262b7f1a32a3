// As much of CUDA as csrc/ms_deform_attn.cu uses, on the CPU: for tests of its arithmetic and of its barriers.
//
// The blocks of a grid run one after the other. The threads of a block are fibres: each runs until it reaches a barrier
// or a shuffle, then the next one of its warp does, and each warp runs until it waits for the others. The order of
// threads and of warps is set with `fcclip_cpu_order`: a barrier that is missing shows as numbers that depend on it. A
// barrier that not all threads reach is an error.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) int4 {
  int x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

int fcclip_cpu_error = 0;  // what the next launch fails with
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
                                                  : "made up for a test";
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int kSharedBytes = 64 << 10;
int4 fcclip_shared_memory[kSharedBytes / sizeof(int4)];

namespace fcclip_cpu {

constexpr int kMaxThreads = 1024, kStackBytes = 64 << 10;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fibre {
  ucontext_t start;
  jmp_buf where;  // it waits; unlike swapcontext, jumps need no call of the system
  std::unique_ptr<char[]> stack;
  bool started, done;
};

inline Fibre fibres[kMaxThreads];
inline jmp_buf scheduler;
inline int current, order_seed = 0;
inline bool progress;
inline void (*body)(void*);
inline void* arguments;
inline Barrier of_block;
struct OfWarp {
  unsigned mask;
  Barrier barrier;
};
inline std::vector<OfWarp> of_warps[kMaxThreads / 32];
inline uint64_t exchanged[kMaxThreads];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the CPU: %s\n", what);
  std::abort();
}

inline void yield() {
  if (!_setjmp(fibres[current].where)) _longjmp(scheduler, 1);
}

inline void resume(Fibre& fibre) {
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.where, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
  progress = true;
}

inline Barrier& warp_barrier(unsigned mask) {
  auto& known = of_warps[current / 32];
  if (!(mask >> current % 32 & 1)) fail("a thread waits for others that do not wait for it");
  for (auto& one : known)
    if (one.mask == mask) return one.barrier;
  known.reserve(64);  // references stay valid
  if (known.size() == 64) fail("more masks than expected");
  known.push_back({mask, {}});
  return known.back().barrier;
}

inline void run_fibre() {
  body(arguments);
  fibres[current].done = true;
  progress = true;
  yield();
}

// Every thread of every block through `function(argument)`.
inline void run(dim3 grid, dim3 block, void (*function)(void*), void* argument) {
  const int threads = static_cast<int>(block.x);
  if (threads > kMaxThreads) fail("a block has at most 1024 threads");
  body = function;
  arguments = argument;
  gridDim = grid;
  blockDim = block;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  std::vector<int> warps(threads / 32);  // whole ones, which can be shuffled
  for (int i = 0; i < threads / 32; ++i) warps[i] = i;
  std::mt19937 random(order_seed);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      if (order_seed == 1) std::reverse(order.begin(), order.end());
      if (order_seed > 1 && threads % 32 == 0) {
        std::shuffle(warps.begin(), warps.end(), random);
        for (int i = 0; i < threads; ++i) order[i] = 32 * warps[i / 32] + i % 32;
        for (int i = 0; i < threads; i += 32) std::shuffle(order.begin() + i, order.begin() + i + 32, random);
      }
      std::memset(static_cast<void*>(fcclip_shared_memory), 0xFF, kSharedBytes);  // NaN, or -1
      of_block = {};
      for (auto& one : of_warps) one.clear();
      for (int i = 0; i < threads; ++i) {
        Fibre& fibre = fibres[i];
        if (!fibre.stack) fibre.stack.reset(new char[kStackBytes]);
        fibre.started = fibre.done = false;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get();
        fibre.start.uc_stack.ss_size = kStackBytes;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, run_fibre, 0);
      }
      for (int left = threads; left > 0;) {
        bool any = false;
        for (int first = 0; first < threads; first += 32) {
          do {
            progress = false;
            for (int i = first; i < std::min(first + 32, threads); ++i) {
              if (fibres[order[i]].done) continue;
              current = order[i];
              threadIdx = dim3(static_cast<unsigned>(current), 0, 0);
              resume(fibres[current]);
              left -= fibres[current].done;
            }
            any |= progress;
          } while (progress);
        }
        if (!any) fail("some threads wait at a barrier that others never reach");
      }
    }
}

}  // namespace fcclip_cpu

inline void __syncthreads() { fcclip_cpu::wait(fcclip_cpu::of_block, blockDim.x); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  fcclip_cpu::wait(fcclip_cpu::warp_barrier(mask), static_cast<unsigned>(__builtin_popcount(mask)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int me = fcclip_cpu::current;
  std::memcpy(&fcclip_cpu::exchanged[me], &x, sizeof x);
  __syncwarp(mask);
  std::memcpy(&x, &fcclip_cpu::exchanged[me ^ distance], sizeof x);
  __syncwarp(mask);
  return x;
}

inline int64_t fcclip_cpu_additions = 0;  // to numbers that are not counters

template <typename T>
T atomicAdd(T* at, T x) {
  fcclip_cpu_additions += std::is_floating_point<T>::value;
  const T before = *at;
  *at += x;
  return before;
}
inline int atomicCAS(int* at, int expected, int x) {
  const int before = *at;
  if (before == expected) *at = x;
  return before;
}
inline int atomicExch(int* at, int x) {
  const int before = *at;
  *at = x;
  return before;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (fcclip_cpu_error) return static_cast<cudaError_t>(fcclip_cpu_error);
  if (config->dynamicSmemBytes > (48 << 10)) return cudaErrorInvalidValue;
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  fcclip_cpu::run(config->gridDim, config->blockDim, [](void* it) { (*static_cast<decltype(call)*>(it))(); }, &call);
  return cudaSuccess;
}

extern "C" {
// 0: in their order; 1: reversed with every second block; more: shuffled anew for every block.
inline __attribute__((used)) void fcclip_cpu_order(int seed) { fcclip_cpu::order_seed = seed; }
inline __attribute__((used)) int64_t fcclip_cpu_take_additions() {
  const int64_t additions = fcclip_cpu_additions;
  fcclip_cpu_additions = 0;
  return additions;
}
inline __attribute__((used)) void fcclip_cpu_fail(int error) { fcclip_cpu_error = error; }
}
