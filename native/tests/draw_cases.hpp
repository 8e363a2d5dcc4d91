// Random cases: shapes, options and masks around random values.
#pragma once

#include "draw_values.hpp"

namespace batchnorm::tests {

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

// A layout whose channels are visited once even by eight threads: positions are contiguous, and
// there are channels and elements enough for each of them.
inline Layout draw_visited_layout(Random& random) {
    Layout layout;
    layout.inner = random.pick<Index>({130, 257, 1025});
    layout.channels = 36 + random.below(40);
    layout.groups = random.pick<Index>({1, 1, 2});
    const Index least = 9 * (Index(1) << 15) / (layout.inner * layout.channels * layout.groups);
    layout.outer = (least + 1) * layout.groups;
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
    o.zero_padding = random.chance(0.4);
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

// Options that the binding allows: an update needs statistics, a residual's gradient dx, and y or
// padding that is zeroed.
inline void settle_options(Random& random, Case& c) {
    Problem& p = c.problem;
    Placement& place = c.placement;
    const bool gated = p.options.activation != Activation::none;
    if (!p.has_running) p.options.update = p.options.renorm = false;
    place.counts_batches = p.has_running && (p.options.decay < 0 || random.chance(0.7));
    p.reads_y = !gated || !p.residual.empty() || random.chance(0.5);
    place.wants_dgamma = random.chance(0.85), place.wants_dbeta = random.chance(0.85);
    place.wants_dx = random.chance(0.95);
    const bool possible = gated ? p.reads_y : place.masked && p.options.zero_padding;
    place.wants_dresidual = possible && place.wants_dx && random.chance(0.5);
}

// All else of a case that has its seed and layout.
inline void complete(Random& random, Case& c) {
    c.problem.type = draw_type(random);
    c.problem.options = draw_options(random);
    c.placement.masked = random.chance(0.6);
    draw_mask(random, c);
    draw_values(random, c);
    settle_options(random, c);
}

inline Case draw_case(std::uint64_t seed) {
    Random random(seed);
    Case c;
    c.seed = seed;
    c.placement.huge = random.chance(0.04);
    c.problem.layout = draw_layout(random, c.placement.huge);
    complete(random, c);
    return c;
}

inline Case draw_visited_case(std::uint64_t seed) {
    Random random(seed);
    Case c;
    c.seed = seed;
    c.problem.layout = draw_visited_layout(random);
    complete(random, c);
    c.problem.options.batch = true;
    return c;
}

}  // namespace batchnorm::tests
