// Multi-scale deformable attention on NVIDIA GPUs: forward and backward, both forms, for fcclip/ops/cuda_engine.py.
//
// Nothing but a plain C interface leaves this file and nothing of torch enters it, so that no version of torch can
// break it. Python has checked every shape before, and brings all memory: nothing here allocates or waits, so that
// calls can be captured in CUDA graphs.
//
// Legend: B images, S cells of all levels, M heads, D channels of a head, N queries, L levels, P points,
//         K = L * P samples of a query and head; T type of the tensors, A type that is computed with, V channels that a
//         thread loads at once (16 bytes), G threads of a group.
//
// How the work is divided. A block takes one head and a tile of neighbouring queries, whose samples lie near each
// other: most of the values they need are in the first cache after the first of them. (Where queries are not the cells
// of the levels, a tile is a run of queries.) Within a block a group of G threads, part of one warp, takes one query:
// each thread owns V channels, so that a group reads a whole cell with one load of 16 bytes a thread. What depends on
// the sample alone (place, coefficients, softmax) is computed by one thread of the group and read by the others from
// shared memory. Cells are 32-bit numbers and the distance of two cells in bytes is one too: their widening product is
// one instruction and reaches all of a 64-bit memory, so that no size needs another kernel.
//
// The gradient of the values would need four atomic additions a sample and channel. Instead a block collects for each
// cell, four samples of all its queries at a time, the list of the queries that contribute to it (a hash table in
// shared memory whose entries are chained), adds them up in registers, and makes one addition a cell: 16 bytes at once
// where the GPU can (sm_90). Half types are added up in fp32 memory: sums of hundreds of terms that were rounded to
// eight bits after each would be wrong in the first digits. The deterministic mode has no atomics at all: Python sorts
// the samples by cell, and every cell then adds up its own in that order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifndef FCCLIP_ARCHITECTURES
#define FCCLIP_ARCHITECTURES ""
#endif
#ifndef FCCLIP_GRID_HEIGHT  // of CUDA; tests make it smaller
#define FCCLIP_GRID_HEIGHT 65535
#endif

extern __shared__ int4 fcclip_shared_memory[];

namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kMaxLevels = 64;
constexpr int kMaxThreads = 512;
constexpr int kTileQueries = 64;
constexpr int kStep = 4;                  // samples of a query that are in shared memory at once (backward)
constexpr int kCorners = 4 * kStep;       // of these samples
constexpr int kSlotsOfCorner = 2;         // slots of the hash table for each corner
constexpr int kMaxSharedBytes = 48 << 10;  // what every GPU gives without being asked

constexpr int kTooManySamples = -1;
constexpr int kUnknownType = -2;
constexpr int kTooManyBlocks = -3;

// ---- numbers ----

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float& result) { result = x; }
__device__ __forceinline__ void narrow(double x, double& result) { result = x; }
__device__ __forceinline__ void narrow(float x, __half& result) { result = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& result) { result = __float2bfloat16_rn(x); }

template <typename T>
struct Computed {
  using Type = float;
};
template <>
struct Computed<double> {
  using Type = double;
};
template <typename T>
using Acc = typename Computed<T>::Type;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T of[V];
};

