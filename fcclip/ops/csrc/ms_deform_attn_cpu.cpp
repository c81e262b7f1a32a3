// Multi-scale deformable attention on the CPU: forward and backward, both forms, for fcclip/ops/cpp_engine.py.
//
// Nothing but a plain C interface leaves this file and nothing but the thread pool of torch enters it, so that no
// version of torch can break it. Python has checked every shape before; nothing is checked again here.
//
// Legend: B images, S cells of all levels, M heads, D channels of a head, N queries, L levels, P points,
//         K = L * P samples of a query and head.
//
// How it is fast. The values of a head are first packed: one cell after the other, each level with a frame of zeros one
// cell wide, channels filled up to whole vectors, half types turned into fp32. Then no corner of a sample needs a check
// of borders, and neighbouring samples lie in the same cache lines. Coordinates, corner coefficients and softmax are
// computed for a block of queries at once, in flat loops that compilers vectorise; the loop over channels is written
// with vectors. Backward gives each image and head to one thread, which alone adds to the gradient of its values: no
// atomics, and the same bits with any number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "exponential.h"

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int64_t kAlignment = 64;
constexpr int64_t kBlockSamples = 512;  // samples whose coefficients are computed at once; stays in the first cache

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void narrow(float x, float& result) { result = x; }
inline void narrow(double x, double& result) { result = x; }
inline void narrow(float x, BFloat16& result) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  result.bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

// What is computed with: fp32, and fp64 for fp64.
template <typename T>
using Acc = decltype(widen(T()));

template <typename A>
struct Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  typedef A Type __attribute__((vector_size(kVectorBytes), may_alias));
};

// Four numbers, or as many as a vector has, whose sum is that of all lanes.
template <typename A>
constexpr int kPartial = Vector<A>::kLanes < 4 ? Vector<A>::kLanes : 4;

template <typename A, int kLanes>
struct Lanes {
  typedef A Type __attribute__((vector_size(kLanes * sizeof(A)), may_alias, aligned(sizeof(A))));

  static inline void add_partial_sums(Type v, A* to) {
    if constexpr (kLanes == kPartial<A>) {
      *reinterpret_cast<Type*>(to) += v;
    } else {
      typename Lanes<A, kLanes / 2>::Type halves[2];
      std::memcpy(halves, &v, sizeof v);
      Lanes<A, kLanes / 2>::add_partial_sums(halves[0] + halves[1], to);
    }
  }
};

// Memory that starts at a whole cache line.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<A*>(::operator new(size * sizeof(A), std::align_val_t(kAlignment)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(kAlignment)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

struct Level {
  int64_t height, width;
  int64_t first;         // its first cell in `value`
  int64_t packed_first;  // its first cell when packed, which belongs to the frame
};

struct Problem {
  int64_t B, S, M, D, N, L, P, K;
  bool fused;
  std::vector<Level> levels;
  int64_t packed_cells;  // of one head
  int64_t zero_cell;     // start of the cells that stay zero: where samples outside their level look
  std::vector<std::pair<int64_t, int64_t>> rows;  // (level, row with frame) of every packed row

  Problem(const int64_t* sizes, const int64_t* shapes, bool is_fused)
      : B(sizes[0]), S(sizes[1]), M(sizes[2]), D(sizes[3]), N(sizes[4]), L(sizes[5]), P(sizes[6]), K(L * P),
        fused(is_fused) {
    int64_t first = 0, packed = 0, widest = 0;
    for (int64_t l = 0; l < L; ++l) {
      const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
      levels.push_back({height, width, first, packed});
      for (int64_t row = 0; row < height + 2; ++row) rows.emplace_back(l, row);
      first += height * width;
      packed += (height + 2) * (width + 2);
      widest = std::max(widest, width);
    }
    zero_cell = packed;
    packed_cells = packed + widest + 4;
  }
};

template <typename A>
inline int64_t packed_channels(const Problem& p) {
  const int64_t lanes = Vector<A>::kLanes;
  return (p.D + lanes - 1) / lanes * lanes;
}

