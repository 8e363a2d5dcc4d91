// Sums of x - anchor and of its square (S2, S3).
//
// Wide sums are around a real row of the data, so both together lose no digit: an anchor far from
// the mean would, as a value of the data, make the variance large too. Products of float32 are
// exact in double. Narrow sums are around the mean of some rows; soundness.hpp says when
// they are good enough.
#include "pieces.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// Adds one tile of n lines to its sums. `line(r)` is a Tile of line r.
template <class F>
BATCHNORM_INLINE void add_tiles(Index n, const double* anchor, double* first, double* second,
                                F line) {
    Doubles a[kVectors];
    for (int i = 0; i < kVectors; ++i) a[i] = load_doubles(anchor + i * kDoubles);
    TileSums sums(first, second);
    BATCHNORM_NO_UNROLL
    for (Index r = 0; r < n; ++r) {
        const Tile x = line(r);
        for (int i = 0; i < kVectors; ++i) {
            const Doubles d = x.v[i] - a[i];
            sums.first[i] = plus(sums.first[i], d);
            sums.second[i] = plus(sums.second[i], d * d);
        }
    }
    sums.store(first, second);
}

// The same in float32. `distance(r, i)` is x - anchor in float vector number i of line r.
template <class F>
BATCHNORM_INLINE void add_narrow_tiles(Index n, double* first, double* second, const F& distance) {
    add_narrow(n, first, second, [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
        const Floats d = distance(r, i);
        return Two{d, d * d};
    });
}

template <class T>
void add_lines(const T* const* lines, int n, Index lanes, const double* anchor, LaneSums& sums,
               Ahead<T>& ahead) {
    Index l = 0;
    for (; l + kTile <= lanes; l += kTile) {
        add_tiles(n, anchor + l, sums.first + l, sums.second + l, [&](Index r) {
            ahead.step();
            return load(lines[r] + l);
        });
    }
    if (l == lanes) return;
    add_tiles(n, anchor + l, sums.first + l, sums.second + l,
              [&](Index r) { return load_some(lines[r] + l, lanes - l); });
}

// Lanes that are missing at the end of a line count as their anchors.
template <class T>
void add_narrow_lines(const T* const* lines, int n, Index lanes, const float* anchor,
                      LaneSums& sums, Ahead<T>& ahead) {
    Index l = 0;
    for (; l + kTile <= lanes; l += kTile) {
        add_narrow_tiles(n, sums.first + l, sums.second + l,
                         [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                             if (i == 0) ahead.step();
                             const Index at = l + i * kFloats;
                             return load_floats(lines[r] + at) - load_floats(anchor + at);
                         });
    }
    if (l == lanes) return;
    for (Index r = 0; r < n; ++r) {
        float some[kTile];
        for (Index e = 0; e < kTile; ++e) some[e] = anchor[l + e];
        for (Index e = 0; e < lanes - l; ++e) some[e] = float(widen(lines[r][l + e]));
        add_narrow_tiles(1, sums.first + l, sums.second + l,
                         [&](Index, int i) BATCHNORM_INLINE_LAMBDA {
                             const Index at = i * kFloats;
                             return load_floats(some + at) - load_floats(anchor + l + at);
                         });
    }
}

// Whole tiles of n lines, `stride` apart. Each tile prefetches the one `ahead` elements further.
template <class T>
void add_even_lines(const T* x, Index stride, Index n, Index lanes, const float* anchor,
                    LaneSums& sums, Index ahead) {
    for (Index l = 0; l + kTile <= lanes; l += kTile) {
        const T* line = x + l;
        Floats a[kFloatVectors];
        for (int i = 0; i < kFloatVectors; ++i) a[i] = load_floats(anchor + l + i * kFloats);
        add_narrow_tiles(n, sums.first + l, sums.second + l,
                         [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
                             const T* tile = line + r * stride;
                             if (i == 0) __builtin_prefetch(tile + ahead);
                             return load_floats(tile + i * kFloats) - a[i];
                         });
    }
}

