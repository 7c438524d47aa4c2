// The numbers of a step: float32, and bfloat16 in a form that compilers turn into vector instructions.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace numbers {

struct Half {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(Half x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <typename T> inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
// To the nearest, to even, in the upper 16 bits. What is not a number stays none, without a branch: compilers leave loops
// that have one as they are.
inline uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t none = -static_cast<uint32_t>(x != x) & 0x7fc00000u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) | none;
}

template <> inline Half narrow<Half>(float x) { return Half{static_cast<uint16_t>(rounded(x) >> 16)}; }

// A number as T can hold it.
template <typename T> inline float as(float x);
template <> inline float as<float>(float x) { return x; }
template <> inline float as<Half>(float x) {
  const uint32_t bits = rounded(x) & 0xffff0000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <typename T> T* start(const at::Tensor& x) { return static_cast<T*>(x.data_ptr()); }

template <typename Run> void by_type(const at::Tensor& x, Run run) {
  if (x.scalar_type() == at::kBFloat16) {
    run(Half{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "bfloat16 or float32, not ", x.scalar_type());
    run(float{});
  }
}

// e^x within 2e-7 of it, in a form that compilers turn into vector instructions (the polynomial is Cephes' expf).
inline float power(float x) {
  const float inside = std::min(88.0f, std::max(-87.0f, x));
  const float whole = std::nearbyint(inside * 1.44269504f);
  const float rest = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float two;
  std::memcpy(&two, &bits, 4);
  return x < -87.0f ? 0.0f : x == x ? sum * two : x;
}

// Into `out`: the softmax of factor · scores + hidden of one row. Numbers from `size` to `filled` become zeros.
template <typename T>
void softmax(float* scores, const float* hidden, float factor, int64_t size, int64_t filled, T* out) {
  float most = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) scores[i] = scores[i] * factor + hidden[i];
  std::fill(scores + size, scores + filled, most);
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < filled; ++i) most = scores[i] > most ? scores[i] : most;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < filled; ++i) sum += scores[i] = power(scores[i] - most);
  const float by = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < filled; ++i) out[i] = narrow<T>(scores[i] * by);
}

// Into `out`, which may be `gradient`: the gradient at a row's scores, from that at its softmax, `chances`.
template <typename From, typename T>
void softmax_gradient(const From* gradient, const T* chances, float factor, int64_t size, T* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += wide(gradient[i]) * wide(chances[i]);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = narrow<T>(wide(chances[i]) * (wide(gradient[i]) - sum) * factor);
}

}  // namespace numbers
