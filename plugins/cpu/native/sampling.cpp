// Chooses a token for each row of logits, as runtime/engine/sampler.py defines it, from the same uniform numbers; or says that a
// row is too close to call: where a sum lies within its rounding error of a bound. Weights and sums are float64.
#include <algorithm>
#include <cmath>
#include <functional>

#include "kernels.hpp"
#include "op.hpp"

namespace {

enum State : int32_t { SURE, UNSURE, NOT_FINITE };  // runtime/backends/base.py
constexpr int64_t BLOCK = 64;                       // logits
constexpr double NEAR = 1e-12;                      // weights this close, relative, may be equal where others compute them

struct Ask {
  double temperature, top_p, min_p, uniform;
};

// One row, and the tokens that may still be chosen, ascending; their weights.
class Choice {
 public:
  Choice(const float* logits, int64_t vocab, float top, const Ask& ask)
      : x_(logits), vocab_(vocab), top_(top), ask_(ask), error_(1e-15 * double(vocab + 16)), count_(vocab) {
    static thread_local ort::Scratch weights, ids, sorted;
    w_ = weights.of<double>(vocab), ids_ = ids.of<int32_t>(vocab), sorted_ = sorted.of<double>(vocab);
  }

  // The token; -1 where that is too close to call.
  int32_t draw(int64_t top_k) {
    if (0 < top_k && top_k < vocab_) keep_top_k(top_k);
    if (ask_.top_p < 1 && !(all_ ? keep_nucleus_of_all() : keep_nucleus(kernels().sum(w_, count_), error_))) return -1;
    if (ask_.min_p > 0 && !keep_likely()) return -1;
    if (all_) return int32_t(find_of_all());
    const int64_t place = find_kept();
    return place < 0 ? -1 : ids_[place];
  }

 private:
  double score(float logit) const { return (logit - double(top_)) / ask_.temperature; }

  // Keeps all whose score is `least` or more, and a few below: scores of other logits may round to it.
  void keep_scores(double least) {
    const float floor = float(top_ + ask_.temperature * (least - 1e-9 * (1 + std::abs(least))));
    count_ = kernels().logits_from(x_, vocab_, floor, ids_), all_ = false;
  }

  void weigh_kept() {
    float* logits = reinterpret_cast<float*>(sorted_);
    for (int64_t i = 0; i < count_; ++i) logits[i] = x_[ids_[i]];
    kernels().weigh(logits, count_, top_, 1 / ask_.temperature, w_);
  }

  // Keeps the k largest, and those whose scores equal the smallest of them.
  void keep_top_k(int64_t k) {
    keep_scores(score(at_most_kth(k, reinterpret_cast<float*>(sorted_))));
    for (int64_t i = 0; i < count_; ++i) sorted_[i] = score(x_[ids_[i]]);
    std::nth_element(sorted_, sorted_ + k - 1, sorted_ + count_, std::greater<double>());
    const double kth = sorted_[k - 1];
    count_ = std::remove_if(ids_, ids_ + count_, [&](int32_t id) { return score(x_[id]) < kth; }) - ids_;
    weigh_kept();
  }

  // A logit that is at most the k-th largest one: the k-th of the largest of blocks, if there are as many.
  float at_most_kth(int64_t k, float* some) const {
    int64_t n = 0, place;
    if (k > vocab_ / BLOCK) n = std::copy(x_, x_ + vocab_, some) - some;
    else
      for (; n < vocab_ / BLOCK; ++n) some[n] = kernels().largest_logit(x_ + n * BLOCK, BLOCK, &place);
    std::nth_element(some, some + k - 1, some + n, std::greater<float>());
    return some[k - 1];
  }

  // Keeps the weights from `floor` on, and perhaps a few below.
  void keep_from(double floor) {
    if (!all_) return keep_if([&](int64_t i) { return w_[i] >= floor; });
    keep_scores(std::log(floor));
    weigh_kept();
  }

