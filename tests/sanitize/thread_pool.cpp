// Runs many short phases on a thread pool: built with ThreadSanitizer, it reports every pair of
// accesses that nothing orders.
//
// Twice. First patiently: no chunk is executed twice, so phases write to plain memory, and each
// reads what other threads wrote in the phase before. If a chunk began, or `run` returned, before
// that was written, it would be a data race. Then with threads that sleep while they hold a chunk,
// as if preempted (VENEER_STALLS): others execute it again, so what is written is atomic, and
// nothing may be written where stragglers read or write.
#include "thread_pool.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

constexpr int kChunks = 37;
constexpr int kPhases = 50;   // of a program
constexpr int kMany = 35;     // threads
constexpr int kVersions = 4;  // arrays; stragglers that use all of them are waited for

// Each phase adds to what its neighbours wrote in the phase before. `Number` is what they write.
template <class Number>
struct Sums final : veneer::Program {
    explicit Sums(int threads) : by_thread(size_t(threads), 0) {
        for (auto& place : places) place = std::vector<Number>(kChunks);
        for (int chunk = 0; chunk < kChunks; ++chunk) places[0][size_t(chunk)] = 1;
    }

    int phases() const override { return kPhases; }

    int prepare(int phase, veneer::Stragglers stragglers) override {
        unsigned taken = 1u << (phase == 0 ? last : wrote[phase - 1]);
        for (int i = 0; i < stragglers.count; ++i) {
            const int other = stragglers.phases[i];
            taken |= 1u << wrote[other] | 1u << (other == 0 ? last : wrote[other - 1]);
        }
        int place = 0;
        while (taken >> place & 1) ++place;
        if (place >= kVersions) return -1;
        read[phase] = phase == 0 ? last : wrote[phase - 1];
        wrote[phase] = place;
        went_on += stragglers.count > 0;
        return kChunks;
    }

    int begin(int phase, int chunks, int thread, int size) const override {
        if (phase % 2 == 0) return Program::begin(phase, chunks, thread, size);
        return chunks * thread * thread / (size * size);  // shares that are not equal
    }

    void chunk(int phase, int chunk, int thread) override {
        const int64_t before = places[read[phase]][size_t((chunk + 1) % kChunks)];
        places[wrote[phase]][size_t(chunk)] = before + (phase + chunk) % 3;
        ++by_thread[size_t(thread)];  // a chunk may use its thread's scratch
    }

    std::vector<Number> places[kVersions];
    int last = 0;  // where the last program's last phase wrote
    int read[kPhases] = {}, wrote[kPhases] = {};
    int64_t went_on = 0;
    std::vector<int64_t> by_thread;
};

// Whether programs run by so many threads count what one thread counts.
template <class Number>
bool counts_right(int threads, int programs, bool patient) {
    veneer::ThreadPool pool(threads, patient);
    auto sums = std::make_unique<Sums<Number>>(threads);
    std::vector<int64_t> expected(kChunks, 1), next(kChunks);
    for (int program = 0; program < programs; ++program) {
        pool.wake();
        pool.run(*sums);
        sums->last = sums->wrote[kPhases - 1];
        pool.let_sleep();
        if (program % 4 == 3) usleep(200);  // they fall asleep
        for (int phase = 0; phase < kPhases; ++phase) {
            for (int chunk = 0; chunk < kChunks; ++chunk)
                next[size_t(chunk)] = expected[size_t((chunk + 1) % kChunks)] + (phase + chunk) % 3;
            expected = next;
        }
        for (int chunk = 0; chunk < kChunks; ++chunk)
            if (sums->places[sums->last][size_t(chunk)] != expected[size_t(chunk)]) return false;
    }
    int64_t done = 0;
    for (const int64_t count : sums->by_thread) done += count;
    const int64_t needed = int64_t(programs) * kPhases * kChunks;
    if (patient ? done != needed : done < needed) return false;
#ifdef VENEER_STALLS
    if (threads > 1 && !patient && (done == needed || sums->went_on == 0)) {
        std::printf("no thread was preempted\n");
        return false;
    }
#endif
    return true;
}

// In each phase one thread's first chunk waits until all other chunks are executed: of the thread
// that took it, and of the share that it begins, the rest is stolen.
struct Held final : veneer::Program {
    explicit Held(int threads) : size(threads) {}
    int phases() const override { return size; }
    int prepare(int, veneer::Stragglers) override {
        executed = 0;
        return 3 * size;
    }
    void chunk(int phase, int chunk, int) override {
        if (chunk == 3 * phase) {
            for (int turns = 0; executed.load() < 3 * size - 1 && turns < kTurns; ++turns)
                usleep(100);
            all = all && executed.load() == 3 * size - 1;
        }
        ++executed;
    }

    static constexpr int kTurns = 100000;  // then nobody steals
    const int size;
    std::atomic<int> executed{0};
    std::atomic<bool> all{true};
};

bool is_stolen(int threads) {
    veneer::ThreadPool pool(threads, true);
    Held program(threads);
    pool.wake();
    pool.run(program);
    pool.let_sleep();
    return program.all;
}

}  // namespace

int main(int count, char** words) {
    const int programs = count > 1 ? std::atoi(words[1]) : 100;
    for (const int threads : {1, 2, 3, 5}) {
        if (!counts_right<int64_t>(threads, programs, true) ||
            !counts_right<std::atomic<int64_t>>(threads, programs, false)) {
            std::printf("%d threads counted wrong\n", threads);
            return 1;
        }
    }
    // More than one word of open shares.
    if (!counts_right<std::atomic<int64_t>>(kMany, 1, false)) {
        std::printf("%d threads counted wrong\n", kMany);
        return 1;
    }
    for (const int threads : {2, 5, kMany}) {
        if (!is_stolen(threads)) {
            std::printf("%d threads left chunks to a thread that was busy\n", threads);
            return 1;
        }
    }
    for (int i = 0; i < 200; ++i) veneer::ThreadPool(3).wake();  // ends while they wake
    std::printf("%d phases by 1, 2, 3 and 5 threads, %d by %d: in order\n", programs * kPhases,
                kPhases, kMany);
}