template <int V, typename T>
__device__ __forceinline__ typename std::enable_if<V % 2 != 0 || !std::is_same<T, __nv_bfloat16>::value>::type load(
    const T* from, Acc<T> (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = widen(pack.of[i]);
}

// Two bf16 in 32 bits become fp32 with one instruction each.
template <int V>
__device__ __forceinline__ typename std::enable_if<V % 2 == 0>::type load(const __nv_bfloat16* from, float (&to)[V]) {
  const Pack<uint32_t, V / 2> pack = *reinterpret_cast<const Pack<uint32_t, V / 2>*>(from);
#pragma unroll
  for (int i = 0; i < V / 2; ++i) {
    to[2 * i] = __uint_as_float(pack.of[i] << 16);
    to[2 * i + 1] = __uint_as_float(pack.of[i] & 0xffff0000u);
  }
}

template <int V, typename T>
__device__ __forceinline__ void store(const Acc<T> (&from)[V], T* to) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(from[i], pack.of[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Adds to memory that other blocks add to, with as few instructions as the GPU knows.
template <int V, typename A>
__device__ __forceinline__ void add(A* to, const A (&sum)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) atomicAdd(to + i, sum[i]);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <>
__device__ __forceinline__ void add<2, float>(float* to, const float (&sum)[2]) {
  atomicAdd(reinterpret_cast<float2*>(to), make_float2(sum[0], sum[1]));
}
template <>
__device__ __forceinline__ void add<4, float>(float* to, const float (&sum)[4]) {
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(sum[0], sum[1], sum[2], sum[3]));
}
#endif

// ---- the problem ----

struct Level {
  int height, width;
  int first;         // its first cell
  int first_tile;    // of queries
  int tiles_across;  // of queries
};

struct Problem {
  int B, S, M, D, N, L, P, K;
  uint32_t cell_bytes;  // from a cell of `value` to the next
  int lanes;            // G
  int tile_width, tile_height;
  int tiles;
  bool fused;
  bool queries_are_cells;
  Level levels[kMaxLevels];
  Level run;  // of all queries, where they are not the cells
};

struct Query {
  int index;  // 0 for those that do not exist
  int level, x, y;
  bool exists;
};

__device__ __forceinline__ Query query_of(const Problem& p, int tile, int member) {
  int l = 0;
  if (p.queries_are_cells)
    while (l + 1 < p.L && tile >= p.levels[l + 1].first_tile) ++l;
  const Level& level = p.queries_are_cells ? p.levels[l] : p.run;
  const int tile_of_level = tile - level.first_tile;
  const int x = tile_of_level % level.tiles_across * p.tile_width + member % p.tile_width;
  const int y = tile_of_level / level.tiles_across * p.tile_height + member / p.tile_width;
  const bool exists = x < level.width && y < level.height;
  return {exists ? level.first + y * level.width + x : 0, l, x, y, exists};
}

// A sample as those need it who read or write values: -1 is a corner outside the level.
template <typename A>
struct alignas(16) Sample {
  int cell[4];
  A coefficient[4];  // with the attention weight
};

template <typename A>
struct Spot {
  bool counts;
  int left, top;
  A right_share, low_share;
};

template <typename A>
__device__ __forceinline__ Spot<A> locate(const Problem& p, const Query& query, const Level& level, A x, A y) {
  const A width = static_cast<A>(level.width), height = static_cast<A>(level.height);
  if (p.fused) {
    const Level& own = p.levels[query.level];
    x += (static_cast<A>(query.x) + A(0.5)) * width / static_cast<A>(own.width) - A(0.5);
    y += (static_cast<A>(query.y) + A(0.5)) * height / static_cast<A>(own.height) - A(0.5);
  } else {
    x = x * width - A(0.5);
    y = y * height - A(0.5);
  }
  // false for what is not finite, too
  if (!(x >= A(-1) && x < width && y >= A(-1) && y < height)) return {false, 0, 0, A(0), A(0)};
  const A left = floor(x), top = floor(y);
  return {true, static_cast<int>(left), static_cast<int>(top), x - left, y - top};
}

template <typename A>
__device__ __forceinline__ Sample<A> sample_at(const Level& level, const Spot<A>& spot, A weight) {
  Sample<A> sample;
  const bool left = spot.counts && spot.left >= 0, right = spot.counts && spot.left + 1 < level.width;
  const bool top = spot.top >= 0, low = spot.top + 1 < level.height;
  const int cell = level.first + spot.top * level.width + spot.left;
  sample.cell[0] = top && left ? cell : -1;
  sample.cell[1] = top && right ? cell + 1 : -1;
  sample.cell[2] = low && left ? cell + level.width : -1;
  sample.cell[3] = low && right ? cell + level.width + 1 : -1;
  const A high_part = weight * (A(1) - spot.low_share), low_part = weight * spot.low_share;
  sample.coefficient[0] = high_part * (A(1) - spot.right_share);
  sample.coefficient[1] = high_part * spot.right_share;
  sample.coefficient[2] = low_part * (A(1) - spot.right_share);
  sample.coefficient[3] = low_part * spot.right_share;
  return sample;
}

template <typename A>
__device__ __forceinline__ bool whole(const Sample<A>& sample) {
  return (sample.cell[0] | sample.cell[1] | sample.cell[2] | sample.cell[3]) >= 0;
}

// Memory of a cell, from that of cell 0.
template <typename T>
__device__ __forceinline__ const T* cell_of(const char* first, int cell, const Problem& p) {
  return reinterpret_cast<const T*>(first + static_cast<uint64_t>(static_cast<uint32_t>(cell)) * p.cell_bytes);
}

// ---- groups ----

template <typename A>
__device__ __forceinline__ A sum_of_group(A x, int G) {
#pragma unroll
  for (int distance = 1; distance < G; distance *= 2) x += __shfl_xor_sync(kWarp, x, distance);
  return x;
}

// Four sums over the group at once, each in every fourth thread: of d[lane % 4].
template <typename A>
__device__ __forceinline__ A four_sums_of_group(const A (&d)[4], int lane, int G) {
  const bool odd = lane & 1, upper = lane & 2;
  A first = odd ? d[1] : d[0], second = odd ? d[3] : d[2];
  first += __shfl_xor_sync(kWarp, odd ? d[0] : d[1], 1);
  second += __shfl_xor_sync(kWarp, odd ? d[2] : d[3], 1);
  A sum = upper ? second : first;
  sum += __shfl_xor_sync(kWarp, upper ? first : second, 2);
#pragma unroll
  for (int distance = 4; distance < G; distance *= 2) sum += __shfl_xor_sync(kWarp, sum, distance);
  return sum;
}

// How the logits of a query and head become weights.
template <typename A>
struct Softmax {
  A highest, share;

  template <typename T>
  __device__ __forceinline__ A weight(T logit) const {
    return exponential(widen(logit) - highest) * share;
  }
};

template <typename T>
__device__ __forceinline__ Softmax<Acc<T>> softmax_of_group(const T* logits, int K, int lane, int G) {
  using A = Acc<T>;
  A highest = widen(logits[0]);
#pragma unroll
  for (int k = lane; k < K; k += G) {
    const A logit = widen(logits[k]);
    highest = logit > highest ? logit : highest;
  }
#pragma unroll
  for (int distance = 1; distance < G; distance *= 2) {
    const A other = __shfl_xor_sync(kWarp, highest, distance);
    highest = other > highest ? other : highest;
  }
  A total = 0;
#pragma unroll
  for (int k = lane; k < K; k += G) total += exponential(widen(logits[k]) - highest);
  return {highest, A(1) / sum_of_group(total, G)};
}

// Numbers that are known to the compiler in the common case and 0 otherwise.
template <int kLanes, int kLevels, int kPoints>
struct Sizes {
  int G, P, K;

  __device__ __forceinline__ explicit Sizes(const Problem& p)
      : G(kLanes ? kLanes : p.lanes), P(kPoints ? kPoints : p.P), K(kPoints ? kLevels * kPoints : p.K) {}
};

template <typename A>
__host__ __device__ constexpr int samples_bytes(int samples) {
  return samples * static_cast<int>(sizeof(Sample<A>)) + 16;  // 16: groups shall not meet in the same banks
}

// ---- forward ----

template <typename T, int V, int kLanes, int kLevels, int kPoints>
__global__ void __launch_bounds__(kMaxThreads, 2) msda_forward(const __grid_constant__ Problem p,
                                                            const T* __restrict__ value, const T* __restrict__ points,
                                                            const T* __restrict__ weights, T* __restrict__ output) {
  using A = Acc<T>;
  const Sizes<kLanes, kLevels, kPoints> sizes(p);
  const int G = sizes.G, P = sizes.P, K = sizes.K;
  const int lane = threadIdx.x % G, group = threadIdx.x / G;
  auto* samples = reinterpret_cast<Sample<A>*>(reinterpret_cast<char*>(fcclip_shared_memory) +
                                               group * samples_bytes<A>(G));
  const int m = blockIdx.x % p.M;
  const Query query = query_of(p, blockIdx.x / p.M, group);
  for (int b = blockIdx.y; b < p.B; b += gridDim.y) {
    const int64_t row = (static_cast<int64_t>(b) * p.N + query.index) * p.M + m;
    const T* point = points + row * K * 2;
    const T* weight = weights + row * K;
    const Softmax<A> softmax = p.fused ? softmax_of_group(weight, K, lane, G) : Softmax<A>{};
    const T* head = value + (static_cast<int64_t>(b) * p.S * p.M + m) * p.D;
    for (int first_channel = 0; first_channel < p.D; first_channel += G * V) {  // once, unless D is large
      const int channel = first_channel + lane * V;
      const bool works = query.exists && channel < p.D;
      const char* channels = reinterpret_cast<const char*>(head + (works ? channel : 0));
      A sum[V];
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = 0;
#pragma unroll 1
      for (int first = 0; first < K; first += G) {
        const int k = first + lane;
        if (k < K) {
          const Level& level = p.levels[k / P];
          Spot<A> spot = locate(p, query, level, widen(point[2 * k]), widen(point[2 * k + 1]));
          samples[lane] = sample_at(level, spot, p.fused ? softmax.weight(weight[k]) : widen(weight[k]));
        }
        __syncwarp();
        const int count = K - first < G ? K - first : G;
        if (works) {
#pragma unroll 2
          for (int s = 0; s < count; ++s) {
            const Sample<A> sample = samples[s];
            if (whole(sample)) {
              A corner[4][V];
#pragma unroll
              for (int i = 0; i < 4; ++i) load<V>(cell_of<T>(channels, sample.cell[i], p), corner[i]);
#pragma unroll
              for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] += sample.coefficient[i] * corner[i][v];
            } else {
#pragma unroll 1
              for (int i = 0; i < 4; ++i) {  // from shared memory: registers cannot be counted through
                const int cell = samples[s].cell[i];
                if (cell < 0) continue;
                const A coefficient = samples[s].coefficient[i];
                A corner[V];
                load<V>(cell_of<T>(channels, cell, p), corner);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] += coefficient * corner[v];
              }
            }
          }
        }
        __syncwarp();
      }
      if (works) store<V>(sum, output + row * p.D + channel);
    }
  }
}

