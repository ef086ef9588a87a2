// Runs views.cu on the CPU, for tests where there is no GPU. KERNEL is the file's name in quotes; the constants
// that cuda_views.py defines must be defined.
//
// As a library, this is a CUDA driver as far as cuda_driver.py needs one: the launch that Python asks for is
// run, block after block, with as many threads as `host_set` says whatever the launch says. With PROGRAM
// defined, it is a program for the sanitizers, which launches views of many kinds by itself.
//
// Shared memory is static memory here. It holds what earlier blocks left, and dynamic shared memory NaN, so
// that what is read must have been written.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

struct Place {
    unsigned int x;
};
static thread_local Place threadIdx, blockIdx, blockDim, gridDim;
static float* dynamic_shared;

enum { FREE, ASCENDING, DESCENDING };

// A barrier of the block's threads. ASCENDING and DESCENDING let one thread run at a time, each up to the next
// barrier, in that order: a thread then reads what others have yet to write wherever a barrier is missing.
class Barrier {
public:
    void reset(int threads, int order) { count = threads, rule = order, arrived = gone = 0, turn = first(); }
    void start(int thread) { await(thread); }
    void wait(int thread)
    {
        if (count == 1) return;
        std::unique_lock<std::mutex> lock(mutex);
        const unsigned long before = generation;
        if (++arrived == count) {
            arrived = 0, ++generation, turn = first();
        } else {
            turn += rule == DESCENDING ? -1 : 1;
        }
        changed.notify_all();
        changed.wait(lock, [&] { return gone || (generation != before && (rule == FREE || turn == thread)); });
        if (gone && generation == before) {
            std::fputs("a thread waits at a barrier that another one never came to\n", stderr);
            std::_Exit(3);
        }
        changed.wait(lock, [&] { return rule == FREE || turn == thread; });
    }
    void leave()
    {
        std::lock_guard<std::mutex> lock(mutex);
        ++gone, turn += rule == DESCENDING ? -1 : 1;
        changed.notify_all();
    }

private:
    int first() const { return rule == DESCENDING ? count - 1 : 0; }
    void await(int thread)
    {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return rule == FREE || turn == thread; });
    }
    std::mutex mutex;
    std::condition_variable changed;
    int count = 1, rule = FREE, arrived = 0, gone = 0, turn = 0;
    unsigned long generation = 0;
};
static Barrier barrier;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define __syncthreads() barrier.wait((int)threadIdx.x)
#define DYNAMIC_SHARED(name) float* name = dynamic_shared
using std::abs;
using std::min;
#include KERNEL

static struct {
    int threads = 1, order = FREE, shared_per_block = 232448, launches = 0;
    unsigned int blocks = 0, block_threads = 0, shared = 0;
    void* stream = nullptr;
} host;

