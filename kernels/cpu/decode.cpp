// Multi-head latent attention of single new tokens, absorbed, straight from the pages.
//
// A context is cut into parts by its own length alone, so a query's result does not depend on the
// queries beside it. A part goes through its keys a tile at a time: scores of all heads, their
// weights, then the values, all on bfloat16 pairs; the parts are joined at the end.
//
// In scores, lanes of a vector are heads. Few heads would leave lanes empty, so each gets `copies`
// lanes that take turns at the pairs of a key and are added at the end; the scores of that many
// keys then share a vector.
#include <omp.h>

#include <cmath>
#include <vector>

#include "tile.h"

namespace ostro {
namespace {

constexpr int64_t kTile = 192;      // keys whose latents stay in the L2 cache between the two uses
constexpr int kKeyRows = 12;        // keys that are scored together; a tile is a whole number of them
constexpr int kScorePanels = 2;     // panels of heads that are scored together
constexpr int kValueHeads = 12;     // heads whose values are summed together
constexpr int64_t kMinPart = 256;   // about the fewest keys of a part that repay joining it
constexpr int64_t kMaxParts = 32;   // of a query: enough for the threads, and bounded memory
constexpr int kLineValues = 32;     // of a cache line
static_assert(kTile % kKeyRows == 0 && kTile % 8 == 0, "only a part's end is not whole");

// Keys [start, stop) of one query.
struct Part {
  int64_t query, start, stop;
};

struct Shape {
  int64_t heads, nope, rope, latent, value, page_size;
  int64_t width() const { return latent + rope; }
  int64_t copies() const {
    return heads <= 4 && rope % 8 == 0 ? 4 : heads <= 8 && rope % 4 == 0 ? 2 : 1;
  }
  int64_t panels() const { return (heads * copies() + kLanes - 1) / kLanes; }
  int64_t lanes() const { return panels() * kLanes; }
  int64_t slots() const { return lanes() / copies(); }  // scores of a key
  int64_t query_size() const { return lanes() * width(); }
  int64_t part_size() const { return heads * latent + 2 * lanes(); }
};

// What a part has found: values [H, C], then of each lane the largest score and the sum of weights.
struct Found {
  float *values, *largest, *sum;
  Found(float* part, const Shape& shape)
      : values(part), largest(part + shape.heads * shape.latent), sum(largest + shape.lanes()) {}
};

struct Scratch {
  const bf16* keys[kTile + kKeyRows];
  std::vector<float> scores, decay;
  std::vector<int32_t> weights;  // of key k in the low half, of key k + copies in the high half
  explicit Scratch(const Shape& shape)
      : scores(kTile * shape.slots()), decay(shape.lanes()), weights(kTile / 2 * shape.slots()) {}
};

// Puts `count` pairs of one head's query, from pair `first` on, at their places among the packed
// queries of all heads.
inline void place_pairs(const bf16* from, int64_t first, int64_t count, int64_t head,
                        const Shape& shape, bf16* packed) {
  const int64_t copies = shape.copies(), lane = head * copies;
  bf16* to = packed + lane / kLanes * shape.width() * kLanes;
  to += (first / copies * kLanes + lane % kLanes) * 2;
  for (int64_t j = 0; j < count; j += copies, to += 2 * kLanes)
    for (int64_t i = 0; i < copies; ++i) copy_pair(from + 2 * (j + i), to + 2 * i);
}

// Where keys [start, stop) stand.
void find_keys(const bf16* cache, const int64_t* table, const Shape& shape, int64_t start,
               int64_t stop, const bf16** keys) {
  while (start < stop) {
    const int64_t page = start / shape.page_size, place = start % shape.page_size;
    const int64_t end = std::min(stop, start - place + shape.page_size);
    const bf16* row = cache + (table[page] * shape.page_size + place) * shape.width();
    for (; start < end; ++start, row += shape.width()) *keys++ = row;
  }
}

template <int Copies>
inline __m512bh broadcast_pairs(const bf16* from) {
  if constexpr (Copies == 1) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  } else if constexpr (Copies == 2) {
    int64_t pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return (__m512bh)_mm512_set1_epi64(pairs);
  } else {
    return (__m512bh)_mm512_broadcast_i32x4(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
}

// Stores the scores of one key, after adding each head's lanes.
template <int Copies>
inline void store_scores(__m512 sums, float* to) {
  if constexpr (Copies == 1) {
    _mm512_storeu_ps(to, sums);
  } else {
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0b10110001));
    if constexpr (Copies == 4) sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0b01001110));
    const __m512i index = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(Copies));
    _mm512_mask_storeu_ps(to, (1u << kLanes / Copies) - 1, _mm512_permutexvar_ps(index, sums));
  }
}

