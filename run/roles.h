// The roles of a run's ranks: all train, or the last ones serve parameters (parallel.method: parameter_server).
#pragma once
#include <memory>

#include "comm/comm.h"
#include "common/config.h"
#include "trainer/server_link.h"

inline bool has_servers(const Config& c) { return c.parallel.method == ParallelMethod::parameter_server; }
// Ranks take the next share of the work when they are done with one, and do not step together.
inline bool is_asynchronous(const Config& c) { return has_servers(c) && c.parallel.staleness > 0; }

// Error(Exit::usage) where other keys contradict parallel.method.
inline void check_method(const Config& c) {
    const Config::Parallel& p = c.parallel;
    if (p.method != ParallelMethod::allreduce) {
        if (p.reduce_dtype != Precision::fp32)
            fail(Exit::usage, "parallel.reduce_dtype = {} needs parallel.method: allreduce", word_of(p.reduce_dtype));
        if (p.zero > 0) fail(Exit::usage, "parallel.zero = {} needs parallel.method: allreduce", p.zero);
        if (p.overlap) fail(Exit::usage, "parallel.overlap = true needs parallel.method: allreduce");
    }
    if (!has_servers(c)) {
        if (p.servers != 1)
            fail(Exit::usage, "parallel.servers = {} needs parallel.method: parameter_server", p.servers);
        if (p.staleness != 0)
            fail(Exit::usage, "parallel.staleness = {} needs parallel.method: parameter_server", p.staleness);
        return;
    }
    if (p.allreduce != UseAllReduce::automatic && p.allreduce != UseAllReduce::ordered)
        fail(Exit::usage,
             "parallel.allreduce = {} has no meaning with parameter_server, whose sums are ordered; use auto",
             word_of(p.allreduce));
}

class Roles {
  public:
    // All ranks of `world` call it.  `training`: false for commands in which every rank has the same role.
    Roles(Comm& world, const Config& config, bool training) : world_(world) {
        if (!training) return;
        check_method(config);
        if (!has_servers(config)) return;
        serves_ = world.rank() >= count_workers(world.size(), config.parallel.servers);
        owned_group_ = world.split(serves_, world.rank());
        link_ = world.split(0, world.rank());
        if (is_asynchronous(config) && !serves_) alone_ = make_self_comm();
    }

    bool serves() const { return serves_; }
    // The ranks of this rank's role.
    Comm& group() const { return owned_group_ ? *owned_group_ : world_; }
    // Those whose steps are one: the group, or this rank alone.
    Comm& together() const { return alone_ ? *alone_ : group(); }
    // Workers, then servers; null where nobody serves.
    Comm* link() const { return link_.get(); }

  private:
    Comm& world_;
    bool serves_ = false;
    std::unique_ptr<Comm> owned_group_, link_, alone_;
};