// One packed row of one head; `packed` is the memory of the head, `value` that of the image.
template <typename T>
void pack_row(const Problem& p, int64_t index, int64_t head, const T* value, Acc<T>* packed) {
  const auto [l, row] = p.rows[index];
  const Level& level = p.levels[l];
  const int64_t D = p.D, Dp = packed_channels<Acc<T>>(p);
  Acc<T>* to = packed + (level.packed_first + row * (level.width + 2)) * Dp;
  if (row == 0 || row == level.height + 1) {
    std::memset(to, 0, (level.width + 2) * Dp * sizeof(Acc<T>));
    return;
  }
  std::memset(to, 0, Dp * sizeof(Acc<T>));
  to += Dp;
  const T* from = value + ((level.first + (row - 1) * level.width) * p.M + head) * D;
  for (int64_t x = 0; x < level.width; ++x, from += p.M * D, to += Dp) {
    for (int64_t c = 0; c < D; ++c) to[c] = widen(from[c]);
    for (int64_t c = D; c < Dp; ++c) to[c] = 0;
  }
  std::memset(to, 0, Dp * sizeof(Acc<T>));
}

template <typename A>
void clear_zero_cells(const Problem& p, A* packed) {
  const int64_t Dp = packed_channels<A>(p);
  std::memset(packed + p.zero_cell * Dp, 0, (p.packed_cells - p.zero_cell) * Dp * sizeof(A));
}

// The samples of a block of queries of one head, as flat arrays over (query, sample).
template <typename A>
struct Samples {
  const Problem& p;
  const int64_t queries;  // that a block holds
  const int64_t size;
  std::vector<A> width, height;                        // of the level of each sample, repeated for every query
  std::vector<int32_t> row, origin;                    // cells of a packed row; packed index of cell (0, 0)
  std::vector<A> x, y;                                 // in: offset or location; then the pixel
  std::vector<A> base_x, base_y;                       // fused: the query's own centre, 0..1
  std::vector<A> weight, inside;                       // attention weight; 1 or 0
  std::vector<A> lx, ly;                               // share of the right and of the lower corners
  std::vector<A> top_left, top_right, low_left, low_right;  // coefficients with the weight
  std::vector<int32_t> cell;                           // packed index of the top left corner

  explicit Samples(const Problem& problem)
      : p(problem), queries(std::max<int64_t>(1, kBlockSamples / problem.K)), size(queries * problem.K) {
    for (auto* one : {&width, &height, &x, &y, &base_x, &base_y, &weight, &inside, &lx, &ly, &top_left, &top_right,
                      &low_left, &low_right})
      one->resize(size);
    for (auto* one : {&row, &origin, &cell}) one->resize(size);
    for (int64_t j = 0; j < size; ++j) {
      const Level& level = p.levels[j % p.K / p.P];
      width[j] = static_cast<A>(level.width);
      height[j] = static_cast<A>(level.height);
      row[j] = static_cast<int32_t>(level.width + 2);
      origin[j] = static_cast<int32_t>(level.packed_first + level.width + 3);
    }
  }

