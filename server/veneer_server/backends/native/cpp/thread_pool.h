// A thread pool that executes a program of phases, and that hardly ever waits for a thread which
// the OS has preempted.
//
// A program is a list of phases with a barrier between them; a phase is cut into chunks. Each
// thread has a share of a phase's chunks and takes them in order, so that it reads memory in order
// and finds data in its caches from its share of an earlier phase. A thread that has finished its
// own share steals chunks from the end of another thread's.
//
// A thread's work in a phase besides its chunks does not grow with the number of threads. It cuts
// its own share itself. A bit per share, 32 to a word, says whether the share has chunks that no
// thread has begun, so one look finds a share to steal from, or that there is none. A thread that
// has done its part of the phase adds the number of chunks it finished to one count. The thread
// that completes the count leads to the next phase; the others only wait for that.
//
// On few cores the OS now and then preempts a thread for long enough to execute dozens of phases.
// If that thread holds a chunk, it is a straggler. So a thread that has waited for a chunk longer
// than a chunk takes executes it again. A chunk only reads what earlier phases wrote and only
// writes its own results, so executing it twice is the same as executing it once, and all threads
// but the straggler can continue. When the straggler resumes, it writes the chunk's results once
// more. Until then nothing else may use the memory that it reads or writes: a program is told of
// stragglers when it prepares a phase, and makes that phase write elsewhere (see
// `Program::prepare`). Both threads may write at the same time: see kernels/shared.h.
//
// Any thread can lead from one phase to the next. All threads wait for a straggler only in three
// cases: it was preempted while it led (a leader only prepares lists), the program ends, or the
// program has no other memory left to write to.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cpus.h"
#include "isa/isa.h"
#include "program.h"
#include "shares.h"

#ifdef VENEER_STALLS
#include <cstdlib>
#endif

namespace veneer {

class ThreadPool {
  public:
    // `patient`: never execute a chunk twice; for tests.
    explicit ThreadPool(int size, bool patient = false)
        : size_(size),
          patient_(patient),
          shares_(size),
          inside_(new Inside[size_t(size)]),
          finished_(new std::atomic<uint64_t>[kMaxChunks]()),
          straggling_(new int[size_t(size)]) {
        try {
            for (int thread = 1; thread < size; ++thread)
                threads_.emplace_back([this, thread] { serve(thread); });
        } catch (...) {
            end();
            throw;
        }
    }

    ~ThreadPool() { end(); }

    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Bind a thread to these CPUs; false if the system refuses. Thread 0, the caller of `run`, is
    // only bound from `wake` to `let_sleep`, since threads and processes that it starts inherit the
    // binding.
    bool bind(int thread, const CpuSet& cpus) {
        if (thread > 0) return cpus.bind(threads_[size_t(thread - 1)].native_handle());
        callers_ = cpus;
        wake();
        const bool bound = !before_.empty();
        let_sleep();
        if (!bound) callers_.clear();
        return bound;
    }

    // Wake the other threads; they look for work until `let_sleep`.
    void wake() {
        if (!callers_.empty()) {
            before_.read(pthread_self());
            if (!callers_.bind(pthread_self())) before_.clear();
        }
        wake_others();
    }
    void let_sleep() {
        awake_.store(0, std::memory_order_seq_cst);
        if (!before_.empty()) before_.bind(pthread_self());
        before_.clear();
    }

    // Execute a program. On return no thread is executing it any more.
    void run(Program& program) {
        if (size_ == 1) return run_alone(program);
        program_ = &program;
        first_ = claimed_.load(std::memory_order_relaxed);
        phases_ = program.phases();
        shares_.reset(first_);
        lead(first_, 0);
        help(0);
        for (int other = 1; other < size_; ++other)
            wait([&] { return inside_[other].phase.load(std::memory_order_seq_cst) == 0; });
    }

    // Call `function(number, thread)` for the numbers 0 to count - 1.
    template <class Function>
    void each(int64_t count, const Function& function) {
        Each<Function> program(count, function);
        run(program);
    }

  private:
    // Phases are numbered from 1, and on from program to program.
    struct Phase {
        uint64_t number;
        int chunks;
    };
    // A thread's work in a phase.
    struct Worked {
        int finished;       // chunks that this thread was the first to finish
        uint64_t patience;  // cycles to wait for other threads' chunks before executing them again
    };

    template <class Function>
    struct Each final : Program {
        Each(int64_t count_, const Function& function_) : count(count_), function(function_) {}
        int phases() const override { return 1; }
        int prepare(int, Stragglers) override {
            return chunks = int(count < kMaxChunks ? count : kMaxChunks);
        }
        void chunk(int, int chunk, int thread) override {
            for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i)
                function(i, thread);
        }
        int64_t count;
        int chunks = 0;
        const Function& function;
    };

    struct alignas(64) Inside {
        // The phase that a thread is in, or 0. It may read and write all that phase's memory.
        std::atomic<uint64_t> phase{0};
    };

