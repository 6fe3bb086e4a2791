// The library that tells how cards are: torch asks it for a fabric between them, of which there is none.
#define NOT_SUPPORTED 3
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    *device = device;
    return 0;
}
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return 0; } // whose state is 0: none
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *processes) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, void *type) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return NOT_SUPPORTED; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return 0;
}