// ---- backward ----

// What a block has in shared memory. Corner e of the table belongs to query e / kCorners of the block.
template <typename A>
struct Shared {
  Sample<A>* samples;  // kStep of each query, padded
  A* dots;             // (queries, kStep, 4): gradient of the output times the value of each corner
  A* grad_weights;     // (queries, K)
  A* coefficients;     // (queries * kCorners)
  int* cells;          // hash table: cell of a slot, -1 for an empty one
  int* heads;          // its first corner, -1 for none
  int* rows;           // (queries): index of each query
  int* counts;         // 2: slots in use in this step, and in the next one
  short* next;         // (queries * kCorners): the next corner of the same cell, -1 for none
  short* used;         // slots in use, in no order

  __host__ __device__ static int bytes(int queries, int K) {
    const int corners = queries * kCorners;
    return queries * (samples_bytes<A>(kStep) + kCorners * static_cast<int>(sizeof(A))) +
           (queries * K + corners) * static_cast<int>(sizeof(A)) +
           (2 * kSlotsOfCorner * corners + queries + 2) * static_cast<int>(sizeof(int)) +
           2 * corners * static_cast<int>(sizeof(short));
  }

  __device__ __forceinline__ Shared(int queries, int K) {
    const int corners = queries * kCorners;
    char* at = reinterpret_cast<char*>(fcclip_shared_memory);
    samples = reinterpret_cast<Sample<A>*>(at);
    dots = reinterpret_cast<A*>(at + queries * samples_bytes<A>(kStep));
    coefficients = dots + corners;
    grad_weights = coefficients + corners;
    cells = reinterpret_cast<int*>(grad_weights + queries * K);
    heads = cells + kSlotsOfCorner * corners;
    rows = heads + kSlotsOfCorner * corners;
    counts = rows + queries;
    next = reinterpret_cast<short*>(counts + 2);
    used = next + corners;
  }
};

