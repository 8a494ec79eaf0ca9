// Linear layers and expert MLPs over packed weights.
#include <omp.h>

#include <utility>
#include <vector>

#include "tile.h"

namespace ostro {
namespace {

constexpr int64_t kRowBlock = 192;  // rows of one task: their inputs stay in the L2 cache

// silu(gate) * up
inline __m512 swiglu(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 decay = exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate));
  return _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, decay)), up);
}

// Where the rows of each hit expert stand in the sorted order, and which row each pair is of.
struct Pairs {
  std::vector<int32_t> expert, first;  // per hit expert; `first` has one more, the end
  std::vector<int32_t> row;            // per pair, sorted by expert, then by row
  std::vector<int32_t> place;          // a row's pairs in order of their experts, then -1
  std::vector<float> weight;           // of each place
};

Pairs sort_pairs(const int64_t* expert_RK, const float* weight_RK, int64_t rows, int64_t k,
                 int64_t num_experts) {
  Pairs pairs;
  std::vector<int32_t> next(num_experts + 1, 0);
  for (int64_t i = 0; i < rows * k; ++i)
    if (expert_RK[i] >= 0) ++next[expert_RK[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) {
    if (next[e + 1]) {
      pairs.expert.push_back(e);
      pairs.first.push_back(next[e]);
    }
    next[e + 1] += next[e];
  }
  pairs.first.push_back(next[num_experts]);
  pairs.row.resize(next[num_experts]);
  pairs.place.assign(rows * k, -1);
  pairs.weight.assign(rows * k, 0.0f);
  std::vector<std::pair<int64_t, float>> chosen;
  for (int64_t r = 0; r < rows; ++r) {
    chosen.clear();
    for (int64_t i = r * k; i < (r + 1) * k; ++i)
      if (expert_RK[i] >= 0) chosen.emplace_back(expert_RK[i], weight_RK[i]);
    std::sort(chosen.begin(), chosen.end());
    for (size_t j = 0; j < chosen.size(); ++j) {
      const int32_t place = next[chosen[j].first]++;
      pairs.row[place] = r;
      pairs.place[r * k + j] = place;
      pairs.weight[r * k + j] = chosen[j].second;
    }
  }
  return pairs;
}

// y[T, O] = x[T, I] w^T; `keep(at, sums)` stores 16 outputs.
template <class T, class Keep>
void linear(const bf16* x, int64_t x_stride, const bf16* w, int64_t rows, int64_t in, int64_t out,
            T* y, int threads, Keep&& keep) {
  const int64_t panels = out / kLanes, groups = (panels + kPanels - 1) / kPanels;
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < groups * blocks; ++task) {
    const int64_t panel = task / blocks * kPanels, first = task % blocks * kRowBlock;
    const int64_t count = std::min(kRowBlock, rows - first);
    const bf16* row[kRowBlock];
    for (int64_t r = 0; r < count; ++r) row[r] = x + (first + r) * x_stride;
    multiply_panels(row, count, w, in * kLanes, panel, std::min(panel + kPanels, panels), in / 2,
                    [&](int64_t r, int64_t p, __m512 sums) {
                      keep(y + (first + r) * out + p * kLanes, sums);
                    });
  }
}

// Hidden values of one hit expert's rows, panels [panel, panel + n) of gate and up.
void hidden_panels(const bf16* const* x_rows, int64_t count, const bf16* gate_up, int64_t d,
                   int64_t f, int64_t panel, int64_t n, bf16* hidden) {
  const bf16* w[kPanels];
  for (int64_t p = 0; p < n; ++p) {
    w[p] = gate_up + (panel + p) * d * kLanes;
    w[n + p] = gate_up + (f / kLanes + panel + p) * d * kLanes;
  }
  const auto use = [&](int64_t r, auto& sums) {
    constexpr int64_t N = sizeof(sums) / sizeof(sums[0]) / 2;
    for (int64_t p = 0; p < N; ++p)
      store_narrow(hidden + r * f + (panel + p) * kLanes, swiglu(sums[p], sums[N + p]));
  };
  if (n == 2)
    multiply_rows<4>(x_rows, count, w, d / 2, use);
  else
    multiply_rows<2>(x_rows, count, w, d / 2, use);
}

}  // namespace
}  // namespace ostro

