// Randomized test of the kernels, without Python: fuzz [cases [seed]].
//
// Every case is compared with a naive reference, and with itself on every instruction set and on
// several numbers of threads, to the bit. Case number k of seed s is case 0 of seed s + k, so
// that `fuzz 1 SEED` repeats the one that failed.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <csignal>
#include <cstdio>
#include <thread>

#include "run.hpp"

extern "C" {
// There only under some sanitizer, and under the thread sanitizer.
__attribute__((weak)) void __sanitizer_set_death_callback(void (*)());
__attribute__((weak)) void __tsan_init();
}

namespace batchnorm::tests {
namespace {

constexpr int kThreadNumbers[] = {1, 2, 3, 8, 16};

// Results by name, with what a reference holds of the same name.
struct Field {
    const char* name;
    std::vector<double> Result::* values;
    Values Reference::* expected;
};

constexpr Field kFields[] = {
    {"count", &Result::count, &Reference::count},
    {"batch mean", &Result::batch_mean, &Reference::batch_mean},
    {"batch variance", &Result::batch_var, &Reference::batch_var},
    {"y", &Result::y, &Reference::y},
    {"running mean", &Result::mean, &Reference::mean},
    {"running variance", &Result::var, &Reference::var},
    {"moving stddev", &Result::stddev, &Reference::stddev},
    {"renorm mean", &Result::renorm_mean, &Reference::renorm_mean},
    {"renorm stddev", &Result::renorm_stddev, &Reference::renorm_stddev},
    {"dx", &Result::dx, &Reference::dx},
    {"dresidual", &Result::dresidual, &Reference::dresidual},
    {"dgamma", &Result::dgamma, &Reference::dgamma},
    {"dbeta", &Result::dbeta, &Reference::dbeta},
};

std::string at(const char* name, std::size_t i, double found, double expected, double error) {
    char text[200];
    std::snprintf(text, sizeof text, "%s[%zu] is %.17g, must be %.17g (to %.3g)", name, i, found,
                  expected, error);
    return text;
}

bool is_close(double found, Real expected, Real error, Real most) {
    if (error == kAnything) return true;
    if (std::isnan(expected)) return !std::isfinite(found);
    if (std::isinf(expected)) return found == expected;
    if (std::isinf(found))
        return std::fabs(expected) + error >= most && (found > 0) == (expected > 0);
    return std::fabs(found - expected) <= error;
}

Type type_of(const Problem& p, const char* name) {
    if (std::strcmp(name, "dgamma") == 0) return p.gamma_type;
    return std::strcmp(name, "dbeta") == 0 ? p.beta_type : p.type;
}

void compare(const Case& c, const Result& found, const Reference& reference) {
    const Problem& p = c.problem;
    for (const Field& field : kFields) {
        const std::vector<double>& values = found.*field.values;
        const Values& expected = reference.*field.expected;
        const Real most = largest(type_of(p, field.name)) * (1 - 2 * half_ulp(p.type));
        for (std::size_t i = 0; i < values.size(); ++i) {
            const Real value = expected.value[i], error = expected.error[i];
            if (is_close(values[i], value, error, most)) continue;
            throw Failure(at(field.name, i, values[i], double(value), double(error)));
        }
    }
    const std::int64_t batches = c.placement.counts_batches ? reference.batches : p.batches;
    if (found.batches != batches) throw Failure("the number of batches is wrong");
}

bool same_bits(double a, double b) {
    return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

void compare_bits(const char* name, const std::vector<double>& a, const std::vector<double>& b) {
    if (a.size() != b.size()) throw Failure(std::string(name) + ": sizes differ");
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!same_bits(a[i], b[i])) throw Failure(at(name, i, a[i], b[i], 0));
    }
}

void compare_bits(const Result& a, const Result& b) {
    for (const Field& field : kFields) compare_bits(field.name, a.*field.values, b.*field.values);
    if (a.batches != b.batches) throw Failure("the number of batches differs");
}

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

// Another library's threads, as OpenMP would lend them.
void lend_threads(void (*f)(void*), void* data, unsigned count, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < count; ++i) others.emplace_back(f, data);
    f(data);
    for (std::thread& other : others) other.join();
}

// Another library's pool. Its threads begin when they like; if it has none to spare, only after
// the call is over, when there must be nothing left to do.
class OtherPool : public Scheduler {
  public:
    explicit OtherPool(bool busy) : Scheduler{&OtherPool::schedule_on}, busy_(busy) {}

    ~OtherPool() {
        for (const auto& [task, data] : late_) task(data);
        for (std::thread& thread : threads_) thread.join();
    }

  private:
    static void schedule_on(const Scheduler& self, void (*task)(void*), void* data) {
        auto& pool = const_cast<OtherPool&>(static_cast<const OtherPool&>(self));
        if (pool.busy_) return pool.late_.emplace_back(task, data), void();
        pool.threads_.emplace_back([task, data] {
            std::this_thread::yield();
            task(data);
        });
    }