template <typename A>
__device__ __forceinline__ void chain(const Shared<A>& shared, int* count, unsigned slots, int corner, int cell,
                                      A coefficient) {
  shared.coefficients[corner] = coefficient;
  // Fibonacci hashing: the upper bits of a product with 2^32 / golden ratio spread neighbouring cells
  unsigned slot = (static_cast<unsigned>(cell) * 2654435769u >> 16) * slots >> 16;
  while (true) {
    const int found = atomicCAS(shared.cells + slot, -1, cell);
    if (found == -1) shared.used[atomicAdd(count, 1)] = static_cast<short>(slot);
    if (found == -1 || found == cell) break;
    slot = (slot + 1) & (slots - 1);
  }
  shared.next[corner] = static_cast<short>(atomicExch(shared.heads + slot, corner));
}

template <typename T, int V, int kLanes, int kLevels, int kPoints>
__global__ void __launch_bounds__(kMaxThreads, 2)
    msda_backward(const __grid_constant__ Problem p, const T* __restrict__ grad_output, const T* __restrict__ value,
                  const T* __restrict__ points, const T* __restrict__ weights, Acc<T>* __restrict__ grad_value,
                  T* __restrict__ grad_points, T* __restrict__ grad_weights) {
  using A = Acc<T>;
  constexpr int kAdded = V < 4 ? V : 4;
  const Sizes<kLanes, kLevels, kPoints> sizes(p);
  const int G = sizes.G, P = sizes.P, K = sizes.K;
  const int lane = threadIdx.x % G, group = threadIdx.x / G, groups = blockDim.x / G;
  const int slots = kSlotsOfCorner * kCorners * groups;
  const Shared<A> shared(groups, K);
  auto* samples = reinterpret_cast<Sample<A>*>(reinterpret_cast<char*>(shared.samples) +
                                               group * samples_bytes<A>(kStep));
  const unsigned my_group = (G == 32 ? kWarp : (1u << G) - 1) << (threadIdx.x % 32 / G * G);
  const int m = blockIdx.x % p.M;
  const Query query = query_of(p, blockIdx.x / p.M, group);
  if (lane == 0) shared.rows[group] = query.index;
  for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
    shared.cells[slot] = -1;
    shared.heads[slot] = -1;
  }
  if (threadIdx.x < 2) shared.counts[threadIdx.x] = 0;
  __syncthreads();
  int step = 0;
  for (int b = blockIdx.y; b < p.B; b += gridDim.y) {
    const int64_t row = (static_cast<int64_t>(b) * p.N + query.index) * p.M + m;
    const T* point = points + row * K * 2;
    const T* weight = weights + row * K;
    const T* grads = grad_output + row * p.D;
    const Softmax<A> softmax = p.fused ? softmax_of_group(weight, K, lane, G) : Softmax<A>{};
    const int64_t head = (static_cast<int64_t>(b) * p.S * p.M + m) * p.D;
    A grad[V];  // of the channels of this thread; where D is large, of the last that it loaded
    if (kLanes) load<V>(grads + lane * V, grad);
    A weighted = 0;  // sum over this thread's samples of weight times gradient of the weight
#pragma unroll 1
    for (int first = 0; first < K; first += kStep, ++step) {
      // places and coefficients: threads 0 to 3 of the group
      const int k = first + lane;
      const bool owns = lane < kStep && k < K && query.exists;
      const Level& level = p.levels[owns ? k / P : 0];
      Spot<A> spot = {false, 0, 0, A(0), A(0)};
      A attention = 0;
      if (owns) {
        spot = locate(p, query, level, widen(point[2 * k]), widen(point[2 * k + 1]));
        attention = p.fused ? softmax.weight(weight[k]) : widen(weight[k]);
      }
      if (lane < kStep) samples[lane] = sample_at(level, spot, attention);
      __syncwarp();

      int* count = shared.counts + step % 2;
      if (grad_value) {
#pragma unroll
        for (int corner = lane; corner < kCorners; corner += G) {
          const int cell = samples[corner / 4].cell[corner % 4];
          const A coefficient = samples[corner / 4].coefficient[corner % 4];
          if (cell >= 0) chain(shared, count, slots, group * kCorners + corner, cell, coefficient);
        }
      }

#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        const Sample<A> sample = samples[s];
        A dots[4] = {A(0), A(0), A(0), A(0)};
        for (int channel = lane * V; channel < p.D; channel += G * V) {
          const char* channels = reinterpret_cast<const char*>(value + head + channel);
          if (!kLanes) load<V>(grads + channel, grad);
          if (whole(sample)) {
            A corner[4][V];
#pragma unroll
            for (int i = 0; i < 4; ++i) load<V>(cell_of<T>(channels, sample.cell[i], p), corner[i]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int v = 0; v < V; ++v) dots[i] += grad[v] * corner[i][v];
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (sample.cell[i] < 0) continue;
              A corner[V];
              load<V>(cell_of<T>(channels, sample.cell[i], p), corner);
#pragma unroll
              for (int v = 0; v < V; ++v) dots[i] += grad[v] * corner[v];
            }
          }
          if (kLanes) break;
        }
        __syncwarp();  // lets the compiler know that all threads are here
        const A dot = four_sums_of_group(dots, lane, G);
        if (lane < 4) shared.dots[group * kCorners + 4 * s + lane] = dot;
      }
      __syncwarp();

      if (owns) {
        const A* dot = shared.dots + group * kCorners + 4 * lane;
        const A above = dot[1] - dot[0], below = dot[3] - dot[2];  // along x
        const A upper = dot[0] + spot.right_share * above, lower = dot[2] + spot.right_share * below;
        const A grad_weight = upper + spot.low_share * (lower - upper);
        const A along_x = above + spot.low_share * (below - above);
        const A scale_x = p.fused ? A(1) : static_cast<A>(level.width);
        const A scale_y = p.fused ? A(1) : static_cast<A>(level.height);
        const int64_t at = row * K + k;
        narrow(spot.counts ? attention * scale_x * along_x : A(0), grad_points[2 * at]);
        narrow(spot.counts ? attention * scale_y * (lower - upper) : A(0), grad_points[2 * at + 1]);
        shared.grad_weights[group * K + k] = grad_weight;
        weighted += attention * grad_weight;
      }

      if (grad_value) {  // all of the block; every cell that this step touched is added up and written by one group
        __syncthreads();
        const int cells = *count;
        if (threadIdx.x == 0) shared.counts[(step + 1) % 2] = 0;
        for (int i = group; i < cells; i += groups) {
          const int slot = shared.used[i], cell = shared.cells[slot], last = shared.heads[slot];
          A* to = grad_value + head + static_cast<int64_t>(cell) * (p.M * p.D);
#pragma unroll
          for (int channel = lane * kAdded; channel < (kLanes ? kLanes * V : p.D); channel += G * kAdded) {
            A sum[kAdded];
#pragma unroll
            for (int v = 0; v < kAdded; ++v) sum[v] = 0;
            for (int corner = last; corner >= 0; corner = shared.next[corner]) {
              const int64_t from = (static_cast<int64_t>(b) * p.N + shared.rows[corner / kCorners]) * p.M + m;
              A of_query[kAdded];
              load<kAdded>(grad_output + from * p.D + channel, of_query);
              const A coefficient = shared.coefficients[corner];
#pragma unroll
              for (int v = 0; v < kAdded; ++v) sum[v] += coefficient * of_query[v];
            }
            add<kAdded>(to + channel, sum);
          }
          __syncwarp(my_group);
          if (lane == 0) {
            shared.cells[slot] = -1;
            shared.heads[slot] = -1;
          }
        }
        __syncthreads();
      }
    }

    weighted = sum_of_group(weighted, G);
    __syncwarp();
    if (query.exists)
      for (int k = lane; k < K; k += G) {
        const A grad_weight = shared.grad_weights[group * K + k];
        narrow(p.fused ? softmax.weight(weight[k]) * (grad_weight - weighted) : grad_weight,
               grad_weights[row * K + k]);
      }
    __syncwarp();
  }
}

