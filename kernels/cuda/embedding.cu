// Token and position embedding.
//
//   forward    y[b,t] = wte[token[b,t]] + wpe[t]
//   backward   dwte[v] += sum over (b,t) with token v of dy[b,t]      dwpe[t] (+)= sum_b dy[b,t]
//
//   shapes     y, dy (B, T, C) real    tokens, order (B, T) i32    wte (Vp, C), wpe (>= T, C) real    dwte, dwpe f32
//   traffic    forward 3 BT C elements (rows of wpe and of frequent tokens from L2); backward dy twice, the rows of
//              dwte that occur, and at most two partial rows of fp32 for each 32 rows of dy.  A thread of the backward
//              has four columns: eight of bf16 would leave their fp32 sums in half sectors.   bound: memory
//   limits     any C from 1 to 2^22.  Tokens are checked on the host before they are uploaded: one outside [0, V) reads
//              and writes nothing out of bounds; its row of y becomes NaN, and the backward leaves it out of dwte
//   order      dwte: `order` lists the rows sorted by token, equal tokens ascending.  It is cut into chunks of 32 rows
//              (of more where the partial sums would not fit in the workspace); a token's rows inside a chunk are added
//              ascending.  A token whose rows lie in one chunk is finished there.  For a token that crosses chunks, 16
//              warps add the chunks' sums in turn, then the warps' sums are added ascending.  dwpe: b ascending.  The
//              partition follows from BT and C alone
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

#include <algorithm>

