// One forward and backward step of a case, on guarded memory, as the binding calls the passes.
#pragma once

#include <array>
#include <stdexcept>

#include "draw_cases.hpp"
#include "driver/float_mode.hpp"

namespace batchnorm::tests {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Placed {
    Buffer buffer;
    Array array;
};

struct Result {
    std::vector<double> count, batch_mean, batch_var, y;
    std::vector<double> mean, var, stddev, renorm_mean, renorm_stddev;
    std::vector<double> dx, dresidual, dgamma, dbeta;
    std::int64_t batches = 0;
};

// The calling thread's mode while it is in a pass: subnormal numbers are flushed to zero, or kept.
enum class Flush { no, yes };

class ThreadMode {
  public:
    explicit ThreadMode(Flush flush) : before_(float_mode()) {
        if (flush == Flush::yes) set_float_mode(before_ | kFlush);
    }
    ~ThreadMode() { set_float_mode(before_); }

  private:
    FloatMode before_;
};

// A case's inputs in memory, used by any number of runs.
class Inputs {
  public:
    explicit Inputs(const Case& drawn) : c(drawn), random_(drawn.seed ^ 0x5bd1e995u) {
        const Problem& p = c.problem;
        x = place(&p.x), dy = place(&p.dy);
        if (!p.residual.empty()) residual = place(&p.residual);
        gamma = place(p.gamma, p.gamma_type), beta = place(p.beta, p.beta_type);
        before_ = fingerprint();
    }

    // An array like x, with rows somewhere of their own; NaN without values.
    Placed place(const std::vector<double>* values) {
        const Layout& layout = c.problem.layout;
        const Index bytes = bytes_of(c.problem.type), row = layout.channels * layout.inner;
        const Index stride = c.placement.huge ? row + (random_.below(3) << 31) + random_.below(9)
                             : random_.chance(0.5) ? row
                                                   : row + random_.below(40);
        Placed placed;
        placed.buffer =
            Buffer(layout.outer, row * bytes, stride * bytes, random_.below(32) * bytes);
        placed.array = {placed.buffer.data(), stride};
        if (layout.outer * row == 0 && random_.chance(0.5)) placed.array.data = nullptr;
        if (values == nullptr) return placed;
        for (Index o = 0; o < layout.outer; ++o) {
            for (Index i = 0; i < row; ++i)
                write(c.problem.type, placed.array.data, o * stride + i,
                      (*values)[static_cast<std::size_t>(o * row + i)]);
        }
        return placed;
    }

    // A per-channel array; no memory where there are no values.
    Buffer place(const std::vector<double>& values, Type type) {
        if (values.empty()) return {};
        Buffer buffer = place(static_cast<Index>(values.size()), type);
        for (std::size_t i = 0; i < values.size(); ++i)
            write(type, buffer.data(), static_cast<Index>(i), values[i]);
        return buffer;
    }

    Buffer place(Index n, Type type) {
        const Index bytes = bytes_of(type);
        return Buffer(1, n * bytes, n * bytes, random_.below(16) * bytes);
    }

    void check() const {
        for (const Buffer* b : buffers()) {
            if (!b->intact()) throw Failure("memory around an input was written");
        }
        if (fingerprint() != before_) throw Failure("an input was written");
    }

    const Case& c;
    Placed x, dy, residual;
    Buffer gamma, beta;

  private:
    std::array<const Buffer*, 6> buffers() const {
        return {&x.buffer, &dy.buffer, &residual.buffer, &gamma, &beta, &c.mask};
    }

    std::uint64_t fingerprint() const {
        std::uint64_t all = 0;
        for (const Buffer* b : buffers()) all = all * 31 + b->fingerprint();
        return all;
    }

    Random random_;
    std::uint64_t before_;
};

// One forward and backward step on fresh outputs.
class Run {
  public:
    Run(Inputs& inputs, Threads threads, Flush flush)
        : in(inputs), c(inputs.c), p(c.problem), threads_(threads), flush_(flush) {
        allocate();
        forward();
        backward();
        inputs.check();
        check_surroundings();
    }

    Result result() const {
        Result r = moments_;
        r.y = values(y), r.dx = values(dx), r.dresidual = values(dresidual);
        r.dgamma = values(dgamma, p.gamma_type), r.dbeta = values(dbeta, p.beta_type);
        r.mean = values(mean, p.running_type), r.var = values(var, p.running_type);
        r.stddev = values(stddev, p.running_type);
        r.renorm_mean = values(renorm_mean, p.running_type);
        r.renorm_stddev = values(renorm_stddev, p.running_type);
        r.batches = batches_;
        return r;
    }

  private:
    void allocate() {
        const Placement& place = c.placement;
        const Index n = p.layout.channels;
        y = in.place(nullptr);
        if (place.wants_dx) dx = in.place(nullptr);
        if (place.wants_dresidual) dresidual = in.place(nullptr);
        if (place.wants_dgamma) dgamma = in.place(n, p.gamma_type);
        if (place.wants_dbeta) dbeta = in.place(n, p.beta_type);
        mean = in.place(p.mean, p.running_type), var = in.place(p.var, p.running_type);
        stddev = in.place(p.stddev, p.running_type);
        renorm_mean = in.place(p.renorm_mean, p.running_type);
        renorm_stddev = in.place(p.renorm_stddev, p.running_type);
        batches_ = p.batches;
        kept = in.place(Statistics::doubles(p.layout), Type::f64);
        sums = in.place(2 * p.layout.statistics(), Type::f64);
    }

