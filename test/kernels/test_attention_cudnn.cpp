// cuDNN's attention against a naive softmax in double.  test_native runs these tests on a GPU with cuDNN; elsewhere
// the tests print why cuDNN cannot run, and only the refusal is tested.
#include <array>

#include "test/attention_reference.h"

using namespace attention_test;

namespace {
// Both head sizes; whole and broken tiles of 64 and 128.
const Case cases[] = {
    {2, 128, 2, 64, 0}, {1, 33, 2, 64, 0}, {1, 300, 3, 64, 0}, {2, 256, 2, 128, 0}, {1, 193, 1, 128, 0}};
constexpr std::array kKernels = {AttentionKernel::cudnn, AttentionKernel::cudnn_fastest};

Target target(AttentionKernel kernel, DType real) {
    return {&cuda_backend(kernel), real, kernel == AttentionKernel::cudnn ? "cudnn" : "cudnn_fastest"};
}

// Says why and returns true where these kernels cannot run.
bool refused(AttentionKernel kernel) {
    const std::string why = cuda_attention_refusal(kernel);
    if (!why.empty()) MESSAGE("not run: ", why);
    return !why.empty();
}
}  // namespace

TEST_CASE("attention by cuDNN: forward, log-sum-exp and backward against a naive softmax in double") {
    for (AttentionKernel kernel : kKernels) {
        if (refused(kernel)) continue;
        for (const Case& c : cases) {
            CAPTURE(int(kernel));
            CAPTURE(c.T);
            CAPTURE(c.HS);
            check_against_naive(target(kernel, DType::bf16), c, 2);  // where a library rounds is its own affair
        }
    }
}

TEST_CASE("attention by cuDNN, the deterministic one: the same bits again") {
    if (refused(AttentionKernel::cudnn)) return;
    const Target t = target(AttentionKernel::cudnn, DType::bf16);
    for (const Case& c : {Case{4, 512, 4, 64, 0}, Case{2, 300, 4, 128, 0}}) {
        CAPTURE(c.HS);
        const Doubles qkv = normal(3 * size_of(c), 1), dy = normal(size_of(c), 2);
        const Forward f = forward(t, c, qkv);
        const Doubles dqkv = backward(t, c, qkv, f, dy);
        for (int i = 0; i < 5; i++) {
            const Forward again = forward(t, c, qkv);
            CHECK((same_bits(f.y, again.y) && same_bits(f.lse, again.lse)));
            CHECK(same_bits(dqkv, backward(t, c, qkv, f, dy)));
        }
    }
}

TEST_CASE("attention by cuDNN: what cuDNN is not asked for has the bits of the portable kernels") {
    for (AttentionKernel kernel : kKernels) {
        if (refused(kernel)) continue;
        for (const auto& [real, c] :
             {std::pair(DType::bf16, Case{1, 70, 2, 64, 0.2f}), std::pair(DType::f32, Case{1, 70, 2, 64, 0}),
              std::pair(DType::bf16, Case{1, 70, 2, 32, 0}), std::pair(DType::bf16, Case{2, 1, 2, 64, 0})}) {
            CAPTURE(c.T);
            CAPTURE(c.HS);
            CAPTURE(c.p);
            check_same_bits(target(kernel, real), {&cuda_backend(), real, "portable"}, c);
        }
    }
}

TEST_CASE("attention by cuDNN rejects a short buffer") {
    for (AttentionKernel kernel : kKernels)
        if (!refused(kernel)) check_short_buffers(target(kernel, DType::bf16), 64);
}

TEST_CASE("attention by cuDNN: where it cannot run, asking for its table says why") {
    for (AttentionKernel kernel : kKernels) {
        const std::string why = cuda_attention_refusal(kernel);
        if (emulated()) CHECK(why == "the emulator has no cuDNN: take the portable kernels, or a GPU");
        if (why.empty())
            CHECK((cuda_backend(kernel).attention_forward != cuda_backend().attention_forward));
        else
            CHECK_THROWS_WITH_AS(cuda_backend(kernel), why.c_str(), Error);
    }
    CHECK(cuda_attention_refusal(AttentionKernel::portable).empty());
}
