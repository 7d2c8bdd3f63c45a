/* The calls of the CUDA runtime that torch makes for tensors without storage: one device, every call succeeds, nothing runs.
   Preloaded, so that they take the place of libcudart's. */

#define SUCCEEDS(name) \
    int name() { return 0; }
#define GIVES(name, type, value) \
    int name(type *out) { *out = (type)(value); return 0; }

GIVES(cudaGetDeviceCount, int, 1)
GIVES(cudaGetDevice, int, 0)
GIVES(cudaDriverGetVersion, int, 13000)
GIVES(cudaEventCreateWithFlags, void *, 1)
GIVES(cudaStreamCreateWithPriority, void *, 2)
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaDeviceSynchronize)
SUCCEEDS(cudaStreamSynchronize)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaFree)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventSynchronize)