  // Reads `count` queries from `first` on of image b and head m, and computes all of the above.
  template <typename T>
  void prepare(const T* points, const T* weights, int64_t b, int64_t m, int64_t first, int64_t count) {
    const int64_t K = p.K;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t at = ((b * p.N + first + q) * p.M + m) * K;
      const T* point = points + at * 2;
      A *xs = &x[q * K], *ys = &y[q * K], *ws = &weight[q * K];
      for (int64_t k = 0; k < K; ++k) {
        xs[k] = widen(point[2 * k]);
        ys[k] = widen(point[2 * k + 1]);
      }
      for (int64_t k = 0; k < K; ++k) ws[k] = widen(weights[at + k]);
    }
    const int64_t n = count * K;
    if (p.fused) {
      softmax(count);
      centres(first, count);
      for (int64_t j = 0; j < n; ++j) {
        x[j] += base_x[j] * width[j] - A(0.5);
        y[j] += base_y[j] * height[j] - A(0.5);
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        x[j] = x[j] * width[j] - A(0.5);
        y[j] = y[j] * height[j] - A(0.5);
      }
    }
    coefficients(n);
  }

 private:
  void softmax(int64_t count) {
    const int64_t K = p.K, n = count * K;
    A* w = weight.data();
    for (int64_t q = 0; q < count; ++q) {
      A* ws = w + q * K;
      A highest = ws[0];
      for (int64_t k = 1; k < K; ++k) highest = ws[k] > highest ? ws[k] : highest;
      for (int64_t k = 0; k < K; ++k) ws[k] -= highest;
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) w[j] = exp_not_positive(w[j]);
    for (int64_t q = 0; q < count; ++q) {
      A* ws = w + q * K;
      A total = 0;
      for (int64_t k = 0; k < K; ++k) total += ws[k];
      const A share = A(1) / total;
      for (int64_t k = 0; k < K; ++k) ws[k] *= share;
    }
  }

  // Query n is cell n: its centre within its own level.
  void centres(int64_t first, int64_t count) {
    size_t l = 0;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t n = first + q;
      while (l + 1 < p.levels.size() && n >= p.levels[l + 1].first) ++l;
      const Level& level = p.levels[l];
      const int64_t cell_of_level = n - level.first;
      const A cx = (static_cast<A>(cell_of_level % level.width) + A(0.5)) / static_cast<A>(level.width);
      const A cy = (static_cast<A>(cell_of_level / level.width) + A(0.5)) / static_cast<A>(level.height);
      for (int64_t k = 0; k < p.K; ++k) {
        base_x[q * p.K + k] = cx;
        base_y[q * p.K + k] = cy;
      }
    }
  }

  void coefficients(int64_t n) {
    const A *__restrict xs = x.data(), *__restrict ys = y.data();
    const A *__restrict ws = width.data(), *__restrict hs = height.data(), *__restrict as = weight.data();
    const int32_t *__restrict rows = row.data(), *__restrict origins = origin.data();
    A *__restrict in = inside.data(), *__restrict rx = lx.data(), *__restrict ry = ly.data();
    A *__restrict c00 = top_left.data(), *__restrict c01 = top_right.data();
    A *__restrict c10 = low_left.data(), *__restrict c11 = low_right.data();
    int32_t* __restrict cells = cell.data();
    const int32_t nowhere = static_cast<int32_t>(p.zero_cell);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {  // comparisons are false for what is not finite, too
      const A across = xs[j] >= A(-1) ? (xs[j] < ws[j] ? A(1) : A(0)) : A(0);
      const A along = ys[j] >= A(-1) ? (ys[j] < hs[j] ? A(1) : A(0)) : A(0);
      in[j] = across * along;
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A px = in[j] != A(0) ? xs[j] : A(0), py = in[j] != A(0) ? ys[j] : A(0), a = in[j] != A(0) ? as[j] : A(0);
      const A left = std::floor(px), top = std::floor(py);
      const A right_share = px - left, low_share = py - top;
      const A low = a * low_share, high = a - low;
      const A low_right = low * right_share, high_right = high * right_share;
      rx[j] = right_share;
      ry[j] = low_share;
      c00[j] = high - high_right;
      c01[j] = high_right;
      c10[j] = low - low_right;
      c11[j] = low_right;
      const int32_t found = origins[j] + static_cast<int32_t>(top) * rows[j] + static_cast<int32_t>(left);
      cells[j] = in[j] != A(0) ? found : nowhere;
    }
  }
};

// ---- forward ----

// `kVectors` vectors of channels of one query: the sum over its K samples.
template <typename A, int kVectors>
inline void gather(const Samples<A>& s, int64_t start, const A* packed, int64_t Dp, A* result) {
  using V = typename Vector<A>::Type;
  constexpr int lanes = Vector<A>::kLanes;
  V sum[kVectors];
  for (int i = 0; i < kVectors; ++i) sum[i] = V{};
  for (int64_t j = start; j < start + s.p.K; ++j) {
    const A* upper = packed + static_cast<int64_t>(s.cell[j]) * Dp;
    const A* lower = upper + static_cast<int64_t>(s.row[j]) * Dp;
    const A c00 = s.top_left[j], c01 = s.top_right[j], c10 = s.low_left[j], c11 = s.low_right[j];
    for (int i = 0; i < kVectors; ++i) {
      sum[i] += c00 * *reinterpret_cast<const V*>(upper + i * lanes);
      sum[i] += c01 * *reinterpret_cast<const V*>(upper + Dp + i * lanes);
      sum[i] += c10 * *reinterpret_cast<const V*>(lower + i * lanes);
      sum[i] += c11 * *reinterpret_cast<const V*>(lower + Dp + i * lanes);
    }
  }
  for (int i = 0; i < kVectors; ++i) *reinterpret_cast<V*>(result + i * lanes) = sum[i];
}

