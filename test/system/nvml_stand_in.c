/* A libnvidia-ml.so.1 for the tests: one GPU, at KILN_NVML_GPU, that draws 300 W, then 1 W more at each sample.
 *
 *   KILN_NVML_FAIL   names of functions that fail, with any text between them
 *   KILN_NVML_HANG   likewise, that never return
 *   WITHOUT          defined when compiling: a function that the library lacks */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef struct gpu* nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;
static struct gpu { int initialized; unsigned int samples; } the_gpu;
enum { NVML_ERROR_UNINITIALIZED = 1, NVML_ERROR_INVALID_ARGUMENT = 2, NVML_ERROR_NOT_FOUND = 6, NVML_ERROR_UNKNOWN = 999 };

static int named(const char* variable, const char* function) {
    const char* names = getenv(variable);
    return names && strstr(names, function);
}
static int begin(const char* function) {
    while (named("KILN_NVML_HANG", function)) sleep(60);
    return named("KILN_NVML_FAIL", function) ? NVML_ERROR_UNKNOWN : 0;
}
#define BEGIN { const int failed = begin(__func__); if (failed) return failed; }
#define ON_GPU BEGIN { if (!the_gpu.initialized) return NVML_ERROR_UNINITIALIZED; if (device != &the_gpu) return NVML_ERROR_INVALID_ARGUMENT; }

nvmlReturn_t nvmlInit_v2(void) { BEGIN return the_gpu.initialized = 1, 0; }
nvmlReturn_t nvmlShutdown(void) { BEGIN return the_gpu.initialized = 0, 0; }
const char* nvmlErrorString(nvmlReturn_t result) {
    static char text[64];
    snprintf(text, sizeof text, result == NVML_ERROR_NOT_FOUND ? "Not Found" : "stand-in's error %d", result);
    return text;
}
#ifndef WITHOUT_HANDLE
nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, nvmlDevice_t* device) {
    BEGIN
    if (!the_gpu.initialized) return NVML_ERROR_UNINITIALIZED;
    if (strcmp(bus_id, getenv("KILN_NVML_GPU"))) return NVML_ERROR_NOT_FOUND;
    *device = &the_gpu;
    return 0;
}
#endif
#ifndef WITHOUT_POWER
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int* milliwatts) {
    ON_GPU
    *milliwatts = 300500 + 1000 * the_gpu.samples++;
    return 0;
}
#endif
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, int type, unsigned int* mhz) {
    ON_GPU
    *mhz = type == 1 ? 1980 : type == 2 ? 3201 : 7;
    return 0;
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned int* celsius) {
    ON_GPU
    *celsius = sensor == 0 ? 61 : 7;
    return 0;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
    ON_GPU
    *memory = (nvmlMemory_t){150754820096ull, 150754820096ull - 98765432109ull, 98765432109ull};
    return 0;
}
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t* busy) {
    ON_GPU
    *busy = (nvmlUtilization_t){97, 42};
    return 0;
}
