// What the thread pool does in a phase beside the chunks: counted (COUNTED), or timed.
//
//     thread_pool THREADS PHASES PROGRAMS
//     thread_pool waiting
//
// Counted: every atomic operation that the pool makes, without a change to it: its `std::atomic` is
// replaced by one that counts. Turns of a wait that only read are left out, since their number says
// how long a thread waited, not what it had to do. Threads go in lockstep: nobody begins its next
// chunk before all threads have begun theirs. So each thread takes part in each phase, as with a
// core for each thread, also where there are fewer cores.
//
// Timed: chunks take half a microsecond each, and threads run as they can.
//
// Waiting: the share of one core that threads take while they wait for one that does not run.
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cassert>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "isa/isa.h"

namespace {

// What one thread did.
struct Tally {
    int64_t reads = 0, writes = 0, exchanges = 0, cuts = 0;
    int64_t turn = 0;      // reads since the last write or pause
    bool waiting = false;  // nothing but pauses and reads since the last pause

    void read() { ++turn; }
    void act() {
        reads += turn;
        turn = 0;
        waiting = false;
    }
    void pause() {
        if (!waiting) reads += turn;
        turn = 0;
        waiting = true;
    }
};

std::mutex mutex;
std::vector<std::unique_ptr<Tally>> tallies;  // of all threads

Tally& tally() {
    thread_local Tally* own = [] {
        const std::lock_guard<std::mutex> held(mutex);
        tallies.push_back(std::make_unique<Tally>());
        return tallies.back().get();
    }();
    return *own;
}

}  // namespace

#ifdef COUNTED
namespace std {  // where the pool looks for it

template <class Number>
class counted_atomic {
  public:
    constexpr counted_atomic() = default;
    constexpr counted_atomic(Number number) : inner_(number) {}
    Number load(memory_order order = memory_order_seq_cst) const {
        tally().read();
        return inner_.load(order);
    }
    void store(Number number, memory_order order = memory_order_seq_cst) {
        tally().act();
        ++tally().writes;
        inner_.store(number, order);
    }
    bool compare_exchange_weak(Number& seen, Number next,
                               memory_order order = memory_order_seq_cst) {
        tally().act();
        ++tally().exchanges;
        return inner_.compare_exchange_weak(seen, next, order);
    }
    bool compare_exchange_strong(Number& seen, Number next,
                                 memory_order order = memory_order_seq_cst) {
        tally().act();
        ++tally().exchanges;
        return inner_.compare_exchange_strong(seen, next, order);
    }

  private:
    atomic<Number> inner_{};
};

}  // namespace std

static_assert(sizeof(std::counted_atomic<uint32_t>) == sizeof(uint32_t), "a futex's word");
#define atomic counted_atomic
#define spin_pause() (tally().pause(), veneer::spin_pause())
#define sched_yield() (tally().pause(), sched_yield())
#define nanosleep(time, left) (tally().pause(), nanosleep(time, left))
#endif

#include "thread_pool.h"  // NOLINT: after the macros

#undef atomic
#undef spin_pause
#undef sched_yield
#undef nanosleep

namespace {

constexpr int kChunks = 8;  // per thread, as most phases of a step have
constexpr int kWork = 500;  // ns of a chunk that is timed

struct Phases final : veneer::Program {
    Phases(int threads_, int phases) : threads(threads_), count(phases) {
        pthread_barrier_init(&all, nullptr, unsigned(threads));
    }
    int phases() const override { return count; }
    int prepare(int, veneer::Stragglers) override { return kChunks * threads; }
    int begin(int phase, int chunks, int thread, int size) const override {
        ++tally().cuts;
        return Program::begin(phase, chunks, thread, size);
    }
    void chunk(int, int, int) override {
#ifdef COUNTED
        tally().act();
        pthread_barrier_wait(&all);
#else
        const auto began = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - began < std::chrono::nanoseconds(kWork)) {
        }
#endif
    }

    const int threads, count;
    pthread_barrier_t all;
};

// A chunk for each of two threads. The second one holds its chunk as if preempted.
struct Held final : veneer::Program {
    int phases() const override { return 2; }
    int prepare(int phase, veneer::Stragglers stragglers) override {
        return phase == 1 && room < stragglers.count ? -1 : 2;
    }
    void chunk(int phase, int, int thread) override {
        while (phase == 0 && thread == 0 && !holds.load()) veneer::spin_pause();
        if (thread == 1 && !holds.exchange(true)) usleep(kHeld);
    }

    static constexpr unsigned kHeld = 300'000;  // us
    std::atomic<bool> holds{false};
    int room = 1;  // stragglers with which the next phase can begin
};

// Of one core, while a function takes its time.
template <class Function>
double share_of_a_core(const Function& function) {
    const auto began = std::chrono::steady_clock::now();
    const std::clock_t before = std::clock();
    function();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    return double(std::clock() - before) / CLOCKS_PER_SEC / took.count();
}

// While the caller has not begun, while it waits for the program's end, and to prepare a phase.
int print_waiting() {
    veneer::ThreadPool pool(2);
    pool.wake();
    std::printf("%.3f", share_of_a_core([] { usleep(Held::kHeld); }));
    for (const int room : {1, 0}) {
        Held program;
        program.room = room;
        std::printf(" %.3f", share_of_a_core([&] { pool.run(program); }));
    }
    std::printf("\n");
    pool.let_sleep();
    return 0;
}

}  // namespace

int main(int count, char** words) {
    if (count == 2 && std::strcmp(words[1], "waiting") == 0) return print_waiting();
    if (count != 4) return 2;
    const int threads = std::atoi(words[1]), phases = std::atoi(words[2]);
    const int programs = std::atoi(words[3]);
    double shortest = 1e300;
    {
        Phases program(threads, phases);
#ifdef COUNTED
        const bool patient = true;  // the waits of the lockstep are no reason to execute twice
#else
        const bool patient = false;
#endif
        veneer::ThreadPool pool(threads, patient);
        pool.wake();
        for (int i = 0; i < programs; ++i) {
            const auto began = std::chrono::steady_clock::now();
            pool.run(program);
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
            shortest = std::min(shortest, took.count());
        }
        pool.let_sleep();
    }
    Tally sum;
    for (const auto& each : tallies) {
        sum.reads += each->reads;
        sum.writes += each->writes;
        sum.exchanges += each->exchanges;
        sum.cuts += each->cuts;
    }
    const double all = double(phases) * programs;
    std::printf("%.1f %.1f %.1f %.1f %.1f\n", double(sum.reads) / all, double(sum.writes) / all,
                double(sum.exchanges) / all, double(sum.cuts) / all, 1e9 * shortest / phases);
}