// Scores of `count` keys, at most M, against N panels of heads. Meanwhile the keys `ahead` are
// fetched: the processor does not foresee the next page, and would wait for every one.
template <int Copies, int M, int N>
inline void score_keys(const bf16* const* keys, const bf16* const* ahead, int64_t count,
                       const bf16* q, int64_t width, float* scores, int64_t slots) {
  if constexpr (M > 1)
    if (count < M)
      return score_keys<Copies, M - 1, N>(keys, ahead, count, q, width, scores, slots);
  __m512 sums[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  for (int64_t line = 0; line < width; line += kLineValues) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
      _mm_prefetch(reinterpret_cast<const char*>(ahead[m] + line), _MM_HINT_T1);
    const int64_t stop = std::min<int64_t>(line + kLineValues, width);
    for (int64_t c = line; c < stop; c += 2 * Copies) {
      __m512bh heads[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
        heads[n] = (__m512bh)_mm512_loadu_si512(q + n * width * kLanes + c / Copies * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const __m512bh pairs = broadcast_pairs<Copies>(keys[m] + c);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], pairs, heads[n]);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store_scores<Copies>(sums[m][n], scores + m * slots + n * kLanes);
}

template <int Copies>
void score_tile(const bf16* q, const Shape& shape, int64_t count, Scratch& scratch) {
  const int64_t width = shape.width(), panels = shape.panels(), slots = shape.slots();
  for (int64_t p = 0; p < panels; p += kScorePanels)
    for (int64_t k = 0; k < count; k += kKeyRows) {
      const bf16* const* keys = scratch.keys + k;
      const bf16* const* ahead = p ? keys : keys + kKeyRows;
      const bf16* heads = q + p * width * kLanes;
      float* scores = scratch.scores.data() + k * slots + p * kLanes;
      const int64_t rows = std::min<int64_t>(count - k, kKeyRows);
      if (Copies == 1 && p + 1 < panels)
        score_keys<Copies, kKeyRows, 2>(keys, ahead, rows, heads, width, scores, slots);
      else
        score_keys<Copies, kKeyRows, 1>(keys, ahead, rows, heads, width, scores, slots);
    }
}

// Combines the lanes of a vector that belong to one head of different keys; all of them get it.
template <int Copies, class Combine>
inline __m512 over_keys(__m512 values, Combine&& combine) {
  if constexpr (Copies > 1)
    values = combine(values, _mm512_shuffle_f32x4(values, values, 0b01001110));
  if constexpr (Copies > 2)
    values = combine(values, _mm512_shuffle_f32x4(values, values, 0b10110001));
  return values;
}

// Turns the scores of a tile into weights exp(score - largest), bfloat16, which are also what the
// sum is of; `decay` is what the sum and the values so far count beside them.
template <int Copies>
void weigh_tile(int64_t count, const Shape& shape, float factor, const Found& found,
                Scratch& scratch) {
  const auto larger = [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); };
  const auto plus = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
  const __m512 scale = _mm512_set1_ps(factor);
  const int64_t slots = shape.slots();
  for (int64_t lane = 0; lane < shape.lanes(); lane += kLanes) {
    const float* scores = scratch.scores.data() + lane;
    const __m512 before = _mm512_loadu_ps(found.largest + lane);
    __m512 most = before;
    for (int64_t k = 0; k < count; k += Copies)
      most = _mm512_max_ps(most, _mm512_loadu_ps(scores + k * slots));
    most = over_keys<Copies>(most, larger);
    const __m512 shift = _mm512_mul_ps(most, scale);
    const auto weight = [&](__m512 score) { return exp2_16(_mm512_fmsub_ps(score, scale, shift)); };
    __m512 total = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 2 * Copies) {
      const __m512 low = rounded(weight(_mm512_loadu_ps(scores + k * slots)));
      const __m512 high = rounded(weight(_mm512_loadu_ps(scores + (k + Copies) * slots)));
      total = _mm512_add_ps(total, _mm512_add_ps(low, high));
      _mm512_storeu_si512(scratch.weights.data() + k / 2 * slots + lane, paired(low, high));
    }
    const __m512 decay = weight(before), sum = _mm512_loadu_ps(found.sum + lane);
    total = over_keys<Copies>(total, plus);
    _mm512_storeu_ps(found.sum + lane, _mm512_fmadd_ps(sum, decay, total));
    _mm512_storeu_ps(found.largest + lane, most);
    _mm512_storeu_ps(scratch.decay.data() + lane, decay);
  }
}

