// Multi-head latent attention of chunks of tokens: one block of keys at a time, with an online
// softmax.
#include <omp.h>

#include <cmath>
#include <vector>

#include "tile.h"

namespace ostro {
namespace {

constexpr int64_t kKeyTile = 256;   // keys that a task scores at once
constexpr int64_t kQueryRows = 24;  // query rows of a task

// Groups of query rows, and what is known of each row so far.
struct Rows {
  const bf16* q;
  int64_t row_stride, group_stride, groups, count, per_token;
  float *largest, *sum, *values;
  bf16* out;
};

// Keys of one block; a group's are packed as panels of 16 keys, its values as panels of 16 values
// of two keys each.
struct Block {
  int64_t keys, width, v_width, start;
  int64_t key_panels() const { return (keys + kLanes - 1) / kLanes; }
  int64_t value_panels() const { return v_width / kLanes; }
  int64_t value_panel() const { return key_panels() * kLanes * kLanes; }
  int64_t k_size() const { return key_panels() * kLanes * width; }
  int64_t v_size() const { return key_panels() * kLanes * v_width; }
};

struct Scratch {
  std::vector<float> scores = std::vector<float>(kQueryRows * kKeyTile);
  std::vector<bf16> weights = std::vector<bf16>(kQueryRows * kKeyTile);
};

// 16 keys as a panel of `pairs` pairs; keys that are not there become zeros.
void pack_keys(const bf16* k, int64_t stride, int64_t count, int64_t pairs, bf16* panel) {
  for (int64_t lane = 0; lane < kLanes; ++lane)
    for (int64_t j = 0; j < pairs; ++j) {
      bf16* to = panel + (j * kLanes + lane) * 2;
      if (lane < count)
        copy_pair(k + lane * stride + 2 * j, to);
      else
        to[0] = to[1] = 0;
    }
}

// The values of 16 keys, two keys to a vector of each panel; keys that are not there become zeros.
void pack_values(const bf16* v, int64_t stride, int64_t count, const Block& block, bf16* packed) {
  const auto load = [&](int64_t key, int64_t c) {
    return key < count ? widen(v + key * stride + c) : _mm512_setzero_ps();
  };
  for (int64_t key = 0; key < kLanes; key += 2)
    for (int64_t p = 0; p < block.value_panels(); ++p)
      _mm512_storeu_si512(packed + p * block.value_panel() + key * kLanes,
                          paired(load(key, p * kLanes), load(key + 1, p * kLanes)));
}

// Turns a row's scores into weights, bfloat16, zero from `visible` on; returns what the sum and the
// values so far count beside them.
float soften_row(const float* scores, int64_t visible, int64_t width, float factor, float& largest,
                 float& sum, bf16* weights) {
  const auto load = [&](int64_t s) {
    const int64_t seen = std::clamp<int64_t>(visible - s, 0, kLanes);
    return _mm512_mask_loadu_ps(_mm512_set1_ps(kLowest), (1u << seen) - 1, scores + s);
  };
  __m512 most = _mm512_set1_ps(largest);
  for (int64_t s = 0; s < width; s += kLanes) most = _mm512_max_ps(most, load(s));
  const float now = _mm512_reduce_max_ps(most);
  const __m512 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(now * factor);
  __m512 total = _mm512_setzero_ps();
  for (int64_t s = 0; s < width; s += kLanes) {
    const __m512 weight = exp2_16(_mm512_fmsub_ps(load(s), scale, shift));
    total = _mm512_add_ps(total, weight);
    store_narrow(weights + s, weight);
  }
  const float decay = std::exp2((largest - now) * factor);
  sum = sum * decay + _mm512_reduce_add_ps(total);
  largest = now;
  return decay;
}

// Folds a group's packed block into at most kQueryRows of its rows, which begin at `first`.
void fold_rows(const Rows& rows, int64_t g, int64_t first, const Block& block, const bf16* packed_k,
               const bf16* packed_v, int64_t start, float factor, Scratch& scratch) {
  float *scores = scratch.scores.data(), decay[kQueryRows];
  bf16* weights = scratch.weights.data();
  const bf16 *q[kQueryRows], *weight_rows[kQueryRows];
  const int64_t count = std::min(kQueryRows, rows.count - first), at = g * rows.count + first;
  for (int64_t i = 0; i < count; ++i) {
    q[i] = rows.q + (first + i) * rows.row_stride + g * rows.group_stride;
    weight_rows[i] = weights + i * kKeyTile;
  }
  const auto seen = [&](int64_t i) {
    return std::clamp<int64_t>(start + (first + i) / rows.per_token - block.start + 1, 0,
                               block.keys);
  };
  const int64_t most = seen(count - 1);
  for (int64_t s = 0; s < most; s += kKeyTile) {
    const int64_t panels = (std::min(kKeyTile, most - s) + kLanes - 1) / kLanes;
    for (int64_t p = 0; p < panels; p += kPanels)
      multiply_panels(q, count, packed_k + s * block.width, block.width * kLanes, p,
                      std::min<int64_t>(p + kPanels, panels), block.width / 2,
                      [&](int64_t i, int64_t panel, __m512 sums) {
                        _mm512_storeu_ps(scores + i * kKeyTile + panel * kLanes, sums);
                      });
    for (int64_t i = 0; i < count; ++i)
      decay[i] = soften_row(scores + i * kKeyTile, seen(i) - s, panels * kLanes, factor,
                            rows.largest[at + i], rows.sum[at + i], weights + i * kKeyTile);
    for (int64_t p = 0; p < block.value_panels(); p += kPanels)
      multiply_panels(weight_rows, count, packed_v + s * kLanes, block.value_panel(), p,
                      std::min(p + kPanels, block.value_panels()), panels * kLanes / 2,
                      [&](int64_t i, int64_t panel, __m512 sums) {
                        float* to = rows.values + (at + i) * block.v_width + panel * kLanes;
                        const __m512 before = _mm512_loadu_ps(to);
                        _mm512_storeu_ps(to,
                                         _mm512_fmadd_ps(before, _mm512_set1_ps(decay[i]), sums));
                      });
  }
  if (rows.out == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    const __m512 share = _mm512_set1_ps(1.0f / rows.sum[at + i]);
    const float* from = rows.values + (at + i) * block.v_width;
    bf16* to = rows.out + ((first + i) * rows.groups + g) * block.v_width;
    for (int64_t c = 0; c < block.v_width; c += kLanes)
      store_narrow(to + c, _mm512_mul_ps(_mm512_loadu_ps(from + c), share));
  }
}

}  // namespace
}  // namespace ostro

