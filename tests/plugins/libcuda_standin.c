/* A stand-in for libcuda.so.1: hands out handles, and writes every launch with its argument values to
 * $CUDA_STANDIN_LOG; without it, it is silent.
 * cuda.bindings finds functions by cuGetProcAddress_v2; what is not here is "not found" there. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, NOT_FOUND = 500 };
enum { NAMES = 256, ARGUMENTS = 64 };

static struct { char name[256]; int count; int sizes[ARGUMENTS]; } functions[NAMES];
static int function_count;
static uintptr_t modules;

/* Called by the test before anything else: how many arguments a kernel takes, and their sizes in bytes. */
int standin_declare(const char *name, int count, const int *sizes) {
    strncpy(functions[function_count].name, name, 255);
    functions[function_count].count = count;
    memcpy(functions[function_count].sizes, sizes, count * sizeof(int));
    return function_count++;
}

static void note(const char *line) {
    if (!getenv("CUDA_STANDIN_LOG")) return;
    FILE *log = fopen(getenv("CUDA_STANDIN_LOG"), "a");
    fputs(line, log);
    fputc('\n', log);
    fclose(log);
}

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGet(int *device, int index) { *device = index; return OK; }

int cuModuleLoadData(uintptr_t *module, const void *image) {
    *module = ++modules;
    note("{\"call\": \"cuModuleLoadData\"}");
    return image ? OK : INVALID;
}

int cuModuleGetFunction(uintptr_t *function, uintptr_t module, const char *name) {
    for (int i = 0; i < function_count; i++)
        if (!strcmp(functions[i].name, name)) { *function = 0x1000 + i; return OK; }
    return NOT_FOUND;
}

int cuFuncSetAttribute(uintptr_t function, int attribute, int value) {
    char line[256];
    snprintf(line, sizeof line, "{\"call\": \"cuFuncSetAttribute\", \"kernel\": \"%s\", \"attribute\": %d, \"value\": %d}",
             functions[function - 0x1000].name, attribute, value);
    note(line);
    return OK;
}

int cuLaunchKernel(uintptr_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, uintptr_t stream, void **parameters, void **extra) {
    char line[8192], *at = line;
    int index = (int)(function - 0x1000);
    if (!getenv("CUDA_STANDIN_LOG")) return extra ? INVALID : OK;
    at += sprintf(at, "{\"call\": \"cuLaunchKernel\", \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
                  "\"shared\": %u, \"stream\": %lu, \"arguments\": [",
                  functions[index].name, gx, gy, gz, bx, by, bz, shared, (unsigned long)stream);
    for (int i = 0; i < functions[index].count; i++) {
        uint64_t bits = 0;
        memcpy(&bits, parameters[i], functions[index].sizes[i]);
        at += sprintf(at, "%s%lu", i ? ", " : "", (unsigned long)bits);
    }
    sprintf(at, "]}");
    note(line);
    return extra ? INVALID : OK;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status);
static const struct { const char *name; void *function; } table[] = {
    {"cuInit", cuInit}, {"cuDriverGetVersion", cuDriverGetVersion}, {"cuDeviceGet", cuDeviceGet},
    {"cuModuleLoadData", cuModuleLoadData}, {"cuModuleGetFunction", cuModuleGetFunction},
    {"cuFuncSetAttribute", cuFuncSetAttribute}, {"cuLaunchKernel", cuLaunchKernel},
    {"cuGetProcAddress", cuGetProcAddress_v2},
};

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    *function = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, symbol)) *function = table[i].function;
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
