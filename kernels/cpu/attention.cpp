// Multi-head latent attention over packed keys: single new tokens (absorbed, straight from the
// pages) and chunks of tokens (one block of keys at a time, with an online softmax).
#include <omp.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tile.h"

namespace ostro {
namespace {

constexpr int64_t kChunk = 512;    // keys of one decode task; fixed, so that sums do not depend
                                   // on how many requests or threads there are
constexpr int64_t kKeyTile = 256;  // keys that a prefill task scores at once
constexpr int64_t kQueryRows = 24;  // query rows of a prefill task
constexpr float kLowest = -std::numeric_limits<float>::infinity();

inline void copy_pair(const bf16* from, bf16* to) { std::memcpy(to, from, 2 * sizeof(bf16)); }

// A decode task: keys [start, stop) of one query.
struct Chunk {
  int64_t query, start, stop;
};

struct Shape {
  int64_t heads, nope, rope, latent, value, page_size;
  int64_t width() const { return latent + rope; }
  int64_t head_panels() const { return (heads + kLanes - 1) / kLanes; }
  int64_t lanes() const { return head_panels() * kLanes; }
};

// Puts 16 values of one head's query at their place among the packed queries of all heads.
inline void place_query(__m512 values, int64_t panel, int64_t lane, bf16* packed) {
  alignas(32) bf16 narrow[kLanes];
  store_narrow(narrow, values);
  for (int64_t j = 0; j < kLanes / 2; ++j)
    copy_pair(narrow + 2 * j, packed + ((panel * kLanes / 2 + j) * kLanes + lane) * 2);
}

// Scores of the heads (lanes) against each key, then their weights exp(score - largest).
void weigh_keys(const bf16* const* keys, int64_t num_keys, const bf16* packed_q, const Shape& shape,
                float scale, float* weights, float* largest, float* sum) {
  const int64_t lanes = shape.lanes(), panels = shape.head_panels();
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t p = 0; p < panels; p += kPanels)
    multiply_panels(keys, num_keys, packed_q, shape.width() * kLanes, p,
                    std::min<int64_t>(p + kPanels, panels), shape.width() / 2,
                    [&](int64_t key, int64_t panel, __m512 sums) {
                      _mm512_storeu_ps(weights + key * lanes + panel * kLanes,
                                       _mm512_mul_ps(sums, factor));
                    });
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    __m512 most = _mm512_set1_ps(kLowest), total = _mm512_setzero_ps();
    for (int64_t key = 0; key < num_keys; ++key)
      most = _mm512_max_ps(most, _mm512_loadu_ps(weights + key * lanes + lane));
    for (int64_t key = 0; key < num_keys; ++key) {
      float* at = weights + key * lanes + lane;
      const __m512 weight = exp16(_mm512_sub_ps(_mm512_loadu_ps(at), most));
      total = _mm512_add_ps(total, weight);
      _mm512_storeu_ps(at, weight);
    }
    _mm512_storeu_ps(largest + lane, most);
    _mm512_storeu_ps(sum + lane, total);
  }
}

// values[h][c] = sum over keys of weight[key][h] * key[c], for H heads and 64 latents from c on.
template <int H>
inline void sum_values(const bf16* const* keys, int64_t num_keys, const float* weights,
                       int64_t lanes, int64_t c, int64_t latent, float* values) {
  __m512 sums[H][4];
  for (auto& of_head : sums)
    for (__m512& sum : of_head) sum = _mm512_setzero_ps();
  for (int64_t key = 0; key < num_keys; ++key) {
    __m512 value[4];
    for (int64_t v = 0; v < 4; ++v) value[v] = widen(keys[key] + c + v * kLanes);
#pragma GCC unroll 4
    for (int64_t h = 0; h < H; ++h) {
      const __m512 weight = _mm512_set1_ps(weights[key * lanes + h]);
      for (int64_t v = 0; v < 4; ++v) sums[h][v] = _mm512_fmadd_ps(weight, value[v], sums[h][v]);
    }
  }
  for (int64_t h = 0; h < H; ++h)
    for (int64_t v = 0; v < 4; ++v)
      _mm512_storeu_ps(values + h * latent + c + v * kLanes, sums[h][v]);
}

