// The four passes in tasks: one after another, or two of them in one visit to each channel.
#if defined(__linux__)
#include <unistd.h>
#endif

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

// Bytes of a core's own cache.
Index cache_bytes() {
    static const Index bytes = [] {
        Index found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return std::max<Index>(found, Index(1) << 19);
    }();
    return bytes;
}

constexpr Index kShared = 8;  // a channel may be as large as some caches of a core, in a shared one

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

// f(i) for every statistic of the channels from first on.
template <class F>
void for_statistics(const Layout& layout, Index first, Index end, F f) {
    for (Index g = 0; g < layout.groups; ++g) {
        for (Index i = g * layout.channels + first; i < g * layout.channels + end; ++i) f(g, i);
    }
}

// Counts and anchors, from which sums begin.
void begin_moments(const Step& step, const SumBlocks& blocks) {
    for (Index g = 0; g < step.layout.groups; ++g) {
        step.statistics.count()[g] = static_cast<double>(blocks.count(g));
        set_anchors(step, blocks, g);
    }
}

// No type is wider than float64, so its sums are taken a second time, around their own mean.
int rounds_of(const Step& step) { return step.type == Type::f64 ? 2 : 1; }

void finish_moments(const Step& step, const Reduction& reduction, Index first, Index end) {
    const Statistics& s = step.statistics;
    for_statistics(step.layout, first, end, [&](Index g, Index i) {
        double sum, square;
        reduction.totals(i, sum, square);
        instructions().finish_moments(s, i, s.count()[g], sum, square);
    });
}

void finish_sums(const Step& step, const Reduction& reduction, double* sums, Index first,
                 Index end) {
    for_statistics(step.layout, first, end, [&](Index, Index i) {
        reduction.totals(i, sums[i], sums[step.statistics.size + i]);
    });
    instructions().finish_gradients(step, sums, first, end);
}

void count_batch(const Step& step, bool updated) {
    if (updated && step.running.batches != nullptr) ++*step.running.batches;
}

// Channels that one task visits once, so that its second pass finds them in a cache; 0 where
// passes one after another are better. Bits do not depend on it. `arrays`: of x's size, that both
// passes touch.
Index visit_width(const Step& step, Index arrays) {
    const Layout& layout = step.layout;
    if (by_rows(step)) return 0;
    const Index bytes = arrays * layout.outer * layout.inner * kBytes[static_cast<int>(step.type)];
    if (bytes == 0 || bytes > kShared * cache_bytes()) return 0;
    const Index elements = layout.outer * layout.channels * layout.inner;
    const Index threads = threads_for(step, elements).count;
    const Index even = threads == 1 ? 1 : 4 * threads;  // visits, so that threads share them evenly
    const Index fitting = std::clamp<Index>(cache_bytes() / bytes, 1, kMaxChannels);
    const Index width = std::clamp<Index>(layout.channels / even, 1, fitting);
    return divide_up(layout.channels, width) >= even ? width : 0;
}

// f(first, end) for channels that are visited once, in parallel.
template <class F>
void for_each_visit(const Step& step, Index width, F f) {
    const Layout& layout = step.layout;
    const Index elements = layout.outer * layout.channels * layout.inner;
    run_tasks(divide_up(layout.channels, width), threads_for(step, elements),
              [&](Index i) { f(i * width, std::min(layout.channels, (i + 1) * width)); });
}

// f(block) for all positions of some channels.
template <class F>
void for_each_group(const Step& step, Index first, Index end, F f) {
    for (Index g = 0; g < step.layout.groups; ++g) f(Block{g, 0, units(step), first, end - first});
}

}  // namespace

void forward(const Step& step) {
    const Index width = step.options.batch ? visit_width(step, step.residual ? 3 : 2) : 0;
    if (width == 0) {
        if (step.options.batch) moments(step);
        return normalize(step);
    }
    const KeepSubnormals mode;
    Reduction reduction(step);
    begin_moments(step, reduction.blocks());
    advise_huge_pages(step.y, step);
    std::atomic<bool> updated{false};
    for_each_visit(step, width, [&](Index first, Index end) {
        for (int round = 0; round < rounds_of(step); ++round) {
            reduction.run(passes(step).moments, first, end);
            finish_moments(step, reduction, first, end);
        }
        if (instructions().finish_channels(step, first, end))
            updated.store(true, std::memory_order_relaxed);
        for_each_group(step, first, end,
                       [&](const Block& block) { passes(step).normalize(step, block); });
    });
    count_batch(step, updated.load(std::memory_order_relaxed));
}

void backward(const Step& step, double* sums) {
    const bool summed = step.options.batch || step.dgamma || step.dbeta || step.dresidual;
    const Index arrays = 3 + (step.y ? 1 : 0) + (step.dresidual ? 1 : 0);
    const Index width = summed && step.dx ? visit_width(step, arrays) : 0;
    if (width == 0) {
        if (summed) reduce(step, sums);
        if (step.dx) apply(step, sums);
        return;
    }
    const KeepSubnormals mode;
    Reduction reduction(step);
    advise_huge_pages(step.dresidual, step);
    advise_huge_pages(step.dx, step);
    for_each_visit(step, width, [&](Index first, Index end) {
        reduction.run(passes(step).reduce, first, end);
        finish_sums(step, reduction, sums, first, end);
        for_each_group(step, first, end,
                       [&](const Block& block) { passes(step).apply(step, block, sums); });
    });
}

void moments(const Step& step) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) {
        std::fill_n(step.statistics.count(), step.layout.groups, 0.0);
        return;
    }
    Reduction reduction(step);
    begin_moments(step, reduction.blocks());
    for (int round = 0; round < rounds_of(step); ++round) {
        reduction.run(passes(step).moments);
        for_channels(step,
                     [&](Index first, Index end) { finish_moments(step, reduction, first, end); });
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
    count_batch(step, updated.load(std::memory_order_relaxed));
    advise_huge_pages(step.y, step);
    for_each_block(step, [&](const Block& block) { passes(step).normalize(step, block); });
}

void reduce(const Step& step, double* sums) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) return;
    Reduction reduction(step);
    advise_huge_pages(step.dresidual, step);
    reduction.run(passes(step).reduce);
    for_channels(step,
                 [&](Index first, Index end) { finish_sums(step, reduction, sums, first, end); });
}

void apply(const Step& step, const double* sums) {
    const KeepSubnormals mode;
    if (is_empty(step.layout)) return;
    advise_huge_pages(step.dx, step);
    for_each_block(step, [&](const Block& block) { passes(step).apply(step, block, sums); });
}

}  // namespace batchnorm
