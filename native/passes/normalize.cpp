// y from x and the coefficients of each channel (S4, S18).
#include "padded_rows.hpp"
#include "pieces.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// `keep`: which elements are real.
template <Activation kAct, bool kByLane, class T, class L>
BATCHNORM_INLINE void line(const T* x, const T* residual, T* y, Index n, const L& lanes, Index c,
                           bool streams, Keep keep = {}) {
    if (residual == nullptr && !keep) {
        fill_vectors<T, kByLane>(lanes, c, y, n, streams,
                                 [=](Index i, const auto& k, auto io) BATCHNORM_INLINE_LAMBDA {
                                     io.store(y + i, activate<kAct>(affine(io.load(x + i), k)));
                                 });
    } else {
        fill_vectors<T, kByLane>(lanes, c, y, n, streams,
                                 [=](Index i, const auto& k, auto io) BATCHNORM_INLINE_LAMBDA {
                                     auto v = affine(io.load(x + i), k);
                                     if (residual != nullptr) v = v + io.load(residual + i);
                                     v = activate<kAct>(v);
                                     io.store(y + i, !keep ? v : keep_lanes(v, keep + i));
                                 });
    }
}

bool zeroes_padding(const Step& s) { return s.mask && s.options.zero_padding; }

// Not inlined, since rows are walked in many ways.
template <Activation kAct, class T, class L>
void fill_rows(const Step& s, const Block& b, Index o, Index rows, const L& lanes) {
    const Index first = b.channel * s.layout.inner, n = rows * b.channels * s.layout.inner;
    line<kAct, true>(element<const T>(s.x, o, first), element<const T>(s.residual, o, first),
                     element<T>(s.y, o, first), n, lanes, 0, b.streams);
}

template <Activation kAct, class T>
void rows_of_channels(const Step& s, const Block& b) {
    const Index span = s.layout.inner, width = b.channels * span, first = b.channel * span;
    const bool dense = b.channels == s.layout.channels && s.x.stride == width &&
                       s.y.stride == width && (!s.residual || s.residual.stride == width);
    const bool padded = zeroes_padding(s);
    const Index joined = dense ? rows_together(width) : 1;
    const Lanes<Compute<T>, kWideLanes> lanes(s, b, joined * width);
    const auto compute = [&](Index o, Index rows) { fill_rows<kAct, T>(s, b, o, rows, lanes); };
    const auto fetch = [&](Index o) { fetch_line(element<const T>(s.x, o, first), width); };
    const auto pad = [&](Index o, Index rows) {
        set_zero(element<T>(s.y, o, first), rows * width);
    };
    for_each_run(s.layout, b.group, b.first, b.rows, [&](Index o, Index n) {
        if (padded) {
            for_padded_rows(s.mask, o, n, width, joined, fetch, compute, pad);
            return true;
        }
        for (Index r = 0; r < n; r += joined) compute(o + r, n - r < joined ? n - r : joined);
        return true;
    });
}

template <class T, class F>
void padded_positions(const Step& s, const Block& b, F compute) {
    for_each_piece(s, b, false, [&](Index o, Index i, Index, const Piece& piece) {
        const bool one = piece.is(Piece::real) || piece.is(Piece::padding);
        const Index begin = piece.begin()->kind == Piece::padding && !one ? piece.begin()->end : 0;
        for (Index c = 0; c < b.channels; ++c) {
            T* y = element<T>(s.y, o, (b.channel + c) * s.layout.inner + i);
            // Padding between channels breaks the streams that hardware prefetches.
            if (c + 1 < b.channels && !one)
                fetch_line(
                    element<const T>(s.x, o, (b.channel + c + 1) * s.layout.inner + i + begin),
                    s.layout.inner);
            for (const auto& [from, end, kind] : piece) {
                if (kind == Piece::padding) {
                    set_zero(y + from, end - from);
                } else {
                    compute(c, o, i + from, end - from,
                            kind == Piece::real ? Keep{} : piece.keep(from));
                }
            }
        }
    });
}

template <Activation kAct, class T>
void channels_of_positions(const Step& s, const Block& b) {
    const Lanes<Compute<T>, kMaxChannels> lanes(s, b, b.channels);
    const auto compute = [&](Index c, Index o, Index i, Index n, Keep keep) {
        const Index offset = (b.channel + c) * s.layout.inner + i;
        line<kAct, false>(element<const T>(s.x, o, offset), element<const T>(s.residual, o, offset),
                          element<T>(s.y, o, offset), n, lanes, c, b.streams, keep);
    };
    if (zeroes_padding(s)) return padded_positions<T>(s, b, compute);
    for_each_stretch(s.layout, b, [&](Index o, Index i, Index n) {
        for (Index c = 0; c < b.channels; ++c) compute(c, o, i, n, Keep{});
        return true;
    });
}

}  // namespace

template <class T>
void normalize_block(const Step& step, const Block& block) {
    with_activation(step.options.activation, [&](auto act) {
        if (by_rows(step)) {
            rows_of_channels<act.value, T>(step, block);
        } else {
            channels_of_positions<act.value, T>(step, block);
        }
    });
    if (block.streams) settle();
}

template void normalize_block<Half>(const Step&, const Block&);
template void normalize_block<Bfloat>(const Step&, const Block&);
template void normalize_block<float>(const Step&, const Block&);
template void normalize_block<double>(const Step&, const Block&);

}  // namespace batchnorm::BATCHNORM_ISA