template <typename T>
void forward(const Problem& p, const T* value, const T* points, const T* weights, T* output) {
  using A = Acc<T>;
  constexpr int lanes = Vector<A>::kLanes;
  const int64_t Dp = packed_channels<A>(p), head_size = p.packed_cells * Dp;
  const int64_t num_rows = static_cast<int64_t>(p.rows.size());
  Buffer<A> packed(p.M * head_size);
  for (int64_t m = 0; m < p.M; ++m) clear_zero_cells(p, packed.get() + m * head_size);
  const int64_t queries = Samples<A>(p).queries;
  const int64_t blocks = (p.N + queries - 1) / queries;
  for (int64_t b = 0; b < p.B; ++b) {
    const T* image = value + b * p.S * p.M * p.D;
    at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t m = 0; m < p.M; ++m) pack_row(p, row, m, image, packed.get() + m * head_size);
    });
    at::parallel_for(0, p.M * blocks, 1, [&](int64_t begin, int64_t end) {
      Samples<A> samples(p);
      Buffer<A> sum(Dp);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t m = task / blocks, first = task % blocks * queries;
        const int64_t count = std::min(queries, p.N - first);
        const A* head = packed.get() + m * head_size;
        samples.prepare(points, weights, b, m, first, count);
        for (int64_t q = 0; q < count; ++q) {
          int64_t c = 0;
          for (; c + 4 * lanes <= Dp; c += 4 * lanes) gather<A, 4>(samples, q * p.K, head + c, Dp, sum.get() + c);
          for (; c + 2 * lanes <= Dp; c += 2 * lanes) gather<A, 2>(samples, q * p.K, head + c, Dp, sum.get() + c);
          for (; c < Dp; c += lanes) gather<A, 1>(samples, q * p.K, head + c, Dp, sum.get() + c);
          T* to = output + ((b * p.N + first + q) * p.M + m) * p.D;
          for (int64_t i = 0; i < p.D; ++i) narrow(sum.get()[i], to[i]);
        }
      }
    });
  }
}

// ---- backward ----

// For `kVectors` vectors of channels of one query: adds the gradient of the values to `grads`, and to `dots` the
// products of the four corners of each sample with the gradient of the output, as partial sums.
template <typename A, int kVectors>
inline void scatter(const Samples<A>& s, int64_t start, const A* packed, const A* grad, int64_t Dp, A* grads, A* dots) {
  using V = typename Vector<A>::Type;
  constexpr int lanes = Vector<A>::kLanes;
  V g[kVectors];
  for (int i = 0; i < kVectors; ++i) g[i] = *reinterpret_cast<const V*>(grad + i * lanes);
  for (int64_t k = 0; k < s.p.K; ++k) {
    const int64_t j = start + k;
    const int64_t upper = static_cast<int64_t>(s.cell[j]) * Dp, lower = upper + static_cast<int64_t>(s.row[j]) * Dp;
    const int64_t corners[4] = {upper, upper + Dp, lower, lower + Dp};
    const A shares[4] = {s.top_left[j], s.top_right[j], s.low_left[j], s.low_right[j]};
    for (int corner = 0; corner < 4; ++corner) {
      const A* from = packed + corners[corner];
      A* to = grads + corners[corner];
      V dot = V{};
      for (int i = 0; i < kVectors; ++i) {
        dot += g[i] * *reinterpret_cast<const V*>(from + i * lanes);
        *reinterpret_cast<V*>(to + i * lanes) += shares[corner] * g[i];
      }
      Lanes<A, lanes>::add_partial_sums(dot, dots + (4 * k + corner) * kPartial<A>);
    }
  }
}