// values[h][c] = decay[h] * values[h][c] + sum over keys of weight[key][h] * key[c], for `heads`
// heads, at most M, and 32 latents from c on.
template <int Copies, int M>
inline void sum_values(const bf16* const* keys, int64_t count, int64_t c, int64_t heads,
                       const int32_t* weights, int64_t slots, const float* decay, float* values,
                       int64_t latent) {
  if constexpr (M > 1)
    if (heads < M)
      return sum_values<Copies, M - 1>(keys, count, c, heads, weights, slots, decay, values,
                                       latent);
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(kLanes));
  __m512 sums[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const float* from = values + m * latent + c;
    sums[m][0] = _mm512_mul_ps(_mm512_set1_ps(decay[m]), _mm512_loadu_ps(from));
    sums[m][1] = _mm512_mul_ps(_mm512_set1_ps(decay[m]), _mm512_loadu_ps(from + kLanes));
  }
  for (int64_t k = 0; k < count; k += 2 * Copies)
    for (int64_t i = k; i < k + Copies; ++i, weights += slots) {
      const __m512i low = _mm512_loadu_si512(keys[i] + c);
      const __m512i high = _mm512_loadu_si512(keys[i + Copies] + c);
      const __m512bh pairs[] = {(__m512bh)_mm512_permutex2var_epi16(low, first, high),
                                (__m512bh)_mm512_permutex2var_epi16(low, second, high)};
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[m]);
        sums[m][0] = _mm512_dpbf16_ps(sums[m][0], weight, pairs[0]);
        sums[m][1] = _mm512_dpbf16_ps(sums[m][1], weight, pairs[1]);
      }
    }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(values + m * latent + c, sums[m][0]);
    _mm512_storeu_ps(values + m * latent + c + kLanes, sums[m][1]);
  }
}

template <int Copies>
void add_values(int64_t count, const Shape& shape, const Found& found, const Scratch& scratch) {
  const int64_t groups = (shape.heads + kValueHeads - 1) / kValueHeads;
  for (int64_t g = 0, h = 0; g < groups; ++g) {
    const int64_t heads = (shape.heads - h + groups - g - 1) / (groups - g);
    for (int64_t c = 0; c < shape.latent; c += 2 * kLanes)
      sum_values<Copies, kValueHeads>(scratch.keys, count, c, heads, scratch.weights.data() + h,
                                      shape.slots(), scratch.decay.data() + h,
                                      found.values + h * shape.latent, shape.latent);
    h += heads;
  }
}

template <int Copies>
void attend_part(const bf16* cache, const int64_t* table, const Part& part, const bf16* q,
                 const Shape& shape, float factor, Scratch& scratch, const Found& found) {
  std::fill_n(found.values, shape.heads * shape.latent, 0.0f);
  std::fill_n(found.largest, shape.lanes(), kLowest);
  std::fill_n(found.sum, shape.lanes(), 0.0f);
  const int64_t slots = shape.slots(), step = 2 * Copies;
  for (int64_t start = part.start; start < part.stop; start += kTile) {
    const int64_t count = std::min(part.stop - start, kTile);
    const int64_t known = std::min(part.stop - start, kTile + kKeyRows);
    find_keys(cache, table, shape, start, start + known, scratch.keys);
    std::fill(scratch.keys + known, std::end(scratch.keys), scratch.keys[known - 1]);
    score_tile<Copies>(q, shape, count, scratch);
    const int64_t whole = (count + step - 1) / step * step;  // those that are not there weigh 0
    std::fill_n(scratch.scores.begin() + count * slots, (whole - count) * slots, kLowest);
    weigh_tile<Copies>(whole, shape, factor, found, scratch);
    add_values<Copies>(whole, shape, found, scratch);
  }
}

