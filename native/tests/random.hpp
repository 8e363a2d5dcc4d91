// Random numbers that a seed decides.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "batchnorm.hpp"

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

}  // namespace batchnorm::tests