namespace {
using device::kVec;

constexpr int kRowsPerBlock = 8;                    // of the forward, a warp each
constexpr size_t kChunk = 32;                       // sorted rows that one block adds up
constexpr int kColumns = 4;                         // of a thread of the backward: its fp32 sums are one access
constexpr int kJoinWarps = 16, kJoinColumns = 128;  // of a block that adds sums across chunks

template <class T>
__global__ void embedding_forward_kernel(T* y,                   // (B, T, C)
                                         const int32_t* tokens,  // (B, T)
                                         const T* wte,           // (Vp, C)
                                         const T* wpe,           // (>= T, C)
                                         size_t BT, int n_times, int C, int V, bool vectors) {
    constexpr int N = kVec<T>;
    const size_t bt = size_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
    if (bt >= BT) return;
    const int token = tokens[bt];
    const bool known = token >= 0 && token < V;
    const T* word = wte + size_t(known ? token : 0) * C;  // (C)
    const T* place = wpe + bt % size_t(n_times) * C;      // (C)
    for (int c = int(threadIdx.x) % 32 * N; c < C; c += 32 * N) {
        const int count = C - c < N ? C - c : N;
        float v[N], p[N];
        device::load_some(v, word + c, count, vectors);
        device::load_some(p, place + c, count, vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) v[i] = known ? v[i] + p[i] : NAN;
        device::store_some(y + bt * C + c, v, count, vectors);
    }
}

// A thread has four columns of a place, which is a position t.
template <class T>
__global__ void embedding_backward_places_kernel(float* dwpe,  // (places, C)
                                                 const T* dy,  // (B, T, C)
                                                 int B, int n_times, int C, size_t places, bool accumulate,
                                                 bool vectors) {
    constexpr int N = kColumns;
    const size_t per_row = (size_t(C) + N - 1) / N, i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t t = i / per_row;
    if (t >= places || (accumulate && t >= size_t(n_times))) return;
    const int c = int(i % per_row) * N, count = C - c < N ? C - c : N;
    float sum[N] = {}, v[N];
    for (int b = 0; b < B && t < size_t(n_times); b++) {
        device::load_some(v, dy + (size_t(b) * n_times + t) * C + c, count, vectors);
        SIMT_UNROLL
        for (int k = 0; k < N; k++) sum[k] += v[k];
    }
    float* out = dwpe + t * C + c;  // (N)
    if (accumulate) {
        device::load_some(v, out, count, vectors);
        SIMT_UNROLL
        for (int k = 0; k < N; k++) sum[k] += v[k];
    }
    device::store_some(out, sum, count, vectors);
}

// dwte and the inputs of both its kernels.  A run is a stretch of equal tokens in the sorted rows.
template <class T>
struct TokenRuns {
    float* dwte;     // (Vp, C)         +=
    float* partial;  // (chunks, 2, C)  =   sum of the run that comes from the chunk before; of the run that goes on
    const T* dy;     // (BT, C)
    const int32_t* tokens;  // (BT)
    const int32_t* order;   // (BT)
    size_t BT, chunk;       // chunk: sorted rows per chunk
    int C, V;
    bool vectors;
    // Token of sorted row p; -1 behind the last, and for p = -1.
    __device__ int token_at(size_t p) const { return p < BT ? tokens[order[p]] : -1; }
};

// One block per chunk; a thread has four columns.  A warp's lanes look up 32 sorted rows at once and tell each other.
template <class T>
__global__ void __launch_bounds__(256) embedding_backward_words_kernel(SIMT_PARAM TokenRuns<T> a) {
    constexpr int N = kColumns, kAhead = 8;  // rows whose loads are in flight
    const size_t first = blockIdx.x * a.chunk, end = first + a.chunk < a.BT ? first + a.chunk : a.BT, C = size_t(a.C);
    const int lane = int(threadIdx.x) % 32;
    float* partial = a.partial + blockIdx.x * (2 * C);                             // (2, C)
    for (int c0 = int(threadIdx.x) - lane; c0 * N < a.C; c0 += int(blockDim.x)) {  // the same for a warp's lanes
        const int c = (c0 + lane) * N, count = a.C - c < N ? a.C - c : N;
        int token = a.token_at(first);
        bool from_before = a.token_at(first - 1) == token;
        float sum[N] = {};
        for (size_t p = first; p < end; p += 32) {
            const int row = p + lane < end ? a.order[p + lane] : 0;
            const int next = a.token_at(p + lane + 1);
            for (int k0 = 0; k0 < 32 && p + k0 < end; k0 += kAhead) {
                float v[kAhead][N];
                SIMT_UNROLL
                for (int k = 0; k < kAhead; k++) {
                    const size_t from = size_t(__shfl_sync(device::kAllLanes, row, k0 + k)) * C + c;
                    device::load_some(v[k], a.dy + from, p + k0 + k < end ? count : 0, a.vectors);
                }
                SIMT_UNROLL
                for (int k = 0; k < kAhead; k++) {
                    if (p + k0 + k >= end) break;
                    SIMT_UNROLL
                    for (int i = 0; i < N; i++) sum[i] += v[k][i];
                    const int after = __shfl_sync(device::kAllLanes, next, k0 + k);
                    const bool goes_on = after == token;
                    if (goes_on && p + k0 + k + 1 < end) continue;
                    if (from_before || goes_on) {
                        device::store_some(partial + (from_before ? 0 : C) + c, sum, count, a.vectors);
                    } else if (token >= 0 && token < a.V) {
                        float* out = a.dwte + size_t(token) * C + c;  // (N)
                        float old[N];
                        device::load_some(old, out, count, a.vectors);
                        SIMT_UNROLL
                        for (int i = 0; i < N; i++) sum[i] += old[i];
                        device::store_some(out, sum, count, a.vectors);
                    }
                    token = after;
                    from_before = false;
                    SIMT_UNROLL
                    for (int i = 0; i < N; i++) sum[i] = 0;
                }
            }
        }
    }
}

// Adds the run that begins in chunk blockIdx.x and goes on behind it, if there is one, to dwte.  A lane has four
// columns.
template <class T>
__global__ void __launch_bounds__(32 * kJoinWarps) embedding_backward_join_kernel(SIMT_PARAM TokenRuns<T> a) {
    using Four = device::Vec<float, 4>;
    SIMT_SHARED(Four, part, [kJoinWarps][32]);
    const size_t first = blockIdx.x * a.chunk, last = first + a.chunk - 1, C = size_t(a.C);
    if (last + 1 >= a.BT) return;
    const int token = a.token_at(last);
    if (a.token_at(last + 1) != token || a.token_at(first - 1) == token || token < 0 || token >= a.V) return;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int c = int(blockIdx.y) * kJoinColumns + 4 * lane, count = a.C - c < 4 ? a.C - c : 4;
    float sum[4] = {}, v[4];
    for (size_t i = blockIdx.x + warp; i == blockIdx.x || a.token_at(i * a.chunk) == token; i += kJoinWarps) {
        device::load_some(v, a.partial + (2 * i + (i == blockIdx.x)) * C + c, count, a.vectors);
        SIMT_UNROLL
        for (int k = 0; k < 4; k++) sum[k] += v[k];
    }
    simt::st_vec(&part[warp][lane], Four{sum[0], sum[1], sum[2], sum[3]});
    __syncthreads();
    if (warp > 0) return;
    float* out = a.dwte + size_t(token) * C + c;  // (4)
    device::load_some(sum, out, count, a.vectors);
    SIMT_NO_UNROLL
    for (int i = 0; i < kJoinWarps; i++) {
        const Four of_warp = simt::ld_vec<Four>(&part[i][lane]);
        SIMT_UNROLL
        for (int k = 0; k < 4; k++) sum[k] += of_warp[k];
    }
    device::store_some(out, sum, count, a.vectors);
}
}  // namespace