// One task's part of a query's result: values of every head, then their largest scores and sums.
void attend_chunk(const bf16* const* keys, int64_t num_keys, const bf16* packed_q,
                  const Shape& shape, float scale, float* weights, float* part) {
  float* largest = part + shape.heads * shape.latent;
  weigh_keys(keys, num_keys, packed_q, shape, scale, weights, largest, largest + shape.lanes());
  for (int64_t c = 0; c < shape.latent; c += 4 * kLanes)
    for (int64_t h = 0; h < shape.heads; h += 4) {
      const float* of_heads = weights + h;
      float* to = part + h * shape.latent;
      switch (std::min<int64_t>(shape.heads - h, 4)) {
        case 1: sum_values<1>(keys, num_keys, of_heads, shape.lanes(), c, shape.latent, to); break;
        case 2: sum_values<2>(keys, num_keys, of_heads, shape.lanes(), c, shape.latent, to); break;
        case 3: sum_values<3>(keys, num_keys, of_heads, shape.lanes(), c, shape.latent, to); break;
        default: sum_values<4>(keys, num_keys, of_heads, shape.lanes(), c, shape.latent, to);
      }
    }
}

// Joins the parts of one head: what each chunk found counts by its largest score.
void join_parts(const float* parts, int64_t num_parts, int64_t part_size, int64_t head,
                const Shape& shape, bf16* out) {
  const float* largest = parts + shape.heads * shape.latent + head;
  const float* sum = largest + shape.lanes();
  float most = kLowest, total = 0.0f;
  for (int64_t i = 0; i < num_parts; ++i) most = std::max(most, largest[i * part_size]);
  for (int64_t i = 0; i < num_parts; ++i)
    total += sum[i * part_size] * std::exp(largest[i * part_size] - most);
  for (int64_t c = 0; c < shape.latent; c += kLanes) {
    __m512 value = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_parts; ++i) {
      const float share = std::exp(largest[i * part_size] - most) / total;
      value = _mm512_fmadd_ps(_mm512_set1_ps(share),
                              _mm512_loadu_ps(parts + i * part_size + head * shape.latent + c),
                              value);
    }
    store_narrow(out + c, value);
  }
}

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

// Two keys' values as one vector of each panel of 16; a second key that is not there counts as 0.
void pack_values(const bf16* v, int64_t stride, bool both, int64_t width, int64_t panel_size,
                 bf16* packed) {
  for (int64_t c = 0; c < width; ++c) {
    bf16* to = packed + c / kLanes * panel_size + c % kLanes * 2;
    to[0] = v[c];
    to[1] = both ? v[stride + c] : 0;
  }
}

// Turns scores of a row into weights, bfloat16, zero from `visible` on; returns the old sum's decay.
float soften_row(const float* scores, int64_t visible, int64_t width, float scale, float& largest,
                 float& sum, bf16* weights) {
  const __m512 factor = _mm512_set1_ps(scale);
  const auto load = [&](int64_t s) {
    const __mmask16 seen = visible - s >= kLanes ? 0xffff : (1u << std::max<int64_t>(visible - s, 0)) - 1;
    const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + s), factor);
    return _mm512_mask_mov_ps(_mm512_set1_ps(kLowest), seen, score);
  };
  __m512 most = _mm512_set1_ps(kLowest);
  for (int64_t s = 0; s < width; s += kLanes) most = _mm512_max_ps(most, load(s));
  const float now = std::max(largest, _mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  for (int64_t s = 0; s < width; s += kLanes) {
    const __m512 weight = exp16(_mm512_sub_ps(load(s), _mm512_set1_ps(now)));
    total = _mm512_add_ps(total, weight);
    store_narrow(weights + s, weight);
  }
  const float decay = largest == kLowest ? 0.0f : std::exp(largest - now);
  sum = sum * decay + _mm512_reduce_add_ps(total);
  largest = now;
  return decay;
}

}  // namespace
}  // namespace ostro

using namespace ostro;

