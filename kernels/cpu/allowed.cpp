// Choices among the tokens that a mask allows: bits of tokens, least significant first.
#include "tile.h"

namespace ostro {
namespace {

constexpr int64_t kWord = 64;  // tokens whose bits are looked at together: most words are empty

// Calls visit(first, lanes) for every vector that has allowed tokens; `lanes` has only these.
template <class Visit>
void each_allowed(const uint8_t* allowed, int64_t count, const Visit& visit) {
  for (int64_t v = 0; v < count; v += kWord) {
    uint64_t word = 0;
    const int64_t left = std::min(count - v, kWord);
    std::memcpy(&word, allowed + v / 8, (left + 7) / 8);
    if (left < kWord) word &= (uint64_t{1} << left) - 1;
    for (int64_t i = v; word; i += kLanes, word >>= kLanes)
      if (const __mmask16 lanes = static_cast<__mmask16>(word)) visit(i, lanes);
  }
}

inline __m512i ids_from(int64_t first) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first)));
}

}  // namespace
}  // namespace ostro

using namespace ostro;

// The largest allowed logit's token, the lowest of equals; 0 where none is above -inf.
extern "C" void ostro_best_allowed(const float* logits, const uint8_t* allowed, int64_t count,
                                   int64_t* best) {
  __m512 largest = _mm512_set1_ps(kLowest);
  __m512i where = _mm512_setzero_si512();
  each_allowed(allowed, count, [&](int64_t first, __mmask16 lanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes, logits + first);
    lanes = _mm512_mask_cmp_ps_mask(lanes, value, largest, _CMP_GT_OQ);
    largest = _mm512_mask_mov_ps(largest, lanes, value);
    where = _mm512_mask_mov_epi32(where, lanes, ids_from(first));
  });
  const __m512 all = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  *best = _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(largest, all, _CMP_EQ_OQ), where);
}

// Allowed logits and their tokens, ascending, and how many; both have room for 16 more than `count`.
extern "C" void ostro_gather_allowed(const float* logits, const uint8_t* allowed, int64_t count,
                                     float* gathered, int32_t* ids, int64_t* num_allowed) {
  int64_t n = 0;
  each_allowed(allowed, count, [&](int64_t first, __mmask16 lanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes, logits + first);
    _mm512_storeu_ps(gathered + n, _mm512_maskz_compress_ps(lanes, value));
    _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32(lanes, ids_from(first)));
    n += __builtin_popcount(lanes);
  });
  *num_allowed = n;
}
