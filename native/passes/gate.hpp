// act'(y) dy, the first step of both gradient reduction and gradient application (S18).
#pragma once

#include "sums.hpp"

namespace batchnorm::BATCHNORM_ISA {

// act'(y) dy for one line, in the type of the arithmetic.
template <int kStep, Activation kAct, class T>
void gate_chunks(const T* dy, const T* x, const T* y, Compute<T>* g, Index n,
                 const Coefficients<Compute<T>>& k) {
    Access<T> from, of_x, of_y;
    for (Index i = 0; i < n; i += Access<T>::kLimit) {
        const Index m = n - i < Access<T>::kLimit ? n - i : Access<T>::kLimit;
        gate_line<kStep, kAct>(from.read(dy + i, m), of_x.read(at(y ? nullptr : x, i), m),
                               of_y.read(at(y, i), m), g + i, m, kStep ? at(k, i) : k);
    }
}

template <int kStep, class T>
void gate(const T* dy, const T* x, const T* y, Compute<T>* g, Index n,
          const Coefficients<Compute<T>>& k, Activation act) {
    if (act == Activation::none) return widen(dy, g, n);
    if (act == Activation::relu) return gate_chunks<kStep, Activation::relu>(dy, x, y, g, n, k);
    return gate_chunks<kStep, Activation::leaky_relu>(dy, x, y, g, n, k);
}

template <class T>
void gate_to(const T* dy, const T* y, T* out, Index n, Activation act) {
    Compute<T> g[kChunk];
    for (Index i = 0; i < n; i += kChunk) {
        const Index m = n - i < kChunk ? n - i : kChunk;
        gate<0>(dy + i, static_cast<const T*>(nullptr), y + i, g, m, {}, act);
        narrow(g, out + i, m);
    }
}

}  // namespace batchnorm::BATCHNORM_ISA
