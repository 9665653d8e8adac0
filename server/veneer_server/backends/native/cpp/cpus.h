// Sets of CPUs, and binding threads to them.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace veneer {

// A set of CPUs of any size, in Linux's format.
class CpuSet {
  public:
    CpuSet() = default;
    CpuSet(const int32_t* cpus, int count) {
        for (int i = 0; i < count; ++i) {
            const size_t cpu = size_t(cpus[i]), word = cpu / kBits;
            if (word >= words_.size()) words_.resize(word + 1);
            words_[word] |= 1UL << cpu % kBits;
        }
    }

    bool empty() const { return words_.empty(); }

    // Bind a thread to these CPUs; false if the system refuses.
    bool bind(pthread_t thread) const {
        return pthread_setaffinity_np(thread, words_.size() * sizeof(long), set()) == 0;
    }

    // Read the CPUs on which a thread may run; empty if the system does not say. Only allocates on
    // the first call.
    void read(pthread_t thread) {
        for (size_t words = 16; words <= 1024; words *= 4) {  // the call fails if they are too few
            words_.assign(words, 0);
            if (pthread_getaffinity_np(thread, words * sizeof(long),
                                       reinterpret_cast<cpu_set_t*>(words_.data())) == 0)
                return;
        }
        clear();
    }
    void clear() { words_.clear(); }

  private:
    static constexpr size_t kBits = 8 * sizeof(long);
    const cpu_set_t* set() const { return reinterpret_cast<const cpu_set_t*>(words_.data()); }

    std::vector<unsigned long> words_;
};

}  // namespace veneer