// Joins what the parts found for one head: each counts by its largest score.
void join_parts(float* parts, int64_t num_parts, int64_t head, const Shape& shape, float factor,
                bf16* out) {
  float shares[kMaxParts], most = kLowest, total = 0.0f;
  const auto found = [&](int64_t i) { return Found(parts + i * shape.part_size(), shape); };
  const int64_t lane = head;  // the first of its copies
  for (int64_t i = 0; i < num_parts; ++i) most = std::max(most, found(i).largest[lane]);
  for (int64_t i = 0; i < num_parts; ++i) {
    shares[i] = std::exp2((found(i).largest[lane] - most) * factor);
    total += found(i).sum[lane] * shares[i];
  }
  for (int64_t c = 0; c < shape.latent; c += kLanes) {
    __m512 value = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_parts; ++i)
      value = _mm512_fmadd_ps(_mm512_set1_ps(shares[i] / total),
                              _mm512_loadu_ps(found(i).values + head * shape.latent + c), value);
    store_narrow(out + c, value);
  }
}

// The parts of all queries, and where each query's begin.
struct Parts {
  std::vector<Part> all;
  std::vector<int64_t> first;
  Parts(const int64_t* lengths, int64_t queries) : first(1, 0) {
    for (int64_t t = 0; t < queries; ++t) {
      const int64_t most = std::min((lengths[t] + kMinPart - 1) / kMinPart, kMaxParts);
      const int64_t step = (lengths[t] + most - 1) / most;
      for (int64_t s = 0; s < lengths[t]; s += step)
        all.push_back({t, s, std::min(s + step, lengths[t])});
      first.push_back(all.size());
    }
  }
};

}  // namespace
}  // namespace ostro

using namespace ostro;

// out[t, h] = softmax over t's context of (q . key * scale) times the latents, times Wuv[h]^T.
//
// `scale` is above 0. q [T, H, nope + rope]; w_uk and w_uv packed per head as [C, N] and [V, C]; the pages of query t
// stand at pages[first_page[t] ..]; its context has lengths[t] >= 1 keys.
extern "C" void ostro_mla_decode(const bf16* q, int64_t q_row, int64_t q_head, const bf16* w_uk,
                                 const bf16* w_uv, const bf16* cache, const int64_t* pages,
                                 const int64_t* first_page, const int64_t* lengths, int64_t queries,
                                 int64_t heads, int64_t nope, int64_t rope, int64_t latent,
                                 int64_t value, int64_t page_size, float scale, bf16* out,
                                 int threads) {
  const Shape shape{heads, nope, rope, latent, value, page_size};
  const Parts parts(lengths, queries);
  const int64_t query_size = shape.query_size(), part_size = shape.part_size();
  const auto packed = uninitialised<bf16>(queries * query_size);
  const auto found = uninitialised<float>(parts.all.size() * part_size);
  const auto latents = uninitialised<bf16>(queries * heads * latent);
  if (heads * shape.copies() % kLanes) std::fill_n(packed.get(), queries * query_size, bf16{0});
  const int64_t latent_groups = (latent / kLanes + kPanels - 1) / kPanels;
  const int64_t value_groups = (value / kLanes + kPanels - 1) / kPanels;
  const auto attend = shape.copies() == 4   ? attend_part<4>
                      : shape.copies() == 2 ? attend_part<2>
                                            : attend_part<1>;
  const float factor = scale * kLog2E;

#pragma omp parallel num_threads(threads)
  {
    std::vector<const bf16*> rows(queries);
    Scratch scratch(shape);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * latent_groups; ++task) {
      const int64_t h = task / latent_groups, panel = task % latent_groups * kPanels;
      for (int64_t t = 0; t < queries; ++t) rows[t] = q + t * q_row + h * q_head;
      multiply_panels(rows.data(), queries, w_uk + h * latent * nope, nope * kLanes, panel,
                      std::min(panel + kPanels, latent / kLanes), nope / 2,
                      [&](int64_t t, int64_t p, __m512 sums) {
                        alignas(32) bf16 narrow[kLanes];
                        store_narrow(narrow, sums);
                        place_pairs(narrow, p * kLanes / 2, kLanes / 2, h, shape,
                                    packed.get() + t * query_size);
                      });
      if (panel) continue;
      for (int64_t t = 0; t < queries; ++t)
        place_pairs(rows[t] + nope, latent / 2, rope / 2, h, shape, packed.get() + t * query_size);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.all.size(); ++i) {
      const Part& part = parts.all[i];
      attend(cache, pages + first_page[part.query], part, packed.get() + part.query * query_size,
             shape, factor, scratch, Found(found.get() + i * part_size, shape));
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < queries * heads; ++task) {
      const int64_t t = task / heads;
      join_parts(found.get() + parts.first[t] * part_size, parts.first[t + 1] - parts.first[t],
                 task % heads, shape, factor, latents.get() + task * latent);
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
