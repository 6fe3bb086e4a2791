// The CUDA runtime: memory is accounted for, launches, copies and waits are written down, captures forbid what CUDA's
// do.
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#undef cudaGetDeviceProperties

#define MEMORY ((uint64_t)143771 << 20) // of an H200
#define CONTEXT ((uint64_t)600 << 20)   // what a CUDA context takes of it
#define FIRST_ADDRESS 0x700000000000ull
#define PAGE ((uint64_t)2 << 20)
#define MOST_BLOCKS 65536
#define MOST_JOINED 64

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

void note(const char *format, ...) {
    static FILE *file;
    pthread_mutex_lock(&lock);
    if (!file) {
        const char *path = getenv("NULLGPU_LOG");
        file = fopen(path ? path : "/dev/null", "a");
    }
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputc('\n', file);
    fflush(file);
    pthread_mutex_unlock(&lock);
}

// The card is lost from the moment on that the file exists which NULLGPU_LOST names.
static int unless_lost(int otherwise) {
    const char *file = getenv("NULLGPU_LOST");
    return file && !access(file, F_OK) ? cudaErrorLaunchFailure : otherwise;
}

// Streams and captures

static Stream legacy;
static Stream *captured;            // the stream that is captured; NULL where none is
static Stream *joined[MOST_JOINED]; // streams that take part in the capture
static int joined_count, is_violated;
static unsigned long long capture_id;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static enum cudaStreamCaptureMode capture_mode;
static pthread_t capturing_thread;

Stream *stream_of(const void *handle) { return (uintptr_t)handle < 16 ? &legacy : (Stream *)handle; }

int breaks_capture(void) {
    if (!captured || mode == cudaStreamCaptureModeRelaxed) return 0;
    return capture_mode == cudaStreamCaptureModeGlobal || pthread_equal(capturing_thread, pthread_self());
}

static int violation(const char *what) {
    note("VIOLATION %s", what);
    is_violated = 1;
    return cudaErrorStreamCaptureUnsupported;
}

static int unless_captured(const char *what) { return breaks_capture() ? violation(what) : 0; }

