// The cut of a pass into tasks: bounds depend on shapes and masks alone, so that bits do not depend
// on the number of threads (S17).
#pragma once

#include <algorithm>
#include <memory>

#include "batchnorm.hpp"
#include "passes/passes.hpp"
#include "pool.hpp"

namespace batchnorm {

constexpr Index kMaxBlocks = 64;            // of rows, for one group and one part of the channels
constexpr Index kTaskElements = 1 << 15;    // a task takes some µs at least
constexpr Index kThreadElements = 1 << 15;  // less than this for each thread: fewer threads

inline Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

inline Threads threads_for(const Step& step, Index elements) {
    const Index most = std::max<Index>(1, elements / kThreadElements);
    Threads threads = step.options.threads;
    threads.count = static_cast<int>(std::min<Index>(threads.count, most));
    return threads;
}

inline Threads threads_of(const Step& step) {
    const Layout& layout = step.layout;
    return threads_for(step, layout.outer * layout.channels * layout.inner);
}

// The cut of one pass: parts of the channels, times blocks of the positions of each group.
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

// The first of a block's real rows, and their number (S5: blocks count real rows).
struct Share {
    Index first, rows;
};

inline Share even_share(Index positions, Index blocks, Index block) {
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
                    found += sum(keep, n);
                    return true;
                });
            });
    }

    Index total(Index group) const {
        Index sum = 0;
        for (Index i = 0; i < scans_; ++i) sum += count(group, i);
        return sum;
    }

    // The position of the group's real unit number `wanted`, which must exist.
    Index find(Index group, Index wanted) const {
        Index scan = 0;
        while (wanted >= count(group, scan)) wanted -= count(group, scan++);
        Index position = even_share(units(step_), scans_, scan).first;
        for_each_entry(group, scan, [&](const unsigned char* keep, Index n) {
            constexpr Index kPart = 32;
            for (Index p = 0; p < n; p += kPart) {
                const Index end = std::min(n, p + kPart), found = sum(keep + p, end - p);
                if (wanted < found) {
                    for (Index e = p;; ++e) {
                        if (keep[e] && wanted-- == 0) return position += e, false;
                    }
                }
                wanted -= found;
            }
            position += n;
            return true;
        });
        return position;
    }

  private:
    static constexpr Index kMaxScans = 64;

    static Index sum(const unsigned char* keep, Index n) {
        unsigned found = 0;
        for (Index e = 0; e < n; ++e) found += keep[e];
        return found;
    }

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

    // The unit of real unit number `wanted` of a group, which must exist.
    Index find(Index group, Index wanted) const {
        return counts_ ? counts_->find(group, wanted) : wanted;
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

}  // namespace batchnorm
