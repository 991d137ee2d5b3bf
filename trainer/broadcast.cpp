#include "trainer/broadcast.h"

#include <algorithm>
#include <vector>

#include "common/hash.h"

void broadcast_from_root(const Backend& k, Comm& comm, Buf data, Stream s) {
    constexpr size_t kPiece = size_t(16) << 20;  // bytes
    std::vector<char> host;
    for (size_t i = 0; comm.size() > 1 && i < data.n_bytes(); i += kPiece) {
        host.resize(std::min(kPiece, data.n_bytes() - i));
        char* device = static_cast<char*>(data.data) + i;
        k.download(host.data(), device, host.size(), s);
        k.synchronize(s);
        comm.broadcast(host.data(), host.size(), 0);
        k.upload(device, host.data(), host.size(), s);
        k.synchronize(s);
    }
}

void broadcast_parameters(const Backend& k, Comm& comm, ModelMemory& model, Stream s) {
    broadcast_from_root(k, comm, model.flat_masters(), s);
    model.round_masters(k, s);
    const uint64_t mine = model.weights_hash(k, s);
    std::vector<uint64_t> all(size_t(comm.size()));
    comm.all_gather(&mine, all.data(), sizeof mine);
    for (int r = 1; r < comm.size(); r++)
        CHECK_THAT(all[size_t(r)] == all[0],
                   "rank {} holds other parameters than rank 0 after the broadcast: {} and {}", r,
                   hash_text(all[size_t(r)]), hash_text(all[0]));
}
