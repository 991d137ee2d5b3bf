// HOST_DEVICE marks a function that kernels call too; without nvcc it means nothing.
#pragma once
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif
