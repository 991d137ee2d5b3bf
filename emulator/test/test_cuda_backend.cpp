// Behaviour of the CUDA backend that only an emulated device can show: refused devices, the text of errors, out of
// memory, uploads that do not wait.
#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/owners.h"
#include "emulator/test/on_machine.h"
#include "test/op_test.h"

namespace {
using namespace emulated;
using emulator::StreamMode;
}  // namespace

TEST_CASE("cuda backend: devices below 8.0 are not used, and opening one says so") {
    OnMachine m(StreamMode::late);
    std::string why;
    CHECK(cuda_device_count(&why) == 16);
    const CudaDevice d = open_cuda_device(3);
    CHECK(d.ordinal == 3);
    CHECK(d.capability == 90);
    CHECK(d.bus_id == "0000:04:00.0");
    CHECK(d.memory_bytes == emulator::machine().memory_bytes);
    CHECK(cuda::n_multiprocessors() == emulator::machine().n_multiprocessors);
    open_cuda_device(0);
    const auto refused = [](int ordinal, const char* text) {
        try {
            open_cuda_device(ordinal);
            FAIL("opened");
        } catch (const Error& e) {
            CHECK(e.code == Exit::usage);
            CHECK(std::string(e.what()).find(text) != std::string::npos);
        }
    };
    refused(16, "GPU 16 cannot be used: this machine has 16");
    emulator::machine().capability = 75;
    CHECK(cuda_device_count(&why) == 0);
    CHECK(why.find("has compute capability 7.5, kiln needs 8.0 or newer") != std::string::npos);
    refused(0, "GPU 0 (emulated GPU) has compute capability 7.5, kiln needs 8.0 or newer");
    emulator::machine().n_devices = 0;
    CHECK(cuda_device_count(&why) == 0);
    CHECK(why == "no CUDA-capable device is detected");
    refused(0, "GPU 0 cannot be used: no CUDA-capable device is detected");
}

TEST_CASE("cuda backend: an error names the call, what the kernel did and the kernels launched last") {
    OnMachine late(StreamMode::late);
    MayLeak abandoned;
    const Backend& k = cuda_backend();
    DeviceInts p(32);
    k.zero(p, 128, nullptr);
    cuda::launch(twice_kernel, 1, 32, 0, nullptr, static_cast<int*>(p));
    // Launchers choose an instance through such a variable: the error must name the kernel, not the variable.
    const auto kernel = broken_kernel<int>;
    cuda::launch(kernel, 1, 32, 0, nullptr, static_cast<int*>(p));
    cuda::launch(add_kernel, 1, 32, 0, nullptr, static_cast<int*>(p), 1);
    try {
        k.synchronize(nullptr);
        FAIL("the kernel's failure is lost");
    } catch (const Error& e) {
        CHECK(e.code == Exit::internal);
        for (const char* part :
             {"CUDA: unspecified launch failure: kernel broken_kernel<int>", " in cudaStreamSynchronize(s)",
              "; launched last: ", "twice_kernel, broken_kernel<int>, add_kernel"})
            CHECK_MESSAGE(std::string(e.what()).find(part) != std::string::npos, e.what());
    }
    CHECK_THROWS_AS(k.zero(p, 128, nullptr), Error);  // the error stays
}

TEST_CASE("cuda backend: with KILN_CUDA_SYNC=1 the launch that failed throws") {
    OnMachine late(StreamMode::late);
    MayLeak abandoned;
    DeviceInts p(32);
    setenv("KILN_CUDA_SYNC", "1", 1);
    std::string text;
    try {
        const auto kernel = broken_kernel<int>;
        cuda::launch(kernel, 1, 32, 0, nullptr, static_cast<int*>(p));
    } catch (const Error& e) { text = e.what(); }
    unsetenv("KILN_CUDA_SYNC");
    CHECK_MESSAGE(text.find(" in broken_kernel<int>") != std::string::npos, text);
    CHECK(text.find("launched last") == std::string::npos);
}

TEST_CASE("cuda backend: out of memory says how much there is, and is over when memory is back") {
    OnMachine late(StreamMode::late);
    const Backend& k = cuda_backend();
    k.take_workspace(nullptr);
    size_t n_free = 0, n_total = 0;
    REQUIRE(cudaMemGetInfo(&n_free, &n_total) == cudaSuccess);
    emulator::machine().memory_bytes = n_total - n_free + (3 << 20);
    void* const half = k.memory.alloc(2 << 20);
    try {
        k.memory.alloc(5 << 20);
        FAIL("allocated more than there is");
    } catch (const Error& e) {
        CHECK(e.code == Exit::memory);
        const std::string text = e.what();
        for (const char* part : {"out of memory: the device has 1.00 MiB of ", " free, 5242880 bytes (5.00 MiB) asked"})
            CHECK_MESSAGE(text.find(part) != std::string::npos, text);
    }
    DeviceInts p(1);
    cuda::launch(add_kernel, 1, 1, 0, nullptr, static_cast<int*>(p), 1);  // the error has gone
    k.memory.free(half);
    k.memory.free(k.memory.alloc(2 << 20));
    k.synchronize(nullptr);
}

