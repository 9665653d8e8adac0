// A thread pool that executes a program of phases, and that hardly ever waits for a thread which
// the OS has preempted.
//
// A program is a list of phases with a barrier between them; a phase is a number of chunks. Each
// thread has a share of a phase's chunks and takes them in order, so that it reads memory in order
// and finds in its caches what its share of an earlier phase brought there. A thread that has
// finished its own share steals chunks from the end of another's.
//
// On few cores the OS now and then preempts a thread for long enough to execute dozens of phases,
// and that thread may hold a chunk: it is then a straggler. So a thread that has waited longer for
// a chunk than one takes executes it again. A chunk only reads what earlier phases wrote and only
// writes its own results, so executing it twice is the same as executing it once, and all threads
// but the straggler go on. When the straggler resumes it writes the chunk's results once more.
// Until then nothing may be put where it reads or writes: a program is told of stragglers when it
// prepares a phase, and has that phase write elsewhere (see `Program::prepare`). Both threads may
// write at one time: see kernels/shared.h.
//
// Any thread can lead from one phase to the next. All threads wait for a straggler only where it
// was preempted while it led (it prepares lists, no more), at a program's end, and where a program
// has no room left to write elsewhere.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cassert>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "isa/isa.h"

#ifdef VENEER_STALLS
#include <cstdlib>
#endif

namespace veneer {

constexpr int kMaxChunks = 1024;  // of a phase

// The phases of the threads that were preempted while they held a chunk of them.
struct Stragglers {
    const int* phases;
    int count;
};

class Program {
  public:
    virtual ~Program() = default;

    virtual int phases() const = 0;

    // The number of chunks of a phase, up to kMaxChunks. 0: nothing to do in it; -1: ask again,
    // since it has to wait for stragglers. Called for one phase after the other, by any thread,
    // when all chunks of the phase before are finished. It must leave alone what stragglers read
    // and write. Neither this function nor `chunk` may throw: other threads are at work.
    virtual int prepare(int phase, Stragglers stragglers) = 0;

    // The first chunk of a thread's share of a phase. For thread `size`, one past the last, the end
    // of all chunks.
    virtual int begin(int phase, int chunks, int thread, int size) const {
        (void)phase;
        return int(int64_t(chunks) * thread / size);
    }

    // Threads are numbered from 0, the caller of `run`, to size - 1.
    virtual void chunk(int phase, int chunk, int thread) = 0;
};

class ThreadPool {
  public:
    // `patient`: no chunk is executed twice; for tests.
    explicit ThreadPool(int size, bool patient = false)
        : size_(size),
          patient_(patient),
          shares_(new Share[size_t(size)]),
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