// ---- the gradient of the values without atomics ----
//
// A sample is filed under the cell of its upper left corner, on levels that have one more row and column before the
// first: (H + 1) x (W + 1) places. Cell (y, x) then gets contributions from the samples of four places.

struct Places {
  int64_t first[kMaxLevels];  // of each level
  int64_t all;                // of one image and head
};

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    msda_places(const __grid_constant__ Problem p, const __grid_constant__ Places places,
                const T* __restrict__ points, const T* __restrict__ weights, bool wide, void* __restrict__ found,
                Acc<T>* __restrict__ coefficients) {
  using A = Acc<T>;
  const int G = p.lanes, K = p.K;
  const int lane = threadIdx.x % G;
  const int m = blockIdx.x % p.M;
  const Query query = query_of(p, blockIdx.x / p.M, threadIdx.x / G);
  for (int b = blockIdx.y; b < p.B; b += gridDim.y) {
    const int64_t row = (static_cast<int64_t>(b) * p.N + query.index) * p.M + m;
    const T* weight = weights + row * K;
    const Softmax<A> softmax = p.fused ? softmax_of_group(weight, K, lane, G) : Softmax<A>{};
    if (!query.exists) continue;
    for (int k = lane; k < K; k += G) {
      const int64_t at = row * K + k;
      const Level& level = p.levels[k / p.P];
      const Spot<A> spot = locate(p, query, level, widen(points[2 * at]), widen(points[2 * at + 1]));
      const Sample<A> sample = sample_at(level, spot, p.fused ? softmax.weight(weight[k]) : widen(weight[k]));
      int64_t place = static_cast<int64_t>(p.B) * p.M * places.all;  // nowhere
      if (spot.counts)
        place = (static_cast<int64_t>(b) * p.M + m) * places.all + places.first[k / p.P] +
                static_cast<int64_t>(spot.top + 1) * (level.width + 1) + spot.left + 1;
      if (wide)
        static_cast<int64_t*>(found)[at] = place;
      else
        static_cast<int*>(found)[at] = static_cast<int>(place);
#pragma unroll
      for (int i = 0; i < 4; ++i) coefficients[4 * at + i] = sample.coefficient[i];
    }
  }
}