using namespace ostro;

// Folds one block of keys into the attention of query rows, causally.
//
// Groups have their own keys; row r of a group is of the token at position start + r / per_token,
// the block's keys are at positions block_start on. State per row, float32: the largest score, the
// sum of exp(score - largest), and the values weighted alike [G, R, V]. With `out` [R, G, V] the
// result is written too.
extern "C" void ostro_attend_block(const bf16* q, int64_t q_row, int64_t q_group, const bf16* k,
                                   int64_t k_row, int64_t k_group, const bf16* v, int64_t v_row,
                                   int64_t v_group, int64_t groups, int64_t num_rows,
                                   int64_t per_token, int64_t keys, int64_t width, int64_t v_width,
                                   int64_t start, int64_t block_start, float scale, float* largest,
                                   float* sum, float* values, bf16* out, int threads) {
  const Rows rows{q, q_row, q_group, groups, num_rows, per_token, largest, sum, values, out};
  const Block block{keys, width, v_width, block_start};
  const int64_t key_panels = block.key_panels();
  const int64_t row_blocks = (num_rows + kQueryRows - 1) / kQueryRows;
  const auto packed_k = uninitialised<bf16>(groups * block.k_size());
  const auto packed_v = uninitialised<bf16>(groups * block.v_size());

#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < groups * key_panels; ++task) {
      const int64_t g = task / key_panels, s = task % key_panels * kLanes;
      const int64_t present = std::min<int64_t>(keys - s, kLanes);
      pack_keys(k + g * k_group + s * k_row, k_row, present, width / 2,
                packed_k.get() + g * block.k_size() + s * width);
      pack_values(v + g * v_group + s * v_row, v_row, present, block,
                  packed_v.get() + g * block.v_size() + s * kLanes);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = groups * row_blocks - 1; task >= 0; --task) {  // a group's longest first
      const int64_t g = task / row_blocks;
      fold_rows(rows, g, task % row_blocks * kQueryRows, block,
                packed_k.get() + g * block.k_size(), packed_v.get() + g * block.v_size(), start,
                scale * kLog2E, scratch);
    }
  }
}
