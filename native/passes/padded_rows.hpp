// Walking rows of which some are padding, in passes whose padded rows are written but not computed.
#pragma once

#include "lines.hpp"
#include "rows.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr Index kRowsAhead = 16;

// Rows [o, o + n) in runs of at most `together` real or padded ones: compute(row, rows) or
// pad(row, rows). Gaps of padded rows break the streams that hardware prefetches, so the real ones
// among the next rows are prefetched here, by fetch(row).
template <class Fetch, class Compute, class Pad>
inline void for_runs_of_rows(const Mask& mask, Index o, Index n, Index together, Fetch fetch,
                             Compute compute, Pad pad) {
    constexpr Index kAtOnce = 64;
    unsigned char keep[kAtOnce + kRowsAhead];
    for (Index r = 0; r < n; r += kAtOnce, o += kAtOnce) {
        const Index left = n - r, m = left < kAtOnce ? left : kAtOnce;
        const Index known = left < kAtOnce + kRowsAhead ? left : kAtOnce + kRowsAhead;
        read_rows(mask, o, known, keep);
        for (Index i = 0, end; i < m; i = end) {
            const Index most = m - i < together ? m : i + together;
            for (end = i + 1; end < most && keep[end] == keep[i];) ++end;
            for (Index a = i + kRowsAhead; a < end + kRowsAhead && a < known; ++a) {
                if (keep[a]) fetch(o + a);
            }
            if (keep[i]) {
                compute(o + i, end - i);
            } else {
                pad(o + i, end - i);
            }
        }
    }
}

// Short rows [o, o + n), `joined` at a time: compute(row, rows) for lines with a real row, then
// pad(row, 1) for each padded one.
template <class Compute, class Pad>
inline void for_lines_of_rows(const Mask& mask, Index o, Index n, Index joined, Compute compute,
                              Pad pad) {
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
            if (!keep[i]) pad(o + r + i, 1);
        }
    }
}

// Rows [o, o + n) of `width` elements each, of which `together` are contiguous in all arrays.
template <class Fetch, class Compute, class Pad>
inline void for_padded_rows(const Mask& mask, Index o, Index n, Index width, Index together,
                            Fetch fetch, Compute compute, Pad pad) {
    const Index joined = together > 1 ? rows_per_line(width) : 1;
    if (joined > 1) return for_lines_of_rows(mask, o, n, joined, compute, pad);
    for_runs_of_rows(mask, o, n, together, fetch, compute, pad);
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