// order: samples by place, those of one place in their own order; starts: where each place begins in `order`.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    msda_gather(const __grid_constant__ Problem p, const __grid_constant__ Places places,
                const T* __restrict__ grad_output, const int64_t* __restrict__ order,
                const int64_t* __restrict__ starts, const Acc<T>* __restrict__ coefficients,
                T* __restrict__ grad_value) {
  using A = Acc<T>;
  const int G = p.lanes;
  const int lane = threadIdx.x % G;
  const int64_t cell_and_head = static_cast<int64_t>(blockIdx.x) * (blockDim.x / G) + threadIdx.x / G;
  if (cell_and_head >= static_cast<int64_t>(p.S) * p.M) return;
  const int m = static_cast<int>(cell_and_head % p.M), cell = static_cast<int>(cell_and_head / p.M);
  int l = 0;
  while (l + 1 < p.L && cell >= p.levels[l + 1].first) ++l;
  const Level& level = p.levels[l];
  const int x = (cell - level.first) % level.width, y = (cell - level.first) / level.width;
  for (int b = blockIdx.y; b < p.B; b += gridDim.y) {
    const int64_t image_and_head = static_cast<int64_t>(b) * p.M + m;
    for (int channel = lane; channel < p.D; channel += G) {
      A sum = 0;
      for (int i = 0; i < 4; ++i) {
        const int64_t place = image_and_head * places.all + places.first[l] +
                              static_cast<int64_t>(y + 1 - i / 2) * (level.width + 1) + (x + 1 - i % 2);
        for (int64_t at = starts[place]; at < starts[place + 1]; ++at) {
          const int64_t sample = order[at];
          sum += coefficients[4 * sample + i] * widen(grad_output[sample / p.K * p.D + channel]);
        }
      }
      narrow(sum, grad_value[((static_cast<int64_t>(b) * p.S + cell) * p.M + m) * p.D + channel]);
    }
  }
}

// ---- host ----

struct Call {
  int dtype;
  bool fused;
  const int64_t* sizes;   // B, S, M, D, N, L, P
  const int64_t* shapes;  // H, W of every level
  int device;
  cudaStream_t stream;
};

