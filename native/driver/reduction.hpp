// The sums of a pass over blocks, and the steps from sums to statistics.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "batchnorm.hpp"
#include "passes/soundness.hpp"
#include "tasks.hpp"

namespace batchnorm {

extern std::atomic<const Instructions*> the_instructions;

inline const Instructions& instructions() {
    return *the_instructions.load(std::memory_order_relaxed);
}

inline const Passes& passes(const Step& step) {
    return instructions().passes[static_cast<int>(step.type)];
}

using SumPass = void (*)(const Step&, const Block&, double*, double*);

// Runs a pass of two sums over all blocks, and adds the sums of each channel, block by block.
class Reduction {
  public:
    explicit Reduction(const Step& step)
        : step_(step),
          blocks_(step),
          size_(step.layout.statistics()),
          partial_(new double[static_cast<std::size_t>(2 * blocks_.grid().blocks * size_)]),
          narrow_(static_cast<std::size_t>(step.layout.groups)) {
        for (Index g = 0; g < step.layout.groups; ++g)
            narrow_[static_cast<std::size_t>(g)] = sums_narrowly(step.type, blocks_.count(g));
    }

    const SumBlocks& blocks() const { return blocks_; }

    // For channels [first, end); bits depend neither on these bounds, where positions are
    // contiguous, nor on the threads. `wide`: in double whatever the count.
    void run(SumPass pass, Index first, Index end, const Threads& threads, bool wide = false) {
        const Grid& grid = blocks_.grid();
        const Index parts = divide_up(end - first, grid.width);
        run_tasks(parts * grid.groups * grid.blocks, threads, [&](Index i) {
            const Index g = i / parts / grid.blocks, b = i / parts % grid.blocks;
            const Share share = blocks_.share(g, b);
            const Index channel = first + i % parts * grid.width;
            const Block block{g,
                              share.first,
                              share.rows,
                              channel,
                              std::min(grid.width, end - channel),
                              wide || !is_narrow(g)};
            double* sum = partial_.get() + 2 * b * size_ + g * step_.layout.channels + channel;
            if (block.rows > 0) return pass(step_, block, sum, sum + size_);
            std::fill_n(sum, block.channels, 0.0);
            std::fill_n(sum + size_, block.channels, 0.0);
        });
    }

    bool is_narrow(Index group) const { return narrow_[static_cast<std::size_t>(group)] != 0; }

    // Both sums of n statistics from `first` on.
    void totals(Index first, Index n, double* sum, double* other) const {
        std::fill_n(sum, n, 0.0);
        std::fill_n(other, n, 0.0);
        for (Index b = 0; b < blocks_.grid().blocks; ++b) {
            const double* one = partial_.get() + 2 * b * size_ + first;
            for (Index i = 0; i < n; ++i) sum[i] += one[i];
            for (Index i = 0; i < n; ++i) other[i] += one[size_ + i];
        }
    }

  private:
    const Step& step_;
    SumBlocks blocks_;
    Index size_;
    std::unique_ptr<double[]> partial_;
    std::vector<char> narrow_;  // by group: in float32 where that is sound
};

}  // namespace batchnorm
