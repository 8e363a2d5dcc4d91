// Sums of x - anchor and of its square (S2, S3).
//
// The anchor is a real row of the data, so both sums together lose no digit: an anchor far from the
// mean would, as a value of the data, make the variance large too. Products of float32 are exact in
// double.
#include "sums.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// Adds one tile of n lines to its sums. `line(r)` is a Tile of line r.
template <class F>
BATCHNORM_INLINE void add_tiles(Index n, const double* anchor, double* first, double* second,
                                F line) {
    Doubles a[kVectors], sum[kVectors], square[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        a[i] = load_doubles(anchor + i * kDoubles);
        sum[i] = load_doubles(first + i * kDoubles);
        square[i] = load_doubles(second + i * kDoubles);
    }
    BATCHNORM_NO_UNROLL
    for (Index r = 0; r < n; ++r) {
        const Tile x = line(r);
        for (int i = 0; i < kVectors; ++i) {
            const Doubles d = x.v[i] - a[i];
            sum[i] = plus(sum[i], d);
            square[i] = plus(square[i], d * d);
        }
    }
    for (int i = 0; i < kVectors; ++i) {
        store_doubles(first + i * kDoubles, sum[i]);
        store_doubles(second + i * kDoubles, square[i]);
    }
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

template <class T>
void rows_of_channels(const Step& s, const Block& b, double* sum, double* square) {
    const Index span = s.layout.inner, width = b.channels * span;
    const Index joined = rows_per_line(width), lanes = joined * width;
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    const LaneValues anchor(means, b.channels, span, joined);
    T pad[kMaxLanes];
    for (Index l = 0; l < width; ++l) narrow(Compute<T>(means[l / span]), pad[l]);
    LaneSums sums(lanes);
    Gather<T> x(s.x, b, span, joined);
    Ahead<T> ahead(s.x, b, span);
    for_real_rows(s, b, joined, [&](const Index* rows, Index n) {
        for (Index r = 0; r < n;) {
            const T* lines[kBatch];
            int m = 0;
            for (; m < kBatch && r < n; ++m, r += joined) {
                lines[m] = x.line(rows + r, n - r < joined ? n - r : joined, m, pad);
            }
            ahead.begin(rows + r, joined == 1 ? (n - r < kBatch ? n - r : kBatch) : 0);
            add_lines(lines, m, lanes, anchor.at, sums, ahead);
        }
    });
    sums.fold(b.channels, span, joined, sum, square);
}

template <class X>
void add_stretch(X x, Index n, double mean, double* first, double* second) {
    double anchor[kTile];
    for (double& a : anchor) a = mean;
    const Index tiles = n / kTile, rest = n - tiles * kTile;
    add_tiles(tiles, anchor, first, second, [&](Index r) { return x.at(r); });
    if (rest == 0) return;
    add_tiles(1, anchor, first, second, [&](Index) { return x.rest(tiles, rest); });
}

template <class T>
void channels_of_positions(const Step& s, const Block& b, double* sum, double* square) {
    const double* means =
        s.statistics.row(Statistics::mean) + b.group * s.layout.channels + b.channel;
    PositionSums sums(b.channels);
    for_each_stretch(s.layout, b, [&](Index o, Index first, Index length) {
        const Index step = s.mask ? piece_of(length) : length;
        for (Index i = first; i < first + length; i += step) {
            const Index n = first + length - i < step ? first + length - i : step;
            Selection<T> real;
            real.read(s.mask, o, i, n);
            if (real.none) continue;
            for (Index c = 0; c < b.channels; ++c) {
                const T* x = element<const T>(s.x, o, (b.channel + c) * s.layout.inner + i);
                T pad;
                narrow(Compute<T>(means[c]), pad);
                if (real.all) {
                    add_stretch(AllTiles<T>{x, pad}, n, means[c], sums.first[c], sums.second[c]);
                } else {
                    add_stretch(RealTiles<T>{x, pad, real}, n, means[c], sums.first[c],
                                sums.second[c]);
                }
            }
        }
        return true;
    });
    sums.fold(b.channels, sum, square);
}

}  // namespace

template <class T>
void moments_block(const Step& step, const Block& block, double* sum, double* square) {
    if (by_rows(step)) return rows_of_channels<T>(step, block, sum, square);
    channels_of_positions<T>(step, block, sum, square);
}

template void moments_block<Half>(const Step&, const Block&, double*, double*);
template void moments_block<Bfloat>(const Step&, const Block&, double*, double*);
template void moments_block<float>(const Step&, const Block&, double*, double*);
template void moments_block<double>(const Step&, const Block&, double*, double*);

}  // namespace batchnorm::BATCHNORM_ISA
