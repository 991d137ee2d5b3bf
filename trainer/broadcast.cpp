#include "trainer/broadcast.h"

#include <algorithm>
#include <vector>

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
