#include "common/hash.h"

#include <fmt/format.h>
#include <xxhash.h>

#include "common/error.h"

uint64_t hash64(const void* data, size_t n_bytes) { return XXH3_64bits(data, n_bytes); }
std::string hash_text(uint64_t hash) { return fmt::format("{:016x}", hash); }

Hasher::Hasher() : state_(XXH3_createState()) {
    if (!state_) fail(Exit::memory, "no memory for a hash state");
    XXH3_64bits_reset(static_cast<XXH3_state_t*>(state_));
}
Hasher::~Hasher() { XXH3_freeState(static_cast<XXH3_state_t*>(state_)); }
void Hasher::update(const void* data, size_t n_bytes) {
    XXH3_64bits_update(static_cast<XXH3_state_t*>(state_), data, n_bytes);
}
uint64_t Hasher::digest() const { return XXH3_64bits_digest(static_cast<const XXH3_state_t*>(state_)); }
