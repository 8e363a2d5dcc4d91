// Randomized test of the kernels, without Python: fuzz [cases [seed]].
//
// Every case is compared with a naive reference, and with itself on every instruction set and on
// several numbers of threads, to the bit; two threads run pass after pass, other numbers a whole
// step in one call. Case number k of seed s is case 0 of seed s + k, so that `fuzz 1 SEED` repeats
// the one that failed.
#include <csignal>
#include <cstdio>

#include "conversions.hpp"
#include "driver/caches.hpp"
#include "surroundings.hpp"

namespace batchnorm::tests {
namespace {

constexpr std::uint64_t kCasesPerVisited = 50;  // the latter are large
constexpr int kThreadNumbers[] = {1, 2, 3, 8, 16};

// The elements of an array that lie in real rows.
std::vector<double> real_rows(const Problem& p, const std::vector<double>& values) {
    std::vector<double> found;
    const Index row = p.layout.channels;
    for (Index o = 0; o < p.layout.outer && !values.empty(); ++o) {
        if (!p.is_real(o, 0)) continue;
        found.insert(found.end(), values.begin() + o * row, values.begin() + (o + 1) * row);
    }
    return found;
}

void check_packed(const Case& c, Result whole) {
    const Case packed = pack(c);
    Inputs inputs(packed);
    const Result alone = run(inputs, {2});
    for (auto member : {&Result::y, &Result::dx, &Result::dresidual})
        whole.*member = real_rows(c.problem, whole.*member);
    try {
        compare_bits(whole, alone);
    } catch (const Failure& failure) {
        throw Failure(std::string("unlike the packed input: ") + failure.what());
    }
}

void check_determinism(Inputs& inputs, const Result& first, const char* instructions) {
    const auto check = [&](const std::string& name, Threads threads, Flush flush = Flush::no) {
        try {
            compare_bits(run(inputs, threads, flush), first);
        } catch (const Failure& failure) {
            throw Failure(std::string(instructions) + ", " + std::to_string(threads.count) + name +
                          " threads, unlike another run: " + failure.what());
        }
    };
    for (int threads : kThreadNumbers) check("", {threads});
    check(" lent", {4, lend_threads});
    stream_above(0);
    for (int threads : {1, 2, 3}) check(" streaming", {threads});
    stream_above(-1);
    for (int threads : {1, 3}) check(" flushing", {threads}, Flush::yes);
    check(" lent flushing", {4, lend_threads}, Flush::yes);
    for (bool busy : {false, true}) {
        const OtherPool pool(busy);
        check(busy ? " busy" : " scheduled", {4, nullptr, &pool});
        check(busy ? " busy flushing" : " scheduled flushing", {4, nullptr, &pool}, Flush::yes);
    }
}

std::vector<const char*> instruction_sets() {
    const std::string best = instructions_in_use();
    std::vector<const char*> found;
    for (const char* name : {"baseline", "avx2", "avx512"}) {
        if (use_instructions(name)) found.push_back(name);
    }
    use_instructions(best.c_str());
    return found;
}

void check_case(const Case& c, const std::vector<const char*>& sets) {
    const Problem& p = c.problem;
    Inputs inputs(c);
    use_instructions(sets.back());
    const Result first = run(inputs, {1});
    Reference reference(p);
    reference.backward(first.y);
    compare(c, first, reference);
    if (p.layout.inner == 1 && p.layout.groups == 1) check_packed(c, first);
    for (const char* set : sets) {
        use_instructions(set);
        check_determinism(inputs, first, set);
    }
}

char doing[2000];  // the current case, to print when a signal ends the test

void set_doing(const std::string& text) {
    std::snprintf(doing, sizeof doing, "%s\n", text.c_str());
}

void tell_doing() {
    if (::write(2, "during ", 7) < 0 || ::write(2, doing, std::strlen(doing)) < 0) return;
}

void on_signal(int signal) {
    tell_doing();
    std::signal(signal, SIG_DFL);
    std::raise(signal);
}

void tell_of_crashes() {
    if (under_any_sanitizer()) return __sanitizer_set_death_callback(tell_doing);
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(signal, on_signal);
}

void check_all(std::uint64_t cases, std::uint64_t seed, bool forks) {
    const std::vector<const char*> sets = instruction_sets();
    set_doing("conversions");
    check_conversions(sets);
    for (std::uint64_t k = 0; k < cases; ++k) {
        const Case c = draw_case(seed + k);
        set_doing(describe(c));
        check_case(c, sets);
        if (k % kCasesPerVisited != 0) continue;
        const Case visited = draw_visited_case(seed + k);
        set_doing("channels visited once by all threads: " + describe(visited));
        check_case(visited, sets);
    }
    use_instructions(sets.back());
    set_doing("steps at the same time");
    check_concurrency(seed, 4, 10);
    set_doing("rounding modes");
    check_rounding(seed);
    set_doing("steps after fork");
    if (forks) check_processes(seed);
    std::printf("%llu cases from seed %llu on", static_cast<unsigned long long>(cases),
                static_cast<unsigned long long>(seed));
    for (const char* set : sets) std::printf(" %s", set);
    std::printf(": fine\n");
}

}  // namespace
}  // namespace batchnorm::tests

int main(int argc, char** argv) {
    using namespace batchnorm::tests;
    const std::uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000;
    const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    // An emulator may not survive a fork of several threads: qemu 7.2 does not.
    const bool forks = argc <= 3 || std::strcmp(argv[3], "without-forks") != 0;
    tell_of_crashes();
    try {
        check_all(cases, seed, forks);
    } catch (const std::exception& failure) {
        std::printf("%s%s\n", doing, failure.what());
        return 1;
    }
    return 0;
}
