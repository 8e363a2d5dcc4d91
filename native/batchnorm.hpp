// The passes over memory, and the steps made of them. No Python, no exceptions across this
// boundary except std::bad_alloc, which is thrown before anything is written.
#pragma once

#include <cstdint>

#include "compiler.hpp"
#include "driver/pool.hpp"

namespace batchnorm {

using Index = std::int64_t;

enum class Type : int { f16, bf16, f32, f64 };
enum class Activation : int { none, relu, leaky_relu };

constexpr Index kBytes[] = {2, 2, 4, 8};  // of an element, by Type

constexpr double kNegativeSlope = 0.01;  // S18

// x seen as (outer, channels, inner): rows of channels if inner is 1. With ghost batches (S12)
// outer is (samples of a group, groups, run), row-major; without them groups is 1.
struct Layout {
    Index outer = 0;
    Index channels = 0;
    Index inner = 1;
    Index groups = 1;
    Index run = 1;  // rows of outer that one sample holds

    // Rows of outer in one group.
    BATCHNORM_INLINE Index rows() const { return groups > 0 ? outer / groups : 0; }
    // Elements that one statistic is taken over, padding included.
    BATCHNORM_INLINE Index positions() const { return rows() * inner; }
    BATCHNORM_INLINE Index statistics() const { return groups * channels; }
};

// Dense but for the outer axis, whose stride is in elements.
struct Array {
    void* data = nullptr;
    Index stride = 0;

    BATCHNORM_INLINE explicit operator bool() const { return data != nullptr; }
};

// Non-zero marks real rows (S1); entry (o, i) is element (o / repeat) * outer + i * inner.
struct Mask {
    const void* data = nullptr;
    int width = 1;  // bytes of an element: 1, 2, 4, 8
    Index repeat = 1;
    Index outer = 0;
    Index inner = 0;
    // The same as bits, where positions are contiguous: a pass sets them, since all its channels
    // read the mask again. Entry (o, i) is bit o / repeat * row + i.
    const unsigned char* bits = nullptr;
    Index row = 0;

    BATCHNORM_INLINE explicit operator bool() const { return data != nullptr; }
};

// One value per channel, contiguous; absent if data is null.
struct PerChannel {
    void* data = nullptr;
    Type type = Type::f32;

    BATCHNORM_INLINE explicit operator bool() const { return data != nullptr; }
};

struct Running {
    PerChannel mean, var;
    std::int64_t* batches = nullptr;                // num_batches_tracked
    PerChannel stddev, renorm_mean, renorm_stddev;  // renormalization only
};

struct Options {
    double eps = 1e-5;
    double decay = 0.9;  // weight of the old value; negative: cumulative average (S9)
    bool batch = true;   // normalize by the batch's own statistics
    bool update = false;
    bool unbiased = false;
    Activation activation = Activation::none;
    bool zero_padding = false;  // padded rows of y and dresidual are 0 (S4)
    bool renorm = false;
    double renorm_decay = 0.99;
    double rmin = 0.0, rmax = 0.0, dmax = 0.0;
    Threads threads;
};

// The results of a forward step for its backward step: kRows arrays of layout.statistics()
// doubles, then the count of each group. r and d are set with renormalization only, var and low
// with the batch's own statistics only.
struct Statistics {
    enum Row { mean, low, var, rstd, scale, offset, r, d, kRows };

    double* data = nullptr;
    Index size = 0;  // layout.statistics()

    BATCHNORM_INLINE double* row(Row which) const { return data + which * size; }
    BATCHNORM_INLINE double* count() const { return data + kRows * size; }
    static BATCHNORM_INLINE Index doubles(const Layout& layout) {
        return kRows * layout.statistics() + layout.groups;
    }
};

// Everything that a step reads and writes. Arrays that a step does not use stay null.
struct Step {
    Type type = Type::f32;
    Layout layout;
    Mask mask;
    Options options;
    Array x, y, residual;
    Array dy, dx, dresidual;
    PerChannel gamma, beta, dgamma, dbeta;
    Running running;
    Statistics statistics;
};

// A whole step forward: `moments`, where the batch normalizes, and `normalize`, with the same bits.
void forward(const Step& step);
// A whole step backward: `reduce`, where anything needs it, and `apply`, if dx is wanted.
void backward(const Step& step, double* sums);

// count, mean and var of x at real rows (S2, S3).
void moments(const Step& step);
// Scale and offset from moments or running statistics; running update (S9-S11); y (S4, S18).
void normalize(const Step& step);
// Sums of g and of g (x - mean) over real rows, with g = act'(y) dy: `sums` holds
// 2 * layout.statistics() doubles. Fills dgamma and dbeta, and dresidual at real rows; at padded
// ones it may hold anything until `apply`.
void reduce(const Step& step, double* sums);
// dx, and dresidual at padded rows (S8).
void apply(const Step& step, const double* sums);

// The instruction sets that this build holds and this machine runs; the last one is in use
// unless `use_instructions` says otherwise.
const char* instructions_in_use();
bool use_instructions(const char* name);  // false if this build or machine has none of that name

}  // namespace batchnorm
