// Random values: of x and of the per-channel arrays, hard ones among them.
#pragma once

#include "cases.hpp"
#include "random.hpp"

namespace batchnorm::tests {

inline Type draw_type(Random& random) { return static_cast<Type>(random.below(4)); }

// A size among the type's subnormal numbers.
inline double subnormal(Type type) {
    return type == Type::f16 ? 2e-5 : type == Type::f64 ? 1e-310 : 3e-40;
}

// The distribution of the values of one channel.
struct Spread {
    double centre, width;
    double outlier;  // added to the channel's first value

    Spread(Random& random, Type type) : centre(random.normal()), width(1), outlier(0) {
        const bool narrow = type == Type::f16;
        switch (random.below(9)) {
            case 0:
                centre = (narrow ? 100 : 1e6) * random.normal();
                break;
            case 1:
                width = 0;
                break;
            case 2:
                centre = 0, width = narrow ? 1e-6 : 1e-20;
                break;
            case 3:
                centre = 0, width = narrow ? 1000 : 1e17;
                break;
            case 4:
                outlier = narrow ? 1e4 : 1e6;
                break;
            case 5:
                width = narrow ? 0.01 : random.pick({1e-3, 1e-42, 1e3});
                centre *= width < 1e-40 ? 0 : 1;
                break;
            case 6:
                centre = 0, width = subnormal(type);
                break;
            default:
                break;
        }
    }
};

inline void draw_x(Random& random, Problem& p) {
    p.x.resize(static_cast<std::size_t>(p.layout.outer * p.layout.channels * p.layout.inner));
    for (Index c = 0; c < p.layout.channels; ++c) {
        const Spread spread(random, p.type);
        for (Index o = 0; o < p.layout.outer; ++o) {
            for (Index i = 0; i < p.layout.inner; ++i) {
                double value = spread.centre + spread.width * random.normal();
                if (o == 0 && i == 0) value += spread.outlier;
                p.x[static_cast<std::size_t>(p.at(o, c, i))] = rounded(p.type, value);
            }
        }
    }
}

inline std::vector<double> draw_values(Random& random, Index n, Type type, double centre,
                                       double width) {
    std::vector<double> values(static_cast<std::size_t>(n));
    for (double& v : values) v = rounded(type, centre + width * random.normal());
    return values;
}

inline std::vector<double> draw_positive(Random& random, Index n, Type type) {
    std::vector<double> values(static_cast<std::size_t>(n));
    for (double& v : values) v = rounded(type, random.uniform(0.1, 4));
    return values;
}

// NaN, infinity and huge numbers where no step may read.
inline void spoil_padding(Random& random, Problem& p, std::vector<double>& values) {
    const Index kind = random.below(5);
    if (kind == 0) return;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double infinity = std::numeric_limits<double>::infinity();
    const double huge = static_cast<double>(largest(p.type));
    for (Index o = 0; o < p.layout.outer; ++o) {
        for (Index i = 0; i < p.layout.inner; ++i) {
            if (p.is_real(o, i)) continue;
            const double bad = kind == 1   ? nan
                               : kind == 2 ? random.pick({infinity, -infinity})
                               : kind == 3 ? random.pick({huge, -huge})
                                           : random.pick({nan, infinity, -infinity, huge, 1.0});
            for (Index c = 0; c < p.layout.channels; ++c)
                values[static_cast<std::size_t>(p.at(o, c, i))] = bad;
        }
    }
}

// One real value that is not finite: only its channel's output shows it, no statistic does (S9).
inline void poison(Random& random, Problem& p) {
    if (p.x.empty() || !random.chance(0.04)) return;
    const Index o = random.below(p.layout.outer), i = random.below(p.layout.inner);
    if (!p.is_real(o, i)) return;
    p.x[static_cast<std::size_t>(p.at(o, random.below(p.layout.channels), i))] = random.pick(
        {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()});
}

inline void draw_running(Random& random, Problem& p) {
    const Index n = p.layout.channels;
    p.running_type = random.chance(0.8) ? Type::f32 : Type::f64;
    p.mean = draw_values(random, n, p.running_type, 0, 1);
    p.var = draw_positive(random, n, p.running_type);
    p.stddev = draw_positive(random, n, p.running_type);
    p.renorm_mean = draw_values(random, n, p.running_type, 0, 1);
    p.renorm_stddev = draw_positive(random, n, p.running_type);
    p.batches = random.below(4);
}

inline void draw_parameters(Random& random, Problem& p) {
    const Index n = p.layout.channels;
    p.gamma_type = random.chance(0.5) ? p.type : draw_type(random);
    p.beta_type = random.chance(0.5) ? p.type : draw_type(random);
    if (random.chance(0.8)) p.gamma = draw_values(random, n, p.gamma_type, 0.5, 1);
    if (random.chance(0.8)) p.beta = draw_values(random, n, p.beta_type, 0, 1);
    if (!p.gamma.empty() && random.chance(0.2)) p.gamma[0] = 0;
    if (!p.gamma.empty() && random.chance(0.1))
        p.gamma[0] = rounded(p.gamma_type, subnormal(p.gamma_type));
    p.has_running = random.chance(0.8);
    if (p.has_running) draw_running(random, p);
}

inline void draw_values(Random& random, Case& c) {
    Problem& p = c.problem;
    draw_x(random, p);
    const Index n = static_cast<Index>(p.x.size());
    const double width = random.pick({1.0, 0.01, subnormal(p.type)});
    p.dy = draw_values(random, n, p.type, width < 1e-4 ? 0 : random.normal(), width);
    if (random.chance(0.3)) p.residual = draw_values(random, n, p.type, 0, 1);
    spoil_padding(random, p, p.x);
    spoil_padding(random, p, p.dy);
    poison(random, p);
    draw_parameters(random, p);
}

}  // namespace batchnorm::tests
