// Tests of every value of the half types.
#pragma once

#include "compare.hpp"

namespace batchnorm::tests {

// Values of a half type, times a float32 factor: exactly rounded (S16).
inline void check_conversions(Type type, const Layout& layout, float factor, Flush flush) {
    Case c;
    Problem& p = c.problem;
    p.type = type, p.options.batch = false, p.options.eps = 0;
    p.layout = layout;
    for (Index bits = 0; bits < layout.outer * layout.channels * layout.inner; ++bits)
        p.x.push_back(decode_half(static_cast<std::uint16_t>(bits), type));
    p.dy = p.x;
    p.gamma.assign(static_cast<std::size_t>(layout.channels), factor);
    c.placement.wants_dgamma = c.placement.wants_dbeta = false;
    Inputs inputs(c);
    const Result found = run(inputs, {1}, flush);
    for (std::size_t i = 0; i < p.x.size(); ++i) {
        const double expected = rounded(type, static_cast<float>(p.x[i]) * factor);
        for (double value : {found.y[i], found.dx[i]}) {
            if (value == expected || (std::isnan(value) && std::isnan(expected))) continue;
            throw Failure(at("conversion", i, value, expected, 0));
        }
    }
}

// All values in whole vectors, and in rows that end before one is full.
constexpr Layout kAllHalves[] = {{1, 1, 65536, 1, 1}, {16384, 4, 1, 1, 1}, {9362, 7, 1, 1, 1},
                                 {9362, 1, 7, 1, 1},  {4, 1, 16384, 1, 1}, {3, 1, 21845, 1, 1}};

inline void check_conversions(const std::vector<const char*>& sets) {
    for (const char* set : sets) {
        use_instructions(set);
        for (Type type : {Type::f16, Type::bf16}) {
            for (float factor : {1.0f, 0.33333334f, 1.7f, 1e-5f, 3e4f}) {
                for (Flush flush : {Flush::no, Flush::yes}) {
                    for (const Layout& layout : kAllHalves)
                        check_conversions(type, layout, factor, flush);
                }
            }
        }
    }
}

}  // namespace batchnorm::tests
