// The four passes, one after another, each in tasks.
#include <algorithm>
#include <atomic>
#include <memory>

#include "batchnorm.hpp"
#include "float_mode.hpp"
#include "huge_pages.hpp"
#include "tasks.hpp"

namespace batchnorm {

extern std::atomic<const Instructions*> the_instructions;

namespace {

const Instructions& instructions() { return *the_instructions.load(std::memory_order_relaxed); }

const Passes& passes(const Step& step) {
    return instructions().passes[static_cast<int>(step.type)];
}

using SumPass = void (*)(const Step&, const Block&, double*, double*);
using Finish = void (*)(const Step&, Index, double, double, double, double*);

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

// f(first, end) for parts of the channels, in parallel.
template <class F>
void for_channels(const Step& step, F f) {
    constexpr Index kPart = 1024;
    const Index channels = step.layout.channels, parts = divide_up(channels, kPart);
    const Index work = 4 * step.layout.statistics();
    run_tasks(parts, threads_for(step, work),
              [&](Index i) { f(i * kPart, std::min(channels, (i + 1) * kPart)); });
}

// The first real row of each group, as anchors.
void set_anchors(const Step& step, const SumBlocks& blocks, Index group) {
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

// Tasks of an elementwise pass, last ones first: the part that a sum has read last is in cache.
template <class F>
void for_each_block(const Step& step, F f) {
    const Layout& layout = step.layout;
    const Grid grid(step, units(step), kWideLanes);
    const Index elements = layout.outer * layout.channels * layout.inner;
    run_tasks(grid.tasks(), threads_for(step, elements), [&](Index forward) {
        const Index i = grid.tasks() - 1 - forward;
        const Index part = i % grid.parts, first = part * grid.width;
        const Share share = even_share(units(step), grid.blocks, i / grid.parts % grid.blocks);
        if (share.rows == 0) return;
        f(Block{i / grid.parts / grid.blocks, share.first, share.rows, first,
                std::min(grid.width, layout.channels - first)});
    });
}

bool is_empty(const Layout& layout) { return layout.channels == 0; }

}  // namespace

void moments(const Step& step) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) {
        std::fill_n(step.statistics.count(), step.layout.groups, 0.0);
        return;
    }
    Reduction reduction(step);
    const Statistics& s = step.statistics;
    for (Index g = 0; g < step.layout.groups; ++g) {
        s.count()[g] = static_cast<double>(reduction.blocks().count(g));
        set_anchors(step, reduction.blocks(), g);
    }
    // No type is wider than float64, so its sums are taken a second time, around their own mean.
    const int rounds = step.type == Type::f64 ? 2 : 1;
    for (int round = 0; round < rounds; ++round) {
        reduction.run(passes(step).moments);
        for_channels(step, [&](Index first, Index end) {
            for (Index g = 0; g < step.layout.groups; ++g) {
                for (Index i = g * step.layout.channels + first; i < g * step.layout.channels + end;
                     ++i) {
                    double sum, square;
                    reduction.totals(i, sum, square);
                    instructions().finish_moments(s, i, s.count()[g], sum, square);
                }
            }
        });
    }
}

void normalize(const Step& step) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) return;
    std::atomic<bool> updated{false};
    for_channels(step, [&](Index first, Index end) {
        if (instructions().finish_channels(step, first, end))
            updated.store(true, std::memory_order_relaxed);
    });
    if (updated.load(std::memory_order_relaxed) && step.running.batches != nullptr) {
        ++*step.running.batches;
    }
    advise_huge_pages(step.y, step);
    for_each_block(step, [&](const Block& block) { passes(step).normalize(step, block); });
}

void reduce(const Step& step, double* sums) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) return;
    Reduction reduction(step);
    advise_huge_pages(step.dresidual, step);
    reduction.run(passes(step).reduce);
    for_channels(step, [&](Index first, Index end) {
        const Index size = step.statistics.size;
        for (Index g = 0; g < step.layout.groups; ++g) {
            for (Index i = g * step.layout.channels + first; i < g * step.layout.channels + end;
                 ++i) {
                reduction.totals(i, sums[i], sums[size + i]);
            }
        }
        instructions().finish_gradients(step, sums, first, end);
    });
}

void apply(const Step& step, const double* sums) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) return;
    advise_huge_pages(step.dx, step);
    for_each_block(step, [&](const Block& block) { passes(step).apply(step, block, sums); });
}

}  // namespace batchnorm
