// Small operations on rows: norms, rotary embedding, writes to the latent cache, the gate.
#include <omp.h>

#include <cmath>

#include "tile.h"

namespace ostro {
namespace {

constexpr int64_t kSmall = 8;  // rows below which threads cost more than they bring

// out = weight * (x / sqrt(mean(x^2) + eps)), each factor rounded as torch rounds it
inline void norm_row(const bf16* x, const bf16* weight, int64_t width, float eps, bf16* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += kLanes) {
    const __m512 value = widen(x + i);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += kLanes) {
    const __m512 scaled = rounded(_mm512_mul_ps(widen(x + i), factor));
    store_narrow(out + i, _mm512_mul_ps(scaled, widen(weight + i)));
  }
}

// Turns the pairs (x[2j], x[2j + 1]) by the complex numbers turn[j].
inline void turn_row(const bf16* x, const float* turn, int64_t width, bf16* out) {
  const __m512i swap = _mm512_set_epi32(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
  for (int64_t i = 0; i < width; i += kLanes) {
    const __m512 value = widen(x + i), angle = _mm512_loadu_ps(turn + i);
    const __m512 cos = _mm512_moveldup_ps(angle), sin = _mm512_movehdup_ps(angle);
    const __m512 other = _mm512_permutexvar_ps(swap, value);
    store_narrow(out + i, _mm512_fmaddsub_ps(value, cos, _mm512_mul_ps(other, sin)));
  }
}

}  // namespace
}  // namespace ostro

using namespace ostro;

extern "C" void ostro_rms_norm(const bf16* x, int64_t stride, const bf16* weight, int64_t rows,
                               int64_t width, float eps, bf16* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows >= kSmall)
  for (int64_t r = 0; r < rows; ++r)
    norm_row(x + r * stride, weight, width, eps, out + r * width);
}

// Turns the last `width` values of every head in place; turn_TJ is complex64 [T, width / 2].
extern "C" void ostro_rotary(bf16* x, int64_t row_stride, int64_t head_stride, int64_t rows,
                             int64_t heads, int64_t width, const float* turn, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows >= kSmall)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      bf16* head = x + r * row_stride + h * head_stride;
      turn_row(head, turn + r * width, width, head);
    }
}

// Norms the latent part of each row, turns its rope key, and keeps both at the row's slot.
extern "C" void ostro_write_latents(const bf16* x, int64_t stride, const bf16* weight, float eps,
                                    const float* turn, int64_t rows, int64_t latent, int64_t rope,
                                    const int64_t* slots, bf16* cache, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows >= kSmall)
  for (int64_t r = 0; r < rows; ++r) {
    bf16* place = cache + slots[r] * (latent + rope);
    norm_row(x + r * stride, weight, latent, eps, place);
    turn_row(x + r * stride + latent, turn + r * rope, rope, place + latent);
  }
}

// The K largest of each row of logits (the first of equals), and softmax over them times `scale`.
extern "C" void ostro_choose(const float* logits, int64_t rows, int64_t num_experts, int64_t k,
                             float scale, int64_t* expert, float* weight, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows >= kSmall)
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits + r * num_experts;
    int64_t* best = expert + r * k;
    float* value = weight + r * k;
    int64_t found = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (found == k && !(row[e] > value[k - 1])) continue;
      int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && row[e] > value[at - 1]; --at) {
        value[at] = value[at - 1];
        best[at] = best[at - 1];
      }
      value[at] = row[e];
      best[at] = e;
    }
    const float largest = value[0];
    float sum = 0.0f;
    for (int64_t j = 0; j < k; ++j) sum += value[j] = std::exp(value[j] - largest);
    for (int64_t j = 0; j < k; ++j) value[j] *= scale / sum;
  }
}

// out = sum + shared + residual, in float32, rounded once.
extern "C" void ostro_add_rows(const float* sum, const bf16* shared, const bf16* residual,
                               int64_t count, bf16* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= (1 << 15))
  for (int64_t i = 0; i < count; i += kLanes)
    store_narrow(out + i, _mm512_add_ps(_mm512_add_ps(_mm512_loadu_ps(sum + i), widen(shared + i)),
                                        widen(residual + i)));
}
