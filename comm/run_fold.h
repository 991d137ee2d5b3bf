// The order of the ordered reduction inside one rank: run sums are folded pairwise, like the carries of a binary
// counter, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).  The tree over ranks continues it, so that the bits do not depend
// on how many ranks share the runs.  RunFold only says which buffers to add; the caller owns and adds them.
#pragma once
#include <bit>
#include <vector>

#include "common/error.h"

class RunFold {
  public:
    explicit RunFold(int n_runs) : sum_(size_t(std::countr_zero(unsigned(n_runs))) + 1, kNone) {
        CHECK_THAT(n_runs > 0 && std::has_single_bit(unsigned(n_runs)), "{} runs; needs a power of two", n_runs);
        for (int b = n_buffers() - 1; b >= 0; b--) free_.push_back(b);
    }
    // k + 1 for 2^k runs.
    int n_buffers() const { return int(sum_.size()); }
    // The buffer that the next run is summed into.
    int working() const { return free_.back(); }
    // The working buffer holds a finished run: calls add(into, from) for every pair that is complete now.
    template <class AddFn>
    void push(AddFn&& add) {
        int carry = free_.back();
        free_.pop_back();
        size_t level = 0;
        for (; sum_[level] != kNone; level++) {
            add(sum_[level], carry);  // the older run is the left operand and keeps the sum
            free_.push_back(carry);
            carry = sum_[level];
            sum_[level] = kNone;
        }
        sum_[level] = carry;
    }
    // After all runs: the buffer with the whole sum, always the first.  Each step folds with a RunFold of its own.
    int result() const {
        CHECK_THAT(sum_.back() != kNone, "result() before all runs were pushed");
        return sum_.back();
    }

  private:
    static constexpr int kNone = -1;
    std::vector<int> sum_;   // at level j: the buffer that holds a sum of 2^j runs
    std::vector<int> free_;  // buffers not in use; the last is the working one
};
