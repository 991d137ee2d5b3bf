// device.attention: the kernels that a run gets, by its config and by the ability of its devices.
// test/system/test_emulated.py has whole runs.
#include <doctest/doctest.h>

#include <cstdlib>

#include "run/attention_kernels.h"
#include "test/config_text.h"

namespace {
const std::string kRefused = "GPU 0 has compute capability 8.0";

// kSmall on 2 heads of 64 elements in bf16, which all kernels compute.
Config run(const std::vector<std::string>& overrides) {
    std::vector<std::string> all = {"device.dtype=bf16", "model.n_embd=128", "model.n_head=2"};
    all.insert(all.end(), overrides.begin(), overrides.end());
    return parse_config(kSmall, "f.yaml", all);
}
std::string attention(const std::vector<std::string>& overrides, const std::string& refused = "") {
    return attention_name(select_attention(run(overrides), refused, true).kernel);
}
std::string error(const std::vector<std::string>& overrides, const std::string& refused = "") {
    return refusal_of([&] { select_attention(run(overrides), refused, true); });
}
}  // namespace

TEST_CASE("attention kernels: auto takes sm90 where device, dtype and head size fit it, else portable") {
    CHECK(attention({}) == "sm90");
    CHECK(attention({"model.n_head=1"}) == "sm90");  // heads of 128
    CHECK(attention({}, kRefused) == "portable");
    CHECK(attention({"device.dtype=fp32"}) == "portable");
    for (const char* heads : {"model.n_head=4", "model.n_head=128"}) CHECK(attention({heads}) == "portable");
    CHECK(attention({"model.n_embd=512"}) == "portable");  // heads of 256
    CHECK(attention({"device.dtype=fp32", "model.n_head=4"}, kRefused) == "portable");
}

TEST_CASE("attention kernels: kernels asked for by name are those or an error") {
    for (const char* name : {"sm90", "cudnn"}) {
        const std::string asked = std::string("device.attention=") + name,
                          cannot = std::string("device.attention: ") + name + " cannot be used: ";
        for (const char* heads : {"model.n_head=1", "model.n_head=2"}) CHECK(attention({asked, heads}) == name);
        CHECK(error({asked}, kRefused) == cannot + kRefused + "; use device.attention: auto");
        CHECK(error({asked, "device.dtype=fp32"}) ==
              cannot + "device.dtype = fp32, expected bf16; set device.dtype: bf16, or use device.attention: auto");
        CHECK(error({asked, "model.n_head=4"}) == cannot +
                                                      "model.n_embd / model.n_head = 128 / 4 = 32, expected 64 or 128; "
                                                      "change these, or use device.attention: auto");
        CHECK(error({asked, "device.dtype=fp32"}, kRefused).find(kRefused) != std::string::npos);  // no dtype helps
    }
    for (const char* dtype : {"device.dtype=fp32", "device.dtype=bf16"})
        CHECK(attention({"device.attention=portable", "model.n_head=4", dtype}) == "portable");
}

TEST_CASE("attention kernels: the kernels that the devices are asked about") {
    for (const auto& [value, preferred] :
         {std::pair{"auto", AttentionKernel::sm90}, std::pair{"portable", AttentionKernel::portable},
          std::pair{"sm90", AttentionKernel::sm90}, std::pair{"cudnn", AttentionKernel::cudnn}})
        CHECK(preferred_attention(run({std::string("device.attention=") + value})) == preferred);
    setenv("KILN_CUDNN_FASTEST", "1", 1);
    CHECK(attention({"device.attention=cudnn"}) == "cudnn_fastest");
    CHECK(attention({}) == "sm90");
    setenv("KILN_CUDNN_FASTEST", "0", 1);
    CHECK(attention({"device.attention=cudnn"}) == "cudnn");
    unsetenv("KILN_CUDNN_FASTEST");
}

TEST_CASE("attention kernels: dropout is left to the portable kernels in training, and that is said") {
    const auto note = [](const std::vector<std::string>& overrides, bool training, const std::string& refused = "") {
        return select_attention(run(overrides), refused, training).note;
    };
    const std::string dropout = "model.dropout=0.1";
    CHECK(attention({dropout}) == "sm90");
    CHECK(note({dropout}, true) ==
          "attention with dropout uses the portable kernels: with model.dropout = 0.1 training does, and evaluation, "
          "without dropout, uses sm90");
    CHECK(note({dropout, "device.attention=cudnn"}, true).ends_with("uses cudnn"));
    CHECK(note({}, true) == "");
    CHECK(note({dropout}, false) == "");
    CHECK(note({dropout}, true, kRefused) == "");  // all of it is portable
    CHECK(note({dropout, "device.attention=portable"}, true) == "");
}
