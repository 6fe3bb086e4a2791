// A GPU that computes nothing: what the CUDA runtime, the driver and cuBLAS share. docs/performance.md says how it is used.
#pragma once
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(hidden) // these names are nobody else's business

typedef struct {
    uint64_t id;
    int is_capturing;
    int nodes; // of the graph that is captured
} Stream;

// Writes a line to the file that NULLGPU_LOG names.
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Gives the stream of a handle; the small numbers are CUDA's own streams.
Stream *stream_of(const void *handle);
// Writes down a kernel's launch.
void launched(const char *name, unsigned x, unsigned y, unsigned z, unsigned block, Stream *stream);
// Gives an attribute of the card.
int attribute(int which);
// Tells whether an unsafe call of this thread breaks the capture that is under way.
int breaks_capture(void);
int memory_info(size_t *free, size_t *total);
// Takes memory of the card; returns 0 where there is not as much.
int take_memory(uint64_t size);
void give_memory(uint64_t size);
// Gives an address on the card.
uint64_t next_place(uint64_t size);
int synchronize(const void *stream);
// Finds a function of this library; one that does nothing where there is none.
void *entry_point(const char *name);

#pragma GCC visibility pop
