// The optimizer: groups of parameters, each with its rule, and the moments that the rules keep between steps.
//
// Masters, gradient and each moment are flat buffers (trainer/flat_params.h).  An elementwise rule (AdamW, Adam, SGD,
// Lion) makes one call for all parameters of its group that lie side by side; a group of everything is one call over
// everything.  A rule that needs whole matrices, such as Muon's, would make a call for each parameter of its group: the
// shape stands in ParamInfo.
#pragma once
#include <vector>

#include "common/config.h"
#include "kernels/owners.h"
#include "model/state.h"
#include "trainer/flat_params.h"

struct ParamGroup {
    Config::Optimizer rule;  // learning_rate is not used: set_rate() has that of the step
    std::vector<FlatParam> params;
};

class Optimizer {
  public:
    // No parameter is in two groups.  `stat` is the dtype of gradients and moments.
    Optimizer(const Backend& k, std::vector<ParamGroup> groups, DType stat);
    Optimizer(const Optimizer&) = delete;
    Optimizer& operator=(const Optimizer&) = delete;

    // Plans the moments in an arena that aligns tensors to kDecayBlock elements, and the rest in `scalars`.
    void plan(Arena& moments, Arena& scalars);
    // After both arenas are placed, before the first update: writes the decay flags.
    void start(Stream s);

    // Before each update, on the host: its learning rate and Adam's bias corrections.
    void set_rate(double learning_rate);
    // Gives the update of all groups to the stream.  Of `flat` it reads param, copy and grad, all (n), and clip (1).
    void update(const OptimizerUpdate& flat, Stream s);

    // Moments of a parameter, the largest number of all groups.
    size_t n_moments() const;
    // Updates that were not skipped, which the bias corrections depend on.
    uint64_t updates() const { return updates_; }
    void set_updates(uint64_t n) { updates_ = n; }
    // Of each group "m.<parameter>" for every parameter, then "v.<parameter>", as far as its rule keeps them.
    std::vector<StateTensor> state() const;

  private:
    struct Stretch {  // parameters of a group that lie side by side
        Range range;
        size_t first_param;  // in the group
    };
    struct GroupState : ParamGroup {
        std::vector<Stretch> stretches;
        std::vector<Tensors> moments;  // (n_moments) of the group's parameters; stat
    };

    const Backend& k_;
    const DType stat_;
    std::vector<GroupState> groups_;
    size_t n_ = 0;  // elements of a flat buffer
    uint64_t updates_ = 0;
    Buf decay_;                   // (n/kDecayBlock) u8: see OptimizerUpdate
    Buf rates_;                   // (groups, 3) stat: see OptimizerUpdate
    const HostBuffer new_rates_;  // (groups, 3) stat, pinned: what update() uploads
};