    bool busy_;
    std::vector<std::thread> threads_;
    std::vector<std::pair<void (*)(void*), void*>> late_;
};

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

// Values of a half type, times a float32 factor: exactly rounded (S16).
void check_conversions(Type type, const Layout& layout, float factor, Flush flush) {
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

void check_conversions(const std::vector<const char*>& sets) {
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

// A case that several threads share, whatever the seed.
Case draw_shared_case(std::uint64_t seed) {
    for (;; ++seed) {
        Case c = draw_case(seed);
        if (c.problem.x.size() > 70000 && c.problem.x.size() < 200000) return c;
    }
}

// Steps of several threads at once, each on data of its own.
void check_concurrency(std::uint64_t seed, int callers, int steps) {
    std::vector<std::string> failures(static_cast<std::size_t>(callers));
    std::vector<std::thread> threads;
    for (int t = 0; t < callers; ++t) {
        threads.emplace_back([&, t] {
            try {
                const Case c = draw_shared_case(seed + static_cast<std::uint64_t>(100 * t));
                Inputs inputs(c);
                const Result alone = run(inputs, {1});
                for (int s = 0; s < steps; ++s) compare_bits(run(inputs, {2 + (s + t) % 3}), alone);
            } catch (const std::exception& failure) {
                failures[static_cast<std::size_t>(t)] = failure.what();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& failure : failures) {
        if (!failure.empty()) throw Failure("steps at the same time: " + failure);
    }
}

// Rounding is the caller's, whoever computes, and whoever computed before.
void check_rounding(std::uint64_t seed) {
    const Case c = draw_shared_case(seed);
    Inputs inputs(c);
    const Result usual = run(inputs, {4});
    for (int mode : {FE_UPWARD, FE_TOWARDZERO}) {
        std::fesetround(mode);
        const Result alone = run(inputs, {1}), shared = run(inputs, {4}),
                     lent = run(inputs, {4, lend_threads});
        const bool kept = std::fegetround() == mode;
        std::fesetround(FE_TONEAREST);
        if (!kept) throw Failure("the rounding mode was changed");
        compare_bits(shared, alone), compare_bits(lent, alone);
        compare_bits(run(inputs, {4}), usual);
    }
}

// A team that fork left behind in the parent.
void refuse_threads(void (*)(void*), void*, unsigned, unsigned) { _exit(2); }

// Exit status of a child that takes the same step on several threads.
int step_in_child(Inputs& inputs, const Result& expected) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);  // a child that waits for ever for its parent's threads fails
        try {
            compare_bits(run(inputs, {4}), expected);
            compare_bits(run(inputs, {4, refuse_threads}), expected);
        } catch (const std::exception&) {
            _exit(1);
        }
        _exit(0);
    }
    int status = -1;
    if (child > 0) waitpid(child, &status, 0);
    return status;
}

// The pool's threads stay behind in the parent. With `busy`, others are in the midst of a step.
void check_fork(std::uint64_t seed, bool busy) {
    const Case c = draw_shared_case(seed);
    Inputs inputs(c);
    const Result expected = run(inputs, {4});
    std::atomic<bool> stop{false};
    std::thread other([&] {
        if (!busy) return;
        Inputs own(c);
        while (!stop.load()) run(own, {4});
    });
    int status = 0;
    for (int i = 0; i < 5 && status == 0; ++i) status = step_in_child(inputs, expected);
    stop.store(true);
    other.join();
    if (status != 0) throw Failure("a step in a child process failed");
    compare_bits(run(inputs, {4}), expected);
}

bool under_thread_sanitizer() { return __tsan_init != nullptr; }
bool under_any_sanitizer() { return __sanitizer_set_death_callback != nullptr; }

void check_processes(std::uint64_t seed) {
    // It refuses to start threads in the child of a process that has several.
    if (under_thread_sanitizer()) return;
    check_fork(seed, false);
    // A sanitizer's own locks may be held by another thread at the fork.
    if (!under_any_sanitizer()) check_fork(seed, true);
}

char doing[2000];  // for when a signal ends the test

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

void check_all(std::uint64_t cases, std::uint64_t seed) {
    const std::vector<const char*> sets = instruction_sets();
    set_doing("conversions");
    check_conversions(sets);
    for (std::uint64_t k = 0; k < cases; ++k) {
        const Case c = draw_case(seed + k);
        set_doing(describe(c));
        check_case(c, sets);
    }
    use_instructions(sets.back());
    set_doing("steps at the same time");
    check_concurrency(seed, 4, 10);
    set_doing("rounding modes");
    check_rounding(seed);
    set_doing("steps after fork");
    check_processes(seed);
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
    tell_of_crashes();
    try {
        check_all(cases, seed);
    } catch (const std::exception& failure) {
        std::printf("%s%s\n", doing, failure.what());
        return 1;
    }
    return 0;
}
