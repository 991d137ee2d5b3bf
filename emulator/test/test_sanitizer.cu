// Memory errors that ASan and UBSan must stop on, each in a process of its own.  In the sanitizer build only.
#ifdef __SANITIZE_ADDRESS__
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "emulator/test/emulated.h"

namespace {
using namespace emulated;

__global__ void past_shared_kernel(float* out, int n) {
    SIMT_SHARED(float, a, [32]);
    SIMT_SHARED(float, b, [32]);
    a[threadIdx.x] = 1.0f;
    b[threadIdx.x] = 2.0f;
    __syncthreads();
    float* p = a;
    out[threadIdx.x] = p[int(threadIdx.x) + n];
}
__global__ void past_global_kernel(float* out, int n) { out[int(threadIdx.x) + n] = 1.0f; }
__global__ void past_local_kernel(float* out, int n) {
    float local[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    float* p = local;
    asm volatile("" : "+r"(p));
    out[threadIdx.x] = p[int(threadIdx.x) % 4 + n];
}
__global__ void array_bound_kernel(float* out, int n) {  // past a row, but inside the whole array
    SIMT_SHARED(float, a, [4][8]);
    a[threadIdx.x % 4][0] = 0.0f;
    __syncthreads();
    out[0] = a[threadIdx.x & 3][n];
}

// The text that the child writes to stderr; empty when the child ends well.
std::string complaint(void (*kernel)(float*, int), int n) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    std::fflush(nullptr);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        dup2(ends[1], 2);
        const WithConfig config;
        Array<float> out(64);
        run(kernel, 1, 32, 0, out.data(), n);
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(got));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : text;
}
bool says(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }
}  // namespace

TEST_CASE("sanitizers: out of bounds by one element") {
    CHECK(says(complaint(past_shared_kernel, 1), "AddressSanitizer: use-after-poison"));
    CHECK(says(complaint(past_global_kernel, 33), "AddressSanitizer: use-after-poison"));
    CHECK(says(complaint(past_local_kernel, 1), "AddressSanitizer: stack-buffer-overflow"));
    CHECK(says(complaint(array_bound_kernel, 8), "runtime error: index 8 out of bounds"));
}
TEST_CASE("sanitizers: nothing is wrong at the bounds") {
    CHECK(complaint(past_shared_kernel, 0) == "");
    CHECK(complaint(past_global_kernel, 32) == "");
    CHECK(complaint(past_local_kernel, 0) == "");
    CHECK(complaint(array_bound_kernel, 7) == "");
}
#endif
