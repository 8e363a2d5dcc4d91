// The rows of x in a block of work: ghost groups and masks resolved to plain row numbers.
#pragma once

#include "batchnorm.hpp"

namespace batchnorm {

// A task's share: `rows` units of a group from `first` on, in the group's own order, for some
// channels; see `units`. In sums over masked rows of channels `rows` counts real rows only.
struct Block {
    Index group, first, rows, channel, channels;
    bool wide = false;     // sums every element in double
    bool streams = false;  // writes past the caches
};

namespace {  // each file, with its own compiler flags, has its own copy

constexpr Index kShortInner = 64;

// True if a step walks along rows of outer, whose lanes are contiguous, layout.inner lanes for each
// channel. Else it walks along the positions of one channel after the other.
BATCHNORM_INLINE bool by_rows(const Step& step) {
    const Index inner = step.layout.inner;
    return inner == 1 || (inner <= kShortInner && (!step.mask || step.mask.inner == 0));
}

// The number of units that tasks share: rows of outer, or positions.
BATCHNORM_INLINE Index units(const Step& step) {
    return by_rows(step) ? step.layout.rows() : step.layout.positions();
}

template <class M>
inline void read_mask(const M* data, Index stride, Index n, unsigned char* keep) {
    if (stride == 1) {
        for (Index i = 0; i < n; ++i) keep[i] = data[i] != 0;
    } else {
        for (Index i = 0; i < n; ++i) keep[i] = data[i * stride] != 0;
    }
}

// n mask elements, `stride` apart, as 0 and 1.
inline void read_mask(const Mask& mask, Index first, Index stride, Index n, unsigned char* keep) {
    switch (mask.width) {
        case 1:
            return read_mask(static_cast<const std::uint8_t*>(mask.data) + first, stride, n, keep);
        case 2:
            return read_mask(static_cast<const std::uint16_t*>(mask.data) + first, stride, n, keep);
        case 4:
            return read_mask(static_cast<const std::uint32_t*>(mask.data) + first, stride, n, keep);
        default:
            return read_mask(static_cast<const std::uint64_t*>(mask.data) + first, stride, n, keep);
    }
}

// The mask at n rows of outer from o on.
inline void read_rows(const Mask& mask, Index o, Index n, unsigned char* keep) {
    if (mask.repeat == 1) return read_mask(mask, o * mask.outer, mask.outer, n, keep);
    for (Index i = 0; i < n;) {
        Index entry = (o + i) / mask.repeat;
        Index end = (entry + 1) * mask.repeat - o;  // of the rows that share this entry
        unsigned char value;
        read_mask(mask, entry * mask.outer, 0, 1, &value);
        for (; i < n && i < end; ++i) keep[i] = value;
    }
}

// Calls f(o, n) for each stretch of consecutive rows of outer among the rows [first, first + rows)
// of a group; stops early if f returns false.
template <class F>
inline void for_each_run(const Layout& layout, Index group, Index first, Index rows, F f) {
    if (layout.groups == 1) {
        if (rows > 0) f(first, rows);
        return;
    }
    Index sample = first / layout.run, within = first % layout.run;
    while (rows > 0) {
        Index n = layout.run - within < rows ? layout.run - within : rows;
        if (!f((sample * layout.groups + group) * layout.run + within, n)) return;
        rows -= n;
        within = 0;
        ++sample;
    }
}

// Calls f(o, i, n) for each stretch of n positions, from position i of outer row o on; stops early
// if f returns false.
template <class F>
inline void for_each_stretch(const Layout& layout, const Block& block, F f) {
    if (block.rows == 0) return;  // inner may be 0
    Index within = block.first % layout.inner, left = block.rows;
    const Index rows = (within + left + layout.inner - 1) / layout.inner;
    for_each_run(layout, block.group, block.first / layout.inner, rows, [&](Index o, Index m) {
        for (Index r = 0; r < m; ++r) {
            const Index n = layout.inner - within < left ? layout.inner - within : left;
            if (!f(o + r, within, n)) return false;
            left -= n;
            within = 0;
        }
        return true;
    });
}

// Calls f(keep, n) for up to 256 mask entries at a time, at `positions` units of a group from unit
// `first` on; stops early if f returns false.
template <class F>
inline void for_each_mask_piece(const Step& step, Index group, Index first, Index positions, F f) {
    constexpr Index kPiece = 256;
    const Mask& mask = step.mask;
    unsigned char keep[kPiece];
    bool more = true;
    if (by_rows(step)) {
        for_each_run(step.layout, group, first, positions, [&](Index o, Index n) {
            for (Index i = 0; i < n && more; i += kPiece) {
                const Index m = n - i < kPiece ? n - i : kPiece;
                read_rows(mask, o + i, m, keep);
                more = f(keep, m);
            }
            return more;
        });
        return;
    }
    const Block block{group, first, positions, 0, 0};
    for_each_stretch(step.layout, block, [&](Index o, Index within, Index n) {
        for (Index i = 0; i < n && more; i += kPiece) {
            const Index m = n - i < kPiece ? n - i : kPiece;
            const Index entry = o / mask.repeat * mask.outer + (within + i) * mask.inner;
            read_mask(mask, entry, mask.inner, m, keep);
            more = f(keep, m);
        }
        return more;
    });
}

}  // namespace
}  // namespace batchnorm