// out[t, h] = softmax over t's context of (q . key * scale) times the latents, times Wuv[h]^T.
//
// q [T, H, nope + rope]; w_uk and w_uv packed per head as [C, N] and [V, C]; the pages of query t
// stand at pages[first_page[t] ..]; its context has lengths[t] >= 1 keys.
extern "C" void ostro_mla_decode(const bf16* q, int64_t q_row, int64_t q_head, const bf16* w_uk,
                                 const bf16* w_uv, const bf16* cache, const int64_t* pages,
                                 const int64_t* first_page, const int64_t* lengths, int64_t queries,
                                 int64_t heads, int64_t nope, int64_t rope, int64_t latent,
                                 int64_t value, int64_t page_size, float scale, bf16* out,
                                 int threads) {
  const Shape shape{heads, nope, rope, latent, value, page_size};
  const int64_t query_size = shape.lanes() * shape.width();
  const int64_t part_size = heads * latent + 2 * shape.lanes();
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;
  for (int64_t t = 0; t < queries; ++t) {
    first_chunk.push_back(chunks.size());
    for (int64_t s = 0; s < lengths[t]; s += kChunk)
      chunks.push_back({t, s, std::min(s + kChunk, lengths[t])});
  }
  first_chunk.push_back(chunks.size());
  const auto packed = uninitialised<bf16>(queries * query_size);
  const auto parts = uninitialised<float>(chunks.size() * part_size);
  const auto latents = uninitialised<bf16>(queries * heads * latent);
  if (heads % kLanes) std::memset(packed.get(), 0, queries * query_size * sizeof(bf16));
  const int64_t latent_groups = (latent / kLanes + kPanels - 1) / kPanels;
  const int64_t value_groups = (value / kLanes + kPanels - 1) / kPanels;

#pragma omp parallel num_threads(threads)
  {
    std::vector<const bf16*> rows(std::max(queries, kChunk));
    std::vector<float> weights(kChunk * shape.lanes());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * latent_groups; ++task) {
      const int64_t h = task / latent_groups, panel = task % latent_groups * kPanels;
      bf16* of_head = packed.get() + h / kLanes * shape.width() * kLanes;
      for (int64_t t = 0; t < queries; ++t) rows[t] = q + t * q_row + h * q_head;
      multiply_panels(rows.data(), queries, w_uk + h * latent * nope, nope * kLanes, panel,
                      std::min(panel + kPanels, latent / kLanes), nope / 2,
                      [&](int64_t t, int64_t p, __m512 sums) {
                        place_query(sums, p, h % kLanes, of_head + t * query_size);
                      });
      if (panel) continue;
      for (int64_t t = 0; t < queries; ++t)
        for (int64_t j = 0; j < rope / 2; ++j)
          copy_pair(rows[t] + nope + 2 * j,
                    of_head + t * query_size + ((latent / 2 + j) * kLanes + h % kLanes) * 2);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Chunk& chunk = chunks[i];
      const int64_t* table = pages + first_page[chunk.query];
      for (int64_t s = chunk.start; s < chunk.stop; ++s)
        rows[s - chunk.start] =
            cache + (table[s / page_size] * page_size + s % page_size) * shape.width();
      attend_chunk(rows.data(), chunk.stop - chunk.start, packed.get() + chunk.query * query_size,
                   shape, scale, weights.data(), parts.get() + i * part_size);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < queries * heads; ++task) {
      const int64_t t = task / heads;
      join_parts(parts.get() + first_chunk[t] * part_size, first_chunk[t + 1] - first_chunk[t],
                 part_size, task % heads, shape, latents.get() + task * latent);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * value_groups; ++task) {
      const int64_t h = task / value_groups, panel = task % value_groups * kPanels;
      for (int64_t t = 0; t < queries; ++t) rows[t] = latents.get() + (t * heads + h) * latent;
      multiply_panels(rows.data(), queries, w_uv + h * value * latent, latent * kLanes, panel,
                      std::min(panel + kPanels, value / kLanes), latent / 2,
                      [&](int64_t t, int64_t p, __m512 sums) {
                        store_narrow(out + (t * heads + h) * value + p * kLanes, sums);
                      });
    }
  }
}

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
  const int64_t key_panels = (keys + kLanes - 1) / kLanes, padded = key_panels * kLanes;
  const int64_t value_panels = v_width / kLanes, value_panel = padded * kLanes;
  const auto packed_k = uninitialised<bf16>(groups * padded * width);
  const auto packed_v = uninitialised<bf16>(groups * padded * v_width);
  const int64_t row_blocks = (num_rows + kQueryRows - 1) / kQueryRows;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < groups * key_panels; ++task) {
      const int64_t g = task / key_panels, s = task % key_panels * kLanes;
      pack_keys(k + g * k_group + s * k_row, k_row, std::min<int64_t>(keys - s, kLanes), width / 2,
                packed_k.get() + g * padded * width + s * width);
      for (int64_t pair = s; pair < s + kLanes; pair += 2) {
        bf16* to = packed_v.get() + g * padded * v_width + pair * kLanes;
        if (pair < keys)
          pack_values(v + g * v_group + pair * v_row, v_row, pair + 1 < keys, v_width, value_panel,
                      to);
        else
          for (int64_t p = 0; p < value_panels; ++p)
            std::memset(to + p * value_panel, 0, 2 * kLanes * sizeof(bf16));
      }
    }
    std::vector<float> scores(kQueryRows * kKeyTile);
    std::vector<bf16> weights(kQueryRows * kKeyTile);
    float decay[kQueryRows];
    const bf16 *rows[kQueryRows], *weight_rows[kQueryRows];
    for (int64_t i = 0; i < kQueryRows; ++i) weight_rows[i] = weights.data() + i * kKeyTile;