    // Wake the other threads; they look for work until `let_sleep`.
    void wake() {
        awake_.store(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &awake_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
    void let_sleep() { awake_.store(0, std::memory_order_seq_cst); }

    // Execute a program. On return no thread is in it any more.
    void run(Program& program) {
        if (size_ == 1) return run_alone(program);
        program_ = &program;
        first_ = claimed_.load(std::memory_order_relaxed);
        phases_ = program.phases();
        lead(first_, 0);
        help(0);
        for (int other = 1; other < size_; ++other)
            wait([&] { return shares_[other].inside.load(std::memory_order_seq_cst) == 0; });
    }

    // Call `function(number, thread)` for 0 to count - 1.
    template <class Function>
    void each(int64_t count, const Function& function) {
        Each<Function> program(count, function);
        run(program);
    }

  private:
    // Phases are numbered from 1 and on from program to program.

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

    struct alignas(64) Share {
        // A phase's number (its lower half), and the chunks of the share that nobody has begun.
        std::atomic<uint64_t> left{0};
        // The phase that the share's owner is in, or 0: it may read and write what that phase does.
        alignas(64) std::atomic<uint64_t> inside{0};

        static uint64_t pack(uint64_t phase, int begin, int end) {
            return phase << 32 | uint64_t(begin) << 16 | uint64_t(end);
        }

        // A chunk from the beginning for the owner, from the end for others; -1 where none is left.
        int take(uint64_t phase, bool owner) {
            uint64_t seen = left.load(std::memory_order_acquire);
            for (;;) {
                const int begin = int(seen >> 16 & 0xffff), end = int(seen & 0xffff);
                if (uint32_t(seen >> 32) != uint32_t(phase) || begin >= end) return -1;
                const uint64_t next =
                    owner ? pack(phase, begin + 1, end) : pack(phase, begin, end - 1);
                if (left.compare_exchange_weak(seen, next, std::memory_order_acq_rel))
                    return owner ? begin : end - 1;
            }
        }
    };

    static void run_alone(Program& program) {
        for (int phase = 0; phase < program.phases(); ++phase) {
            const int chunks = program.prepare(phase, {nullptr, 0});
            for (int chunk = 0; chunk < chunks; ++chunk) program.chunk(phase, chunk, 0);
        }
    }

    template <class Holds>
    static void wait(const Holds& holds) {
        for (int turns = 0; !holds();) {
            if (++turns < kSpins)
                spin_pause();
            else
                sched_yield();
        }
    }

    void end() {
        stopping_.store(true);
        wake();
        for (auto& thread : threads_) thread.join();
    }

    void serve(int thread) noexcept {
        for (;;) {
            while (awake_.load(std::memory_order_acquire) == 0)
                syscall(SYS_futex, &awake_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
            if (stopping_.load()) return;
            help(thread);
            spin_pause();
        }
    }

    // Execute chunks of the current program until it has ended.
    void help(int thread) {
        for (;;) {
            const uint64_t current = current_.load(std::memory_order_acquire);
            if (!(current & kUnderWay)) return;
            const uint64_t phase = current >> 1;
            if (enter(phase, thread)) {
                // If this thread was preempted in between it may be a later phase's number: then
                // this phase has been claimed.
                const int chunks = chunks_.load(std::memory_order_acquire);
                const uint64_t patience = work(phase, thread);
                leave(thread);
                finish(current, chunks, patience, thread);
            }
            wait([&] { return current_.load(std::memory_order_acquire) != current; });
        }
    }

    // Begin to read and write what a phase does, unless it is over. Either this thread sees that it
    // is over, or the thread that ends it sees this one.
    bool enter(uint64_t phase, int thread) {
        stall();
        std::atomic<uint64_t>& inside = shares_[thread].inside;
        inside.store(phase, std::memory_order_seq_cst);
        stall();
        if (claimed_.load(std::memory_order_seq_cst) == phase) return true;
        inside.store(0, std::memory_order_release);
        return false;
    }
    void leave(int thread) { shares_[thread].inside.store(0, std::memory_order_release); }

    // Execute the chunks that nobody has begun. Returns how long to wait for other threads' chunks
    // before they are executed again.
    uint64_t work(uint64_t phase, int thread) {
        uint64_t longest = 0, before = cycles();
        for (int other = 0; other < size_; ++other) {
            Share& share = shares_[(thread + other) % size_];
            for (;;) {
                const int chunk = share.take(phase, other == 0);
                if (chunk < 0) break;
                do_chunk(phase, chunk, thread);
                const uint64_t now = cycles();
                if (now - before > longest) longest = now - before;
                before = now;
            }
        }
        return longest > 0 ? kPatience + 2 * longest : kGuess;
    }

    void do_chunk(uint64_t phase, int chunk, int thread) {
        stall();
        program_->chunk(int(phase - first_), chunk, thread);
        // A late thread finds a later phase's number there.
        std::atomic<uint64_t>& finished = finished_[chunk];
        uint64_t seen = finished.load(std::memory_order_relaxed);
        while (seen < phase &&
               !finished.compare_exchange_weak(seen, phase, std::memory_order_release)) {
        }
    }

    // Wait until all chunks are finished, executing again those that take too long; then lead to
    // the next phase, unless another thread has.
    void finish(uint64_t current, int chunks, uint64_t patience, int thread) {
        const uint64_t phase = current >> 1, began = cycles();
        int done = 0;
        auto skip = [&] {
            while (done < chunks && finished_[done].load(std::memory_order_acquire) >= phase)
                ++done;
        };
        for (int turns = 0; current_.load(std::memory_order_acquire) == current;) {
            skip();
            if (done == chunks) {
                uint64_t expected = phase;
                if (claimed_.compare_exchange_strong(expected, phase + 1)) lead(phase + 1, thread);
                return;
            }
            if (!patient_ && cycles() - began > patience) {
                if (!enter(phase, thread)) return;
                for (; done < chunks; skip()) do_chunk(phase, done, thread);
                leave(thread);
            } else if (++turns < kSpins) {
                spin_pause();
            } else {
                sched_yield();
            }
        }
    }

    // Prepare the next phase and let all threads begin it, or end the program. Only the thread that
    // has claimed the phase is here.
    void lead(uint64_t phase, int thread) {
        stall();
        for (;; claimed_.store(++phase, std::memory_order_seq_cst)) {
            const int number = int(phase - first_);
            if (number == phases_) return current_.store(phase << 1, std::memory_order_release);
            int chunks;
            while ((chunks = program_->prepare(number, stragglers(thread))) < 0) sched_yield();
            assert(chunks <= kMaxChunks);
            if (chunks == 0) continue;
            chunks_.store(chunks, std::memory_order_release);
            int begin = program_->begin(number, chunks, 0, size_);
            for (int other = 0; other < size_; ++other) {
                const int end = program_->begin(number, chunks, other + 1, size_);
                shares_[other].left.store(Share::pack(phase, begin, end),
                                          std::memory_order_release);
                begin = end;
            }
            return current_.store(phase << 1 | kUnderWay, std::memory_order_release);
        }
    }

    // The phases that other threads are still in. A thread that is just leaving is given a moment.
    Stragglers stragglers(int thread) {
        int count = 0;
        for (int turns = 0; turns < kMoment; ++turns) {
            count = 0;
            for (int other = 0; other < size_; ++other) {
                const uint64_t inside = shares_[other].inside.load(std::memory_order_seq_cst);
                // An older one belongs to a program that is over; its thread will notice.
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

    static constexpr uint64_t kUnderWay = 1;      // beside a phase's number
    static constexpr uint64_t kPatience = 20000;  // cycles, 5 to 10 us
    static constexpr uint64_t kGuess = 100000;    // where this thread executed none
    static constexpr int kSpins = 2000;
    static constexpr int kMoment = 20;

    const int size_;
    const bool patient_;
    std::unique_ptr<Share[]> shares_;                    // by thread
    std::unique_ptr<std::atomic<uint64_t>[]> finished_;  // by chunk, its last finished phase
    std::unique_ptr<int[]> straggling_;                  // written by the thread that leads
    // Of the current program: set before its first phase, and read by threads that have entered it.
    Program* program_ = nullptr;
    uint64_t first_ = 1;
    int phases_ = 0;
    std::atomic<int> chunks_{0};
    alignas(64) std::atomic<uint64_t> current_{0};  // the current phase, and kUnderWay
    alignas(64) std::atomic<uint64_t> claimed_{1};  // no phase before this one can be entered
    alignas(64) std::atomic<uint32_t> awake_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;  // last: they use the members above
};

}  // namespace veneer
