// Stretches of positions under a mask, in pieces that are read once for all channels of a block.
#pragma once

#include "padded_rows.hpp"
#include "rows.hpp"
#include "sums.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Equal pieces: long ones, since hardware prefetching starts again with each channel, but short
// enough for the cache.
constexpr Index kPiece = 4096;

constexpr Index kPart = kTile * kGroup;

inline Index piece_of(Index length) {
    const Index pieces = (length + kPiece - 1) / kPiece;
    return ((length + pieces - 1) / pieces + kPart - 1) / kPart * kPart;
}

// The parts of a piece that are real, that are padding, and that have both.
class Piece {
  public:
    enum Kind { padding, real, mixed };
    struct Part {
        Index first, end;
        Kind kind;
    };

    // Without a mask everything is real.
    void read(const Mask& mask, Index o, Index i, Index n) {
        count_ = 0;
        if (!mask) return add(0, n, real);
        keep_ = {mask.bits, o / mask.repeat * mask.row + i};
        for (Index p = 0; p < n; p += kPart) {
            const Index end = n - p < kPart ? n : p + kPart;
            add(p, end, kind_of(keep_ + p, end - p));
        }
    }

    bool is(Kind kind) const { return count_ == 1 && parts_[0].kind == kind; }
    Keep keep(Index p) const { return keep_ + p; }
    const Part* begin() const { return parts_; }
    const Part* end() const { return parts_ + count_; }

  private:
    static Kind kind_of(Keep keep, Index n) {
        std::uint32_t some = 0, every = 0xffff;
        for (Index e = 0; e < n; e += 16) {
            const std::uint32_t left = n - e < 16 ? (1u << (n - e)) - 1 : 0xffff;
            const std::uint32_t word = (keep + e).word();
            some |= word & left, every &= word | ~left;
        }
        return some == 0 ? padding : every == 0xffff ? real : mixed;
    }

    void add(Index first, Index end, Kind kind) {
        if (count_ > 0 && parts_[count_ - 1].kind == kind) {
            parts_[count_ - 1].end = end;
        } else {
            parts_[count_++] = {first, end, kind};
        }
    }

    Keep keep_;
    Part parts_[kPiece / kPart + 1];
    int count_ = 0;
};

// Prefetches the beginning of the same channels in the next row of outer, where that is a jump:
// hardware follows a stretch only after some of its lines, and a visit has few channels.
template <class T>
inline void fetch_next(const Step& s, const Block& b, const Array& array, Index o) {
    constexpr Index kJump = 4;  // channels
    if (!array || b.channels >= kJump || o + 1 >= s.layout.outer) return;
    fetch_line(element<const T>(array, o + 1, b.channel * s.layout.inner), s.layout.inner);
}

// f(o, i, n, piece) for the pieces of a block's positions; one piece for each stretch where there
// is no mask and `whole`.
template <class F>
inline void for_each_piece(const Step& s, const Block& b, bool whole, F f) {
    Piece piece;
    for_each_stretch(s.layout, b, [&](Index o, Index first, Index length) {
        const Index step = whole && !s.mask ? length : piece_of(length);
        for (Index i = first; i < first + length; i += step) {
            const Index n = first + length - i < step ? first + length - i : step;
            piece.read(s.mask, o, i, n);
            f(o, i, n, piece);
        }
        return true;
    });
}

// n positions from position `first` of outer row o on.
struct Stretch {
    Index o, first, n;
};

constexpr Index kTogether = 4;

// f(stretches, m) for some stretches of a block at a time: where they are short, what begins and
// ends the work on a channel costs as much as the work.
template <class F>
inline void for_some_stretches(const Step& s, const Block& b, F f) {
    constexpr Index kShort = 1024;
    Stretch some[kTogether];
    Index m = 0;
    for_each_stretch(s.layout, b, [&](Index o, Index first, Index n) {
        some[m++] = {o, first, n};
        if (m == kTogether || n > kShort) f(some, m), m = 0;
        return true;
    });
    if (m > 0) f(some, m);
}

// Adds the terms of n positions in float32; term(e, access) is those of a vector from position e
// on, read and kept by `access`.
template <class Term>
BATCHNORM_INLINE void add_positions(Index n, TileSums& sums, const Term& term) {
    const Index tiles = n / kTile, done = tiles * kTile;
    add_narrow(tiles, sums, [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
        return term(r * kTile + i * kFloats, Whole{});
    });
    if (done == n) return;
    add_narrow(1, sums, [&](Index, int i) BATCHNORM_INLINE_LAMBDA {
        const Index e = done + i * kFloats, left = n - e;
        return term(e, Some{left < 0 ? 0 : left < kFloats ? left : kFloats});
    });
}

// Tile r of a part: unchanged, or with `pad` where it is padding.
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
    Keep keep;
    BATCHNORM_INLINE Tile at(Index r) const { return rest(r, kTile); }
    BATCHNORM_INLINE Tile rest(Index r, Index n) const {
        T tile[kTile];
        for (Index i = 0; i < kTile; ++i) {
            const Index e = r * kTile + i;
            tile[i] = i < n && keep[e] ? p[e] : pad;
        }
        return load(tile);
    }
};

// 0 where `keep` is.
template <class T>
inline void zero_padding(T* p, Keep keep, Index n) {
    for (Index i = 0; i < n; ++i) {
        if (!keep[i]) p[i] = T{};
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
