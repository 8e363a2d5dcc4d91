// The values around which moments are summed (S3).
#pragma once

#include <algorithm>
#include <vector>

#include "batchnorm.hpp"
#include "reduction.hpp"

namespace batchnorm {

// The real rows of each group from which anchors are taken: for each where its first channel lies.
class Anchors {
  public:
    Anchors(const Step& step, const SumBlocks& blocks) : step_(step), blocks_(blocks) {
        const Index groups = step.layout.groups;
        starts_.reserve(static_cast<std::size_t>(groups + 1));
        at_.reserve(static_cast<std::size_t>(groups * kMostSamples));
        for (Index g = 0; g < groups; ++g) {
            const Index count = real_units(g);
            starts_.push_back(at_.size());
            if (count == 0) continue;
            at_.push_back(place(g, 0, 0));
            if (!sums_narrowly(step.type, blocks.count(g))) continue;
            const Index most =
                std::clamp<Index>(count / 16, std::min<Index>(count, 8), kMostSamples);
            for (Index k = 1; k < most; ++k) at_.push_back(place(g, sample(count, most, k), k));
        }
        starts_.push_back(at_.size());
    }

    // Anchors of channels [first, end): the first of the rows, or the mean of all as one float32.
    void set(Index group, Index first, Index end, bool wide) const {
        const Layout& layout = step_.layout;
        double* mean = step_.statistics.row(Statistics::mean) + group * layout.channels;
        double* low = step_.statistics.row(Statistics::low) + group * layout.channels;
        std::fill(low + first, low + end, 0.0);
        std::fill(mean + first, mean + end, 0.0);
        const auto from = starts_[static_cast<std::size_t>(group)];
        const auto all = starts_[static_cast<std::size_t>(group + 1)] - from;
        const std::size_t rows = wide ? std::min<std::size_t>(all, 1) : all;
        for (std::size_t r = 0; r < rows; ++r) add(at_[from + r], first, end, mean);
        if (rows < 2) return;
        for (Index c = first; c < end; ++c)
            mean[c] = static_cast<float>(mean[c] / static_cast<double>(rows));
    }

  private:
    Index per_row() const { return by_rows(step_) ? 1 : step_.layout.inner; }

    Index real_units(Index group) const {
        return blocks_.count(group) / (by_rows(step_) ? std::max<Index>(step_.layout.inner, 1) : 1);
    }

    // Where real unit number `wanted` of a group lies in its first channel; of a row with several
    // positions of a channel, some other one for each k.
    Index place(Index group, Index wanted, Index k) const {
        const Index unit = blocks_.find(group, wanted);
        Index o = 0;
        for_each_run(step_.layout, group, unit / per_row(), 1, [&](Index row, Index) {
            o = row;
            return true;
        });
        const Index inner = step_.layout.inner;
        return o * step_.x.stride + (by_rows(step_) ? k * 7 % inner : unit % inner);
    }

    void add(Index at, Index first, Index end, double* mean) const {
        constexpr Index kPart = 64;
        const Index inner = step_.layout.inner;
        double x[kPart];
        for (Index c = first; c < end; c += kPart) {
            const Index n = std::min(kPart, end - c);
            instructions().load({step_.x.data, step_.type}, at + c * inner, n, x, inner);
            for (Index i = 0; i < n; ++i) mean[c + i] += x[i];
        }
    }

    const Step& step_;
    const SumBlocks& blocks_;
    std::vector<Index> at_;
    std::vector<std::size_t> starts_;
};

}  // namespace batchnorm
