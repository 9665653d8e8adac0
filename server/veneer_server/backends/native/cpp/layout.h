// The memory layout of the structs that Python has too. Beside each such struct stands a table of
// its fields, for the caller to compare with its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace veneer {

// A field; with an empty name, the struct itself.
struct Field {
    const char* of;
    const char* name;
    int64_t offset, size;  // bytes
};

#define VENEER_STRUCT(type) {#type, "", 0, sizeof(type)}
#define VENEER_FIELD(type, name) {#type, #name, offsetof(type, name), sizeof(type::name)}

}  // namespace veneer
