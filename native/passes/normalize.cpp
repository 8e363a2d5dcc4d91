// y from x and the coefficients of each channel (S4, S18).
#include "padded_rows.hpp"
#include "sums.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <int kStep, Activation kAct, class T>
void line(const T* x, const T* residual, T* y, Index n, const Coefficients<Compute<T>>& k) {
    Access<T> from, extra, to;
    for (Index i = 0; i < n; i += Access<T>::kLimit) {
        const Index m = n - i < Access<T>::kLimit ? n - i : Access<T>::kLimit;
        normalize_line<kStep, kAct>(from.read(x + i, m), extra.read(at(residual, i), m),
                                    to.target(y + i), m, kStep ? at(k, i) : k);
        to.write(y + i, m);
    }
}

template <int kStep, class T>
void line(const T* x, const T* residual, T* y, Index n, const Coefficients<Compute<T>>& k,
          Activation act) {
    switch (act) {
        case Activation::none:
            return line<kStep, Activation::none>(x, residual, y, n, k);
        case Activation::relu:
            return line<kStep, Activation::relu>(x, residual, y, n, k);
        case Activation::leaky_relu:
            return line<kStep, Activation::leaky_relu>(x, residual, y, n, k);
    }
}

bool zeroes_padding(const Step& s) { return s.mask && s.options.zero_padding; }

template <class T>
void rows_of_channels(const Step& s, const Block& b) {
    const Index span = s.layout.inner, width = b.channels * span, first = b.channel * span;
    const bool dense = b.channels == s.layout.channels && s.x.stride == width &&
                       s.y.stride == width && (!s.residual || s.residual.stride == width);
    const Index joined = dense ? rows_per_line(width) : 1;
    const Lanes<Compute<T>, kWideLanes> lanes(s, b, joined * width);
    const auto k = lanes.from();
    const auto compute = [&](Index o, Index rows) {
        line<1>(element<const T>(s.x, o, first), element<const T>(s.residual, o, first),
                element<T>(s.y, o, first), rows * width, k, s.options.activation);
    };
    const auto fetch = [&](Index o) { fetch_line(element<const T>(s.x, o, first), width); };
    const auto pad = [&](Index o) { set_zero(element<T>(s.y, o, first), width); };
    for_each_run(s.layout, b.group, b.first, b.rows, [&](Index o, Index n) {
        if (zeroes_padding(s)) {
            for_padded_rows(s.mask, o, n, joined, fetch, compute, pad);
            return true;
        }
        for (Index r = 0; r < n; r += joined) compute(o + r, n - r < joined ? n - r : joined);
        return true;
    });
}

template <class T, class F>
void padded_positions(const Step& s, const Block& b, F compute) {
    Selection<T> real;
    for_each_stretch(s.layout, b, [&](Index o, Index first, Index length) {
        const Index step = piece_of(length);
        for (Index i = first; i < first + length; i += step) {
            const Index n = first + length - i < step ? first + length - i : step;
            real.read(s.mask, o, i, n);
            for (Index c = 0; c < b.channels; ++c) {
                T* y = element<T>(s.y, o, (b.channel + c) * s.layout.inner + i);
                if (real.none) {
                    set_zero(y, n);
                    continue;
                }
                const Index part = real.all ? n : kBlanked;
                for (Index p = 0; p < n; p += part) {
                    const Index m = n - p < part ? n - p : part;
                    compute(c, o, i + p, m);
                    if (!real.all) real.select(y + p, T{}, y + p, m, p);
                }
            }
        }
        return true;
    });
}

template <class T>
void channels_of_positions(const Step& s, const Block& b) {
    const Lanes<Compute<T>, kMaxChannels> lanes(s, b, b.channels);
    const auto compute = [&](Index c, Index o, Index i, Index n) {
        const Index offset = (b.channel + c) * s.layout.inner + i;
        line<0>(element<const T>(s.x, o, offset), element<const T>(s.residual, o, offset),
                element<T>(s.y, o, offset), n, lanes.from(c), s.options.activation);
    };
    if (zeroes_padding(s)) return padded_positions<T>(s, b, compute);
    for_each_stretch(s.layout, b, [&](Index o, Index i, Index n) {
        for (Index c = 0; c < b.channels; ++c) compute(c, o, i, n);
        return true;
    });
}

}  // namespace

template <class T>
void normalize_block(const Step& step, const Block& block) {
    if (by_rows(step)) return rows_of_channels<T>(step, block);
    channels_of_positions<T>(step, block);
}

template void normalize_block<Half>(const Step&, const Block&);
template void normalize_block<Bfloat>(const Step&, const Block&);
template void normalize_block<float>(const Step&, const Block&);
template void normalize_block<double>(const Step&, const Block&);

}  // namespace batchnorm::BATCHNORM_ISA