int power_of_two_from(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

Problem problem_of(const Call& call, int type_bytes) {
  Problem p{};
  const int64_t* sizes = call.sizes;
  p.B = static_cast<int>(sizes[0]);
  p.S = static_cast<int>(sizes[1]);
  p.M = static_cast<int>(sizes[2]);
  p.D = static_cast<int>(sizes[3]);
  p.N = static_cast<int>(sizes[4]);
  p.L = static_cast<int>(sizes[5]);
  p.P = static_cast<int>(sizes[6]);
  p.K = p.L * p.P;
  p.cell_bytes = static_cast<uint32_t>(p.M) * p.D * type_bytes;
  p.fused = call.fused;
  p.queries_are_cells = p.N == p.S;
  int first = 0;
  for (int l = 0; l < p.L; ++l) {
    p.levels[l].height = static_cast<int>(call.shapes[2 * l]);
    p.levels[l].width = static_cast<int>(call.shapes[2 * l + 1]);
    p.levels[l].first = first;
    first += p.levels[l].height * p.levels[l].width;
  }
  p.run.height = 1;
  p.run.width = p.N;
  return p;
}

// Divides the queries among blocks of `queries`, and threads among them.
void divide(Problem& p, int queries, int lanes) {
  p.lanes = lanes;
  p.tile_width = queries;
  p.tile_height = 1;
  if (p.queries_are_cells)
    for (; p.tile_width > 2 * p.tile_height || p.tile_width == 2; p.tile_width /= 2) p.tile_height *= 2;
  p.tiles = 0;
  for (int l = 0; l < (p.queries_are_cells ? p.L : 1); ++l) {
    Level& level = p.queries_are_cells ? p.levels[l] : p.run;
    level.first_tile = p.tiles;
    level.tiles_across = (level.width + p.tile_width - 1) / p.tile_width;
    p.tiles += level.tiles_across * ((level.height + p.tile_height - 1) / p.tile_height);
  }
}

Places places_of(const Problem& p) {
  Places places{};
  for (int l = 0; l < p.L; ++l) {
    places.first[l] = places.all;
    places.all += static_cast<int64_t>(p.levels[l].height + 1) * (p.levels[l].width + 1);
  }
  return places;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int B, int threads, int shared_bytes, cudaStream_t stream,
           Arguments... arguments) {
  if (blocks > 0x7fffffff) return kTooManyBlocks;
  cudaLaunchConfig_t config{};
  const int height = B < FCCLIP_GRID_HEIGHT ? B : FCCLIP_GRID_HEIGHT;
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(height), 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t left_behind = cudaGetLastError();
  return static_cast<int>(status != cudaSuccess ? status : left_behind);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// What a launch is made of: (how `Kernels` computes it) with the kernel for these sizes.
template <typename T, typename Kernels>
int choose(const Call& call, bool is_aligned, const Kernels& kernels) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  Problem p = problem_of(call, static_cast<int>(sizeof(T)));
  if constexpr (sizeof(T) < 8) {
    if (is_aligned && p.L == 3 && p.P == 4) {
      switch (p.D) {
        case 8: return kernels.template run<T, 2, 4, 3, 4>(p, 4);
        case 16: return kernels.template run<T, 4, 4, 3, 4>(p, 4);
        case 32: return kernels.template run<T, kVector, 32 / kVector, 3, 4>(p, 32 / kVector);
        case 64: return kernels.template run<T, kVector, 64 / kVector, 3, 4>(p, 64 / kVector);
      }
    }
  }
  const bool vectors = is_aligned && p.D % kVector == 0;
  const int needed = power_of_two_from(vectors ? p.D / kVector : p.D);
  const int lanes = needed < 4 ? 4 : needed < 32 ? needed : 32;
  return vectors ? kernels.template run<T, kVector, 0, 0, 0>(p, lanes) : kernels.template run<T, 1, 0, 0, 0>(p, lanes);
}

struct Forward {
  const Call& call;
  const void *value, *points, *weights;
  void* output;

  template <typename T, int V, int kLanes, int kLevels, int kPoints>
  int run(Problem p, int lanes) const {
    const int queries = kMaxThreads / lanes < kTileQueries ? kMaxThreads / lanes : kTileQueries;
    divide(p, queries, lanes);
    return launch(msda_forward<T, V, kLanes, kLevels, kPoints>, static_cast<int64_t>(p.tiles) * p.M, p.B,
                  queries * lanes, queries * samples_bytes<Acc<T>>(lanes), call.stream, p,
                  static_cast<const T*>(value), static_cast<const T*>(points), static_cast<const T*>(weights),
                  static_cast<T*>(output));
  }
};

struct Backward {
  const Call& call;
  const void *grad_output, *value, *points, *weights;
  void *grad_value, *grad_points, *grad_weights;

  template <typename T, int V, int kLanes, int kLevels, int kPoints>
  int run(Problem p, int lanes) const {
    using A = Acc<T>;
    int queries = kMaxThreads / lanes < kTileQueries ? kMaxThreads / lanes : kTileQueries;
    while (Shared<A>::bytes(queries, p.K) > kMaxSharedBytes) {  // many samples: fewer queries, and whole warps
      queries /= 2;
      if (queries == 0) return kTooManySamples;
      if (queries * lanes < 32) lanes *= 2;
      if (kLanes && lanes != kLanes) return kTooManySamples;  // not with the sizes that are compiled in
    }
    divide(p, queries, lanes);
    return launch(msda_backward<T, V, kLanes, kLevels, kPoints>, static_cast<int64_t>(p.tiles) * p.M, p.B,
                  queries * lanes, Shared<A>::bytes(queries, p.K), call.stream, p, static_cast<const T*>(grad_output),
                  static_cast<const T*>(value), static_cast<const T*>(points), static_cast<const T*>(weights),
                  static_cast<A*>(grad_value), static_cast<T*>(grad_points), static_cast<T*>(grad_weights));
  }
};

// Calls `body` with a null pointer of the type that `dtype` means, on the device of the call.
template <typename F>
int dispatch(const Call& call, const F& body) {
  int before = call.device;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && before != call.device) status = cudaSetDevice(call.device);
  if (status != cudaSuccess) return static_cast<int>(status);
  int result = kUnknownType;
  switch (call.dtype) {
    case 0: result = body(static_cast<float*>(nullptr)); break;
    case 1: result = body(static_cast<double*>(nullptr)); break;
    case 2: result = body(static_cast<__half*>(nullptr)); break;
    case 3: result = body(static_cast<__nv_bfloat16*>(nullptr)); break;
  }
  if (before != call.device) {
    status = cudaSetDevice(before);
    if (result == 0) result = static_cast<int>(status);
  }
  return result;
}

