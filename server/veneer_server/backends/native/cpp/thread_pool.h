// Threads that do a program's parts together, and hardly ever wait for one that is not running.
//
// A program is a list of parts, a part is a number of chunks. All threads go through it side by
// side. Each has a share of a part's chunks and takes them in order, so that it reads memory in
// order, and so that a later part's share finds in its caches what an earlier one's brought; who
// has done its own takes chunks from the end of another's.
//
// On few cores other processes have one of them now and then, for a time in which dozens of parts
// would be done, and a thread that is put aside may hold a chunk. So whoever has waited for a
// chunk longer than one takes does it again: chunks only read what earlier parts wrote and write
// what they alone write, so twice is the same as once. Then all but the thread that was put aside
// go on. It will write its chunk's results once more whenever it is back: until then nothing may
// be put where it reads or writes, so a program is told of such stragglers as it prepares a part,
// and has it write elsewhere (see `Program::prepare`). Any thread can lead from part to part. All
// wait for one that is put aside while it leads (it prepares lists, no more), for stragglers
// at a program's end, and for them where a program has no room left to write elsewhere.
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

constexpr int kMaxChunks = 1024;  // of a part

// The parts of threads that some process has put aside with a chunk of them.
struct Stragglers {
    const int* phases;
    int count;
};

class Program {
  public:
    virtual ~Program() = default;

    virtual int phases() const = 0;

    // How many chunks a part has, up to kMostChunks; 0 where there is nothing to do in it, -1 to
    // be asked again since it has to wait for stragglers. Called for one part after the other, by
    // any thread, when all chunks of the part before are done. What stragglers read and write
    // must stay as it is.
    // It must not throw, nor `chunk`: others are at work.
    virtual int prepare(int phase, Stragglers stragglers) = 0;

    // The first chunk of a thread's share of a part; for `size` threads, thread `size` has the
    // end.
    virtual int begin(int phase, int chunks, int thread, int size) const {
        (void)phase;
        return int(int64_t(chunks) * thread / size);
    }

    // Threads are 0, which is who called `run`, to size - 1.
    virtual void chunk(int phase, int chunk, int thread) = 0;
};

class ThreadPool {
  public:
    // `patient`: no chunk is done twice; for a test.
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

    // Wake the others; they look for work until `rest`.
    void wake() {
        awake_.store(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &awake_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
    void let_sleep() { awake_.store(0, std::memory_order_seq_cst); }

    // Do a program; on return no thread is in it any more.
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
    // Parts are numbered on from program to program, from 1.

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
        // A part's number (its lower half), and which chunks of the share nobody has begun.
        std::atomic<uint64_t> left{0};
        // The part that the share's owner is in, or 0: it may read and write what that does.
        alignas(64) std::atomic<uint64_t> inside{0};

        static uint64_t pack(uint64_t phase, int begin, int end) {
            return phase << 32 | uint64_t(begin) << 16 | uint64_t(end);
        }

        // A chunk of its beginning for its owner, of its end for others; -1 where none is left.
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

    // Take part in the program under way until it has ended.
    void help(int thread) {
        for (;;) {
            const uint64_t current = current_.load(std::memory_order_acquire);
            if (!(current & kUnderWay)) return;
            const uint64_t phase = current >> 1;
            if (enter(phase, thread)) {
                // Of a later part, where we were put aside in between; then that has been claimed.
                const int chunks = chunks_.load(std::memory_order_acquire);
                const uint64_t patience = work(phase, thread);
                leave(thread);
                finish(current, chunks, patience, thread);
            }
            wait([&] { return current_.load(std::memory_order_acquire) != current; });
        }
    }

    // Begin to read and write what a part does, unless it is over. Either we see that it is, or
    // who ends it sees us.
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

    // Do what nobody has begun; how long to wait for others' chunks before they are done again.
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
        // Who comes late finds a later part's number there.
        std::atomic<uint64_t>& finished = finished_[chunk];
        uint64_t seen = finished.load(std::memory_order_relaxed);
        while (seen < phase &&
               !finished.compare_exchange_weak(seen, phase, std::memory_order_release)) {
        }
    }

    // Wait until all chunks are done, doing again those that take too long, then lead on; or
    // until somebody else has.
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

    // Prepare the next part and let all begin it, or end the program. One thread at a time is
    // here: who has claimed the part.
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

    // The parts that other threads are still in. Who is just leaving is given a moment.
    Stragglers stragglers(int thread) {
        int count = 0;
        for (int turns = 0; turns < kMoment; ++turns) {
            count = 0;
            for (int other = 0; other < size_; ++other) {
                const uint64_t inside = shares_[other].inside.load(std::memory_order_seq_cst);
                // What is older is of a program that is over, and will be found to be.
                if (other != thread && inside >= first_)
                    straggling_[count++] = int(inside - first_);
            }
            if (count == 0) break;
            spin_pause();
        }
        return {straggling_.get(), count};
    }

    // For tests: threads are put aside with a chunk in their hands.
    static void stall() {
#ifdef VENEER_STALLS
        thread_local unsigned seed = unsigned(cycles());
        if (rand_r(&seed) % 32 == 0) usleep(unsigned(rand_r(&seed)) % 500);
#endif
    }

    static constexpr uint64_t kUnderWay = 1;      // beside a part's number
    static constexpr uint64_t kPatience = 20000;  // cycles, 5 to 10 us
    static constexpr uint64_t kGuess = 100000;    // where nothing tells how long a chunk takes
    static constexpr int kSpins = 2000;
    static constexpr int kMoment = 20;

    const int size_;
    const bool patient_;
    std::unique_ptr<Share[]> shares_;                    // one a thread
    std::unique_ptr<std::atomic<uint64_t>[]> finished_;  // by chunk, the last part it was done in
    std::unique_ptr<int[]> straggling_;                  // who leads writes there
    // Of the program under way: set before its first part, and read by who has entered it.
    Program* program_ = nullptr;
    uint64_t first_ = 1;
    int phases_ = 0;
    std::atomic<int> chunks_{0};
    alignas(64) std::atomic<uint64_t> current_{0};  // the part that all are to do, and kUnderWay
    alignas(64) std::atomic<uint64_t> claimed_{1};  // no part before this one can be entered
    alignas(64) std::atomic<uint32_t> awake_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;  // last: they use the rest
};

}  // namespace veneer
