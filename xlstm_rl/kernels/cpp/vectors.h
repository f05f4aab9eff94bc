// Vectors of float or double as wide as the instruction set of the build, and the functions the cells apply to them.
//
// GCC's and Clang's vector extensions are used, so that one source serves SSE, AVX2, AVX-512 and NEON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace xlstm {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

// Unaligned element types: heads start anywhere inside a tensor.
template <class T> struct Types;
template <> struct Types<float> {
  typedef float Vec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
};
template <> struct Types<double> {
  typedef double Vec __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
};
template <class T> using Vec = typename Types<T>::Vec;
template <class T> using Int = typename Types<T>::Int;
template <class T> constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

template <class T> constexpr int64_t padded(int64_t n) { return (n + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>; }

template <class T> INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> INLINE void store(T* p, Vec<T> x) { *reinterpret_cast<Vec<T>*>(p) = x; }
// x - 0 is x whatever x is, unlike 0 + x, so that only the broadcast remains.
template <class T> INLINE Vec<T> fill(T x) { return x - Vec<T>{}; }

// The first `count` elements (all of them if there are more than a vector holds); zeros beyond. The tail is kept out
// of line, or it would push the registers of the loops around it into memory.
template <class T> __attribute__((noinline, cold)) Vec<T> load_tail(const T* p, int64_t count) {
  T part[WIDTH<T>] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <class T> __attribute__((noinline, cold)) void store_tail(T* p, Vec<T> x, int64_t count) {
  std::memcpy(p, &x, count * sizeof(T));
}
template <class T> INLINE Vec<T> load_part(const T* p, int64_t count) {
  return __builtin_expect(count >= WIDTH<T>, 1) ? load(p) : load_tail(p, count);
}
template <class T> INLINE void store_part(T* p, Vec<T> x, int64_t count) {
  if (__builtin_expect(count >= WIDTH<T>, 1))
    store(p, x);
  else
    store_tail(p, x, count);
}

// Which of the positions first, first + 1, ... lie in [low, high].
template <class T> INLINE Int<T> within(int64_t first, int64_t low, int64_t high) {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
  Int<T> position;
  for (int e = 0; e < WIDTH<T>; e++) position[e] = Integer(e);
  return (position >= Integer(low - first)) & (position <= Integer(high - first));
}
template <class T> INLINE Vec<T> keep_where(Int<T> mask, Vec<T> x) { return (Vec<T>)((Int<T>)x & mask); }

// The sum of all elements, halving the vector: adding them one after the other would take several times as long.
template <class T, int BYTES> INLINE T sum_of_bytes(const void* x) {
  T result;
  if constexpr (BYTES == sizeof(T)) {
    std::memcpy(&result, x, BYTES);
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2)));
    Half low, high;
    std::memcpy(&low, x, BYTES / 2);
    std::memcpy(&high, static_cast<const char*>(x) + BYTES / 2, BYTES / 2);
    low += high;
    result = sum_of_bytes<T, BYTES / 2>(&low);
  }
  return result;
}
template <class T> INLINE T sum(Vec<T> x) { return sum_of_bytes<T, VECTOR_BYTES>(&x); }

// Written so that a NaN in `a` stays one: the instructions give back their second operand then.
template <class V> INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == sizeof(float)) return (V)_mm512_max_ps((__m512)b, (__m512)a);
#endif
  return a < b ? b : a;
}
template <class V> INLINE V smaller(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == sizeof(float)) return (V)_mm512_min_ps((__m512)b, (__m512)a);
#endif
  return b < a ? b : a;
}
template <class T> INLINE Vec<T> magnitude(Vec<T> x) { return x < 0 ? -x : x; }