static cudaError_t make_stream(cudaStream_t *handle) {
    static uint64_t last = 16;
    Stream *stream = calloc(1, sizeof *stream);
    stream->id = ++last;
    *handle = (cudaStream_t)stream;
    return 0;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return make_stream(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return make_stream(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return make_stream(s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0; }

int synchronize(const void *handle) {
    Stream *stream = stream_of(handle);
    if (stream->is_capturing) return violation("synchronisation of a captured stream");
    if (breaks_capture()) return violation("synchronisation of a stream");
    note("SYNC stream %llu", (unsigned long long)stream->id);
    return unless_lost(0);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return synchronize(s); }
cudaError_t cudaStreamQuery(cudaStream_t s) {
    return stream_of(s)->is_capturing ? violation("query of a captured stream") : 0;
}
cudaError_t cudaDeviceSynchronize(void) {
    if (captured) return violation("synchronisation of the device");
    note("SYNC device");
    return unless_lost(0);
}

typedef struct {
    int is_captured;
    unsigned flags;
} Event;
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    Event *event = calloc(1, sizeof *event);
    event->flags = flags;
    *e = (cudaEvent_t)event;
    return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return 0; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    ((Event *)e)->is_captured = stream_of(s)->is_capturing;
    return 0;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (((Event *)e)->is_captured) return violation("query of a captured event");
    return breaks_capture() ? violation("query of an event") : 0;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (((Event *)e)->is_captured) return violation("wait for a captured event");
    if (breaks_capture()) return violation("wait for an event");
    note("SYNC event, %s", ((Event *)e)->flags & cudaEventBlockingSync ? "asleep" : "spinning");
    return unless_lost(0);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t a, cudaEvent_t b) {
    *milliseconds = 1;
    return 0;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    Stream *stream = stream_of(s);
    if (stream->is_capturing && !((Event *)e)->is_captured) {
        violation("wait of a captured stream for an event outside");
        return cudaErrorStreamCaptureIsolation;
    }
    if (((Event *)e)->is_captured && !stream->is_capturing && joined_count < MOST_JOINED) {
        stream->is_capturing = 1;
        joined[joined_count++] = stream;
    }
    return 0;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) {
    enum cudaStreamCaptureMode before = mode;
    mode = *m;
    *m = before;
    return 0;
}
static enum cudaStreamCaptureStatus status_of(cudaStream_t s) {
    if (!stream_of(s)->is_capturing) return cudaStreamCaptureStatusNone;
    return is_violated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = status_of(s);
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = status_of(s);
    if (id) *id = capture_id;
    if (graph) *graph = (cudaGraph_t)0x10;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
    if ((uintptr_t)s < 16) return violation("capture of the legacy stream");
    note("CAPTURE begin mode %d", m);
    captured = stream_of(s);
    captured->is_capturing = 1;
    captured->nodes = 0;
    capture_mode = m;
    capturing_thread = pthread_self();
    is_violated = joined_count = 0;
    capture_id++;
    return 0;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *d,
                                          const cudaGraphEdgeData *e, size_t n, enum cudaStreamCaptureMode m) {
    return cudaStreamBeginCapture(s, m);
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    int *nodes = malloc(sizeof *nodes), was_violated = is_violated;
    *nodes = stream_of(s)->nodes;
    note("CAPTURE end nodes %d violated %d", *nodes, is_violated);
    if (graph) *graph = (cudaGraph_t)nodes;
    stream_of(s)->is_capturing = is_violated = 0;
    while (joined_count) joined[--joined_count]->is_capturing = 0;
    captured = NULL;
    return was_violated ? cudaErrorStreamCaptureInvalidated : 0;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t s, cudaGraphNode_t *d, const cudaGraphEdgeData *e,
                                                size_t n, unsigned flags) {
    return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)graph;
    return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(made, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t s) {
    note("GRAPH nodes %d stream %llu", *(int *)graph, (unsigned long long)stream_of(s)->id);
    return unless_lost(0);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = *(int *)graph;
    return 0;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return 0; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return 0; }

// Memory

typedef struct {
    uint64_t address, size;
} Block;
static Block device_blocks[MOST_BLOCKS], host_blocks[MOST_BLOCKS];
static int device_count, host_count;
static uint64_t used, peak, next_address = FIRST_ADDRESS;

// What others have taken of the card's memory, and CUDA itself.
static uint64_t taken(void) {
    const char *bytes = getenv("NULLGPU_TAKEN");
    return CONTEXT + (bytes ? strtoull(bytes, NULL, 10) : 0);
}

// Takes a block off its list, and returns its size; 0 where it is not on it.
static uint64_t take(Block *blocks, int *count, const void *address) {
    uint64_t size = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < *count && !size; i++) {
        if (blocks[i].address == (uint64_t)address) {
            size = blocks[i].size;
            blocks[i] = blocks[--*count];
        }
    }
    pthread_mutex_unlock(&lock);
    return size;
}

int take_memory(uint64_t size) {
    pthread_mutex_lock(&lock);
    int fits = used + size + taken() <= MEMORY;
    if (fits) used += size;
    if (used > peak) peak = used;
    pthread_mutex_unlock(&lock);
    if (!fits) note("OOM asked %llu used %llu", (unsigned long long)size, (unsigned long long)used);
    return fits;
}
void give_memory(uint64_t size) {
    pthread_mutex_lock(&lock);
    used -= size;
    pthread_mutex_unlock(&lock);
}
uint64_t next_place(uint64_t size) {
    pthread_mutex_lock(&lock);
    uint64_t place = next_address;
    next_address += (size + PAGE - 1) / PAGE * PAGE + PAGE;
    pthread_mutex_unlock(&lock);
    return place;
}

cudaError_t cudaMalloc(void **address, size_t size) {
    int forbidden = unless_captured("cudaMalloc");
    if (forbidden) return forbidden;
    uint64_t pages = (size + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    int fits = device_count < MOST_BLOCKS && take_memory(pages);
    if (fits) {
        *address = (void *)next_place(pages);
        device_blocks[device_count++] = (Block){(uint64_t)*address, pages};
    }
    pthread_mutex_unlock(&lock);
    return fits ? 0 : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *address) {
    int forbidden = unless_captured("cudaFree");
    if (!forbidden) give_memory(take(device_blocks, &device_count, address));
    return forbidden;
}
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    int forbidden = unless_captured("cudaHostAlloc");
    if (forbidden) return forbidden;
    if (host_count == MOST_BLOCKS || posix_memalign(address, 4096, size ? size : 1)) return cudaErrorMemoryAllocation;
    memset(*address, 0, size);
    pthread_mutex_lock(&lock);
    host_blocks[host_count++] = (Block){(uint64_t)*address, size};
    pthread_mutex_unlock(&lock);
    return 0;
}
cudaError_t cudaFreeHost(void *address) {
    int forbidden = unless_captured("cudaFreeHost");
    if (!forbidden && take(host_blocks, &host_count, address)) free(address);
    return forbidden;
}
int memory_info(size_t *free, size_t *total) {
    *total = MEMORY;
    *free = MEMORY > used + taken() ? MEMORY - used - taken() : 0;
    return 0;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return memory_info(free, total); }

static int is_on_device(const void *p) { return (uint64_t)p >= FIRST_ADDRESS && (uint64_t)p < next_address; }
static int is_pinned(const void *p) {
    for (int i = 0; i < host_count; i++) {
        if ((uint64_t)p - host_blocks[i].address < host_blocks[i].size) return 1;
    }
    return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = is_on_device(p) ? cudaMemoryTypeDevice : is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = (void *)p;
    if (a->type == cudaMemoryTypeHost) a->hostPointer = (void *)p;
    return 0;
}

static char kind_of(const void *p) { return is_on_device(p) ? 'D' : is_pinned(p) ? 'P' : 'H'; }
static cudaError_t copy(void *to, const void *from, size_t size, int is_async, Stream *stream) {
    char source = kind_of(from), target = kind_of(to);
    if (stream->is_capturing && (!is_async || source == 'H' || target == 'H'))
        return violation("copy of unpinned memory");
    if (source == 'D' && target != 'D') memset(to, 0, size);
    note("COPY %c%c %zu stream %llu %s%s", source, target, size, (unsigned long long)stream->id,
         is_async ? "async" : "sync", stream->is_capturing ? " captured" : "");
    if (stream->is_capturing) captured->nodes++;
    return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return captured ? violation("cudaMemcpy") : copy(to, from, size, 0, &legacy);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
    return copy(to, from, size, 1, stream_of(s));
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t s) {
    return copy(to, from, width * height, 1, stream_of(s));
}
cudaError_t cudaMemset(void *p, int value, size_t size) { return captured ? violation("cudaMemset") : 0; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) {
    launched("memset", 0, 0, 0, 0, stream_of(s));
    return 0;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static void *all; // nobody reads them
    int failed = all ? 0 : cudaMalloc(&all, 1 << 20);
    *address = all;
    return failed;
}
__attribute__((destructor)) static void tell_peak(void) { note("PEAK %llu", (unsigned long long)peak); }

// Kernels of torch, by the names that they are registered under

typedef struct {
    const void *function;
    const char *name;
} Kernel;
static Kernel *kernels;
static int kernel_count, kernel_room, sorted_count;

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterVar(void **h, char *a, char *b, const char *name, int e, size_t size, int constant, int global) {}
void __cudaRegisterFunction(void **h, const char *function, char *f, const char *name, int limit, void *t, void *b,
                            void *bd, void *gd, int *warp) {
    if (kernel_count == kernel_room) {
        kernel_room = kernel_room ? 2 * kernel_room : 65536;
        kernels = realloc(kernels, kernel_room * sizeof *kernels);
    }
    kernels[kernel_count++] = (Kernel){function, name};
}
static int compare(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)((Kernel *)a)->function, y = (uintptr_t)((Kernel *)b)->function;
    return (x > y) - (x < y);
}
static const char *name_of(const void *function) {
    if (sorted_count != kernel_count) {
        qsort(kernels, kernel_count, sizeof *kernels, compare);
        sorted_count = kernel_count;
    }
    Kernel wanted = {function, NULL}, *found = bsearch(&wanted, kernels, kernel_count, sizeof *kernels, compare);
    return found ? found->name : "?";
}
void launched(const char *name, unsigned x, unsigned y, unsigned z, unsigned block, Stream *stream) {
    if (stream->is_capturing && captured) captured->nodes++;
    note("KERNEL %s grid %u,%u,%u block %u stream %llu%s", name, x, y, z, block, (unsigned long long)stream->id,
         stream->is_capturing ? " captured" : "");
}
static __thread struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    call.grid = grid;
    call.block = block;
    call.shared = shared;
    call.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = call.grid;
    *block = call.block;
    *shared = call.shared;
    *(cudaStream_t *)stream = call.stream;
    return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) {
    *kernel = (cudaKernel_t)entry;
    return 0;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t s) {
    launched(name_of(f), g.x, g.y, g.z, b.x, stream_of(s));
    return unless_lost(0);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t s) {
    return cudaLaunchKernel(f, g, b, arguments, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **arguments) {
    return cudaLaunchKernel(f, c->gridDim, c->blockDim, arguments, 0, c->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *data) {
    function(data);
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->binaryVersion = a->ptxVersion = 90;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared,
                                                                   unsigned flags) {
    *n = 2;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t shared) {
    *n = 2;
    return 0;
}

// The card: an H200, unless CUDA_VISIBLE_DEVICES hides it

int attribute(int which) {
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
        return 9;
    case cudaDevAttrMultiProcessorCount:
        return 132;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return 232448;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        return 49152;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return 233472;
    case cudaDevAttrWarpSize:
        return 32;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        return 2048;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
        return 65536;
    case cudaDevAttrMaxThreadsPerBlock:
        return 1024;
    case cudaDevAttrMaxGridDimX:
        return 2147483647;
    case cudaDevAttrL2CacheSize:
        return 60 << 20;
    case cudaDevAttrClockRate:
        return 1980000;
    case cudaDevAttrMemoryClockRate:
        return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth:
        return 6144;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
        return 32;
    default:
        return 0;
    }
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->totalGlobalMem = MEMORY;
    p->major = 9;
    p->warpSize = 32;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->multiProcessorCount = 132;
    p->l2CacheSize = 60 << 20;
    p->memoryBusWidth = 6144;
    p->concurrentKernels = p->unifiedAddressing = 1;
    p->asyncEngineCount = 3;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    for (int i = 0; i < 16; i++) p->uuid.bytes[i] = visible && *visible ? *visible : i; // each card has its own
    return 0;
}
cudaError_t cudaGetDeviceCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = !visible || (*visible && *visible != '-');
    return *count ? 0 : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { return *device = 0; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : 0; }
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    snprintf(id, size, "0000:00:00.0");
    return 0;
}
cudaError_t cudaGetLastError(void) { return unless_lost(0); }
cudaError_t cudaPeekAtLastError(void) { return unless_lost(0); }
const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    default:
        return "an error of a GPU that computes nothing";
    }
}

static int nothing(void) { return 0; }
void *entry_point(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    return found ? found : (void *)nothing;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *found = entry_point(name);
    if (result) *result = cudaDriverEntryPointSuccess;
    return 0;
}
cudaError_t cudaGetDriverEntryPoint(const char *name, void **found, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, found, 0, flags, result);
}
