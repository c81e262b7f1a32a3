// The exponential of numbers that are not positive, for loops that compilers vectorise.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline double exp_not_positive(double x) { return std::exp(x); }

// exp(x) for x <= 0 to about one unit in the last place: 2^n * exp(r) with |r| <= ln(2) / 2 and the Taylor series of
// exp(r), whose next term is below 6e-9. Without branches or calls, so that loops over it are vectorised.
inline float exp_not_positive(float x) {
  const float lowest = -87.0f;  // below, the result would leave the normal numbers
  const float inside = x < lowest ? lowest : x;
  const float n = std::floor(inside * 1.44269504f + 0.5f);
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;  // n * ln(2) in two parts, the first exact
  float series = 1.0f / 5040.0f;
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < lowest ? 0.0f : series * power;
}

}  // namespace