static void run(const Arguments& arguments, unsigned int blocks, unsigned int shared)
{
    const size_t floats = shared / sizeof(float);
    const std::unique_ptr<float[]> memory(new float[floats]);
    dynamic_shared = memory.get();
    barrier.reset(host.threads, host.order);
    const auto work = [&](int thread) {
        threadIdx.x = (unsigned int)thread, blockDim.x = (unsigned int)host.threads, gridDim.x = blocks;
        barrier.start(thread);
        for (unsigned int block = 0; block < blocks; ++block) {
            if (thread == 0)
                std::fill(memory.get(), memory.get() + floats, std::numeric_limits<float>::quiet_NaN());
            barrier.wait(thread);
            blockIdx.x = block;
            make_views(arguments);
            barrier.wait(thread);
        }
        barrier.leave();
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < host.threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
}

#ifdef PROGRAM

int main()
{
    host.threads = 8;
    unsigned int noise = 1;
    double sum = 0;
    for (const int size : {2, 8, 33, 60}) {
        for (int kind = 0; kind < 16; ++kind) {
            const bool blurs = kind & 1, scratch = kind & 2, half = kind & 4, last = kind & 8;
            const int images = 3, views = 7, area = size * size, planes = blurs ? 4 : 3;
            std::vector<unsigned char> pixels(images * 3 * area);
            for (auto& pixel : pixels) noise = noise * 1664525u + 1013904223u, pixel = noise >> 24;
            const long long at[2] = {12345 + kind, 678};
            const float ones[3] = {1, 1, 1}, zeros[3] = {0, 0, 0};
            std::vector<float> record(views * COLUMNS), room((scratch ? 2 : 0) * planes * area);
            std::vector<unsigned char> out(views * 3 * area * (half ? 2 : 4));
            Arguments a{};
            a.images = pixels.data(), a.out = out.data(), a.at = at, a.record = record.data();
            a.scratch = scratch ? room.data() : nullptr, a.scale = ones, a.shift = zeros;
            a.image_count = images, a.views = views, a.firsts = 3, a.size = size;
            a.blur_half = blurs ? std::max(1, size / 20) : 0, a.bfloat16 = half, a.channels_last = last;
            a.crop_scale_min = 0.08f, a.jitter_probability = 0.8f, a.hue = 0.1f, a.flip_probability = 0.5f;
            a.grayscale_probability = 0.2f, a.blur_first = a.blur_second = 0.5f;
            a.solarize_first = a.solarize_second = 0.3f;
            a.brightness_low = a.contrast_low = a.saturation_low = 0.6f;
            a.brightness_high = a.contrast_high = a.saturation_high = 1.4f;
            run(a, scratch ? 2 : views, scratch ? 0 : planes * area * sizeof(float));
            a.at = nullptr, a.given = record.data(), a.record = nullptr;
            std::vector<unsigned char> again(out.size());
            a.out = again.data();
            run(a, scratch ? 2 : views, scratch ? 0 : planes * area * sizeof(float));
            if (out != again) return std::puts("given parameters make other views than drawn ones"), 1;
            for (const auto byte : out) sum += byte;
        }
    }
    std::printf("%.0f\n", sum);
}

#else

extern "C" {

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
static bool initialized;
static char module_handle, function_handle, context_handle;
static thread_local void* context;
static int shared_limit = 48 * 1024;
static const int STATIC_SHARED = 4592;  // as ptxas says for sm_90

int cuInit(unsigned int flags) { return initialized = true, flags ? INVALID_VALUE : SUCCESS; }
int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return !initialized ? NOT_INITIALIZED : ordinal == 0 ? SUCCESS : INVALID_VALUE;
}
int cuDeviceGetAttribute(int* value, int attribute, int)
{
    switch (attribute) {
    case 16: *value = 2; return SUCCESS;                       // multiprocessors
    case 75: *value = 9; return SUCCESS;                       // compute capability
    case 76: *value = 0; return SUCCESS;
    case 97: *value = host.shared_per_block; return SUCCESS;   // shared memory per block, opted in
    default: return INVALID_VALUE;
    }
}
int cuDevicePrimaryCtxRetain(void** handle, int) { return *handle = &context_handle, SUCCESS; }
int cuCtxGetCurrent(void** handle) { return *handle = context, SUCCESS; }
int cuCtxSetCurrent(void* handle) { return context = handle, handle == &context_handle ? SUCCESS : INVALID_VALUE; }
int cuCtxSynchronize() { return context ? SUCCESS : INVALID_CONTEXT; }
int cuModuleLoadData(void** handle, const char* code)
{
    *handle = &module_handle;
    return !context ? INVALID_CONTEXT : code ? SUCCESS : INVALID_VALUE;
}
int cuModuleGetFunction(void** handle, void* module, const char* name)
{
    *handle = &function_handle;
    return module != &module_handle ? INVALID_VALUE : std::strcmp(name, "make_views") ? NOT_FOUND : SUCCESS;
}
int cuFuncGetAttribute(int* value, int attribute, void* function)
{
    *value = STATIC_SHARED;
    return function == &function_handle && attribute == 1 ? SUCCESS : INVALID_VALUE;
}
int cuFuncSetAttribute(void* function, int attribute, int value)
{
    if (function != &function_handle || attribute != 8 || value + STATIC_SHARED > host.shared_per_block)
        return INVALID_VALUE;
    shared_limit = value;
    return SUCCESS;
}
int cuGetErrorString(int error, const char** text) { return *text = error == 201 ? "invalid context" : "refused", 0; }
int cuLaunchKernel(
    void* function, unsigned int blocks, unsigned int y, unsigned int z, unsigned int threads, unsigned int down,
    unsigned int deep, unsigned int shared, void* stream, void** values, void** extra)
{
    if (!context) return INVALID_CONTEXT;
    if (function != &function_handle || !blocks || y != 1 || z != 1 || !threads || threads > MOST_THREADS
        || threads & (threads - 1) || down != 1 || deep != 1 || (int)shared > shared_limit || extra)
        return INVALID_VALUE;
    host.blocks = blocks, host.block_threads = threads, host.shared = shared, host.stream = stream;
    ++host.launches;
    run(*(const Arguments*)values[0], blocks, shared);
    return SUCCESS;
}

// For tests.
void host_set(int threads, int order, int shared_per_block)
{
    host.threads = threads, host.order = order, host.shared_per_block = shared_per_block;
}
void host_last(unsigned int* launch)
{
    launch[0] = host.launches, launch[1] = host.blocks, launch[2] = host.block_threads, launch[3] = host.shared;
}
void* host_stream() { return host.stream; }
int host_sizes(int which) { return which ? COLUMNS : (int)sizeof(Arguments); }
void host_philox(unsigned int* counter, unsigned int key0, unsigned int key1) { philox(counter, key0, key1); }
}

#endif
