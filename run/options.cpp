#include "run/options.h"

#include "comm/topology.h"
#include "run/roles.h"

namespace {
// The algorithm that parallel.allreduce names; `auto` follows fixed rules, never timing.
AllReduce choose_all_reduce(const Config& c, const RunDevice& device, int size) {
    if (c.parallel.method == ParallelMethod::diloco) return AllReduce::mpi;  // no gradient is summed over ranks
    const int runs = 1 << split_runs(c.train.global_batch_size / c.train.micro_batch_size).k;
    const AllReduce by_host = (size & (size - 1)) == 0 && runs % size == 0 ? AllReduce::ordered : AllReduce::mpi;
    if (has_servers(c)) return by_host;  // only says how a worker adds up its micro-batches
    switch (c.parallel.allreduce) {
        case UseAllReduce::mpi:
            return AllReduce::mpi;
        case UseAllReduce::ring:
            return AllReduce::ring;
        case UseAllReduce::ordered:
            return AllReduce::ordered;
        case UseAllReduce::nccl:
            if (device.has_own_gpu) return AllReduce::nccl;
            fail(Exit::usage,
                 "parallel.allreduce: nccl needs a GPU of its own for every rank; this run has {}; use auto",
                 device.name);
        case UseAllReduce::automatic:
            break;
    }
    return device.has_own_gpu ? AllReduce::nccl : by_host;
}

void check_reduce_dtype(const Config& c, AllReduce how) {
    if (c.parallel.reduce_dtype == Precision::fp32) return;
    if (how != AllReduce::ordered && how != AllReduce::ring)
        fail(Exit::usage,
             "parallel.reduce_dtype: bf16 needs parallel.allreduce: ordered or ring, this run has {}: mpi and nccl sum "
             "in the dtype that they send",
             all_reduce_name(how));
    if (c.parallel.zero > 0)
        fail(Exit::usage, "parallel.reduce_dtype: bf16 is not available with parallel.zero = {} in this build",
             c.parallel.zero);
}
}  // namespace

DType real_of(Precision precision) {
    switch (precision) {
        case Precision::fp32:
            return DType::f32;
        case Precision::bf16:
            return DType::bf16;
    }
    return DType::f32;
}

ModelConfig model_config(const Config& c) {
    return {.architecture = &find_architecture(c.model.architecture),
            .L = c.model.n_layer,
            .NH = c.model.n_head,
            .C = c.model.n_embd,
            .T = c.model.context_length,
            .V = c.model.vocab_size,
            .bias = c.model.bias,
            .dropout = float(c.model.dropout)};
}

ActivationShape forward_shape(const Config& c, int B) {
    return {.B = B, .T = c.model.context_length, .real = real_of(c.device.dtype), .recompute = c.train.recompute};
}

TrainerOptions training_options(const Context& x) {
    Config c = x.config;
    if (is_asynchronous(c)) {  // a step of one worker is its share of the batch
        batch_share(c.train.global_batch_size, c.train.micro_batch_size, 0, x.comm.size(), false);  // or an error
        c.train.global_batch_size /= x.comm.size();
    }
    const AllReduce how = choose_all_reduce(c, x.device, is_asynchronous(c) ? 1 : x.comm.size());
    check_reduce_dtype(c, how);
    return {.model = model_config(c),
            .train = c.train,
            .optimizer = c.optimizer,
            .parallel = c.parallel,
            .allreduce = how,
            .seed = c.run.seed,
            .real = real_of(c.device.dtype),
            .graph = c.device.graph,
            .link = x.link,
            .timeout_s = c.run.timeout_seconds};
}

Schedule schedule_of(const Config& c, int64_t total_steps) {
    return {.kind = c.schedule.name,
            .learning_rate = c.optimizer.learning_rate,
            .min_learning_rate = c.schedule.min_learning_rate,
            .warmup_steps = c.schedule.warmup_steps,
            .decay_steps = c.schedule.decay_steps,
            .total_steps = total_steps};
}
