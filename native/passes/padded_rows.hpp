// Walking rows of which some are padding, in passes whose padded rows are written but not computed.
#pragma once

#include "lines.hpp"
#include "rows.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr Index kRowsAhead = 16;

// Rows o + i; those with keep[i] are real. Unless most rows are padded, all are computed, which
// hardware prefetches, and the padded ones overwritten.
template <class Compute, class Pad>
inline void for_some_rows(Index o, Index n, const unsigned char* keep, Compute compute, Pad pad) {
    unsigned char rows[2][kRowsAhead];  // padded, real
    Index found[2] = {0, 0};
    for (Index i = 0; i < n; ++i) {
        rows[0][found[0]] = rows[1][found[1]] = static_cast<unsigned char>(i);
        ++found[keep[i]];
    }
    if (3 * found[1] > n) {
        for (Index i = 0; i < n; ++i) compute(o + i, 1);
    } else {
        for (Index i = 0; i < found[1]; ++i) compute(o + rows[1][i], 1);
    }
    for (Index i = 0; i < found[0]; ++i) pad(o + rows[0][i]);
}

// Rows [o, o + n) one by one. Gaps of padded rows break the streams that hardware prefetches, so
// the real ones among the next rows are prefetched here, by fetch(row).
template <class Fetch, class Compute, class Pad>
inline void for_single_rows(const Mask& mask, Index o, Index n, Fetch fetch, Compute compute,
                            Pad pad) {
    unsigned char keep[2][kRowsAhead];
    read_rows(mask, o, n < kRowsAhead ? n : kRowsAhead, keep[0]);
    for (Index r = 0; r < n; r += kRowsAhead) {
        const unsigned char* now = keep[r / kRowsAhead % 2];
        unsigned char* next = keep[(r / kRowsAhead + 1) % 2];
        const Index left = n - r, ahead = left - kRowsAhead;
        const Index some = ahead < 0 ? 0 : ahead < kRowsAhead ? ahead : kRowsAhead;
        read_rows(mask, o + r + kRowsAhead, some, next);
        for (Index i = 0; i < some; ++i) {
            if (next[i]) fetch(o + r + kRowsAhead + i);
        }
        for_some_rows(o + r, left < kRowsAhead ? left : kRowsAhead, now, compute, pad);
    }
}

// Rows [o, o + n), `joined` at a time: compute(row, rows) for lines with a real row, then
// pad(row) for each padded one.
template <class Fetch, class Compute, class Pad>
inline void for_padded_rows(const Mask& mask, Index o, Index n, Index joined, Fetch fetch,
                            Compute compute, Pad pad) {
    if (joined == 1) return for_single_rows(mask, o, n, fetch, compute, pad);
    unsigned char keep[kLongLine];  // kTile are used; GCC 12 warns that it reads whole vectors
    for (Index r = 0; r < n; r += joined) {
        const Index m = n - r < joined ? n - r : joined;
        read_rows(mask, o + r, m, keep);
        Index real = 0;
        for (Index i = 0; i < m; ++i) real += keep[i];
        // Padded rows between real ones are computed too, and overwritten.
        if (real > 0) compute(o + r, m);
        if (real == m) continue;
        for (Index i = 0; i < m; ++i) {
            if (!keep[i]) pad(o + r + i);
        }
    }
}

template <class T>
inline void set_zero(T* p, Index n) {
    for (Index i = 0; i < n; ++i) p[i] = T{};
}

// Prefetches the beginning of n elements; hardware prefetches the rest.
template <class T>
inline void fetch_line(const T* p, Index n) {
    const Index step = Index(64 / sizeof(T)), most = 16 * step;
    for (Index i = 0, end = n < most ? n : most; i < end; i += step) __builtin_prefetch(p + i);
}

}  // namespace batchnorm::BATCHNORM_ISA
