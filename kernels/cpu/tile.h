// Rows of bfloat16 times packed weights, in registers.
//
// A packed weight [O, I] stands as [O / 16][I / 2][16][2]: a *panel* is 16 outputs, and one vector
// of a panel holds two consecutive inputs of each of them. The sum over the inputs runs in the same
// order whatever the number of rows, so a row's result does not depend on the rows beside it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

namespace ostro {

using bf16 = uint16_t;

constexpr int kLanes = 16;   // float32 values of a vector
constexpr int kPanels = 4;   // panels that are multiplied together
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Rows that are multiplied together with N panels: their sums fit the registers.
template <int N>
constexpr int kRows = N <= 2 ? 12 : 6;

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

inline void copy_pair(const bf16* from, bf16* to) { std::memcpy(to, from, 2 * sizeof(bf16)); }

inline __m512 widen(const bf16* from) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline __m256i narrowed(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

inline void store_narrow(bf16* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(values));
}

// What a value becomes when it is kept as bfloat16.
inline __m512 rounded(__m512 values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(values)), 16));
}

// Two vectors of values that bfloat16 holds exactly as one of pairs (low, high).
inline __m512i paired(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
}

// 2^x, relative error below 2e-7; exactly 1 at 0, and 0 at -inf.
inline __m512 exp2_16(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // in [0, 1)
  __m512 p = _mm512_set1_ps(1.8671372e-3f);
  for (const float c : {9.0170130e-3f, 5.5799928e-2f, 2.4016444e-1f, 6.9315130e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// e^x, relative error below 2e-7 (1 + |x|).
inline __m512 exp16(__m512 x) { return exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E))); }

// Adds x[m] . w[n] to sums[m][n] over `pairs` pairs of inputs.
template <int M, int N>
inline void multiply(const bf16* const* x, const bf16* const* w, int64_t pairs,
                     __m512 (&sums)[M][N]) {
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh weights[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      weights[n] = (__m512bh)_mm512_loadu_si512(w[n] + k * 2 * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x[m] + 2 * k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], both, weights[n]);
    }
  }
}

template <int M, int N, class Use>
inline void multiply_tile(const bf16* const* x, const bf16* const* w, int64_t pairs, int64_t first,
                          Use&& use) {
  __m512 sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  multiply<M, N>(x, w, pairs, sums);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) use(first + m, sums[m]);
}

template <int M, int N, class Use>
inline void multiply_count(const bf16* const* x, const bf16* const* w, int64_t pairs, int64_t first,
                           int64_t count, Use&& use) {
  if constexpr (M > 1)
    if (count < M) return multiply_count<M - 1, N>(x, w, pairs, first, count, use);
  multiply_tile<M, N>(x, w, pairs, first, use);
}

// Calls use(row, sums[N]) for every one of the rows x[0 .. num_rows).
template <int N, class Use>
inline void multiply_rows(const bf16* const* x, int64_t num_rows, const bf16* const* w,
                          int64_t pairs, Use&& use) {
  const int64_t tiles = (num_rows + kRows<N> - 1) / kRows<N>;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int64_t count = (num_rows - first + tiles - tile - 1) / (tiles - tile);
    multiply_count<kRows<N>, N>(x + first, w, pairs, first, count, use);
    first += count;
  }
}

// Calls use(row, panel, sums) for every row and each of the panels [first_panel, stop_panel), of
// which there are at most kPanels; `panel_size` values lie between the starts of two panels.
template <class Use>
inline void multiply_panels(const bf16* const* x, int64_t num_rows, const bf16* weight,
                            int64_t panel_size, int64_t first_panel, int64_t stop_panel,
                            int64_t pairs, Use&& use) {
  const bf16* w[kPanels];
  const int64_t count = stop_panel - first_panel;
  for (int64_t n = 0; n < count; ++n) w[n] = weight + (first_panel + n) * panel_size;
  const auto each = [&](int64_t row, auto& sums) {
    constexpr int64_t N = sizeof(sums) / sizeof(sums[0]);
    for (int64_t n = 0; n < N; ++n) use(row, first_panel + n, sums[n]);
  };
  switch (count) {
    case 1: multiply_rows<1>(x, num_rows, w, pairs, each); break;
    case 2: multiply_rows<2>(x, num_rows, w, pairs, each); break;
    case 3: multiply_rows<3>(x, num_rows, w, pairs, each); break;
    default: multiply_rows<4>(x, num_rows, w, pairs, each); break;
  }
}

}  // namespace ostro
