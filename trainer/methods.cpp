// The table of methods: from options.parallel to a GradientSync.
#include "trainer/local_sgd.h"
#include "trainer/replicated_update.h"
#include "trainer/served_update.h"
#include "trainer/sharded_update.h"

std::unique_ptr<GradientSync> make_gradient_sync(const Group& group, const TrainerOptions& options,
                                                 TrainerMemory& memory) {
    switch (options.parallel.method) {
        case ParallelMethod::allreduce:
            if (options.parallel.zero > 0) return std::make_unique<ShardedUpdate>(group, options, memory);
            return make_replicated_update(group, options, memory);
        case ParallelMethod::parameter_server:
            return make_served_update(group, options, memory);
        case ParallelMethod::diloco:
            return make_local_sgd(group, options, memory);
    }
    fail(Exit::internal, "no GradientSync for parallel.method: {}", word_of(options.parallel.method));
}
