// Access to memory by which the chunks of a step pass data to later chunks.
//
// A chunk may be executed twice (see thread_pool.h). Then two threads write the same numbers to the
// same place, and the later one may do so while other threads already read them. The numbers read
// are the same either way, but to C++ it is a data race unless each access is atomic. So a chunk
// uses these functions for everything that it writes for other chunks, and for everything that it
// reads and other chunks wrote.
//
// Single numbers are stored as relaxed atomics. There are no atomic vectors: the kernels store and
// load a vector by one or two instructions, where atomics would take one per number. With
// VENEER_ATOMIC_NUMBERS they do take one per number: ThreadSanitizer then checks in the real
// decoder that two threads access no other memory at the same time (tests/sanitize).
#pragma once

#include <cstring>

#include "../isa/isa.h"
#include "bf16.h"

namespace veneer {

#ifdef VENEER_ATOMIC_NUMBERS
constexpr bool kAtomicNumbers = true;
#else
constexpr bool kAtomicNumbers = false;
#endif

template <class Number>
inline void store_number(Number* at, Number value) {
    __atomic_store(at, &value, __ATOMIC_RELAXED);
}

template <class Number>
inline Number load_number(const Number* at) {
    if constexpr (!kAtomicNumbers) return *at;
    Number value;
    __atomic_load(at, &value, __ATOMIC_RELAXED);
    return value;
}

template <class Number>
inline void store_numbers(Number* at, const Number* from, int count) {
    for (int i = 0; i < count; ++i) store_number(at + i, from[i]);
}

template <class Number>
inline void load_numbers(Number* to, const Number* at, int count) {
    if constexpr (!kAtomicNumbers) {
        std::memcpy(to, at, size_t(count) * sizeof(Number));
        return;
    }
    for (int i = 0; i < count; ++i) to[i] = load_number(at + i);
}

// Store `bytes` bytes. Both `bytes` and the address must be multiples of eight.
inline void store_words(uint8_t* at, const uint8_t* from, size_t bytes) {
    if constexpr (!kAtomicNumbers) {
        std::memcpy(at, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t word;
        std::memcpy(&word, from + i, sizeof word);
        store_number(reinterpret_cast<uint64_t*>(at + i), word);
    }
}

inline void store_shared(float* at, Floats a) {
    if constexpr (!kAtomicNumbers) return store(at, a);
    alignas(64) float numbers[kLanes];
    store(numbers, a);
    store_numbers(at, numbers, kLanes);
}

inline void store_shared(float* at, Floats a, int count) {
    if constexpr (!kAtomicNumbers) return store(at, a, count);
    alignas(64) float numbers[kLanes];
    store(numbers, a);
    store_numbers(at, numbers, count);
}

// Round to bfloat16 and store.
inline void store_shared(bf16* at, Floats a) {
    if constexpr (!kAtomicNumbers) return store_bf16(at, a);
    alignas(64) bf16 numbers[kLanes];
    store_bf16(numbers, a);
    store_numbers(at, numbers, kLanes);
}

inline Floats load_shared(const float* at) {
    if constexpr (!kAtomicNumbers) return load(at);
    alignas(64) float numbers[kLanes];
    load_numbers(numbers, at, kLanes);
    return load(numbers);
}

inline Floats load_shared(const float* at, int count) {
    if constexpr (!kAtomicNumbers) return load(at, count);
    alignas(64) float numbers[kLanes];
    load_numbers(numbers, at, count);
    return load(numbers, count);
}

inline Floats load_shared(const bf16* at) {
    if constexpr (!kAtomicNumbers) return load(at);
    alignas(64) bf16 numbers[kLanes];
    load_numbers(numbers, at, kLanes);
    return load(numbers);
}

inline Pairs load_pairs_shared(const bf16* at) {
    if constexpr (!kAtomicNumbers) return load_pairs(at);
    alignas(64) bf16 numbers[2 * kLanes];
    load_numbers(numbers, at, 2 * kLanes);
    return load_pairs(numbers);
}

inline Pairs broadcast_pair_shared(const bf16* at) {
    if constexpr (!kAtomicNumbers) return broadcast_pair(at);
    bf16 numbers[2];
    load_numbers(numbers, at, 2);
    return broadcast_pair(numbers);
}

}  // namespace veneer
