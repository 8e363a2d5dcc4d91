// Sums over the real rows of a block, in tiles of double lanes whose order is fixed (S17).
//
// Where rows of channels are contiguous, every lane adds its rows one after the other, padded
// ones left out: a masked array and the packed one give the same bits (S5).
#pragma once

#include "lines.hpp"

namespace batchnorm::BATCHNORM_ISA {

constexpr int kBatch = 16;  // lines that a lane's sums take in before they go back to memory

// Calls f(rows, n) with the real outer rows of a block; `unit` divides every n except the last
// one.
template <class F>
inline void for_real_rows(const Step& s, const Block& b, Index unit, F f) {
    constexpr Index kScan = 256;
    Index list[kScan + kTile];
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

    bool contiguous(const Index* rows) const {
        return array.stride == width && rows[joined - 1] - rows[0] == joined - 1;
    }
};

// Prefetches the lines of the next batch in the order of memory, a cache line at each call: sums
// walk a batch tile by tile, across its rows, an order that no hardware prefetcher follows.
template <class T>
class Ahead {
  public:
    Ahead(const Array& array, const Block& b, Index span)
        : array_(array), first_(b.channel * span), lanes_(b.channels * span) {}

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
    Index left_ = 0, at_ = 0;
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
struct LaneValues {
    alignas(64) double at[kMaxLanes + kTile];

    LaneValues(const double* values, Index channels, Index span, Index joined) {
        Index l = 0;
        for (Index r = 0; r < joined; ++r, l += channels * span) {
            if (span == 1) {
                for (Index c = 0; c < channels; ++c) at[l + c] = values[c];
            } else {
                for (Index i = 0; i < channels * span; ++i) at[l + i] = values[i / span];
            }
        }
        for (Index end = l + kTile; l < end; ++l) at[l] = 0.0;
    }
};

// The last lanes of a line, filled up to a tile.
template <class T>
inline Tile load_some(const T* p, Index n, T pad = T{}) {
    T tile[kTile];
    for (Index i = 0; i < kTile; ++i) tile[i] = i < n ? p[i] : pad;
    return load(tile);
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
        for (Index c = 0; c < channels; ++c) {
            double a[kTile], b[kTile];
            for (int l = 0; l < kTile; ++l) a[l] = first[c][l], b[l] = second[c][l];
            for (int half = kTile / 2; half > 0; half /= 2) {
                for (int l = 0; l < half; ++l) a[l] += a[l + half], b[l] += b[l + half];
            }
            sum[c] = a[0], other[c] = b[0];
        }
    }
};

// Under a mask a stretch of positions is cut into equal pieces, each read with its mask: long ones,
// since hardware prefetching starts again with each channel, but short enough for the cache.
constexpr Index kPiece = 4096;

inline Index piece_of(Index length) {
    const Index pieces = (length + kPiece - 1) / kPiece;
    return ((length + pieces - 1) / pieces + kTile - 1) / kTile * kTile;
}

// The mask at a piece's positions, as bit patterns that select elements.
template <class T>
struct Selection {
    using Bits = BitsOf<T>;
    Bits bits[kPiece];
    bool all = true, none = false;

    void read(const Mask& mask, Index o, Index i, Index n) {
        if (!mask) return;
        unsigned char keep[kPiece];
        read_mask(mask, o / mask.repeat * mask.outer + i * mask.inner, mask.inner, n, keep);
        unsigned char every = 1, some = 0;
        for (Index p = 0; p < n; ++p) every &= keep[p], some |= keep[p];
        all = every != 0, none = some == 0;
        if (all || none) return;
        for (Index p = 0; p < n; ++p) bits[p] = keep[p] ? static_cast<Bits>(~Bits(0)) : Bits(0);
    }

    // Copies `in` at real positions and `other` elsewhere, from position `first` of the piece on;
    // `in` and `out` may be the same.
    BATCHNORM_INLINE void select(const T* in, T other, T* out, Index n, Index first = 0) const {
        Bits fill;
        __builtin_memcpy(&fill, &other, sizeof fill);
        for (Index p = 0; p < n; ++p) {
            Bits value;
            __builtin_memcpy(&value, in + p, sizeof value);
            value = (value & bits[first + p]) | (fill & ~bits[first + p]);
            __builtin_memcpy(out + p, &value, sizeof value);
        }
    }
};

// Tiles of a piece: tile r unchanged, or, under a mask, with `pad` at padded positions.
template <class T>
struct AllTiles {
    const T* p;
    T pad;
    BATCHNORM_INLINE Tile at(Index r) const { return load(p + r * kTile); }
    Tile rest(Index r, Index n) const { return load_some(p + r * kTile, n, pad); }
};

template <class T>
struct RealTiles {
    const T* p;
    T pad;
    const Selection<T>& real;
    BATCHNORM_INLINE Tile at(Index r) const {
        T tile[kTile];
        real.select(p + r * kTile, pad, tile, kTile, r * kTile);
        return load(tile);
    }
    Tile rest(Index r, Index n) const {
        T tile[kTile];
        real.select(p + r * kTile, pad, tile, n, r * kTile);
        return load_some(tile, n, pad);
    }
};

}  // namespace batchnorm::BATCHNORM_ISA
