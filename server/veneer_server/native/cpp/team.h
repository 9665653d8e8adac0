// Threads that share a step's work by taking chunks of it, and never wait for one that is not
// running: the caller takes every chunk that nobody else has begun.
//
// On few cores some other process has one of them now and then. With a fixed share for each
// thread the step would wait for the scheduler to bring the missing thread back, at each of
// its hundreds of parallel parts; here it goes on alone, and waits for chunks under way only.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace veneer {

class Team {
  public:
    // `thread` is 0 for the caller, else 1 to size - 1.
    using Work = void (*)(const void* what, int chunk, int thread);

    explicit Team(int size) {
        for (int thread = 1; thread < size; ++thread)
            threads_.emplace_back([this, thread] { serve(thread); });
    }

    ~Team() {
        stopping_.store(true);
        call();
        for (auto& thread : threads_) thread.join();
    }

    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return int(threads_.size()) + 1; }

    // Wake the others; they look for work until `rest`.
    void call() {
        awake_.store(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &awake_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
    void rest() { awake_.store(0, std::memory_order_seq_cst); }

    // Call `function(chunk, thread)` for each chunk; all are done on return.
    template <class Function>
    void run(int chunks, const Function& function) {
        if (chunks <= 1 || threads_.empty()) {
            for (int chunk = 0; chunk < chunks; ++chunk) function(chunk, 0);
            return;
        }
        const uint32_t epoch = ++epoch_;
        Part& part = parts_[epoch % kParts];
        part.what = &function;
        part.work = [](const void* what, int chunk, int thread) {
            (*static_cast<const Function*>(what))(chunk, thread);
        };
        part.done.store(0, std::memory_order_relaxed);
        part.size.store(ticket(epoch, uint32_t(chunks)), std::memory_order_relaxed);
        ticket_.store(ticket(epoch, 0), std::memory_order_release);
        while (take(0)) {
        }
        for (int turns = 0; part.done.load(std::memory_order_acquire) != uint32_t(chunks);) {
            if (++turns < kSpins)
                _mm_pause();
            else
                sched_yield();
        }
    }

  private:
    static constexpr int kParts = 4;
    static constexpr int kSpins = 2000;

    // Which part in the upper half, how many chunks (or which) in the lower.
    static uint64_t ticket(uint32_t epoch, uint32_t chunk) {
        return uint64_t(epoch) << 32 | chunk;
    }

    struct alignas(64) Part {
        const void* what = nullptr;
        Work work = nullptr;
        std::atomic<uint64_t> size{0};
        std::atomic<uint32_t> done{0};

        bool has(uint64_t mine) const {
            const uint64_t mine_size = size.load(std::memory_order_relaxed);
            return mine_size >> 32 == mine >> 32 && uint32_t(mine) < uint32_t(mine_size);
        }
    };

    // Take a chunk of the newest part and do it; false where none is left. A ticket names its
    // part: that may be newer than the one seen before. A part whose chunk somebody has is not
    // over, so it is still there; to a ticket past the last chunk the part may be gone, which
    // `has` tells by its number.
    bool take(int thread) {
        const uint64_t seen = ticket_.load(std::memory_order_acquire);
        if (!parts_[(seen >> 32) % kParts].has(seen)) return false;
        const uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
        Part& part = parts_[(mine >> 32) % kParts];
        if (!part.has(mine)) return false;
        part.work(part.what, int(uint32_t(mine)), thread);
        part.done.fetch_add(1, std::memory_order_release);
        return true;
    }

    void serve(int thread) {
        for (;;) {
            while (awake_.load(std::memory_order_acquire) == 0)
                syscall(SYS_futex, &awake_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
            if (stopping_.load()) return;
            if (!take(thread)) _mm_pause();
        }
    }

    std::vector<std::thread> threads_;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> awake_{0};
    std::atomic<bool> stopping_{false};
    uint32_t epoch_ = 0;
    Part parts_[kParts];
};

}  // namespace veneer
