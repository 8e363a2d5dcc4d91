// The geometry of a call, checked once for any number of calls; and the arguments of a call, by
// name. Arrays are addresses; x, dy and residual may have gaps between rows, others are dense.
#pragma once

#include <nanobind/ndarray.h>

#include <memory>

#include "bind/checks.hpp"
#include "bind/kept.hpp"

namespace batchnorm::bind {

using GivenSums =
    nanobind::ndarray<const double, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// The per-channel arrays that a forward step takes, checked once.
struct State {
    PerChannel gamma, beta;
    Running running;
};

struct Renorm {
    double decay, rmin, rmax, dmax;
};

struct Forward {
    Address x, mask, y, residual;
    Index residual_row;
    const State& state;
    double eps, decay;
    bool batch, update, unbiased;
    const Renorm* renorm;  // null: no renormalization
    int threads;
    Kept* kept;  // the moments, if `moments` has computed them; else null
};

struct Inputs {
    Address dy;
    Index dy_row;
    Address x, y, mask;
};

struct Gradients {
    Address dx, dresidual, dgamma;
    int dgamma_type;
    Address dbeta;
    int dbeta_type;
};

class Plan {
  public:
    Plan(Type type, const Layout& layout, Index row, int activation, bool zero_padding);

    void set_mask(int width, Index repeat, Index outer, Index inner);
    void set_team(Address team) { team_ = reinterpret_cast<Team>(team); }

    Kept* moments(Address x, Address mask, int threads) const;
    // Returns the statistics that it keeps. If `call.kept` is given, filled by `moments` and
    // perhaps merged with other processes' moments, normalizes by it, completes and returns it.
    Kept* forward(const Forward& call) const;
    // The statistics that a step of this plan kept, from the array of `Kept.all`.
    Kept* restore(Address data, Index size, bool renorm) const;
    void backward(const Inputs& in, const Gradients& out, const Kept& kept, bool batch,
                  int threads) const;
    // The first half of a backward step by the batch's own statistics: sums of g, then of
    // g (x - mean), to which the caller may add other processes' sums.
    Doubles reduce(const Inputs& in, const Gradients& out, const Kept& kept, int threads) const;
    // The second half: fills dx from the sums.
    void apply(const Inputs& in, const Gradients& out, const GivenSums& sums, const Kept& kept,
               int threads) const;

  private:
    Step begin(Address mask, const Kept& kept, int threads) const;
    Step begin_gradient(const Inputs& in, const Gradients& out, const Kept& kept,
                        int threads) const;
    void check_running(const Step& step) const;
    void check_gate(const Step& step, bool has_dx) const;
    Array array(const char* name, Address address, Index row) const;
    void require(const char* name, const Array& array) const;

    Index dense() const { return step_.layout.channels * step_.layout.inner; }
    std::size_t sum_count() const {
        return static_cast<std::size_t>(2 * step_.layout.statistics());
    }

    Step step_;
    Index row_;
    Team team_ = nullptr;
};

}  // namespace batchnorm::bind