template <class T>
struct RowsOfChannels {
    const Step& s;
    const Block& b;
    const Index span = s.layout.inner, width = b.channels * span;
    const Index joined = rows_per_line(width), lanes = joined * width;
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    LaneSums sums{lanes};
    Gather<T> x{s.x, b, span, joined};
    Ahead<T> ahead{s.x, b, span};

    RowsOfChannels(const Step& step, const Block& block) : s(step), b(block) {}

    void wide(double* sum, double* square) {
        const LaneValues<double> anchor(means, b.channels, span, joined);
        T pad[kMaxLanes];
        for (Index l = 0; l < width; ++l) narrow_to(means[l / span], pad[l]);
        for_real_rows(s, b, joined, [&](const Index* rows, Index n) {
            for_batches(rows, n, pad, [&](const T* const* lines, int m) {
                add_lines(lines, m, lanes, anchor.at, sums, ahead);
            });
        });
        sums.fold(b.channels, span, joined, sum, square);
    }

    void narrow(double* sum, double* square) {
        const LaneValues<float> anchor(means, b.channels, span, joined);
        if (lanes % kTile == 0 && x.even(s)) return even(anchor, sum, square);
        for_real_rows(s, b, joined * kGroup, [&](const Index* rows, Index n) {
            const Index whole = n - n % joined;
            for_batches(rows, whole, nullptr, [&](const T* const* lines, int m) {
                add_narrow_lines(lines, m, lanes, anchor.at, sums, ahead);
            });
            if (whole == n) return;
            const T* line = x.line(rows + whole, n - whole, 0, nullptr);
            add_narrow_lines(&line, 1, (n - whole) * width, anchor.at, sums, ahead);
        });
        sums.fold(b.channels, span, joined, sum, square);
    }

    void even(const LaneValues<float>& anchor, double* sum, double* square) {
        const Index lines = b.rows / joined, stride = joined * s.x.stride;
        const Index most = even_batch(lanes, sizeof(T));
        const T* from = element<const T>(s.x, b.first, b.channel * span);
        for (Index r = 0; r < lines; r += most) {
            const Index n = lines - r < most ? lines - r : most;
            add_even_lines(from + r * stride, stride, n, lanes, anchor.at, sums,
                           r + most < lines ? most * stride : 0);
        }
        if (lines * joined < b.rows) {
            const T* line = from + lines * stride;
            add_narrow_lines(&line, 1, (b.rows - lines * joined) * width, anchor.at, sums, ahead);
        }
        sums.fold(b.channels, span, joined, sum, square);
    }

    template <class F>
    void for_batches(const Index* rows, Index n, const T* pad, F add) {
        for (Index r = 0; r < n;) {
            const T* lines[kBatch];
            int m = 0;
            for (; m < kBatch && r < n; ++m, r += joined) {
                lines[m] = x.line(rows + r, n - r < joined ? n - r : joined, m, pad);
            }
            ahead.begin(rows + r, joined == 1 ? (n - r < kBatch ? n - r : kBatch) : 0);
            add(lines, m);
        }
    }

    static void narrow_to(double value, T& out) {
        batchnorm::BATCHNORM_ISA::narrow(Compute<T>(value), out);
    }
};

template <class X>
void add_stretch(X x, Index n, double mean, double* first, double* second) {
    double anchor[kTile];
    for (double& a : anchor) a = mean;
    const Index tiles = n / kTile, rest = n - tiles * kTile;
    add_tiles(tiles, anchor, first, second, [&](Index r) { return x.at(r); });
    if (rest == 0) return;
    add_tiles(1, anchor, first, second, [&](Index) { return x.rest(tiles, rest); });
}

