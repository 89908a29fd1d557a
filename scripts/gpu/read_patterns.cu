// How fast packed rows can be read, with nothing computed: what the attention kernel could reach if a CUDA block had 1, 2, 4 or
// all 8 key heads of a cell. A row of 8 heads of 128 coordinates at 4.25 bits has 544 bytes, a head 68 of them; memory is read
// 32 bytes at a time. As in the kernel a warp copies 16 bytes a lane to shared memory, in turns of 2176 bytes of keys and as
// many of values.
//
//   nvcc -std=c++17 -O3 -arch=native -o read_patterns scripts/gpu/read_patterns.cu && ./read_patterns > read-patterns.jsonl

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(x) do { const cudaError_t e = (x); if (e != cudaSuccess) { fprintf(stderr, "%s: %s\n", #x, cudaGetErrorString(e)); exit(1); } } while (0)

#define N_HEADS    8
#define HEAD_BYTES 68
#define N_WARPS    16

template <int heads> struct config {
    static constexpr int bytes    = heads*HEAD_BYTES;
    static constexpr int n_pieces = heads == N_HEADS ? bytes/16 : (bytes + 12 + 15)/16; // of 16, whatever the alignment
    static constexpr int n_lanes  = n_pieces <= 8 ? 8 : n_pieces <= 16 ? 16 : 32;        // of a row
    static constexpr int n_cells  = 32/heads;
    static constexpr int pitch    = 16*(n_pieces | 1);
    static constexpr int stage    = n_cells*pitch;
};

template <int n> static __device__ void wait() { asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory"); }

template <int heads>
static __global__ void __launch_bounds__(32*N_WARPS, 1) read_rows(const char * k, const char * v, int n_cells, int n_splits, uint32_t * out) {
    using cfg = config<heads>;
    extern __shared__ __align__(16) char shared[];
    const int lane   = threadIdx.x % 32;
    const int warp   = threadIdx.x / 32;
    const int n_tiles = n_cells/cfg::n_cells;
    const int first  = (int) ((int64_t) n_tiles* blockIdx.y     /n_splits);
    const int last   = (int) ((int64_t) n_tiles*(blockIdx.y + 1)/n_splits);
    char * const stages = shared + warp*2*cfg::stage;
    uint32_t sum = 0;
    const auto copy = [&](const char * rows, int which, int tile) {
        for (int i = lane/cfg::n_lanes; tile < last && i < cfg::n_cells; i += 32/cfg::n_lanes) {
            const char * row = rows + ((int64_t) tile*cfg::n_cells + i)*N_HEADS*HEAD_BYTES + blockIdx.x*cfg::bytes;
            const char * at  = (const char *) ((uintptr_t) row & ~(uintptr_t) 15);
            for (int p = lane % cfg::n_lanes; 16*p < cfg::bytes + (int) (row - at); p += cfg::n_lanes) {
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
                    "r"((uint32_t) __cvta_generic_to_shared(stages + which*cfg::stage + i*cfg::pitch + 16*p)), "l"(at + 16*p) : "memory");
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    copy(k, 0, first + warp);
    copy(v, 1, first + warp);
    for (int tile = first + warp; tile < last; tile += N_WARPS) {
        for (int which = 0; which < 2; ++which) {
            wait<1>();
            __syncwarp();
            sum ^= *(const uint32_t *) (stages + which*cfg::stage + 4*lane);
            __syncwarp();
            copy(which ? v : k, which, tile + N_WARPS);
        }
    }
    wait<0>();
    if (sum == 0x12345678) {
        out[0] = sum;
    }
}

template <int heads> static void bench(int n_cells, const char * cells, int n_copies, int n_sm, uint32_t * out) {
    using cfg = config<heads>;
    const int64_t bytes = (int64_t) n_cells*N_HEADS*HEAD_BYTES;
    const int shared    = std::max(2*N_WARPS*cfg::stage, 120*1024); // one CUDA block a multiprocessor, as attention has
    const int n_groups  = N_HEADS/heads;
    const int n_splits  = n_sm/n_groups;
    CHECK(cudaFuncSetAttribute(read_rows<heads>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n_copies; ++i) {
        read_rows<heads><<<dim3(n_groups, n_splits), 32*N_WARPS, shared, stream>>>(cells + 2*i*bytes, cells + (2*i + 1)*bytes, n_cells, n_splits, out);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> us;
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    for (int i = 0; i < 10; ++i) {
        float ms;
        CHECK(cudaEventRecord(start, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(stop, stream));
        CHECK(cudaEventSynchronize(stop));
        CHECK(cudaEventElapsedTime(&ms, start, stop));
        us.push_back(1000*ms/n_copies);
    }
    std::sort(us.begin() + 1, us.end()); // the first one warms up
    printf("{\"n_cells\": %d, \"heads_of_a_block\": %d, \"us\": %.2f, \"gb_per_s\": %.0f}\n", n_cells, heads, us[5], 2e-3*bytes/us[5]);
}

int main() {
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    printf("{\"device\": \"%s\", \"multiprocessors\": %d}\n", prop.name, prop.multiProcessorCount);
    for (const int n_cells : { 32768, 131072 }) {
        const int64_t bytes = (int64_t) n_cells*N_HEADS*HEAD_BYTES;
        const int n_copies  = (int) (600000000/(2*bytes)); // more than the device's cache holds
        char * cells;
        uint32_t * out;
        CHECK(cudaMalloc(&cells, 2*bytes*n_copies + 16)); // 16: the last piece
        CHECK(cudaMalloc(&out, sizeof(*out)));
        CHECK(cudaMemset(cells, 1, 2*bytes*n_copies));
        bench<1>(n_cells, cells, n_copies, prop.multiProcessorCount, out);
        bench<2>(n_cells, cells, n_copies, prop.multiProcessorCount, out);
        bench<4>(n_cells, cells, n_copies, prop.multiProcessorCount, out);
        bench<8>(n_cells, cells, n_copies, prop.multiProcessorCount, out);
        CHECK(cudaFree(cells));
        CHECK(cudaFree(out));
    }
}
