// The four passes, each split into tasks whose bounds depend on shapes and masks alone: bits do
// not depend on the number of threads (S17).
#include <algorithm>
#include <atomic>
#include <memory>

#include "batchnorm.hpp"
#include "float_mode.hpp"
#include "huge_pages.hpp"
#include "passes.hpp"
#include "pool.hpp"

namespace batchnorm {

extern std::atomic<const Instructions*> the_instructions;

namespace {

constexpr Index kMaxBlocks = 64;            // of rows, for one group and one part of the channels
constexpr Index kTaskElements = 1 << 14;    // a task takes some µs at least
constexpr Index kThreadElements = 1 << 15;  // less than this for each thread: fewer threads

const Instructions& instructions() { return *the_instructions.load(std::memory_order_relaxed); }

const Passes& passes(const Step& step) {
    return instructions().passes[static_cast<int>(step.type)];
}

Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

Threads threads_for(const Step& step, Index elements) {
    const Index most = std::max<Index>(1, elements / kThreadElements);
    Threads threads = step.options.threads;
    threads.count = static_cast<int>(std::min<Index>(threads.count, most));
    return threads;
}

// How one pass is cut: parts of the channels, times blocks of the positions of each group.
struct Grid {
    Index parts, width;    // of channels
    Index groups, blocks;  // most blocks of any group
    Index span;            // lanes of a channel in a row

    Grid(const Step& step, Index units, Index lanes) : groups(step.layout.groups) {
        const Layout& layout = step.layout;
        span = by_rows(step) ? layout.inner : 1;
        width = by_rows(step) ? lanes / std::max<Index>(span, 1) : kMaxChannels;
        parts = std::max<Index>(1, divide_up(layout.channels, width));
        blocks = block_count(layout, units);
    }

    Index block_count(const Layout& layout, Index units) const {
        const Index most = std::clamp<Index>(2 * kMaxBlocks / parts, 1, kMaxBlocks);
        const Index wide = std::max<Index>(1, std::min(layout.channels, width) * span);
        return std::clamp<Index>(units / std::max<Index>(1, kTaskElements / wide), 1, most);
    }

    Index tasks() const { return groups * blocks * parts; }
};

// Where the real rows of a block begin, and how many there are (S5: blocks count real rows).
struct Share {
    Index first, rows;
};

Share even_share(Index positions, Index blocks, Index block) {
    const Index size = divide_up(positions, blocks);
    const Index first = std::min(positions, block * size);
    return {first, std::min(positions, first + size) - first};
}

// Counts of real positions for each scanned part of a group, so that a block finds its beginning
// without reading the mask from the start.
class MaskCounts {
  public:
    explicit MaskCounts(const Step& step)
        : step_(step),
          scans_(std::clamp<Index>(units(step) / 1024, 1, kMaxScans)),
          counts_(new Index[static_cast<std::size_t>(step.layout.groups * scans_)]) {
        const Layout& layout = step.layout;
        run_tasks(
            layout.groups * scans_, threads_for(step, layout.outer * layout.inner), [&](Index i) {
                Index& found = counts_[static_cast<std::size_t>(i)];
                found = 0;
                for_each_entry(i / scans_, i % scans_, [&](const unsigned char* keep, Index n) {
                    for (Index e = 0; e < n; ++e) found += keep[e];
                    return true;
                });
            });
    }

    Index total(Index group) const {
        Index sum = 0;
        for (Index i = 0; i < scans_; ++i) sum += count(group, i);
        return sum;
    }

    // The unit of the group that is its real one number `wanted`, which exists.
    Index find(Index group, Index wanted) const {
        Index scan = 0;
        while (wanted >= count(group, scan)) wanted -= count(group, scan++);
        Index position = even_share(units(step_), scans_, scan).first;
        for_each_entry(group, scan, [&](const unsigned char* keep, Index n) {
            for (Index e = 0; e < n; ++e, ++position) {
                if (keep[e] && wanted-- == 0) return false;
            }
            return true;
        });
        return position;
    }

  private:
    static constexpr Index kMaxScans = 64;

    Index count(Index group, Index scan) const {
        return counts_[static_cast<std::size_t>(group * scans_ + scan)];
    }

    template <class F>
    void for_each_entry(Index group, Index scan, F f) const {
        const Share share = even_share(units(step_), scans_, scan);
        for_each_mask_piece(step_, group, share.first, share.rows, f);
    }

    const Step& step_;
    Index scans_;
    std::unique_ptr<Index[]> counts_;
};

// The blocks that sums run over.
class SumBlocks {
  public:
    explicit SumBlocks(const Step& step)
        : step_(step),
          counts_(step.mask ? new MaskCounts(step) : nullptr),
          by_real_rows_(step.mask && by_rows(step)),
          grid_(step, most_units(), kMaxLanes) {}

    const Grid& grid() const { return grid_; }

    // Real positions of a group.
    Index count(Index group) const {
        return real_units(group) * (by_rows(step_) ? step_.layout.inner : 1);
    }

    Index first_real(Index group) const { return counts_ ? counts_->find(group, 0) : 0; }

    // Task i's block; the blocks' first rows come from `starts`.
    Block block(Index i, const Share& share) const {
        const Index part = i % grid_.parts, first = part * grid_.width;
        const Index group = i / grid_.parts / grid_.blocks;
        return {group, share.first, share.rows, first,
                std::min(grid_.width, step_.layout.channels - first)};
    }

    Share share(Index group, Index block) const {
        if (!by_real_rows_) return even_share(units(step_), grid_.blocks, block);
        const Index real = real_units(group), blocks = grid_.block_count(step_.layout, real);
        if (block >= blocks) return {0, 0};
        Share share = even_share(real, blocks, block);
        if (share.rows > 0) share.first = counts_->find(group, share.first);
        return share;
    }

  private:
    Index real_units(Index group) const { return counts_ ? counts_->total(group) : units(step_); }

    Index most_units() const {
        if (!by_real_rows_) return units(step_);
        Index most = 0;
        for (Index g = 0; g < step_.layout.groups; ++g) most = std::max(most, real_units(g));
        return most;
    }

    const Step& step_;
    std::unique_ptr<MaskCounts> counts_;
    bool by_real_rows_;
    Grid grid_;
};

using SumPass = void (*)(const Step&, const Block&, double*, double*);
using Finish = void (*)(const Step&, Index, double, double, double, double*);

// Runs a pass of two sums over all blocks, and adds those of each channel up, block by block.
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

// Tasks of an elementwise pass, last ones first: what a sum has just read last is still in cache.
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
    // No type is wider than float64, so that its sums are taken around their own mean again.
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