namespace cuda {
void embedding_forward(const Embedding& a, Stream s) {
    const size_t BT = size_t(a.B) * a.T;
    with_real(a.y.dtype, [&]<class T>() {
        T* y = a.y.as<T>();            // (B, T, C)
        const T* wte = a.wte.as<T>();  // (Vp, C)
        const T* wpe = a.wpe.as<T>();  // (>= T, C)
        const bool vectors = a.C % kVec<T> == 0 && device::aligned16(y, wte, wpe);
        cuda::launch(embedding_forward_kernel<T>, dim3(blocks_for(BT, kRowsPerBlock)), dim3(32 * kRowsPerBlock), 0, s,
                     y, a.tokens.as<int32_t>(), wte, wpe, BT, a.T, a.C, a.V, vectors);
    });
}

void embedding_backward(const EmbeddingGrad& a, Stream s) {
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.C);
    expect_size("embedding.order", a.order, BT, "B*T");  // the CPU alone does without
    const size_t room =
        std::max<size_t>(1, kWorkspaceBytes / (2 * C * sizeof(float)));  // chunks that the workspace holds
    const size_t chunk = std::max(kChunk, (BT + room - 1) / room), chunks = (BT + chunk - 1) / chunk;
    float* partial = workspace<float>(s, chunks * 2 * C, "embedding_backward");  // (chunks, 2, C)
    with_real(a.dy.dtype, [&]<class T>() {
        constexpr int N = kColumns;
        float* dwpe = a.dwpe.as<float>();  // (>= T, C)
        const T* dy = a.dy.as<T>();        // (B, T, C)
        const size_t per_row = (C + N - 1) / N, places = a.dwpe.count / C;
        TokenRuns<T> runs = {
            a.dwte.as<float>(), partial, dy, a.tokens.as<int32_t>(), a.order.as<int32_t>(), BT, chunk, a.C, a.V, false};
        runs.vectors = C % kVec<T> == 0 && device::aligned16(runs.dwte, dwpe, dy);
        cuda::launch(embedding_backward_places_kernel<T>, dim3(blocks_for(places * per_row, 256)), dim3(256), 0, s,
                     dwpe, dy, a.B, a.T, a.C, places, a.accumulate, runs.vectors);
        const unsigned threads = unsigned(std::min<size_t>(256, (per_row + 31) / 32 * 32));
        cuda::launch(embedding_backward_words_kernel<T>, dim3(unsigned(chunks)), dim3(threads), 0, s, runs);
        cuda::launch(embedding_backward_join_kernel<T>, dim3(unsigned(chunks), blocks_for(C, kJoinColumns)),
                     dim3(32 * kJoinWarps), 0, s, runs);
    });
}
}  // namespace cuda
