#include "comm/comm.h"

#include <vector>

std::optional<Comm::Message> Comm::probe(int tag) {
    fail(Exit::internal, "probe of tag {} between the {} rank(s) of {}", tag, size(), name());
}

std::unique_ptr<Comm::Transfer> Comm::isend(std::vector<std::byte> message, int to, int tag) {
    fail(Exit::internal, "isend of {} bytes to rank {}, tag {}, between the {} rank(s) of {}", message.size(), to, tag,
         size(), name());
}

std::unique_ptr<Comm::Transfer> Comm::irecv(size_t n_bytes, int from, int tag) {
    fail(Exit::internal, "irecv of {} bytes from rank {}, tag {}, between the {} rank(s) of {}", n_bytes, from, tag,
         size(), name());
}

void require_same(Comm& comm, uint64_t value, Exit code, const std::string& what) {
    std::vector<uint64_t> all(size_t(comm.size()));
    comm.all_gather(&value, all.data(), sizeof value);
    std::string others;
    for (int r = 0; r < comm.size(); r++)
        if (all[size_t(r)] != all[0]) others += (others.empty() ? "" : ", ") + std::to_string(r);
    if (!others.empty()) fail(code, "rank(s) {} have {}", others, what);
}
