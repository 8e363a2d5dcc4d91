// Sums over the real rows of a block, in tiles of lanes whose order is fixed (S17).
//
// Narrow sums add groups of float32 lanes, pairwise, and the groups in double; wide ones add every
// element in double. soundness.hpp says which.
//
// Where rows of channels are contiguous, every lane adds its rows one after the other, padded
// ones left out: a masked array and the packed one give the same bits (S5).
#pragma once

#include "lines.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr int kBatch = 16;  // lines that a lane's sums take in before they go back to memory
constexpr int kGroup = 8;   // lines, or tiles, that are added in float32

static_assert(kBatch % kGroup == 0);

// Calls f(rows, n) with the real outer rows of a block; `unit` divides every n except the last
// one.
template <class F>
inline void for_real_rows(const Step& s, const Block& b, Index unit, F f) {
    constexpr Index kScan = 256;
    Index list[kScan + kTile * kGroup];
    unsigned char keep[kScan];
    Index n = 0, left = b.rows;
    const Index to_scan = s.mask ? s.layout.rows() - b.first : b.rows;
    for_each_run(s.layout, b.group, b.first, to_scan, [&](Index o, Index m) {
        while (m > 0 && left > 0) {
            Index some = m < kScan ? m : kScan, found = 0;
            if (s.mask) {
                read_rows(s.mask, o, some, keep);
                for (Index i = 0; i < some && found < left; ++i) {
                    list[n + found] = o + i;  // a padded row is overwritten by the next one
                    found += keep[i];
                }
            } else {
                for (; found < some; ++found) list[n + found] = o + found;
            }
            n += found, left -= found, o += some, m -= some;
            const Index whole = n - n % unit;
            if (whole > 0) f(list, whole);
            for (Index i = 0; i < n - whole; ++i) list[i] = list[whole + i];
            n -= whole;
        }
        return left > 0;
    });
    if (n > 0) f(list, n);
}

// Lines of `joined` rows each: in place where the rows lie side by side, else copied together.
template <class T>
struct Gather {
    Array array;
    Index first, width, joined;
    T together[kBatch * kMaxLanes];

    Gather(const Array& a, const Block& b, Index span, Index rows)
        : array(a), first(b.channel * span), width(b.channels * span), joined(rows) {}

    // Line number `slot` of a batch. Rows that are missing at the end repeat `pad`, or are 0.
    const T* line(const Index* rows, Index n, int slot, const T* pad) {
        const T* base = static_cast<const T*>(array.data) + first;
        if (joined == 1 || (n == joined && contiguous(rows))) return base + rows[0] * array.stride;
        T* const line = together + slot * kMaxLanes;
        T* out = line;
        for (Index r = 0; r < n; ++r) {
            const T* row = base + rows[r] * array.stride;
            for (Index l = 0; l < width; ++l) *out++ = row[l];
        }
        for (Index r = n; r < joined; ++r) {
            for (Index l = 0; l < width; ++l) *out++ = pad != nullptr ? pad[l] : T{};
        }
        return line;
    }

    // Lines lie at equal distances where rows do: in order, and not joined or side by side.
    bool even(const Step& s) const {
        return !s.mask && s.layout.groups == 1 && (joined == 1 || array.stride == width);
    }

    bool contiguous(const Index* rows) const {
        return array.stride == width && rows[joined - 1] - rows[0] == joined - 1;
    }
};

// Lines that are walked tile by tile in batches which fit the nearest cache.
inline Index even_batch(Index lanes, Index bytes) {
    constexpr Index kNear = 1 << 14;
    const Index lines = kNear / (lanes * bytes) / kGroup * kGroup;
    return lines < kBatch ? kBatch : lines;
}

// Prefetches the lines of the next batch in the order of memory, a cache line at each call: sums
// walk a batch tile by tile, across its rows, an order that no hardware prefetcher follows.
template <class T>
class Ahead {
  public:
    Ahead(const Array& array, const Block& b, Index span)
        : array_(array), first_(b.channel * span), lanes_(b.channels * span), at_(lanes_) {}

    void begin(const Index* rows, Index n) {
        rows_ = rows, left_ = n, at_ = lanes_;
        step();
    }

    BATCHNORM_INLINE void step() {
        if (at_ >= lanes_) {
            if (left_ <= 0) return;
            line_ = element<const T>(array_, *rows_++, first_);
            --left_, at_ = 0;
        }
        __builtin_prefetch(line_ + at_);
        at_ += Index(64 / sizeof(T));
    }

  private:
    Array array_;
    Index first_, lanes_;
    const Index* rows_ = nullptr;
    const T* line_ = nullptr;
    Index left_ = 0, at_;
};

// Two sums for each lane of a block. Only lanes in use are touched: for a small step, bringing all
// of the arrays into the cache would take longer than the step.
struct LaneSums {
    alignas(64) double first[kMaxLanes + kTile];
    alignas(64) double second[kMaxLanes + kTile];

    explicit LaneSums(Index lanes) {
        for (Index l = 0; l < lanes + kTile; ++l) first[l] = second[l] = 0.0;
    }

    // Adds up lanes of the same channel.
    void fold(Index channels, Index span, Index joined, double* sum, double* other) const {
        if (span == 1 && joined == 1) {
            for (Index c = 0; c < channels; ++c) sum[c] = first[c], other[c] = second[c];
            return;
        }
        for (Index c = 0; c < channels; ++c) {
            double a = 0.0, b = 0.0;
            for (Index r = 0; r < joined; ++r) {
                for (Index l = (r * channels + c) * span, end = l + span; l < end; ++l) {
                    a += first[l];
                    b += second[l];
                }
            }
            sum[c] = a, other[c] = b;
        }
    }
};

