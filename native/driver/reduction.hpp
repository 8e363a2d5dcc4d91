// The sums of a pass over blocks, and the steps from sums to statistics.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "batchnorm.hpp"
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
          partial_(new double[static_cast<std::size_t>(2 * blocks_.grid().blocks * size_)]) {}

    const SumBlocks& blocks() const { return blocks_; }

    void run(SumPass pass) {
        const Grid& grid = blocks_.grid();
        const Index elements = step_.layout.outer * step_.layout.channels * step_.layout.inner;
        run_tasks(grid.tasks(), threads_for(step_, elements), [&](Index i) {
            const Index block = i / grid.parts % grid.blocks;
            const Block task = blocks_.block(i, blocks_.share(i / grid.parts / grid.blocks, block));
            const Index at = task.group * step_.layout.channels + task.channel;
            double* sum = partial_.get() + 2 * block * size_ + at;
            if (task.rows > 0) return pass(step_, task, sum, sum + size_);
            std::fill_n(sum, task.channels, 0.0);
            std::fill_n(sum + size_, task.channels, 0.0);
        });
    }

    // The same for some channels on this thread, where positions are contiguous: with the same
    // blocks, and so with the same bits.
    void run(SumPass pass, Index first, Index end) {
        for (Index g = 0; g < step_.layout.groups; ++g) {
            for (Index b = 0; b < blocks_.grid().blocks; ++b) {
                const Share share = blocks_.share(g, b);
                double* sum = partial_.get() + 2 * b * size_ + g * step_.layout.channels + first;
                std::fill_n(sum, end - first, 0.0);
                std::fill_n(sum + size_, end - first, 0.0);
                const Block block{g, share.first, share.rows, first, end - first};
                if (share.rows > 0) pass(step_, block, sum, sum + size_);
            }
        }
    }

    void totals(Index i, double& sum, double& other) const {
        sum = other = 0.0;
        for (Index b = 0; b < blocks_.grid().blocks; ++b) {
            sum += partial_[static_cast<std::size_t>(2 * b * size_ + i)];
            other += partial_[static_cast<std::size_t>((2 * b + 1) * size_ + i)];
        }
    }

  private:
    const Step& step_;
    SumBlocks blocks_;
    Index size_;
    std::unique_ptr<double[]> partial_;
};

// The first real row of each group, as anchors.
inline void set_anchors(const Step& step, const SumBlocks& blocks, Index group) {
    const Layout& layout = step.layout;
    double* mean = step.statistics.row(Statistics::mean) + group * layout.channels;
    double* low = step.statistics.row(Statistics::low) + group * layout.channels;
    std::fill_n(low, layout.channels, 0.0);
    if (blocks.count(group) == 0) {
        std::fill_n(mean, layout.channels, 0.0);
        return;
    }
    const Index unit = blocks.first_real(group), per_row = by_rows(step) ? 1 : layout.inner;
    Index o = 0;
    for_each_run(layout, group, unit / per_row, 1, [&](Index row, Index) {
        o = row;
        return true;
    });
    if (layout.inner == 1) {
        return instructions().load({step.x.data, step.type}, o * step.x.stride, layout.channels,
                                   mean);
    }
    for (Index c = 0; c < layout.channels; ++c) {
        const Index at = o * step.x.stride + c * layout.inner + unit % per_row;
        instructions().load({step.x.data, step.type}, at, 1, mean + c);
    }
}

// f(i) for every statistic of the channels from first on.
template <class F>
void for_statistics(const Layout& layout, Index first, Index end, F f) {
    for (Index g = 0; g < layout.groups; ++g) {
        for (Index i = g * layout.channels + first; i < g * layout.channels + end; ++i) f(g, i);
    }
}

// Counts and anchors, from which sums begin.
inline void begin_moments(const Step& step, const SumBlocks& blocks) {
    for (Index g = 0; g < step.layout.groups; ++g) {
        step.statistics.count()[g] = static_cast<double>(blocks.count(g));
        set_anchors(step, blocks, g);
    }
}

// No type is wider than float64, so its sums are taken a second time, around their own mean.
inline int rounds_of(const Step& step) { return step.type == Type::f64 ? 2 : 1; }

inline void finish_moments(const Step& step, const Reduction& reduction, Index first, Index end) {
    const Statistics& s = step.statistics;
    for_statistics(step.layout, first, end, [&](Index g, Index i) {
        double sum, square;
        reduction.totals(i, sum, square);
        instructions().finish_moments(s, i, s.count()[g], sum, square);
    });
}

inline void finish_sums(const Step& step, const Reduction& reduction, double* sums, Index first,
                        Index end) {
    for_statistics(step.layout, first, end, [&](Index, Index i) {
        reduction.totals(i, sums[i], sums[step.statistics.size + i]);
    });
    instructions().finish_gradients(step, sums, first, end);
}

inline void count_batch(const Step& step, bool updated) {
    if (updated && step.running.batches != nullptr) ++*step.running.batches;
}

}  // namespace batchnorm