using namespace ostro;

// y[T, O] = x[T, I] w^T, rounded to bfloat16.
extern "C" void ostro_linear(const bf16* x, int64_t x_stride, const bf16* w, int64_t rows,
                             int64_t in, int64_t out, bf16* y, int threads) {
  linear(x, x_stride, w, rows, in, out, y, threads, store_narrow);
}

// The same in float32.
extern "C" void ostro_linear_wide(const bf16* x, int64_t x_stride, const bf16* w, int64_t rows,
                                  int64_t in, int64_t out, float* y, int threads) {
  linear(x, x_stride, w, rows, in, out, y, threads,
         [](float* at, __m512 sums) { _mm512_storeu_ps(at, sums); });
}

// out[r] = sum over k of weight[r, k] * down[e] swiglu(gate_up[e] x[r]), e = expert[r, k]; experts
// of a row in ascending order, all in float32 but the hidden values, which are bfloat16.
// Adds to counts[1 + E] how many pairs have no local expert, then how many each expert has.
//
// First all hidden values, expert by expert; then the outputs, panels by panels: the products of
// all pairs for 64 outputs stay in the cache until the rows are summed.
extern "C" void ostro_expert_mlp(const bf16* x, int64_t rows, int64_t k, const int64_t* expert_RK,
                                 const float* weight_RK, const bf16* gate_up, const bf16* down,
                                 int64_t num_experts, int64_t d, int64_t f, int64_t* counts,
                                 bf16* out, int threads) {
  const Pairs pairs = sort_pairs(expert_RK, weight_RK, rows, k, num_experts);
  const int64_t num_hit = pairs.expert.size(), num_pairs = pairs.row.size();
  counts[0] += rows * k - num_pairs;
  for (int64_t hit = 0; hit < num_hit; ++hit)
    counts[1 + pairs.expert[hit]] += pairs.first[hit + 1] - pairs.first[hit];
  const auto hidden = uninitialised<bf16>(num_pairs * f);
  std::vector<const bf16*> x_rows(num_pairs), hidden_rows(num_pairs);
  for (int64_t p = 0; p < num_pairs; ++p) {
    x_rows[p] = x + pairs.row[p] * d;
    hidden_rows[p] = hidden.get() + p * f;
  }
  const int64_t half = f / kLanes, step = kPanels / 2, tasks = (half + step - 1) / step;
  const int64_t panels = d / kLanes;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_hit * tasks; ++task) {
      const int64_t hit = task / tasks, panel = task % tasks * step, first = pairs.first[hit];
      hidden_panels(&x_rows[first], pairs.first[hit + 1] - first,
                    gate_up + pairs.expert[hit] * 2 * f * d, d, f, panel,
                    std::min(step, half - panel), hidden.get() + first * f);
    }
    const auto products = uninitialised<float>(num_pairs * kPanels * kLanes);
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
      const int64_t stop = std::min(panel + kPanels, panels);
      for (int64_t hit = 0; hit < num_hit; ++hit) {
        const int64_t first = pairs.first[hit];
        multiply_panels(&hidden_rows[first], pairs.first[hit + 1] - first,
                        down + pairs.expert[hit] * d * f, f * kLanes, panel, stop, f / 2,
                        [&](int64_t r, int64_t p, __m512 sums) {
                          float* to = &products[((first + r) * kPanels + p - panel) * kLanes];
                          _mm512_storeu_ps(to, sums);
                        });
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t p = panel; p < stop; ++p) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t j = r * k; j < (r + 1) * k && pairs.place[j] >= 0; ++j) {
            const float* from = &products[(pairs.place[j] * kPanels + p - panel) * kLanes];
            sum = _mm512_fmadd_ps(_mm512_set1_ps(pairs.weight[j]), _mm512_loadu_ps(from), sum);
          }
          store_narrow(out + r * d + p * kLanes, sum);
        }
    }
  }
}
