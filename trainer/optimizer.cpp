#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace {
// The op of an elementwise rule, without its tensors.
OptimizerUpdate elementwise(const Config::Optimizer& rule) {
    return {.kind = rule.name,
            .beta1 = float(rule.beta1),
            .beta2 = float(rule.beta2),
            .eps = float(rule.eps),
            .weight_decay = float(rule.weight_decay),
            .momentum = float(rule.momentum)};
}
}  // namespace

Optimizer::Optimizer(const Backend& k, std::vector<ParamGroup> groups, DType stat)
    : k_(k), stat_(stat), new_rates_(k, groups.size() * 3 * sizeof(double)) {
    for (ParamGroup& group : groups) {
        GroupState& g = groups_.emplace_back(GroupState{std::move(group), {}, {}});
        for (size_t i = 0; i < g.params.size(); i++) {
            const Range range = g.params[i].range;
            if (g.stretches.empty() || g.stretches.back().range.end() != range.first)
                g.stretches.push_back({{range.first, 0}, i});
            g.stretches.back().range.count += range.count;
            n_ = std::max(n_, range.end());
        }
        g.moments.assign(::n_moments(g.rule.name), Tensors(g.params.size()));
    }
}

void Optimizer::plan(Arena& moments, Arena& scalars) {
    for (GroupState& g : groups_)
        for (size_t m = 0; m < g.moments.size(); m++)
            for (size_t i = 0; i < g.params.size(); i++) {
                const FlatParam& p = g.params[i];
                moments.add(g.moments[m][i], fmt::format("{}.{}", kMoments[m], p.info.name), p.range.count, stat_);
            }
    scalars.add(decay_, "decay", n_ / kDecayBlock, DType::u8);
    scalars.add(rates_, "rate", groups_.size() * 3, stat_);
}

void Optimizer::start(Stream s) {
    std::vector<uint8_t> decay(decay_.count);
    for (const GroupState& g : groups_)
        for (const auto& [info, range] : g.params)
            std::fill_n(decay.begin() + ptrdiff_t(range.first / kDecayBlock), range.count / kDecayBlock, info.decay);
    if (decay.empty()) return;  // a shard can be without parameters
    k_.upload(decay_.data, decay.data(), decay.size(), s);
    k_.synchronize(s);
}

void Optimizer::set_rate(double learning_rate) {
    const double t = double(updates_ + 1);
    for (size_t g = 0; g < groups_.size(); g++) {
        const OptimizerUpdate rule = elementwise(groups_[g].rule);
        const double rate[3] = {learning_rate, 1 - std::pow(double(rule.beta1), t),
                                1 - std::pow(double(rule.beta2), t)};
        for (size_t i = 0; i < 3; i++)
            if (stat_ == DType::f64)
                new_rates_.as<double>()[3 * g + i] = rate[i];
            else
                new_rates_.as<float>()[3 * g + i] = float(rate[i]);
    }
}

void Optimizer::update(const OptimizerUpdate& flat, Stream s) {
    k_.upload(rates_.data, new_rates_.as<void>(), rates_.n_bytes(), s);
    for (size_t i = 0; i < groups_.size(); i++) {
        const GroupState& g = groups_[i];
        for (const auto& [range, first_param] : g.stretches) {
            const auto part = [&](const Buf& all) { return all.slice(range.first, range.count); };
            const auto moment = [&](size_t m) { return Buf(g.moments[m][first_param].data, range.count, stat_); };
            OptimizerUpdate op = elementwise(g.rule);
            op.param = part(flat.param);
            if (flat.copy) op.copy = part(flat.copy);
            op.m = moment(0);
            if (g.moments.size() > 1) op.v = moment(1);
            op.grad = part(flat.grad);
            op.decay = decay_.slice(range.first / kDecayBlock, range.count / kDecayBlock);
            op.rate = rates_.slice(3 * i, 3);
            op.clip = flat.clip;
            k_.optimizer_update(op, s);
        }
    }
}

size_t Optimizer::n_moments() const {
    size_t n = 0;
    for (const GroupState& g : groups_) n = std::max(n, g.moments.size());
    return n;
}

std::vector<StateTensor> Optimizer::state() const {
    std::vector<StateTensor> out;
    for (const GroupState& g : groups_)
        for (size_t m = 0; m < g.moments.size(); m++)
            for (size_t i = 0; i < g.params.size(); i++)
                out.push_back(state_tensor(fmt::format("{}.", kMoments[m]), g.params[i].info, g.moments[m][i]));
    return out;
}
