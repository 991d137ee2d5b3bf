// mma.sync, ldmatrix and stmatrix, for a whole warp at once.
#include <cstring>

#include "state.h"

namespace emulator {
namespace {
float low_bf16(uint32_t pair) { return __builtin_bit_cast(float, pair << 16); }
float high_bf16(uint32_t pair) { return __builtin_bit_cast(float, pair & 0xffff0000u); }

struct MmaLane {
    float* d;
    const uint32_t *a, *b;
};

// Lane l holds, with g = l / 4 and t = 2 (l % 4):
//   A register i, half h    row g + 8 (i & 1), column t + h + 8 (i / 2)
//   B register i, half h    row (k) t + h + 8 i, column (n) g
//   D register i            row g + 8 (i / 2), column t + (i & 1)
void mma_warp(void* const* lanes, uint32_t) {
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
        const int g = l / 4, t = 2 * (l % 4);
        for (int i = 0; i < 4; i++) {
            a[g + 8 * (i & 1)][t + 8 * (i / 2)] = low_bf16(lane.a[i]);
            a[g + 8 * (i & 1)][t + 1 + 8 * (i / 2)] = high_bf16(lane.a[i]);
            d[g + 8 * (i / 2)][t + (i & 1)] = lane.d[i];
        }
        for (int i = 0; i < 2; i++) {
            b[t + 8 * i][g] = low_bf16(lane.b[i]);
            b[t + 1 + 8 * i][g] = high_bf16(lane.b[i]);
        }
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; l++) {
        const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
        for (int i = 0; i < 4; i++) lane.d[i] = d[l / 4 + 8 * (i / 2)][2 * (l % 4) + (i & 1)];
    }
}

struct MatrixLane {
    uint32_t* registers;
    uint8_t* row;
    int count;  // matrices
    bool transposed, store;
    uintptr_t pc;
};

// Checks the eight rows of matrix m, which lanes 8m .. 8m+7 point to.
void check_rows(const MatrixLane* const* lanes, int m) {
    Block& b = block();
    const uint8_t* rows[8];
    for (int r = 0; r < 8; r++) {
        const MatrixLane& lane = *lanes[m * 8 + r];
        const char* what = lane.store ? "stmatrix" : "ldmatrix";
        if (reinterpret_cast<uintptr_t>(lane.row) % 16)
            fail("memcheck", std::string(what) + ": a row is not aligned to 16 bytes");
        if (!b.in_arena(lane.row)) fail("memcheck", std::string(what) + ": a row is not in shared memory");
        check_bounds(lane.row, 16, what);
        rows[r] = lane.row;
        const int thread = int(self().warp) * 32 + m * 8 + r;
        if (b.racecheck) check_access({lane.row, 16, lane.store, lane.pc, thread});
    }
    if (b.counting) count_matrix(rows);
}

// Lane l holds elements (l / 4, 2 (l % 4)) and the next one of its row; transposed: of its column.
void move_matrices(void* const* arguments, uint32_t) {
    const auto* lanes = reinterpret_cast<MatrixLane* const*>(arguments);
    const MatrixLane& first = *lanes[0];
    for (int m = 0; m < first.count; m++) {
        check_rows(lanes, m);
        uint16_t matrix[8][8] = {};
        if (!first.store)
            for (int r = 0; r < 8; r++) std::memcpy(matrix[r], lanes[m * 8 + r]->row, 16);
        for (int l = 0; l < 32; l++) {
            const int i = l / 4, j = 2 * (l % 4);
            uint16_t& low = first.transposed ? matrix[j][i] : matrix[i][j];
            uint16_t& high = first.transposed ? matrix[j + 1][i] : matrix[i][j + 1];
            uint32_t& pair = lanes[l]->registers[m];
            if (first.store) {
                low = uint16_t(pair);
                high = uint16_t(pair >> 16);
            } else {
                pair = uint32_t(low) | uint32_t(high) << 16;
            }
        }
        if (first.store)
            for (int r = 0; r < 8; r++) std::memcpy(lanes[m * 8 + r]->row, matrix[r], 16);
    }
}
}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
    MmaLane lane{d, a, b};
    collective_at("mma.m16n8k16", kFullMask, &lane, mma_warp, CALLER_PC());
}

void matrix_load(const char* op, uint32_t* registers, const void* row, int count, bool transposed) {
    const uintptr_t pc = CALLER_PC();
    MatrixLane lane{registers, static_cast<uint8_t*>(const_cast<void*>(row)), count, transposed, false, pc};
    collective_at(op, kFullMask, &lane, move_matrices, pc);
}

void matrix_store(const char* op, const uint32_t* registers, void* row, int count, bool transposed) {
    const uintptr_t pc = CALLER_PC();
    MatrixLane lane{const_cast<uint32_t*>(registers), static_cast<uint8_t*>(row), count, transposed, true, pc};
    collective_at(op, kFullMask, &lane, move_matrices, pc);
}
}  // namespace emulator