    static void run_alone(Program& program) {
        for (int phase = 0; phase < program.phases(); ++phase) {
            const int chunks = program.prepare(phase, {nullptr, 0});
            for (int chunk = 0; chunk < chunks; ++chunk) program.chunk(phase, chunk, 0);
            program.pause();
        }
    }

    template <class Holds>
    static void wait(const Holds& holds) {
        for (int64_t turns = 0; !holds(); ++turns) pause(turns);
    }

    // One turn of a wait. A long wait is for a thread that the OS has preempted, perhaps on this
    // very core. Yielding does not give that thread the core: Linux lets a thread that yields
    // continue for milliseconds, until its time slice ends. Sleeping does.
    static void pause(int64_t turns) {
        if (turns < kSpins) return spin_pause();
        const timespec nap{0, kNap};
        nanosleep(&nap, nullptr);
    }

    void wake_others() {
        awake_.store(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &awake_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }

    void end() {
        stopping_.store(true);
        wake_others();
        for (auto& thread : threads_) thread.join();
    }

    void serve(int thread) noexcept {
        for (int64_t turns = 0;; ++turns) {
            while (awake_.load(std::memory_order_acquire) == 0) {
                syscall(SYS_futex, &awake_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
                turns = 0;
            }
            if (stopping_.load()) return;
            if (help(thread)) turns = 0;
            pause(turns);
        }
    }

    // Execute chunks of the current program until it has ended. Returns false if there was none.
    bool help(int thread) {
        for (bool any = false;; any = true) {
            const uint64_t current = current_.load(std::memory_order_acquire);
            const Phase phase = {current >> kChunkBits, int(current & (kChunkBit - 1))};
            if (phase.chunks == 0) return any;
            if (enter(phase, thread)) {
                const Worked worked = work(phase, thread);
                leave(thread);
                if (arrive(phase, worked.finished))
                    claim(phase, thread);
                else
                    wait_for_others(phase, current, worked.patience, thread);
            }
            wait([&] { return current_.load(std::memory_order_acquire) != current; });
        }
    }

    // Enter a phase, unless it is over; from then on this thread may use the phase's memory. Either
    // this thread sees that the phase is over, or the thread that ends it sees this thread.
    bool enter(Phase phase, int thread) {
        stall();
        std::atomic<uint64_t>& inside = inside_[thread].phase;
        inside.store(phase.number, std::memory_order_seq_cst);
        stall();
        if (claimed_.load(std::memory_order_seq_cst) == phase.number) return true;
        inside.store(0, std::memory_order_release);
        return false;
    }
    void leave(int thread) { inside_[thread].phase.store(0, std::memory_order_release); }

    // Execute chunks that no thread has begun.
    Worked work(Phase phase, int thread) {
        int finished = 0;
        uint64_t longest = 0, before = cycles();
        auto begin_of = [&](int owner) {
            return program_->begin(int(phase.number - first_), phase.chunks, owner, size_);
        };
        auto empty = [&](int owner) {
            for (int chunk; (chunk = shares_.take(phase.number, owner, thread, begin_of)) >= 0;) {
                finished += do_chunk(phase, chunk, thread);
                const uint64_t now = cycles();
                if (now - before > longest) longest = now - before;
                before = now;
            }
        };
        empty(thread);
        for (int other; (other = shares_.next_open(phase.number, thread)) >= 0;) empty(other);
        program_->pause();
        return {finished, longest > 0 ? kPatience + 2 * longest : kGuess};
    }

    // Execute a chunk. Returns true if this thread is the first to finish it.
    bool do_chunk(Phase phase, int chunk, int thread) {
        stall();
        program_->chunk(int(phase.number - first_), chunk, thread);
        // A late thread finds a later phase's number there.
        std::atomic<uint64_t>& finished = finished_[chunk];
        uint64_t seen = finished.load(std::memory_order_relaxed);
        while (seen < phase.number) {
            if (finished.compare_exchange_weak(seen, phase.number, std::memory_order_release))
                return true;
        }
        return false;
    }

    // Count this thread, and the chunks that it was the first to finish, once it has left the
    // phase. Returns true if that completes the phase.
    bool arrive(Phase phase, int finished) {
        stall();
        uint64_t seen = arrived_.load(std::memory_order_relaxed), next;
        do {
            if (!PhaseWord::is_of(seen, phase.number)) return false;
            next = PhaseWord::packed(phase.number, PhaseWord::high(seen) + 1,
                                     PhaseWord::low(seen) + finished);
        } while (!arrived_.compare_exchange_weak(seen, next, std::memory_order_acq_rel));
        return finished > 0 && PhaseWord::low(next) == phase.chunks;
    }

    // Enter a phase again after arriving, and take this thread out of the count: not all threads
    // have left the phase then.
    bool enter_again(Phase phase, int thread) {
        uint64_t seen = arrived_.load(std::memory_order_relaxed), next;
        do {
            if (!PhaseWord::is_of(seen, phase.number)) return false;
            next = PhaseWord::packed(phase.number, PhaseWord::high(seen) - 1, PhaseWord::low(seen));
        } while (!arrived_.compare_exchange_weak(seen, next, std::memory_order_seq_cst));
        return enter(phase, thread);
    }

    // Wait until another thread has led to the next phase. If that takes too long, execute the
    // unfinished chunks again, and lead.
    void wait_for_others(Phase phase, uint64_t current, uint64_t patience, int thread) {
        const uint64_t began = cycles();
        for (int turns = 0; current_.load(std::memory_order_acquire) == current;) {
            if (!patient_ && cycles() - began > patience) {
                if (!enter_again(phase, thread)) return;
                for (int chunk = 0; chunk < phase.chunks; ++chunk)
                    if (finished_[chunk].load(std::memory_order_acquire) < phase.number)
                        do_chunk(phase, chunk, thread);
                program_->pause();
                leave(thread);
                return claim(phase, thread);
            }
            if (++turns < kSpins)
                spin_pause();
            else
                sched_yield();
        }
    }

    // Lead on from a phase whose chunks are all finished, unless another thread does.
    void claim(Phase phase, int thread) {
        uint64_t expected = phase.number;
        if (claimed_.compare_exchange_strong(expected, phase.number + 1))
            lead(phase.number + 1, thread);
    }

    // Prepare the next phase and let all threads begin it, or end the program. Only called by the
    // thread that has claimed the phase.
    void lead(uint64_t phase, int thread) {
        stall();
        for (;; claimed_.store(++phase, std::memory_order_seq_cst)) {
            const int number = int(phase - first_);
            if (number == phases_)
                return current_.store(phase << kChunkBits, std::memory_order_release);
            int chunks;
            wait([&] { return (chunks = program_->prepare(number, stragglers(thread))) >= 0; });
            assert(chunks <= kMaxChunks);
            if (chunks == 0) continue;
            shares_.open(phase);
            arrived_.store(PhaseWord::packed(phase, 0, 0), std::memory_order_relaxed);
            return current_.store(phase << kChunkBits | uint64_t(chunks),
                                  std::memory_order_release);
        }
    }

    // The phases that other threads are still in. Threads that are just leaving are given a moment.
    Stragglers stragglers(int thread) {
        // If all threads are counted, they have left the last phase that had chunks. A thread that
        // enters it again has taken itself out of the count, or sees that the phase is claimed.
        if (PhaseWord::high(arrived_.load(std::memory_order_seq_cst)) == size_) return {nullptr, 0};
        int count = 0;
        for (int turns = 0; turns < kMoment; ++turns) {
            count = 0;
            for (int other = 0; other < size_; ++other) {
                const uint64_t inside = inside_[other].phase.load(std::memory_order_seq_cst);
                // An older phase belongs to a program that is over; its thread will notice.
                if (other != thread && inside >= first_)
                    straggling_[count++] = int(inside - first_);
            }
            if (count == 0) break;
            spin_pause();
        }
        return {straggling_.get(), count};
    }

    // For tests: threads sleep now and then while they hold a chunk, as if preempted.
    static void stall() {
#ifdef VENEER_STALLS
        thread_local unsigned seed = unsigned(cycles());
        if (rand_r(&seed) % 32 == 0) usleep(unsigned(rand_r(&seed)) % 500);
#endif
    }

    static constexpr int kChunkBits = 11;  // bits below a phase's number; kMaxChunks fits
    static constexpr uint64_t kChunkBit = uint64_t(1) << kChunkBits;
    static constexpr uint64_t kPatience = 20000;  // cycles, 5 to 10 us
    static constexpr uint64_t kGuess = 100000;    // if this thread executed no chunk
    static constexpr int kSpins = 2000;           // turns of a wait, 30 to 100 us
    static constexpr long kNap = 20'000;          // ns, to which Linux adds up to 50,000
    static constexpr int kMoment = 20;

    const int size_;
    const bool patient_;
    Shares shares_;
    std::unique_ptr<Inside[]> inside_;                   // by thread
    std::unique_ptr<std::atomic<uint64_t>[]> finished_;  // by chunk, its last finished phase
    std::unique_ptr<int[]> straggling_;                  // written by the thread that leads
    // The current program's: set before its first phase, read by threads that have entered a phase.
    Program* program_ = nullptr;
    uint64_t first_ = 1;
    int phases_ = 0;
    alignas(64) std::atomic<uint64_t> current_{0};  // the current phase, and its chunks; 0: none
    alignas(64) std::atomic<uint64_t> arrived_{0};  // threads, and the chunks that they finished
    alignas(64) std::atomic<uint64_t> claimed_{1};  // no phase before this one can be entered
    alignas(64) std::atomic<uint32_t> awake_{0};
    std::atomic<bool> stopping_{false};
    CpuSet callers_, before_;           // the caller's CPUs while bound, and those before that
    std::vector<std::thread> threads_;  // last, since they use the members above
};

}  // namespace veneer
