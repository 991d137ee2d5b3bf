// The fp32 kernels of attention.cu, for comparison and not for speed, and the kernel of D = dy . y for both types.
//
// One warp per row, a query or a key.  The warp walks over the rows of the other kind, 32 at a time: first each lane
// owns one of these rows and computes its weight, then each lane owns columns and adds up the 32 rows.
#pragma once
#include "kernels/cuda/attention_tile.cuh"

namespace attention {
struct Fp32Tensors {
    float* y;          // (B, T, NH, HS)     forward: out; backward: in
    float* lse;        // (B, NH, T)         likewise
    const float* qkv;  // (B, T, 3, NH, HS)
    float* dqkv;       // (B, T, 3, NH, HS)  backward: out
    const float* dy;   // (B, T, NH, HS)     backward
    const float* D;    // (B, NH, T)         backward
};

__device__ __forceinline__ float dot(const float* a, const float* b, int HS) {
    float sum = 0;
    for (int c = 0; c < HS; c++) sum = fmaf(a[c], b[c], sum);
    return sum;
}
__device__ __forceinline__ float keep_factor(const device::DropoutStream& drop, const Head& at, int i, int j, int T) {
    if (!drop.on()) return 1;
    const size_t element = (size_t(at.h) * T + i) * T + j;
    const Philox4 w = drop.words(at.b, uint32_t(element / 4));
    const uint32_t low = element & 1 ? w.v[1] : w.v[0], high = element & 1 ? w.v[3] : w.v[2];
    return drop.keeps(element & 2 ? high : low) ? drop.scale : 0.0f;
}

// Shared floats of one warp.
HOST_DEVICE constexpr size_t fp32_forward_floats(int HS) { return size_t(2) * HS + 32; }
HOST_DEVICE constexpr size_t fp32_backward_floats(int HS) { return size_t(4) * HS + 64; }

// A lane reads only columns that it wrote itself, of o and of the other sums below: these need no barrier.
__global__ void attention_fp32_forward_kernel(SIMT_PARAM Fp32Tensors t, SIMT_PARAM Sizes a,
                                              SIMT_PARAM device::DropoutStream parameter) {
    SIMT_DYN_SHARED(shared);
    float* q = reinterpret_cast<float*>(shared) + warp_id() * fp32_forward_floats(a.HS);  // (HS)
    float *o = q + a.HS, *weights = o + a.HS;                                             // (HS), (32)
    const Head at = head_of_block(a);
    const int lane = lane_id(), i = at.tile * (int(blockDim.x) / 32) + warp_id();
    if (i >= a.T) return;
    device::DropoutStream drop = parameter;
    drop.read_where();
    const float *queries = t.qkv + at.qkv, *keys = queries + at.out, *values = keys + at.out;  // (T, HS), rows of at.in
    for (int c = lane; c < a.HS; c += 32) q[c] = queries[size_t(i) * at.in + c] * a.scale, o[c] = 0;
    float m = -INFINITY, l = 0;
    for (int j0 = 0; j0 <= i; j0 += 32) {
        __syncwarp();  // q is there; the weights of the block before have been read
        const int j = j0 + lane, n = min(32, i + 1 - j0);
        const float s = lane < n ? dot(q, keys + size_t(j) * at.in, a.HS) : -INFINITY;
        const float largest = fmaxf(m, device::warp_max(s));
        const float p = expf(s - largest), kept = expf(m - largest);
        m = largest;
        l = l * kept + device::warp_sum(p);
        weights[lane] = lane < n ? p * keep_factor(drop, at, i, j, a.T) : 0.0f;
        __syncwarp();
        for (int c = lane; c < a.HS; c += 32) {
            float sum = o[c] * kept;
            for (int k = 0; k < n; k++) sum = fmaf(weights[k], values[size_t(j0 + k) * at.in + c], sum);
            o[c] = sum;
        }
    }
    if (lane == 0) t.lse[at.stat + i] = m + logf(l);
    for (int c = lane; c < a.HS; c += 32) t.y[at.y + size_t(i) * at.out + c] = o[c] / l;
}

// dk and dv of one key: sums over the queries from this key on, ascending.
__global__ void attention_fp32_backward_keys_kernel(SIMT_PARAM Fp32Tensors t, SIMT_PARAM Sizes a,
                                                    SIMT_PARAM device::DropoutStream parameter) {
    SIMT_DYN_SHARED(shared);
    float* k = reinterpret_cast<float*>(shared) + warp_id() * fp32_backward_floats(a.HS);  // (HS)
    float *v = k + a.HS, *dk = v + a.HS, *dv = dk + a.HS;                                  // (HS)
    float *weights = dv + a.HS, *ds = weights + 32;                                        // (32)
    const Head at = head_of_block(a);
    const int lane = lane_id(), j = at.tile * (int(blockDim.x) / 32) + warp_id();
    if (j >= a.T) return;
    device::DropoutStream drop = parameter;
    drop.read_where();
    const float *queries = t.qkv + at.qkv, *dy = t.dy + at.y;  // (T, HS) in rows of at.in, of at.out
    for (int c = lane; c < a.HS; c += 32) {
        k[c] = queries[size_t(j) * at.in + at.out + c] * a.scale;
        v[c] = queries[size_t(j) * at.in + 2 * at.out + c];
        dk[c] = dv[c] = 0;
    }
    for (int i0 = j; i0 < a.T; i0 += 32) {
        __syncwarp();  // k and v are there; the weights of the block before have been read
        const int i = i0 + lane, n = min(32, a.T - i0);
        float weight = 0, d = 0;
        if (lane < n) {
            const float p = expf(dot(k, queries + size_t(i) * at.in, a.HS) - t.lse[at.stat + i]);
            const float factor = keep_factor(drop, at, i, j, a.T);
            weight = p * factor;
            d = p * (dot(v, dy + size_t(i) * at.out, a.HS) * factor - t.D[at.stat + i]);
        }
        weights[lane] = weight, ds[lane] = d;
        __syncwarp();
        for (int c = lane; c < a.HS; c += 32)
            for (int r = 0; r < n; r++) {
                dv[c] = fmaf(weights[r], dy[size_t(i0 + r) * at.out + c], dv[c]);
                dk[c] = fmaf(ds[r], queries[size_t(i0 + r) * at.in + c], dk[c]);
            }
    }
    float* out = t.dqkv + at.qkv + size_t(j) * at.in;  // (3, NH, HS)
    for (int c = lane; c < a.HS; c += 32) out[at.out + c] = dk[c] * a.scale, out[2 * at.out + c] = dv[c];
}

// dq of one query: a sum over the keys up to this query, ascending.
__global__ void attention_fp32_backward_queries_kernel(SIMT_PARAM Fp32Tensors t, SIMT_PARAM Sizes a,
                                                       SIMT_PARAM device::DropoutStream parameter) {
    SIMT_DYN_SHARED(shared);
    float* q = reinterpret_cast<float*>(shared) + warp_id() * fp32_backward_floats(a.HS);  // (HS)
    float *dy = q + a.HS, *dq = dy + a.HS, *ds = dq + a.HS;                                // (HS), (HS), (32)
    const Head at = head_of_block(a);
    const int lane = lane_id(), i = at.tile * (int(blockDim.x) / 32) + warp_id();
    if (i >= a.T) return;
    device::DropoutStream drop = parameter;
    drop.read_where();
    const float *queries = t.qkv + at.qkv, *keys = queries + at.out, *values = keys + at.out;  // (T, HS), rows of at.in
    for (int c = lane; c < a.HS; c += 32) {
        q[c] = queries[size_t(i) * at.in + c] * a.scale;
        dy[c] = t.dy[at.y + size_t(i) * at.out + c];
        dq[c] = 0;
    }
    const float lse = t.lse[at.stat + i], D = t.D[at.stat + i];
    for (int j0 = 0; j0 <= i; j0 += 32) {
        __syncwarp();  // q and dy are there; the ds of the block before have been read
        const int j = j0 + lane, n = min(32, i + 1 - j0);
        float d = 0;
        if (lane < n) {
            const float p = expf(dot(q, keys + size_t(j) * at.in, a.HS) - lse);
            d = p * (dot(dy, values + size_t(j) * at.in, a.HS) * keep_factor(drop, at, i, j, a.T) - D);
        }
        ds[lane] = d;
        __syncwarp();
        for (int c = lane; c < a.HS; c += 32)
            for (int r = 0; r < n; r++) dq[c] = fmaf(ds[r], keys[size_t(j0 + r) * at.in + c], dq[c]);
    }
    for (int c = lane; c < a.HS; c += 32) t.dqkv[at.qkv + size_t(i) * at.in + c] = dq[c] * a.scale;
}

// D = sum_c dy y.  Eight lanes per row (b, t, h), N elements at a time; HS is a multiple of N.
template <class T, int N>
__global__ void attention_backward_sums_kernel(float* D, const T* dy, const T* y, size_t n_rows, int n_t, int NH,
                                               int HS) {
    const size_t row = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / 8;  // of (B, T, NH)
    float sum = 0;
    for (int c = int(threadIdx.x) % 8 * N; c < HS && row < n_rows; c += 8 * N) {
        float a[N], b[N];
        device::load<N>(a, dy + row * HS + c);
        device::load<N>(b, y + row * HS + c);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) sum = fmaf(a[i], b[i], sum);
    }
    SIMT_UNROLL
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(device::kAllLanes, sum, offset);
    if (threadIdx.x % 8 != 0 || row >= n_rows) return;
    const size_t bt = row / NH, h = row % NH;
    D[(bt / n_t * NH + h) * n_t + bt % n_t] = sum;  // (B, NH, T)
}
}  // namespace attention