// `keep`: which elements are real.
template <class T>
void add_narrow_stretch(const T* x, Keep keep, Index n, float mean, double* first, double* second) {
    const Floats anchor = all_lanes(mean);
    const Index tiles = n / kTile, done = tiles * kTile;
    if (!keep) {
        add_narrow_tiles(tiles, first, second, [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
            return load_floats(x + r * kTile + i * kFloats) - anchor;
        });
    } else {
        add_narrow_tiles(tiles, first, second, [&](Index r, int i) BATCHNORM_INLINE_LAMBDA {
            const Index at = r * kTile + i * kFloats;
            return keep_lanes(load_floats(x + at) - anchor, keep + at);
        });
    }
    if (done == n) return;
    float some[kTile];
    load_rest(x + done, n - done, keep ? keep + done : Keep{}, mean, some);
    add_narrow_tiles(1, first, second, [&](Index, int i) BATCHNORM_INLINE_LAMBDA {
        return load_floats(some + i * kFloats) - anchor;
    });
}

template <class T>
void add_real_positions(const Step& s, const Block& b, const double* means, PositionSums& sums) {
    for_some_stretches(s, b, [&](const Stretch* some, Index m) {
        for (Index k = 0; k < m; ++k) fetch_next<T>(s, b, s.x, some[k].o);
        for (Index c = 0; c < b.channels; ++c) {
            const Floats anchor = all_lanes(float(means[c]));
            const Index offset = (b.channel + c) * s.layout.inner;
            TileSums both(sums.first[c], sums.second[c]);
            for (Index k = 0; k < m; ++k) {
                const T* x = element<const T>(s.x, some[k].o, offset + some[k].first);
                add_positions(some[k].n, both, [&](Index e, auto io) BATCHNORM_INLINE_LAMBDA {
                    const Floats d = io.keep(io.load(x + e) - anchor);
                    return Two{d, d * d};
                });
            }
            both.store(sums.first[c], sums.second[c]);
        }
    });
}

template <class T>
void channels_of_positions(const Step& s, const Block& b, double* sum, double* square) {
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    PositionSums sums(b.channels);
    if constexpr (kCanBeNarrow<T>) {
        if (!s.mask && !b.wide) {
            add_real_positions<T>(s, b, means, sums);
            return sums.fold(b.channels, sum, square);
        }
    }
    for_each_piece(s, b, true, [&](Index o, Index first, Index, const Piece& piece) {
        fetch_next<T>(s, b, s.x, o);
        for (Index c = 0; c < b.channels; ++c) {
            const T* x = element<const T>(s.x, o, (b.channel + c) * s.layout.inner + first);
            double *one = sums.first[c], *other = sums.second[c];
            for (const auto& [from, end, kind] : piece) {
                if (kind == Piece::padding) continue;
                const Keep keep = kind == Piece::real ? Keep{} : piece.keep(from);
                if constexpr (kCanBeNarrow<T>) {
                    if (!b.wide) {
                        add_narrow_stretch(x + from, keep, end - from, float(means[c]), one, other);
                        continue;
                    }
                }
                T pad;
                narrow(Compute<T>(means[c]), pad);
                if (!keep) {
                    add_stretch(AllTiles<T>{x + from, pad}, end - from, means[c], one, other);
                } else {
                    add_stretch(RealTiles<T>{x + from, pad, keep}, end - from, means[c], one,
                                other);
                }
            }
        }
    });
    sums.fold(b.channels, sum, square);
}

}  // namespace

template <class T>
void moments_block(const Step& step, const Block& block, double* sum, double* square) {
    if (!by_rows(step)) return channels_of_positions<T>(step, block, sum, square);
    RowsOfChannels<T> rows(step, block);
    if constexpr (kCanBeNarrow<T>) {
        if (!block.wide) return rows.narrow(sum, square);
    }
    rows.wide(sum, square);
}

template void moments_block<Half>(const Step&, const Block&, double*, double*);
template void moments_block<Bfloat>(const Step&, const Block&, double*, double*);
template void moments_block<float>(const Step&, const Block&, double*, double*);
template void moments_block<double>(const Step&, const Block&, double*, double*);

}  // namespace batchnorm::BATCHNORM_ISA