template <typename T>
void backward_head(const Problem& p, int64_t b, int64_t m, const T* grad_output, const T* value, const T* points,
                   const T* weights, T* grad_value, T* grad_points, T* grad_weights) {
  using A = Acc<T>;
  constexpr int lanes = Vector<A>::kLanes, partial = kPartial<A>;
  const int64_t Dp = packed_channels<A>(p), K = p.K;
  Buffer<A> packed(p.packed_cells * Dp), grads(p.packed_cells * Dp), grad(Dp), dots(4 * K * partial);
  for (int64_t row = 0; row < static_cast<int64_t>(p.rows.size()); ++row)
    pack_row(p, row, m, value + b * p.S * p.M * p.D, packed.get());
  clear_zero_cells(p, packed.get());
  std::memset(grads.get(), 0, p.packed_cells * Dp * sizeof(A));
  std::memset(grad.get(), 0, Dp * sizeof(A));
  Samples<A> s(p);
  std::vector<A> grad_x(K), grad_y(K), grad_w(K);
  for (int64_t first = 0; first < p.N; first += s.queries) {
    const int64_t count = std::min(s.queries, p.N - first);
    s.prepare(points, weights, b, m, first, count);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t at = (b * p.N + first + q) * p.M + m, start = q * K;
      for (int64_t c = 0; c < p.D; ++c) grad.get()[c] = widen(grad_output[at * p.D + c]);
      std::memset(dots.get(), 0, 4 * K * partial * sizeof(A));
      int64_t c = 0;
      for (; c + 4 * lanes <= Dp; c += 4 * lanes)
        scatter<A, 4>(s, start, packed.get() + c, grad.get() + c, Dp, grads.get() + c, dots.get());
      for (; c + 2 * lanes <= Dp; c += 2 * lanes)
        scatter<A, 2>(s, start, packed.get() + c, grad.get() + c, Dp, grads.get() + c, dots.get());
      for (; c < Dp; c += lanes)
        scatter<A, 1>(s, start, packed.get() + c, grad.get() + c, Dp, grads.get() + c, dots.get());

      A softmax_sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t j = start + k;
        A dot[4] = {};
        for (int i = 0; i < 4; ++i)
          for (int lane = 0; lane < partial; ++lane) dot[i] += dots.get()[(4 * k + i) * partial + lane];
        const A rx = s.lx[j], ry = s.ly[j];
        const A upper = dot[0] + rx * (dot[1] - dot[0]), lower = dot[2] + rx * (dot[3] - dot[2]);
        const A along_x = (dot[1] - dot[0]) + ry * ((dot[3] - dot[2]) - (dot[1] - dot[0]));
        const A scale_x = p.fused ? A(1) : s.width[j], scale_y = p.fused ? A(1) : s.height[j];
        const bool counts = s.inside[j] != A(0);
        grad_w[k] = counts ? upper + ry * (lower - upper) : A(0);
        grad_x[k] = counts ? s.weight[j] * scale_x * along_x : A(0);
        grad_y[k] = counts ? s.weight[j] * scale_y * (lower - upper) : A(0);
        softmax_sum += s.weight[j] * grad_w[k];
      }
      if (p.fused)
        for (int64_t k = 0; k < K; ++k) grad_w[k] = s.weight[start + k] * (grad_w[k] - softmax_sum);
      for (int64_t k = 0; k < K; ++k) {
        narrow(grad_x[k], grad_points[2 * (at * K + k)]);
        narrow(grad_y[k], grad_points[2 * (at * K + k) + 1]);
        narrow(grad_w[k], grad_weights[at * K + k]);
      }
    }
  }
  for (const Level& level : p.levels)
    for (int64_t row = 0; row < level.height; ++row) {
      const A* from = grads.get() + (level.packed_first + (row + 1) * (level.width + 2) + 1) * Dp;
      T* to = grad_value + ((b * p.S + level.first + row * level.width) * p.M + m) * p.D;
      for (int64_t x = 0; x < level.width; ++x, from += Dp, to += p.M * p.D)
        for (int64_t c = 0; c < p.D; ++c) narrow(from[c], to[c]);
    }
}

template <typename T>
void backward(const Problem& p, const T* grad_output, const T* value, const T* points, const T* weights,
              T* grad_value, T* grad_points, T* grad_weights) {
  at::parallel_for(0, p.B * p.M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      backward_head(p, task / p.M, task % p.M, grad_output, value, points, weights, grad_value, grad_points,
                    grad_weights);
  });
}

// Calls `body` with a null pointer of the type that `dtype` means; false for an unknown one.
template <typename F>
bool dispatch(int32_t dtype, const F& body) {
  switch (dtype) {
    case 0: body(static_cast<float*>(nullptr)); return true;
    case 1: body(static_cast<double*>(nullptr)); return true;
    case 2: body(static_cast<BFloat16*>(nullptr)); return true;
    default: return false;
  }
}

template <typename F>
int32_t guarded(const F& body) {
  try {
    return body() ? 0 : 2;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// sizes: B, S, M, D, N, L, P; shapes: H, W of every level; dtype: 0 fp32, 1 fp64, 2 bf16, of every tensor.
// Return 0, 1 when memory ran out, 2 for an unknown dtype.
extern "C" {

int32_t fcclip_msda_forward(int32_t dtype, int32_t fused, const int64_t* sizes, const int64_t* shapes,
                            const void* value, const void* points, const void* weights, void* output) {
  return guarded([&] {
    const Problem problem(sizes, shapes, fused != 0);
    return dispatch(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      forward(problem, static_cast<const T*>(value), static_cast<const T*>(points), static_cast<const T*>(weights),
              static_cast<T*>(output));
    });
  });
}

int32_t fcclip_msda_backward(int32_t dtype, int32_t fused, const int64_t* sizes, const int64_t* shapes,
                             const void* grad_output, const void* value, const void* points, const void* weights,
                             void* grad_value, void* grad_points, void* grad_weights) {
  return guarded([&] {
    const Problem problem(sizes, shapes, fused != 0);
    return dispatch(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      backward(problem, static_cast<const T*>(grad_output), static_cast<const T*>(value),
               static_cast<const T*>(points), static_cast<const T*>(weights), static_cast<T*>(grad_value),
               static_cast<T*>(grad_points), static_cast<T*>(grad_weights));
    });
  });
}

}  // extern "C"
