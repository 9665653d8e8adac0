// Tables of the fields of the structs that Python declares too. Each such struct has a table beside
// it, which the caller compares with its own declaration.
#pragma once

#include <cstddef>
#include <cstdint>

namespace veneer {

// A field of a struct or, with an empty name, the struct itself.
struct Field {
    const char* of;
    const char* name;
    int64_t offset, size;  // bytes
};

#define VENEER_STRUCT(type) {#type, "", 0, sizeof(type)}
#define VENEER_FIELD(type, name) {#type, #name, offsetof(type, name), sizeof(type::name)}

}  // namespace veneer