  template <class F>
  void keep_if(const F& chosen) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i)
      if (chosen(i)) w_[kept] = w_[i], ids_[kept++] = ids_[i];
    count_ = kept;
  }

  // With a rough sum of all weights where that is enough.
  bool keep_nucleus_of_all() {
    const double factor = 1 / ask_.temperature, rough = kernels().rough_sum(x_, vocab_, top_, float(factor));
    if (is_peaked(rough) && keep_nucleus(rough, ROUGH)) return true;
    count_ = vocab_, all_ = true;
    return keep_nucleus(kernels().weigh(x_, vocab_, top_, factor, w_), error_);
  }

  // Top-p: the fewest whose weights reach its share of `total`, of equal ones the first. False where that is too close to call.
  bool keep_nucleus(double total, double error) {
    const double target = ask_.top_p * total, slack = error * total;
    keep_from((1 - ask_.top_p) / double(count_) * total * (1 - 2 * ROUGH));  // all below do not make up what is cut off
    double above = 0;
    const int64_t some = around(target, &above);
    std::sort(sorted_, sorted_ + some, std::greater<double>());
    int64_t last = 0;
    while (last < some && above + sorted_[last] < target) above += sorted_[last++];
    if (last == some || !(above + slack < target && target < above + sorted_[last] - slack)) return false;
    const double threshold = sorted_[last];
    int64_t ties = 1 + last - (std::find(sorted_, sorted_ + last, threshold) - sorted_);
    return tell_apart(threshold) && (keep_if([&](int64_t i) { return w_[i] > threshold || (w_[i] == threshold && ties-- > 0); }), true);
  }

  // Whether weights that are about `threshold` belong to equal logits.
  bool tell_apart(double threshold) const {
    int64_t first = -1;
    for (int64_t i = 0; i < count_; ++i) {
      if (std::abs(w_[i] - threshold) > NEAR * threshold) continue;
      if (first < 0) first = i;
      if (x_[ids_[i]] != x_[ids_[first]]) return false;
    }
    return true;
  }

  // Copies those weights among which the sum from the largest down reaches `target` to sorted_; *above is the sum before them.
  int64_t around(double target, double* above) {
    constexpr int BINS = 1024;  // 64 for each power of two
    if (count_ <= 32) return std::copy(w_, w_ + count_, sorted_) - sorted_;
    const auto bin = [](double w) {
      int64_t bits;
      __builtin_memcpy(&bits, &w, 8);
      return int(std::min<int64_t>((int64_t(1023) << 6) - (bits >> 46), BINS - 1));
    };
    double sums[BINS] = {};
    for (int64_t i = 0; i < count_; ++i) sums[bin(w_[i])] += w_[i];
    int b = 0;
    while (b < BINS - 1 && *above + sums[b] < target) *above += sums[b++];
    return std::copy_if(w_, w_ + count_, sorted_, [&](double w) { return bin(w) == b; }) - sorted_;
  }

  // Min-p; the largest weight is 1. False where that is too close to call.
  bool keep_likely() {
    keep_from(ask_.min_p * (1 - 2 * NEAR));
    for (int64_t i = 0; i < count_; ++i)
      if (std::abs(w_[i] - ask_.min_p) <= NEAR * ask_.min_p && x_[ids_[i]] != top_) return false;
    keep_if([&](int64_t i) { return w_[i] >= ask_.min_p; });
    return true;
  }

  // The place of the kept weight that the uniform number falls on; -1 where that is too close to call. sum(i, n) and weights(i, n)
  // are those of n places from i on.
  template <class Sum, class Weights>
  int64_t find(double total, double error, const Sum& sum, const Weights& weights) const {
    const double target = ask_.uniform * total, slack = error * total;
    double before = 0;
    for (int64_t i = 0; i < count_; i += BLOCK) {
      const int64_t n = std::min(BLOCK, count_ - i);
      const double block = sum(i, n);
      if (before + block <= target) {
        before += block;
        continue;
      }
      const double* w = weights(i, n);
      for (int64_t j = 0; j < n; before += w[j++])
        if (before + w[j] > target) {
          const bool sure = (before + slack < target || before == 0) && target < before + w[j] - slack;
          return sure ? i + j : -1;
        }
      return -1;
    }
    return -1;
  }

  int64_t find_kept() const {
    return find(kernels().sum(w_, count_), error_, [&](int64_t i, int64_t n) { return kernels().sum(w_ + i, n); },
                [&](int64_t i, int64_t) { return w_ + i; });
  }

  // Of all, with rough sums where those are enough.
  int64_t find_of_all() const {
    const double factor = 1 / ask_.temperature;
    const auto rough = [&](int64_t i, int64_t n) { return kernels().rough_sum(x_ + i, n, top_, float(factor)); };
    const double total = rough(0, count_);
    if (is_peaked(total)) {
      const int64_t place = find(total, ROUGH, rough, [&](int64_t i, int64_t n) {
        kernels().weigh(x_ + i, n, top_, factor, w_);
        return w_;
      });
      if (place >= 0) return place;
    }
    kernels().weigh(x_, vocab_, top_, factor, w_);
    return find_kept();
  }

  // Whether rough sums may be enough: in a flat row each weight is about as small as their error.
  bool is_peaked(double total) const { return total < double(vocab_) / 16; }

  const float* x_;
  const int64_t vocab_;
  const float top_;
  const Ask& ask_;
  const double error_;  // of a sum, relative
  int64_t count_;
  bool all_ = true;  // all tokens are kept, and ids_ holds none
  double *w_, *sorted_;
  int32_t* ids_;
};

}  // namespace

// logits [rows, vocab]; asks [rows], none: the largest; top_k [rows], 0: all. Gives ids, states and the largest logits [rows].
extern "C" __attribute__((visibility("default"))) void latentrt_choose_tokens(
    const float* logits, int64_t rows, int64_t vocab, const Ask* asks, const int32_t* top_k, int32_t* ids, int32_t* states,
    float* largest) {
  for (int64_t r = 0; r < rows; ++r, logits += vocab) {
    int64_t place;
    largest[r] = kernels().largest_logit(logits, vocab, &place);
    ids[r] = int32_t(place);
    states[r] = std::isfinite(largest[r]) ? SURE : NOT_FINITE;
    if (states[r] == NOT_FINITE || !asks || asks[r].temperature == 0) continue;
    const int32_t drawn = Choice(logits, vocab, largest[r], asks[r]).draw(top_k[r]);
    if (drawn < 0) states[r] = UNSURE;
    else ids[r] = drawn;
  }
}