#pragma omp for schedule(dynamic)
    for (int64_t task = groups * row_blocks - 1; task >= 0; --task) {  // the longest first
      const int64_t g = task % groups, first = task / groups * kQueryRows;
      const int64_t count = std::min(kQueryRows, num_rows - first);
      const int64_t state = g * num_rows + first;
      const auto seen = [&](int64_t i) {
        return std::clamp<int64_t>(start + (first + i) / per_token - block_start + 1, 0, keys);
      };
      for (int64_t i = 0; i < count; ++i) rows[i] = q + (first + i) * q_row + g * q_group;
      const int64_t most = seen(count - 1);
      for (int64_t s = 0; s < most; s += kKeyTile) {
        const int64_t panels = (std::min(kKeyTile, most - s) + kLanes - 1) / kLanes;
        for (int64_t p = 0; p < panels; p += kPanels)
          multiply_panels(rows, count, packed_k.get() + (g * padded + s) * width, width * kLanes, p,
                          std::min<int64_t>(p + kPanels, panels), width / 2,
                          [&](int64_t i, int64_t panel, __m512 sums) {
                            _mm512_storeu_ps(&scores[i * kKeyTile + panel * kLanes], sums);
                          });
        for (int64_t i = 0; i < count; ++i)
          decay[i] = soften_row(&scores[i * kKeyTile], seen(i) - s, panels * kLanes, scale,
                                largest[state + i], sum[state + i], &weights[i * kKeyTile]);
        for (int64_t p = 0; p < value_panels; p += kPanels)
          multiply_panels(weight_rows, count, packed_v.get() + g * padded * v_width + s * kLanes,
                          value_panel, p, std::min(p + kPanels, value_panels),
                          panels * kLanes / 2, [&](int64_t i, int64_t panel, __m512 sums) {
                            float* to = values + (state + i) * v_width + panel * kLanes;
                            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to),
                                                                 _mm512_set1_ps(decay[i]), sums));
                          });
      }
      if (out == nullptr) continue;
      for (int64_t i = 0; i < count; ++i) {
        const __m512 share = _mm512_set1_ps(1.0f / sum[state + i]);
        for (int64_t c = 0; c < v_width; c += kLanes)
          store_narrow(out + ((first + i) * groups + g) * v_width + c,
                       _mm512_mul_ps(_mm512_loadu_ps(values + (state + i) * v_width + c), share));
      }
    }
  }
}
