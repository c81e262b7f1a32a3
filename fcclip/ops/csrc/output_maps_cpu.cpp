// What the outputs are made of, on the CPU, for fcclip/ops/output_maps.py: masks enlarged with their probabilities, and
// what heads ask of every pixel. fp32; each function goes over its maps once, where PyTorch needs several passes.
//
// As in ms_deform_attn_cpu.cpp nothing is checked here. Maps are row-major, `places` say which of them are looked at.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t kPixels = 1024;  // looked at together; what is known of them stays in the first cache

inline float sigmoid(float x) {
  const float power = exp_not_positive(x < 0 ? x : -x);
  return (x < 0 ? power : 1.0f) / (1.0f + power);
}

// One row of the result from the rows of one map: `kTaps` rows are summed, then as many columns.
template <int kTaps>
void enlarge_row(const float* map, int64_t width, const int32_t* rows, const float* row_weights, int64_t out_width,
                 const int32_t* columns, const float* column_weights, float* between, float* logits, float* shares) {
  for (int64_t x = 0; x < width; ++x) {
    float sum = 0;
    for (int t = 0; t < kTaps; ++t) sum += row_weights[t] * map[rows[t] * width + x];
    between[x] = sum;
  }
  for (int64_t x = 0; x < out_width; ++x) {
    float sum = 0;
    for (int t = 0; t < kTaps; ++t) sum += column_weights[t * out_width + x] * between[columns[t * out_width + x]];
    logits[x] = sum;
  }
  for (int64_t x = 0; x < out_width; ++x) shares[x] = sigmoid(logits[x]);
}

template <typename F>
int32_t guarded(const F& body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// Return 0, or 1 when memory ran out.
extern "C" {

// maps (., height, width); rows, row_weights (out_height, taps); columns, column_weights (taps, out_width), taps 2 or 4
// -> logits and their sigmoids, (n, out_height, out_width).
int32_t fcclip_enlarge(int64_t n, const int64_t* places, const float* maps, int64_t height, int64_t width, int64_t taps,
                       int64_t out_height, const int32_t* rows, const float* row_weights, int64_t out_width,
                       const int32_t* columns, const float* column_weights, float* logits, float* shares) {
  return guarded([&] {
    at::parallel_for(0, n * out_height, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> between(width);
      const auto enlarge = taps == 2 ? enlarge_row<2> : enlarge_row<4>;
      for (int64_t index = begin; index < end; ++index) {
        const int64_t map = places[index / out_height], row = index % out_height;
        enlarge(maps + map * height * width, width, rows + row * taps, row_weights + row * taps, out_width, columns,
                column_weights, between.data(), logits + index * out_width, shares + index * out_width);
      }
    });
  });
}

// shares (., pixels), scores (n) -> of each pixel, which of the n has the highest score times share, the first of equal
// ones; whether the share of that one is at least a half; and for each of the n in how many pixels its own is, added.
int32_t fcclip_win(int64_t n, const int64_t* places, const float* scores, const float* shares, int64_t pixels,
                   int64_t* owner, uint8_t* inside, int64_t* areas) {
  return guarded([&] {
    std::vector<int32_t> counts((pixels + kPixels - 1) / kPixels * n);
    at::parallel_for(0, (pixels + kPixels - 1) / kPixels, 1, [&](int64_t begin, int64_t end) {
      float best[kPixels], share_of_best[kPixels];
      int32_t winner[kPixels];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kPixels, size = std::min(kPixels, pixels - first);
        std::fill(best, best + size, -1.0f);
        std::fill(share_of_best, share_of_best + size, 0.0f);
        std::fill(winner, winner + size, 0);
        for (int64_t i = 0; i < n; ++i) {
          const float* of_map = shares + places[i] * pixels + first;
          const float score = scores[i];
          int32_t count = 0;
          for (int64_t x = 0; x < size; ++x) {
            const float share = of_map[x], value = score * share;
            const bool wins = value > best[x];
            best[x] = wins ? value : best[x];
            share_of_best[x] = wins ? share : share_of_best[x];
            winner[x] = wins ? static_cast<int32_t>(i) : winner[x];
            count += share >= 0.5f;
          }
          counts[block * n + i] = count;
        }
        for (int64_t x = 0; x < size; ++x) {
          owner[first + x] = winner[x];
          inside[first + x] = share_of_best[x] >= 0.5f;
        }
      }
    });
    for (size_t index = 0; index < counts.size(); ++index) areas[index % n] += counts[index];
  });
}

// maps (n, pixels) -> of each pixel the first of the highest.
int32_t fcclip_highest(int64_t n, const float* maps, int64_t pixels, int64_t* highest) {
  return guarded([&] {
    at::parallel_for(0, (pixels + kPixels - 1) / kPixels, 1, [&](int64_t begin, int64_t end) {
      float best[kPixels];
      int32_t winner[kPixels];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kPixels, size = std::min(kPixels, pixels - first);
        std::copy(maps + first, maps + first + size, best);
        std::fill(winner, winner + size, 0);
        for (int64_t i = 1; i < n; ++i) {
          const float* map = maps + i * pixels + first;
          for (int64_t x = 0; x < size; ++x) {
            const bool wins = map[x] > best[x];
            best[x] = wins ? map[x] : best[x];
            winner[x] = wins ? static_cast<int32_t>(i) : winner[x];
          }
        }
        std::copy(winner, winner + size, highest + first);
      }
    });
  });
}

// logits, shares (., pixels) -> where logits are positive, rows of `inside` that are `stride` apart; for each of the n
// in how many pixels, and the sum of its shares there, both added.
int32_t fcclip_measure(int64_t n, const int64_t* places, const float* logits, const float* shares, int64_t pixels,
                       int64_t stride, uint8_t* inside, int64_t* areas, float* sums) {
  return guarded([&] {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float *logit = logits + places[i] * pixels, *share = shares + places[i] * pixels;
        uint8_t* to = inside + i * stride;
        for (int64_t first = 0; first < pixels; first += kPixels) {
          const int64_t end_pixel = std::min(first + kPixels, pixels);
          int32_t count = 0;
          float sum = 0;
          for (int64_t x = first; x < end_pixel; ++x) {
            const bool is_inside = logit[x] > 0;
            to[x] = is_inside;
            count += is_inside;
          }
#pragma omp simd reduction(+ : sum)
          for (int64_t x = first; x < end_pixel; ++x) sum += logit[x] > 0 ? share[x] : 0.0f;
          areas[i] += count;
          sums[i] += sum;
        }
      }
    });
  });
}

}  // extern "C"
