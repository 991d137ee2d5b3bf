#include "model/architecture.h"

#include <algorithm>
#include <numeric>

#include "common/architecture_names.h"
#include "common/error.h"
#include "model/gpt2.h"

namespace {
// One line registers an architecture.
constexpr const Architecture* kArchitectures[] = {
    &gpt2,
};

size_t product(const std::vector<size_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), size_t(1), std::multiplies<>());
}
}  // namespace

std::vector<std::string> architecture_names() {
    std::vector<std::string> names;
    for (const Architecture* a : kArchitectures) names.emplace_back(a->name);
    return names;
}

const Architecture& find_architecture(const std::string& name) {
    for (const Architecture* a : kArchitectures)
        if (name == a->name) return *a;
    fail(Exit::usage, "model.architecture = {} is unknown; there are {}", name, fmt::join(architecture_names(), ", "));
}

size_t ParamInfo::count() const { return product(shape); }
std::vector<size_t> ParamInfo::shape_saved() const {
    std::vector<size_t> saved = shape;
    saved[0] = n_rows_saved;
    return saved;
}

size_t activation_index(const std::vector<ActivationInfo>& list, std::string_view name) {
    const auto at = std::ranges::find(list, name, &ActivationInfo::name);
    CHECK_THAT(at != list.end(), "no activation is called {}", name);
    return size_t(at - list.begin());
}

size_t count_params(const ModelConfig& c) {
    size_t n = 0;
    for (const ParamInfo& info : c.architecture->params(c)) n += info.count_saved();
    return n;
}

void init_params(const ModelConfig& c, const Backend& k, const Tensors& params, uint64_t seed, Stream s) {
    uint32_t tensor = 0;
    for (const ParamInfo& info : c.architecture->params(c)) {
        const Buf p = params[tensor];
        const size_t n = info.count_saved();
        init_tensor(k, info.init, p.slice(0, n), tensor++, seed, s);
        const Buf padding = p.slice(n, p.count - n);
        if (padding.count > 0) k.zero(padding.data, padding.n_bytes(), s);
    }
    k.synchronize(s);
}
