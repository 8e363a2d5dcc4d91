// Stretches of positions under a mask, in pieces that are read once for all channels of a block.
#pragma once

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
        const Index first = o / mask.repeat * mask.outer + i * mask.inner;
        if (mask.width == 1 && mask.inner == 1) {
            keep_ = static_cast<const unsigned char*>(mask.data) + first;
        } else {
            read_mask(mask, first, mask.inner, n, copy_);
            keep_ = copy_;
        }
        for (Index p = 0; p < n; p += kPart) {
            const Index end = n - p < kPart ? n : p + kPart;
            unsigned char every = 1, some = 0;
            for (Index e = p; e < end; ++e) {
                const unsigned char here = keep_[e] != 0;
                every &= here, some |= here;
            }
            add(p, end, some == 0 ? padding : every != 0 ? real : mixed);
        }
    }

    bool is(Kind kind) const { return count_ == 1 && parts_[0].kind == kind; }
    const unsigned char* keep(Index p) const { return keep_ + p; }
    const Part* begin() const { return parts_; }
    const Part* end() const { return parts_ + count_; }

  private:
    void add(Index first, Index end, Kind kind) {
        if (count_ > 0 && parts_[count_ - 1].kind == kind) {
            parts_[count_ - 1].end = end;
        } else {
            parts_[count_++] = {first, end, kind};
        }
    }

    unsigned char copy_[kPiece];
    const unsigned char* keep_ = copy_;
    Part parts_[kPiece / kPart + 1];
    int count_ = 0;
};

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
    const unsigned char* keep;
    BATCHNORM_INLINE Tile at(Index r) const { return rest(r, kTile); }
    BATCHNORM_INLINE Tile rest(Index r, Index n) const {
        T tile[kTile];
        for (Index i = 0; i < kTile; ++i) {
            const Index e = r * kTile + i;
            tile[i] = i < n && keep[e] != 0 ? p[e] : pad;
        }
        return load(tile);
    }
};

// 0 where `keep` is.
template <class T>
inline void zero_padding(T* p, const unsigned char* keep, Index n) {
    for (Index i = 0; i < n; ++i) {
        if (keep[i] == 0) p[i] = T{};
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