TEST_CASE("cuda backend: an upload from pinned memory does not wait: the buffer must stay as it is") {
    OnMachine late(StreamMode::late);
    const Backend& k = cuda_backend();
    StreamOwner s(k);
    MarkOwner sent(k);
    HostBuffer host(k, sizeof(int));
    DeviceInts p(1);
    *host.as<int>() = 1;
    k.upload(p, host.as<void>(), sizeof(int), s.get());
    *host.as<int>() = 2;  // too early: the upload has not read it
    k.set_mark(sent.get(), s.get());
    k.wait_mark(sent.get());
    CHECK(value_of(p) == 2);
    *host.as<int>() = 3;  // safe: the mark is past
    CHECK(value_of(p) == 2);
}

TEST_CASE("cuda backend: streams that compute at the same time do not share scratch memory") {
    // LayerNorm's gradient passes sums of chunks from one kernel to the next through the workspace, and a product of a
    // long K adds its parts there.  Both streams are past their first kernels when either runs its second one.
    // Broken on purpose and seen to fail: one workspace for all streams.
    OnMachine late(StreamMode::late);
    const Target t = {&cuda_backend(), DType::f32, "cuda f32"};
    constexpr int BT = 300, C = 8, K = 96;
    struct Work {
        const Target& t;
        StreamOwner stream;
        Dev dx, dw, dy, x, w, mean, rstd, a, b, d;
        Work(const Target& target, unsigned seed)
            : t(target),
              stream(*target.k),
              dx(t, DType::f32, poison(size_t(BT) * C)),
              dw(t, DType::f32, poison(C)),
              dy(t, DType::f32, normal(size_t(BT) * C, seed)),
              x(t, DType::f32, normal(size_t(BT) * C, seed + 1)),
              w(t, DType::f32, normal(C, seed + 2)),
              mean(t, DType::f32, normal(BT, seed + 3)),
              rstd(t, DType::f32, normal(BT, seed + 4)),
              a(t, DType::f32, normal(size_t(C) * K, seed + 5)),
              b(t, DType::f32, normal(size_t(K) * C, seed + 6)),
              d(t, DType::f32, poison(size_t(C) * C)) {}
        void give() const {
            t.k->layernorm_backward({.dx = dx,
                                     .dw = dw,
                                     .dy = dy,
                                     .x = x,
                                     .w = w,
                                     .mean = mean,
                                     .rstd = rstd,
                                     .BT = BT,
                                     .C = C,
                                     .overwrite_dx = true},
                                    stream.get());
            cuda::gemm({.d = d, .a = a, .b = b, .M = C, .N = C, .K = K}, stream.get());
        }
        void step() const { cudaStreamQuery(stream.get()); }  // runs one operation
        std::vector<Doubles> results() const {
            t.k->synchronize(stream.get());
            return {dx.host(), dw.host(), d.host()};
        }
    };
    const Work one(t, 1), two(t, 100);
    one.give();
    const std::vector<Doubles> alone_one = one.results();
    two.give();
    const std::vector<Doubles> alone_two = two.results();
    one.give();
    two.give();
    for (int i = 0; i < 3; i++) one.step(), two.step();
    CHECK(one.results() == alone_one);
    CHECK(two.results() == alone_two);
    CHECK(cuda::gemm_workspace(one.stream.get()).data != cuda::gemm_workspace(two.stream.get()).data);
}

TEST_CASE("cuda backend: a stream that computes has scratch memory until it is closed, one that copies has none") {
    OnMachine late(StreamMode::late);
    const Backend& k = cuda_backend();
    const auto taken = [&, before = k.memory_state().n_free] { return before - k.memory_state().n_free; };
    {
        DeviceInts x(2), y(2);
        const size_t operands = taken();
        StreamOwner copies(k), computes(k);
        k.zero(x, 2 * sizeof(int), copies.get());
        k.copy(y, x, 2 * sizeof(int), copies.get());
        k.synchronize(copies.get());
        CHECK(taken() == operands);
        k.hash({.y = Buf(reinterpret_cast<uint32_t*>(static_cast<int*>(y)), 2), .x = Buf(static_cast<int*>(x), 2)},
               computes.get());
        CHECK(taken() == operands + cuda::kWorkspaceBytes + cuda::gemm_workspace_bytes());
        k.take_workspace(computes.get());
        CHECK(taken() == operands + cuda::kWorkspaceBytes + cuda::gemm_workspace_bytes());
    }
    CHECK(taken() == 0);
}