template <typename T>
using Pointed = typename std::remove_pointer<T>::type;

}  // namespace

// sizes: B, S, M, D, N, L, P; shapes: H, W of every level; dtype: 0 fp32, 1 fp64, 2 fp16, 3 bf16, of every tensor but
// grad_value, coefficients (fp64 for fp64, else fp32). Return 0, a cudaError_t, or one of the codes above.
extern "C" {

int32_t fcclip_msda_forward(int32_t dtype, int32_t fused, const int64_t* sizes, const int64_t* shapes, int32_t device,
                            void* stream, const void* value, const void* points, const void* weights, void* output) {
  const Call call = {dtype, fused != 0, sizes, shapes, device, static_cast<cudaStream_t>(stream)};
  return dispatch(call, [&](auto* type) {
    using T = Pointed<decltype(type)>;
    return choose<T>(call, aligned(value) && aligned(output), Forward{call, value, points, weights, output});
  });
}

// grad_value must be zeros, and may be null: then it is left to fcclip_msda_gather.
int32_t fcclip_msda_backward(int32_t dtype, int32_t fused, const int64_t* sizes, const int64_t* shapes, int32_t device,
                             void* stream, const void* grad_output, const void* value, const void* points,
                             const void* weights, void* grad_value, void* grad_points, void* grad_weights) {
  const Call call = {dtype, fused != 0, sizes, shapes, device, static_cast<cudaStream_t>(stream)};
  return dispatch(call, [&](auto* type) {
    using T = Pointed<decltype(type)>;
    return choose<T>(call, aligned(grad_output) && aligned(value) && aligned(grad_value),
                     Backward{call, grad_output, value, points, weights, grad_value, grad_points, grad_weights});
  });
}

// places: (B, N, M, K) int64 if `wide`, else int32; coefficients: (B, N, M, K, 4).
int32_t fcclip_msda_places(int32_t dtype, int32_t fused, const int64_t* sizes, const int64_t* shapes, int32_t device,
                           void* stream, int32_t wide, const void* points, const void* weights, void* places,
                           void* coefficients) {
  const Call call = {dtype, fused != 0, sizes, shapes, device, static_cast<cudaStream_t>(stream)};
  return dispatch(call, [&](auto* type) {
    using T = Pointed<decltype(type)>;
    Problem p = problem_of(call, static_cast<int>(sizeof(T)));
    const int lanes = 8, queries = kTileQueries;
    divide(p, queries, lanes);
    return launch(msda_places<T>, static_cast<int64_t>(p.tiles) * p.M, p.B, queries * lanes, 0, call.stream, p,
                  places_of(p), static_cast<const T*>(points), static_cast<const T*>(weights), wide != 0, places,
                  static_cast<Acc<T>*>(coefficients));
  });
}

// grad_value: in the dtype of the tensors.
int32_t fcclip_msda_gather(int32_t dtype, int32_t fused, const int64_t* sizes, const int64_t* shapes, int32_t device,
                           void* stream, const void* grad_output, const void* order, const void* starts,
                           const void* coefficients, void* grad_value) {
  const Call call = {dtype, fused != 0, sizes, shapes, device, static_cast<cudaStream_t>(stream)};
  return dispatch(call, [&](auto* type) {
    using T = Pointed<decltype(type)>;
    Problem p = problem_of(call, static_cast<int>(sizeof(T)));
    p.lanes = p.D < 32 ? power_of_two_from(p.D) : 32;
    const int groups = kMaxThreads / p.lanes;
    const int64_t blocks = (static_cast<int64_t>(p.S) * p.M + groups - 1) / groups;
    return launch(msda_gather<T>, blocks, p.B, kMaxThreads, 0, call.stream, p, places_of(p),
                  static_cast<const T*>(grad_output), static_cast<const int64_t*>(order),
                  static_cast<const int64_t*>(starts), static_cast<const Acc<T>*>(coefficients),
                  static_cast<T*>(grad_value));
  });
}

// What a code of the above means.
const char* fcclip_msda_error(int32_t code) {
  switch (code) {
    case kTooManySamples: return "more samples of a query than fit into the shared memory of a block";
    case kUnknownType: return "unknown dtype";
    case kTooManyBlocks: return "more blocks than a grid can have";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

// What it was compiled for, as the compiler was told.
const char* fcclip_msda_architectures() { return FCCLIP_ARCHITECTURES; }

}  // extern "C"
