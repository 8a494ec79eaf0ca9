// Linear layers and expert MLPs over packed weights.
#include <omp.h>

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
  std::vector<int32_t> place;          // per (row, k): its pair, or -1
};

Pairs sort_pairs(const int64_t* expert_RK, int64_t rows, int64_t k, int64_t num_experts) {
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
  for (int64_t i = 0; i < rows * k; ++i) {
    if (expert_RK[i] < 0) continue;
    const int32_t place = next[expert_RK[i]]++;
    pairs.place[i] = place;
    pairs.row[place] = i / k;
  }
  return pairs;
}

// One task of a phase: so many panels for the rows of one hit expert.
struct Task {
  int32_t hit, panel, stop;
};

std::vector<Task> make_tasks(int64_t num_hit, int64_t panels, int64_t step) {
  std::vector<Task> tasks;
  for (int64_t hit = 0; hit < num_hit; ++hit)
    for (int64_t p = 0; p < panels; p += step)
      tasks.push_back({(int32_t)hit, (int32_t)p, (int32_t)std::min(p + step, panels)});
  return tasks;
}

}  // namespace
}  // namespace ostro

using namespace ostro;

// y[T, O] = x[T, I] w^T, rounded to bfloat16.
extern "C" void ostro_linear(const bf16* x, int64_t x_stride, const bf16* w, int64_t rows,
                             int64_t in, int64_t out, bf16* y, int64_t y_stride, int threads) {
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
                      store_narrow(y + (first + r) * y_stride + p * kLanes, sums);
                    });
  }
}

// out[r] = sum over k of weight[r, k] * down[e] swiglu(gate_up[e] x[r]), e = expert[r, k]; experts
// of a row in ascending order, all in float32 but the hidden values, which are bfloat16.
// `hidden` holds [R * K, F] and `products` [R * K, D] values of work space. Adds to counts[1 + E] how
// many pairs have no local expert, then how many each expert has.
extern "C" void ostro_expert_mlp(const bf16* x, int64_t rows, int64_t k, const int64_t* expert_RK,
                                 const float* weight_RK, const bf16* gate_up, const bf16* down,
                                 int64_t num_experts, int64_t d, int64_t f, int64_t* counts,
                                 bf16* hidden, float* products, bf16* out, int threads) {
  const Pairs pairs = sort_pairs(expert_RK, rows, k, num_experts);
  const int64_t num_hit = pairs.expert.size(), num_pairs = pairs.row.size();
  const int64_t half = f / kLanes;
  counts[0] += rows * k - num_pairs;
  for (int64_t hit = 0; hit < num_hit; ++hit)
    counts[1 + pairs.expert[hit]] += pairs.first[hit + 1] - pairs.first[hit];
  const std::vector<Task> up = make_tasks(num_hit, half, kPanels / 2);
  const std::vector<Task> down_tasks = make_tasks(num_hit, d / kLanes, kPanels);
  std::vector<const bf16*> x_rows(num_pairs), hidden_rows(num_pairs);
  for (int64_t p = 0; p < num_pairs; ++p) {
    x_rows[p] = x + pairs.row[p] * d;
    hidden_rows[p] = hidden + p * f;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < up.size(); ++i) {
      const Task& task = up[i];
      const bf16* weight = gate_up + pairs.expert[task.hit] * 2 * f * d;
      const int64_t first = pairs.first[task.hit], count = pairs.first[task.hit + 1] - first;
      const int64_t panel_size = d * kLanes;
      const bf16* w[kPanels];
      const int64_t n = task.stop - task.panel;
      for (int64_t p = 0; p < n; ++p) {
        w[p] = weight + (task.panel + p) * panel_size;
        w[n + p] = weight + (half + task.panel + p) * panel_size;
      }
      const auto use = [&](int64_t r, auto& sums) {
        constexpr int64_t N = sizeof(sums) / sizeof(sums[0]) / 2;
        for (int64_t p = 0; p < N; ++p)
          store_narrow(hidden + (first + r) * f + (task.panel + p) * kLanes,
                       swiglu(sums[p], sums[N + p]));
      };
      if (n == 2)
        multiply_rows<4>(&x_rows[first], count, w, d / 2, use);
      else
        multiply_rows<2>(&x_rows[first], count, w, d / 2, use);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < down_tasks.size(); ++i) {
      const Task& task = down_tasks[i];
      const int64_t first = pairs.first[task.hit], count = pairs.first[task.hit + 1] - first;
      multiply_panels(&hidden_rows[first], count, down + pairs.expert[task.hit] * d * f,
                      f * kLanes, task.panel, task.stop, f / 2,
                      [&](int64_t r, int64_t p, __m512 sums) {
                        _mm512_storeu_ps(products + (first + r) * d + p * kLanes, sums);
                      });
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      int64_t order[64];
      int64_t present = 0;
      for (int64_t j = 0; j < k; ++j)
        if (expert_RK[r * k + j] >= 0) order[present++] = r * k + j;
      std::sort(order, order + present,
                [&](int64_t a, int64_t b) { return expert_RK[a] < expert_RK[b]; });
      for (int64_t c = 0; c < d; c += kLanes) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < present; ++j)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(weight_RK[order[j]]),
                                _mm512_loadu_ps(products + pairs.place[order[j]] * d + c), sum);
        store_narrow(out + r * d + c, sum);
      }
    }
  }
}