    Step begin() const {
        Step step;
        step.type = p.type, step.layout = p.layout;
        if (c.placement.masked) {
            step.mask = c.placement.mask;
            step.mask.data = c.mask.data();
        }
        step.options.activation = p.options.activation, step.options.batch = p.options.batch;
        step.options.renorm = p.options.renorm;
        step.options.zero_padding = p.options.zero_padding;
        step.options.threads = threads_;
        step.x = in.x.array;
        step.statistics = {reinterpret_cast<double*>(kept.data()), p.layout.statistics()};
        return step;
    }

    void forward() {
        Step step = begin();
        step.options = p.options;
        step.options.threads = threads_;
        step.y = y.array, step.residual = in.residual.array;
        step.gamma = {in.gamma.data(), p.gamma_type}, step.beta = {in.beta.data(), p.beta_type};
        Running& running = step.running;
        running.mean = {mean.data(), p.running_type}, running.var = {var.data(), p.running_type};
        if (c.placement.counts_batches) running.batches = &batches_;
        if (p.options.renorm) {
            running.stddev = {stddev.data(), p.running_type};
            running.renorm_mean = {renorm_mean.data(), p.running_type};
            running.renorm_stddev = {renorm_stddev.data(), p.running_type};
        }
        if (p.options.batch) {
            in_mode([&] { moments(step); });
            keep_moments(step.statistics);
        }
        in_mode([&] { apart() ? normalize(step) : batchnorm::forward(step); });
    }

    // True if passes run one after another, with two threads; else a step is one call.
    bool apart() const { return threads_.count == 2; }

    void keep_moments(const Statistics& s) {
        if (p.layout.channels == 0) return;
        moments_.count.assign(s.count(), s.count() + p.layout.groups);
        for (Index i = 0; i < s.size; ++i) {
            moments_.batch_mean.push_back(s.row(Statistics::mean)[i] + s.row(Statistics::low)[i]);
            moments_.batch_var.push_back(s.row(Statistics::var)[i]);
        }
    }

    void backward() {
        Step step = begin();
        step.dy = in.dy.array, step.dx = dx.array, step.dresidual = dresidual.array;
        if (p.reads_y) step.y = y.array;
        step.dgamma = {dgamma.data(), p.gamma_type}, step.dbeta = {dbeta.data(), p.beta_type};
        double* found = reinterpret_cast<double*>(sums.data());
        step.options.batch = p.options.batch;
        if (!apart()) return in_mode([&] { batchnorm::backward(step, found); });
        if (p.options.batch || dgamma || dbeta || dresidual.buffer)
            in_mode([&] { reduce(step, found); });
        if (dx.buffer) in_mode([&] { apply(step, found); });
    }

    template <class F>
    void in_mode(F pass) const {
        const FloatMode before = float_mode();
        FloatMode during, after;
        {
            const ThreadMode mode(flush_);
            during = float_mode();
            pass();
            after = float_mode();
        }
        if ((during & kFlush) != (after & kFlush) || (before & kFlush) != (float_mode() & kFlush))
            throw Failure("the thread's floating-point mode was changed");
    }

    void check_surroundings() const {
        const Buffer* const all[] = {
            &y.buffer, &dx.buffer, &dresidual.buffer, &dgamma,        &dbeta, &mean,
            &var,      &stddev,    &renorm_mean,      &renorm_stddev, &kept,  &sums};
        for (const Buffer* b : all) {
            if (!b->intact()) throw Failure("memory around an output was written");
        }
    }

    std::vector<double> values(const Placed& placed) const {
        std::vector<double> found;
        if (!placed.buffer) return found;
        const Index row = p.layout.channels * p.layout.inner;
        found.reserve(static_cast<std::size_t>(p.layout.outer * row));
        for (Index o = 0; o < p.layout.outer; ++o) {
            for (Index i = 0; i < row; ++i)
                found.push_back(read(p.type, placed.array.data, o * placed.array.stride + i));
        }
        return found;
    }

    std::vector<double> values(const Buffer& buffer, Type type) const {
        std::vector<double> found;
        if (!buffer) return found;
        for (Index i = 0; i < p.layout.channels; ++i) found.push_back(read(type, buffer.data(), i));
        return found;
    }

    Inputs& in;
    const Case& c;
    const Problem& p;
    Threads threads_;
    Flush flush_;
    Placed y, dx, dresidual;
    Buffer dgamma, dbeta, mean, var, stddev, renorm_mean, renorm_stddev, kept, sums;
    std::int64_t batches_ = 0;
    Result moments_;
};

inline Result run(Inputs& inputs, Threads threads, Flush flush = Flush::no) {
    return Run(inputs, threads, flush).result();
}

}  // namespace batchnorm::tests
