// y from x and the coefficients of each channel (S4, S18).
#include "lines.hpp"

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

template <class T>
void rows_of_channels(const Step& s, const Block& b) {
    const Index span = s.layout.inner, width = b.channels * span, first = b.channel * span;
    const bool dense = b.channels == s.layout.channels && s.x.stride == width &&
                       s.y.stride == width && (!s.residual || s.residual.stride == width);
    const Index joined = dense ? rows_per_line(width) : 1;
    const Lanes<Compute<T>, kWideLanes> lanes(s, b, joined * width);
    const auto k = lanes.from();
    for_each_run(s.layout, b.group, b.first, b.rows, [&](Index o, Index n) {
        for (Index r = 0; r < n; r += joined) {
            const Index m = (n - r < joined ? n - r : joined) * width;
            line<1>(element<const T>(s.x, o + r, first), element<const T>(s.residual, o + r, first),
                    element<T>(s.y, o + r, first), m, k, s.options.activation);
        }
        return true;
    });
}

template <class T>
void channels_of_positions(const Step& s, const Block& b) {
    const Lanes<Compute<T>, kMaxChannels> lanes(s, b, b.channels);
    for_each_stretch(s.layout, b, [&](Index o, Index i, Index n) {
        for (Index c = 0; c < b.channels; ++c) {
            const Index offset = (b.channel + c) * s.layout.inner + i;
            line<0>(element<const T>(s.x, o, offset), element<const T>(s.residual, o, offset),
                    element<T>(s.y, o, offset), n, lanes.from(c), s.options.activation);
        }
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