// A per-channel row of statistics, one value for each lane, and 0 up to the end of the tile.
template <class F>
struct LaneValues {
    alignas(64) F at[kMaxLanes + kTile];

    LaneValues(const double* values, Index channels, Index span, Index joined) {
        const Index width = channels * span;
        if (span == 1) {
            for (Index c = 0; c < channels; ++c) at[c] = F(values[c]);
        } else {
            for (Index c = 0; c < channels; ++c) {
                const F value = F(values[c]);
                for (Index i = c * span, end = i + span; i < end; ++i) at[i] = value;
            }
        }
        Index l = width;
        for (Index end = joined * width; l < end; ++l) at[l] = at[l - width];
        for (Index end = l + kTile; l < end; ++l) at[l] = F(0);
    }
};

// The last lanes of a line, filled up to a tile.
template <class T>
inline Tile load_some(const T* p, Index n, T pad = T{}) {
    T tile[kTile];
    for (Index i = 0; i < kTile; ++i) tile[i] = i < n ? p[i] : pad;
    return load(tile);
}

template <class T>
constexpr bool kCanBeNarrow = sizeof(T) < 8;

// Two running sums of a tile, in registers.
struct TileSums {
    Doubles first[kVectors], second[kVectors];

    BATCHNORM_INLINE TileSums(const double* a, const double* b) {
        for (int i = 0; i < kVectors; ++i) {
            first[i] = load_doubles(a + i * kDoubles);
            second[i] = load_doubles(b + i * kDoubles);
        }
    }

    BATCHNORM_INLINE void store(double* a, double* b) const {
        for (int i = 0; i < kVectors; ++i) {
            store_doubles(a + i * kDoubles, first[i]);
            store_doubles(b + i * kDoubles, second[i]);
        }
    }

    // Adds float vector number i of a tile.
    BATCHNORM_INLINE void add(int i, Floats a, Floats b) {
        first[2 * i] = plus(first[2 * i], low_doubles(a));
        first[2 * i + 1] = plus(first[2 * i + 1], high_doubles(a));
        second[2 * i] = plus(second[2 * i], low_doubles(b));
        second[2 * i + 1] = plus(second[2 * i + 1], high_doubles(b));
    }
};

struct Two {
    Floats first, second;
};

// The terms r to r + n - 1 of two sums, added pairwise: an error of log2(n) roundings, and none
// where all terms are equal.
template <int n, class Term>
BATCHNORM_INLINE Two add_pairwise(const Term& term, Index r, int i) {
    if constexpr (n == 1) {
        return term(r, i);
    } else {
        const Two a = add_pairwise<n / 2>(term, r, i), b = add_pairwise<n / 2>(term, r + n / 2, i);
        return {a.first + b.first, plus(a.second, b.second)};
    }
}

template <int n, class Term>
BATCHNORM_INLINE void add_group(TileSums& sums, const Term& term, Index r) {
    for (int i = 0; i < kFloatVectors; ++i) {
        const Two both = add_pairwise<n>(term, r, i);
        sums.add(i, both.first, both.second);
    }
}

// Adds the terms of n tiles in float32; term(r, i) is those of float vector number i of tile r.
template <class Term>
BATCHNORM_INLINE void add_narrow(Index n, TileSums& sums, const Term& term) {
    Index r = 0;
    BATCHNORM_NO_UNROLL
    for (; r + kGroup <= n; r += kGroup) add_group<kGroup>(sums, term, r);
    if ((n & 4) != 0) add_group<4>(sums, term, r), r += 4;
    if ((n & 2) != 0) add_group<2>(sums, term, r), r += 2;
    if ((n & 1) != 0) add_group<1>(sums, term, r);
}

template <class Term>
BATCHNORM_INLINE void add_narrow(Index n, double* first, double* second, const Term& term) {
    TileSums sums(first, second);
    add_narrow(n, sums, term);
    sums.store(first, second);
}

// Up to a tile of elements as float32, and `pad` after them and where `keep`, if given, is 0.
template <class T>
BATCHNORM_INLINE void load_rest(const T* p, Index n, Keep keep, float pad, float* out) {
    for (Index i = 0; i < kTile; ++i) out[i] = pad;
    for (Index i = 0; i < n; ++i) {
        if (!keep || keep[i]) out[i] = float(widen(p[i]));
    }
}

// Positions of one channel: lanes are positions 0 to 15, 16 to 31, ... of every stretch.
struct PositionSums {
    alignas(64) double first[kMaxChannels][kTile];
    alignas(64) double second[kMaxChannels][kTile];

    explicit PositionSums(Index channels) {
        for (Index c = 0; c < channels; ++c) {
            for (int l = 0; l < kTile; ++l) first[c][l] = second[c][l] = 0.0;
        }
    }

    void fold(Index channels, double* sum, double* other) const {
        for (Index c = 0; c < channels; ++c) sum[c] = fold(first[c]), other[c] = fold(second[c]);
    }

  private:
    // Halves are added until one number is left.
    static BATCHNORM_INLINE double fold(const double* lanes) {
        static_assert(kTile == 16);
        typedef double Eight __attribute__((vector_size(64)));
        typedef double Four __attribute__((vector_size(32)));
        typedef double Pair __attribute__((vector_size(16)));
        Eight low, high;
        __builtin_memcpy(&low, lanes, sizeof low);
        __builtin_memcpy(&high, lanes + 8, sizeof high);
        const Eight eight = low + high;
        const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                          __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
        const Pair two =
            __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
        return two[0] + two[1];
    }
};

}  // namespace batchnorm::BATCHNORM_ISA
