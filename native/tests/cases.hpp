// Random cases: shapes, options, values, and the memory that they lie in.
#pragma once

#include <initializer_list>
#include <sstream>
#include <string>

#include "memory.hpp"
#include "reference.hpp"

namespace batchnorm::tests {

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    std::uint64_t next() {  // splitmix64
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    Index below(Index n) { return static_cast<Index>(next() % static_cast<std::uint64_t>(n)); }
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    double uniform(double low, double high) { return low + (high - low) * uniform(); }
    bool chance(double p) { return uniform() < p; }
    double normal() {
        double sum = 0;
        for (int i = 0; i < 6; ++i) sum += uniform(-1, 1);
        return sum * 0.70710678118654752;
    }
    template <class T>
    T pick(std::initializer_list<T> list) {
        return list.begin()[below(static_cast<Index>(list.size()))];
    }

  private:
    std::uint64_t state_;
};

// What surrounds a case's numbers: where its arrays lie, and which of them there are.
struct Placement {
    bool masked = false, huge = false;
    Mask mask;  // without data
    bool wants_dx = true, wants_dresidual = false, wants_dgamma = true, wants_dbeta = true;
    bool counts_batches = true;
};

struct Case {
    std::uint64_t seed = 0;
    Problem problem;
    Placement placement;
    Buffer mask;
};

inline Type draw_type(Random& random) { return static_cast<Type>(random.below(4)); }

inline Index draw_size(Random& random) {
    return random.pick<Index>({1,  2,  3,  5,  7,   8,   15,  16,  17,  31,  32,   33,   37,   48,
                               63, 64, 65, 97, 128, 255, 256, 257, 300, 513, 1025, 4099, 70001});
}

// A size that keeps a product below its limit.
inline Index draw_size(Random& random, Index limit) {
    if (random.chance(0.015)) return 0;
    Index size = draw_size(random);
    while (size > limit) size = draw_size(random);
    return size;
}

inline void draw_outer(Random& random, Layout& layout, Index limit) {
    layout.run = random.pick<Index>({1, 1, 2, 3, 5, 16, 33});
    if (random.chance(0.3)) layout.groups = random.pick<Index>({2, 3, 4, 7});
    if (layout.groups * layout.run > limit) layout.groups = layout.run = 1;
    const Index samples =
        draw_size(random, std::max<Index>(1, limit / (layout.groups * layout.run)));
    layout.outer = samples * layout.groups * layout.run;
    if (layout.outer == 0 && random.chance(0.5)) layout.groups = 0;
}

inline Layout draw_layout(Random& random, bool huge) {
    const double size = random.uniform();
    const Index limit = huge ? 2000 : size < 0.7 ? 4000 : size < 0.96 ? 120000 : 1200000;
    Layout layout;
    const Index outer = huge ? random.pick<Index>({2, 3, 5}) : 0;
    Index left = huge ? limit / outer : limit;
    const bool rows = random.chance(0.5);
    if (!rows && random.chance(0.5)) {
        layout.inner = draw_size(random, left);
        left /= std::max<Index>(1, layout.inner);
    }
    layout.channels = draw_size(random, std::min<Index>(left, random.chance(0.5) ? 40 : 5000));
    left /= std::max<Index>(1, layout.channels);
    if (!rows && layout.inner == 1) {
        layout.inner = draw_size(random, left);
        left /= std::max<Index>(1, layout.inner);
    }
    if (huge) {
        layout.outer = outer;
    } else {
        draw_outer(random, layout, left);
    }
    return layout;
}

inline Options draw_options(Random& random) {
    Options o;
    o.eps = random.pick({1e-5, 1e-3, 1e-8, 1e-12});
    o.decay = random.pick({0.9, 0.99, 0.0, 1.0, -1.0});
    o.batch = random.chance(0.8);
    o.update = random.chance(0.7);
    o.unbiased = random.chance(0.5);
    o.activation = static_cast<Activation>(random.below(3));
    o.renorm = random.chance(0.25);
    o.renorm_decay = random.pick({0.99, 0.5, 0.0});
    o.rmin = random.pick({0.0, 0.5, 1.0});
    o.rmax = random.pick({1.0, 1.5, 10.0});
    o.dmax = random.pick({0.0, 0.5, 5.0});
    return o;
}

// Mask entries for every position, some of them shared (S1).
inline void draw_mask_view(Random& random, Case& c) {
    const Layout& layout = c.problem.layout;
    Mask& mask = c.placement.mask;
    mask.width = random.pick({1, 2, 4, 8});
    mask.repeat = random.chance(0.6) ? 1 : random.pick<Index>({2, 3, layout.run, 64});
    const Index entries = (layout.outer + mask.repeat - 1) / mask.repeat;
    const double kind = random.uniform();
    if (kind < 0.1) {  // the other way round in memory
        mask.inner = entries + random.below(3), mask.outer = 1;
    } else {
        mask.inner = kind < 0.3 ? 0 : random.pick<Index>({1, 1, 1, 2, 3});
        const Index row = mask.inner == 0 ? 1 : layout.inner * mask.inner;
        mask.outer = kind > 0.9 ? 0 : row + (random.chance(0.5) ? random.below(5) : 0);
        if (c.placement.huge && kind < 0.5) mask.outer = (Index(1) << 31) + random.below(9);
    }
}

// Stretches of true and false, or single ones, with every kind of non-zero element.
inline void fill_mask(Random& random, const Mask& mask, unsigned char* data, Index entries,
                      Index positions) {
    const double extreme = random.uniform();
    const double density = extreme < 0.05 ? 0.0 : extreme < 0.1 ? 1.0 : random.uniform(0.05, 0.95);
    const double stay = random.chance(0.5) ? 0.0 : random.uniform(0.5, 0.99);
    bool now = random.chance(density);
    for (Index e = 0; e < entries; ++e) {
        for (Index i = 0; i < positions; ++i) {
            if (!random.chance(stay)) now = random.chance(density);
            unsigned char* at = data + (e * mask.outer + i * mask.inner) * mask.width;
            std::memset(at, 0, static_cast<std::size_t>(mask.width));
            if (now)
                at[random.below(mask.width)] = static_cast<unsigned char>(1 + random.below(255));
        }
    }
}

inline bool is_set(const Mask& mask, const unsigned char* data, Index o, Index i) {
    const unsigned char* at = data + (o / mask.repeat * mask.outer + i * mask.inner) * mask.width;
    for (int b = 0; b < mask.width; ++b) {
        if (at[b] != 0) return true;
    }
    return false;
}

inline void draw_mask(Random& random, Case& c) {
    Problem& p = c.problem;
    const Index outer = p.layout.outer, inner = p.layout.inner;
    p.real.assign(static_cast<std::size_t>(outer * inner), 1);
    if (!c.placement.masked) return;
    draw_mask_view(random, c);
    const Mask& mask = c.placement.mask;
    const Index entries = outer * inner == 0 ? 0 : (outer + mask.repeat - 1) / mask.repeat;
    const Index row = (inner - 1) * mask.inner + 1;
    const bool apart = mask.outer >= row;
    const Index extent = entries == 0 ? 0 : apart ? row : (entries - 1) * mask.outer + row;
    c.mask = Buffer(apart ? entries : 1, extent * mask.width, mask.outer * mask.width,
                    random.below(16) * mask.width);
    fill_mask(random, mask, c.mask.data(), entries, entries == 0 ? 0 : inner);
    for (Index o = 0; o < outer; ++o) {
        for (Index i = 0; i < inner; ++i)
            p.real[static_cast<std::size_t>(o * inner + i)] = is_set(mask, c.mask.data(), o, i);
    }
}

// A size among the type's subnormal numbers.
inline double subnormal(Type type) {
    return type == Type::f16 ? 2e-5 : type == Type::f64 ? 1e-310 : 3e-40;
}

// How the values of one channel are spread.
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

// NaN, infinity and huge numbers where nobody may look.
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

// One real value that is no number: its channel shows it, others do not, nor the statistics (S9).
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

// As the binding allows: an update needs statistics, and a residual's gradient y and dx.
inline void settle_options(Random& random, Case& c) {
    Problem& p = c.problem;
    Placement& place = c.placement;
    const bool gated = p.options.activation != Activation::none;
    if (!p.has_running) p.options.update = p.options.renorm = false;
    place.counts_batches = p.has_running && (p.options.decay < 0 || random.chance(0.7));
    p.reads_y = !gated || !p.residual.empty() || random.chance(0.5);
    place.wants_dgamma = random.chance(0.85), place.wants_dbeta = random.chance(0.85);
    place.wants_dx = random.chance(0.95);
    place.wants_dresidual = gated && p.reads_y && place.wants_dx && random.chance(0.5);
}

inline Case draw_case(std::uint64_t seed) {
    Random random(seed);
    Case c;
    c.seed = seed;
    c.placement.huge = random.chance(0.04);
    c.problem.type = draw_type(random);
    c.problem.layout = draw_layout(random, c.placement.huge);
    c.problem.options = draw_options(random);
    c.placement.masked = random.chance(0.6);
    draw_mask(random, c);
    draw_values(random, c);
    settle_options(random, c);
    return c;
}

// x[mask] as a case of its own (S5): for rows of channels in one group.
inline Case pack(const Case& c) {
    const Problem& p = c.problem;
    Case packed;
    packed.seed = c.seed + 1, packed.problem = p, packed.placement = c.placement;
    packed.placement.masked = packed.placement.huge = false;
    Problem& q = packed.problem;
    q.x.clear(), q.dy.clear(), q.residual.clear();
    for (Index o = 0; o < p.layout.outer; ++o) {
        if (!p.is_real(o, 0)) continue;
        const auto first = p.at(o, 0, 0), end = p.at(o + 1, 0, 0);
        q.x.insert(q.x.end(), p.x.begin() + first, p.x.begin() + end);
        q.dy.insert(q.dy.end(), p.dy.begin() + first, p.dy.begin() + end);
        if (p.residual.empty()) continue;
        q.residual.insert(q.residual.end(), p.residual.begin() + first, p.residual.begin() + end);
    }
    Index rows = 0;
    for (char real : p.real) rows += real;
    q.layout.outer = rows;
    q.layout.run = 1;
    q.real.assign(static_cast<std::size_t>(rows), 1);
    return packed;
}

inline std::string describe(const Case& c) {
    const Problem& p = c.problem;
    const Placement& place = c.placement;
    const Options& o = p.options;
    std::ostringstream text;
    text << "case " << c.seed << ": " << name_of(p.type) << " (" << p.layout.outer << ", "
         << p.layout.channels << ", " << p.layout.inner << "), groups " << p.layout.groups
         << ", run " << p.layout.run << (place.huge ? ", huge strides" : "");
    if (place.masked) {
        Index real = 0;
        for (char r : p.real) real += r;
        text << "; mask of width " << place.mask.width << ", repeat " << place.mask.repeat
             << ", strides " << place.mask.outer << " and " << place.mask.inner << ", " << real
             << " real positions";
    }
    text << "; " << (o.batch ? "batch" : "running") << ", eps " << o.eps << ", activation "
         << static_cast<int>(o.activation) << ", residual " << !p.residual.empty();
    text << "; gamma " << (p.gamma.empty() ? "none" : name_of(p.gamma_type)) << ", beta "
         << (p.beta.empty() ? "none" : name_of(p.beta_type));
    text << "; statistics " << (p.has_running ? name_of(p.running_type) : "none") << ", update "
         << o.update << ", unbiased " << o.unbiased << ", decay " << o.decay << ", batches "
         << (place.counts_batches ? p.batches : -1);
    if (o.renorm) {
        text << "; renorm decay " << o.renorm_decay << ", r in " << o.rmin << " to " << o.rmax
             << ", d to " << o.dmax;
    }
    text << "; backward: y " << p.reads_y << ", dx " << place.wants_dx << ", dresidual "
         << place.wants_dresidual << ", dgamma " << place.wants_dgamma << ", dbeta "
         << place.wants_dbeta;
    return text.str();
}

}  // namespace batchnorm::tests
