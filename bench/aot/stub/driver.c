// A replacement for libcuda.so.1 with the functions that Triton's launcher calls and a GPU's limits, but without a GPU.
//
// Kernels do nothing. A launch that exceeds a limit fails as with the real driver, and launches are counted by the
// kernel's name, so that a test can check the launches of a call. STUB_CAPABILITY is 80, 86, 90, 100 or 120.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void *stream;
    void *attributes;
    unsigned count;
} Launch;
typedef struct {
    char name[256];
    int shared_bytes_allowed;
    long launches;
} Function;

enum { INVALID_VALUE = 1, OUT_OF_RESOURCES = 701, MOST_FUNCTIONS = 65536, PLAIN_SHARED_BYTES = 48 * 1024 };
// Attributes of a device and of a function, with the numbers of cuda.h.
enum { WARP_SIZE = 10, REGISTERS = 12, PROCESSORS = 16, SHARED_OF_PROCESSOR = 81, SHARED_OPT_IN = 97 };
enum { MAX_THREADS = 0, MAX_DYNAMIC_SHARED = 8 };

static Function functions[MOST_FUNCTIONS];
static int count_of_functions, refused;
static char refusal[512];

static int capability(void) {
    const char *given = getenv("STUB_CAPABILITY");
    return given ? atoi(given) : 90;
}

// Returns the shared memory that a block may request, in bytes (CUDA's programming guide, technical specifications).
static int most_shared_bytes(void) {
    switch (capability()) {
    case 80: return 163 * 1024;
    case 90: case 100: return 227 * 1024;
    default: return 99 * 1024;
    }
}

static Result refuse(Result code, const Function *of, const char *what, unsigned long value) {
    refused++;
    snprintf(refusal, sizeof refusal, "%s: %s, got %lu", of->name, what, value);
    return code;
}

Result cuInit(unsigned flags) { (void)flags; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(Result code, const char **text) {
    (void)code;
    *text = refusal[0] ? refusal : "a stub's error";
    return 0;
}
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case WARP_SIZE: *value = 32; break;
    case REGISTERS: *value = 65536; break;
    case PROCESSORS: *value = 132; break;
    case SHARED_OPT_IN: *value = most_shared_bytes(); break;
    case SHARED_OF_PROCESSOR: *value = most_shared_bytes() + 1024; break;
    default: *value = 1000000;
    }
    return 0;
}
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxSetCurrent(void *context) { (void)context; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { (void)limit; (void)value; return 0; }
Result cuModuleLoadData(void **module, const void *image) { (void)image; *module = (void *)2; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module;
    if (count_of_functions == MOST_FUNCTIONS) return INVALID_VALUE;
    Function *added = &functions[count_of_functions++];
    snprintf(added->name, sizeof added->name, "%s", name);
    added->shared_bytes_allowed = PLAIN_SHARED_BYTES;
    *function = added;
    return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    (void)function;
    *value = attribute == MAX_THREADS ? 1024 : 0;
    return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) {
    Function *of = function;
    if (attribute != MAX_DYNAMIC_SHARED) return 0;
    if (value > most_shared_bytes())
        return refuse(INVALID_VALUE, of, "more shared memory than a block may have", (unsigned long)value);
    of->shared_bytes_allowed = value;
    return 0;
}
Result cuFuncSetCacheConfig(void *function, int config) { (void)function; (void)config; return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
    (void)function; (void)config;
    *count = 1;
    return 0;
}
Result cuTensorMapEncodeTiled(void *map) { (void)map; return 0; }
Result cuTensorMapEncodeIm2col(void *map) { (void)map; return 0; }
// Addresses of host memory stand for those of the device.
Result cuPointerGetAttribute(void *data, int attribute, uint64_t address) {
    (void)attribute;
    memcpy(data, &address, sizeof address);
    return 0;
}
Result cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
    (void)arguments; (void)extra;
    Function *of = function;
    if (launch->grid_x == 0 || launch->grid_x > 2147483647u)
        return refuse(INVALID_VALUE, of, "a grid of 1 to 2^31 - 1 programs", launch->grid_x);
    if (launch->grid_y == 0 || launch->grid_y > 65535 || launch->grid_z == 0 || launch->grid_z > 65535)
        return refuse(INVALID_VALUE, of, "1 to 65,535 along the grid's other axes", launch->grid_y);
    if (launch->block_x * launch->block_y * launch->block_z > 1024)
        return refuse(INVALID_VALUE, of, "at most 1,024 threads", launch->block_x);
    if ((int)launch->shared_bytes > of->shared_bytes_allowed)
        return refuse(OUT_OF_RESOURCES, of, "more shared memory than was asked for", launch->shared_bytes);
    of->launches++;
    return 0;
}

// For the tests: the number of refused launches, and the name and number of launches of each loaded kernel.
int stub_refused(void) { return refused; }
int stub_functions(void) { return count_of_functions; }
const char *stub_name(int index) { return functions[index].name; }
long stub_launches(int index) { return functions[index].launches; }
