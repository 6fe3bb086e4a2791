// The CUDA driver, as Triton and torch's compiler call it. A function's handle is its name.
#include "nullgpu.h"
#include <cuda.h>
#include <string.h>

#define SET(pointer, value)                                                                                            \
    {                                                                                                                  \
        *(pointer) = (value);                                                                                          \
        return 0;                                                                                                      \
    }
#define CONTEXT_HANDLE ((CUcontext)0x20)
#define MODULE_HANDLE ((CUmodule)0x30)

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) SET(version, 13000) CUresult cuDeviceGet(CUdevice *device, int number)
    SET(device, 0) CUresult cuDeviceGetCount(int *count) SET(count, 1) CUresult
    cuDeviceGetName(char *name, int size, CUdevice device) {
    strncpy(name, "NVIDIA H200", size);
    return 0;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device)
    SET(value, attribute(which)) CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
        SET(context, CONTEXT_HANDLE) CUresult
    cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    SET(active, 1)
}
CUresult cuCtxGetCurrent(CUcontext *context) SET(context, CONTEXT_HANDLE) CUresult cuCtxSetCurrent(CUcontext context) {
    return 0;
}
CUresult cuCtxGetDevice(CUdevice *device) SET(device, 0) CUresult cuCtxSynchronize(void) { return 0; }
CUresult cuGetErrorString(CUresult result, const char **text)
    SET(text, "an error of a GPU that computes nothing") CUresult cuGetErrorName(CUresult result, const char **text)
        SET(text, "CUDA_ERROR")

            CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (breaks_capture()) note("NOTE a module is loaded while capturing");
    SET(module, MODULE_HANDLE)
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *path) SET(module, MODULE_HANDLE) CUresult
    cuModuleUnload(CUmodule module) {
    return 0;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
    SET(function, (CUfunction)strdup(name)) CUresult
    cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function)
        SET(value, which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                   : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                    : 0) CUresult
    cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    return 0;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *launch) SET(n, 66)

    CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
    launched((char *)function, x, y, z, bx, stream_of(stream));
    return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
    launched((char *)function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, stream_of(c->hStream));
    return 0;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s,
                                CUtensorMapL2promotion l, CUtensorMapFloatOOBfill fill) {
    return 0;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr p) SET((uint64_t *)data, p) CUresult
    cuMemGetInfo(size_t *free, size_t *total) {
    return memory_info(free, total);
}

// Memory that torch's allocator puts together itself. A handle is its size.
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f)
    SET(size, 2 << 20) CUresult
    cuMemAddressReserve(CUdeviceptr *place, size_t size, size_t alignment, CUdeviceptr wanted, unsigned long long f) {
    *place = next_place(size);
    return 0;
}
CUresult cuMemAddressFree(CUdeviceptr place, size_t size) { return 0; }
CUresult cuMemCreate(CUmemGenericAllocationHandle *made, size_t size, const CUmemAllocationProp *p,
                     unsigned long long flags) {
    *made = size;
    return take_memory(size) ? 0 : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle size) {
    give_memory(size);
    return 0;
}
CUresult cuMemMap(CUdeviceptr place, size_t size, size_t offset, CUmemGenericAllocationHandle h, unsigned long long f) {
    return 0;
}
CUresult cuMemSetAccess(CUdeviceptr place, size_t size, const CUmemAccessDesc *access, size_t count) { return 0; }
CUresult cuMemUnmap(CUdeviceptr place, size_t size) { return 0; }

CUresult cuStreamSynchronize(CUstream stream) { return synchronize(stream); }
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    memset(to, 0, size);
    return 0;
}
CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    SET(found, entry_point(name))
}