// exp within 2 ulp; exactly zero where the result would be denormal, the largest finite result where it would overflow.
template <class T> Vec<T> exponential(Vec<T> x);
template <> INLINE Vec<float> exponential<float>(Vec<float> x) {
#if defined(__AVX512F__)
  x = smaller(larger(x, fill(-100.0f)), fill(88.37f));
#else
  Int<float> vanishes = x < -87.33f;
  x = smaller(larger(x, fill(-87.33f)), fill(88.37f));
#endif
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  Vec<float> shifted = x * 1.44269504f + 12582912.f;
  Vec<float> n = shifted - 12582912.f;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  Int<float> power = ((Int<float>)shifted - 0x4B400000 + 127) << 23;
  return keep_where<float>(~vanishes, p * (Vec<float>)power);
#endif
}
template <> INLINE Vec<double> exponential<double>(Vec<double> x) {
  Int<double> vanishes = x < -708.3;
  x = smaller(larger(x, fill(-708.3)), fill(709.4));
  Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  Vec<double> n = shifted - 6755399441055744.0;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  // Taylor series: the remainder is below 1e-17 for |r| <= log(2) / 2.
  Vec<double> p = fill(1.0 / 6227020800);
  constexpr double INVERSE_FACTORIALS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                           1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                           0.5,             1.0,            1.0};
  for (double c : INVERSE_FACTORIALS) p = p * r + c;
  Int<double> power = ((Int<double>)shifted - 0x4338000000000000 + 1023) << 52;
  return keep_where<double>(~vanishes, p * (Vec<double>)power);
}

// 1 / x for normal x within 1 ulp; zero for the largest ones, whose inverses are denormal. The divider takes as long for
// a vector as all of an exponential.
template <class T> INLINE Vec<T> inverse(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    Vec<T> estimate = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return estimate + estimate * (T(1) - x * estimate);
  }
#endif
  return T(1) / x;
}
template <class T> INLINE Vec<T> sigmoid(Vec<T> x) { return inverse<T>(T(1) + exponential<T>(-x)); }
template <class T> INLINE Vec<T> silu(Vec<T> x) { return x * sigmoid<T>(x); }
// The derivative of silu, given the sigmoid.
template <class T> INLINE Vec<T> silu_slope(Vec<T> x, Vec<T> open) { return open * (T(1) + x * (T(1) - open)); }

template <class T> Vec<T> hyperbolic_tangent(Vec<T> x);
template <> INLINE Vec<double> hyperbolic_tangent<double>(Vec<double> x) {
  return 1.0 - 2.0 / (exponential<double>(2.0 * x) + 1.0);
}
template <> INLINE Vec<float> hyperbolic_tangent<float>(Vec<float> x) {
  Vec<float> far = 1.0f - 2.0f / (exponential<float>(2.0f * x) + 1.0f);
  // Near zero the difference above loses its digits; the polynomial is that of Cephes.
  Vec<float> z = x * x;
  Vec<float> p = fill(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return magnitude<float>(x) < 0.625f ? p * z * x + x : far;
}

// log(1 + y) for y in [0, 1] given s = y / (2 + y), to relative accuracy.
template <class T> INLINE Vec<T> log1p_series(Vec<T> s) {
  constexpr int TERMS = sizeof(T) == 4 ? 8 : 18;
  Vec<T> z = s * s;
  Vec<T> p = fill(T(1) / (2 * TERMS - 1));
  for (int k = TERMS - 2; k >= 0; k--) p = p * z + T(1) / (2 * k + 1);
  return T(2) * s * p;
}
template <class T> INLINE Vec<T> log1p_unit(Vec<T> y) { return log1p_series<T>(y / (T(2) + y)); }
// log(sigmoid(x)) from exp(-|x|), which the caller may need for more.
template <class T> INLINE Vec<T> log_sigmoid(Vec<T> x, Vec<T> exp_minus_abs) {
  return smaller(x, fill(T(0))) - log1p_unit<T>(exp_minus_abs);
}
template <class T> INLINE Vec<T> log_sigmoid(Vec<T> x) { return log_sigmoid<T>(x, exponential<T>(-magnitude<T>(x))); }

// x * Phi(x), the exact GeLU.
template <class T> Vec<T> gelu(Vec<T> x);
template <> INLINE Vec<double> gelu<double>(Vec<double> x) {
  for (int e = 0; e < WIDTH<double>; e++) x[e] *= 0.5 * std::erfc(-x[e] * 0.70710678118654752440);
  return x;
}
template <> INLINE Vec<float> gelu<float>(Vec<float> x) {
  // Abramowitz and Stegun 7.1.26, error of erf below 1.5e-7.
  Vec<float> a = magnitude<float>(x) * 0.70710678f;
  Vec<float> t = 1.0f / (1.0f + 0.3275911f * a);
  Vec<float> p = fill(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Vec<float> tail = 0.5f * p * t * exponential<float>(-a * a);
  return x * (x < 0 ? tail : 1.0f - tail);
}

}  // namespace xlstm
