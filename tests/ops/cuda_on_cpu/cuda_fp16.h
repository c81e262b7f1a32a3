// See cuda_runtime.h.

#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  float size = exponent ? std::ldexp(static_cast<float>(1024 + digits), exponent - 25)
                        : std::ldexp(static_cast<float>(digits), -24);
  if (exponent == 31) size = digits ? NAN : INFINITY;
  return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {0x7FFF};
  if (size == 0) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent = 0;
  std::frexp(size, &exponent);                         // size in [0.5, 1) * 2^exponent
  const int last = exponent - 11 < -24 ? -24 : exponent - 11;  // of the digits that are kept
  const auto digits = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -last)));  // ties to even
  // 1024 and more carry over into the exponent by themselves
  return {static_cast<uint16_t>(sign | (digits + (static_cast<uint32_t>(last + 24) << 10)))};
}
