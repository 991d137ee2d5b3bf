#include "run/records.h"

#include <fmt/ranges.h>

#include <cmath>

#include "common/clock.h"
#include "common/hash.h"
#include "run/options.h"
#include "run/roles.h"

namespace {
using nlohmann::ordered_json;

ordered_json or_null(std::optional<double> number) { return number ? ordered_json(*number) : ordered_json(nullptr); }

ordered_json peak_record(const Peak& p) {
    return {{"measured_flops", or_null(p.measured_flops)},
            {"vendor_flops", or_null(p.vendor_flops)},
            {"used", p.flops() ? ordered_json(p.used()) : ordered_json(nullptr)},
            {"devices", p.devices},
            {"formula", "PaLM: 6 N + 12 L C T"}};
}

ordered_json gpu_record(const GpuSample& s) {
    ordered_json record;
    const auto put = [&](const char* name, const auto& value) {
        if (value) record[name] = *value;
    };
    put("power_w", s.power_w);
    put("sm_mhz", s.sm_mhz);
    put("memory_mhz", s.memory_mhz);
    put("temperature_c", s.temperature_c);
    put("memory_bytes", s.memory_bytes);
    put("utilization", s.utilization);
    return record;
}
}  // namespace

ordered_json run_record(const Context& x, const Trainer& trainer, const RunState& state, const Peak& peak,
                        const LibraryBytes& libraries, int64_t total_steps) {
    const ModelConfig& c = trainer.config();
    ordered_json record = {{"type", "run"},
                           {"step", state.step},
                           {"time", utc_now()},
                           {"commit", x.commit},
                           {"config_hash", hash_text(hash64(state.config))},
                           {"device", x.device.name},
                           {"dtype", word_of(x.config.device.dtype)}};
    if (!x.device.attention.empty()) record["attention"] = x.device.attention;
    if (!state.choices.empty()) record["gemm_choices"] = hash_text(hash64(state.choices));
    if (!x.device.nccl_algorithms.empty()) record["nccl_algorithms"] = x.device.nccl_algorithms;
    if (has_servers(x.config))
        record.update({{"method", word_of(x.config.parallel.method)},
                       {"servers", x.config.parallel.servers},
                       {"staleness", x.config.parallel.staleness}});
    record.update({{"world", x.comm.size()},
                   {"threads", x.threads},
                   {"allreduce", all_reduce_name(training_options(x).allreduce)},
                   {"graph", trainer.uses_graphs()},
                   {"memory",
                    {{"planned", trainer.memory().n_bytes()},
                     {"workspace", x.device.workspace_bytes},
                     {"libraries", libraries.all},
                     {"nccl", libraries.nccl}}},
                   {"parameters", count_params(c)},
                   {"flops_per_token", c.architecture->flops_per_token(c)},
                   {"peak", peak_record(peak)},
                   {"total_steps", total_steps}});
    return record;
}

ordered_json step_record(const RunState& after, const StepResult& r, double learning_rate, const StepSpeed& speed,
                         const std::optional<GpuSample>& gpu) {
    ordered_json record = {{"type", "step"},
                           {"step", after.step},
                           {"tokens", after.tokens},
                           {"loss", r.loss},
                           {"grad_norm", r.grad_norm},
                           {"learning_rate", learning_rate},
                           {"step_ms", speed.ms},
                           {"tokens_per_s", speed.tokens_per_s},
                           {"mfu", or_null(speed.mfu)},
                           {"phase_ms",
                            {{"data", r.ms.data},
                             {"forward", r.ms.forward},
                             {"backward", r.ms.backward},
                             {"reduce", r.ms.reduce},
                             {"optimizer", r.ms.optimizer},
                             {"gather", r.ms.gather},
                             {"exposed", r.ms.reduce + r.ms.gather + r.ms.waited}}},
                           {"wire_bytes", {{"sent", speed.traffic.sent}, {"received", speed.traffic.received}}}};
    if (gpu) record["gpu"] = gpu_record(*gpu);
    return record;
}

ordered_json eval_record(int64_t step, const EvalResult& r) {
    return {{"type", "eval"},         {"step", step},      {"val_loss", r.loss}, {"perplexity", std::exp(r.loss)},
            {"accuracy", r.accuracy}, {"tokens", r.tokens}};
}

ordered_json servers_event(int64_t step, const std::vector<ServerReport>& servers, const std::vector<int>& lost) {
    ordered_json list = ordered_json::array();
    for (const ServerReport& s : servers)
        list.push_back({{"rank", s.rank},
                        {"first", s.first},
                        {"elements", s.count},
                        {"applied", s.applied},
                        {"repeated", s.n_repeated},
                        {"skipped", s.n_skipped},
                        {"largest_staleness", s.largest_staleness}});
    return {{"type", "event"}, {"step", step}, {"event", "parameter_server"}, {"lost", lost}, {"servers", list}};
}

std::string servers_summary(const std::vector<ServerReport>& servers, const std::vector<int>& lost) {
    return fmt::format("{} server(s) applied each gradient once, {} of the workers; staleness up to {}{}",
                       servers.size(), fmt::join(servers[0].applied, ", "), servers[0].largest_staleness,
                       lost.empty() ? "" : fmt::format("; rank(s) {} were lost", fmt::join(lost, ", ")));
}
