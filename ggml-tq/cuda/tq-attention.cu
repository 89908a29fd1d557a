#include "tq-attention.cuh"

#include <map>
#include <mutex>

// Keys of all heads, from which on blocks of two heads are faster: they read less, but are fewer. Measured with 8 heads of 128
// coordinates, one query, on an H200: alone as fast at 8k and faster at 16k, within a step of a model slower at 8k, as fast at 32k.
#define TQ_ATTENTION_MIN_PAIRS (8*16384)
#define TQ_ATTENTION_MAX_ROWS  32 // queries times heads of a key head; more of them are left to upstream's kernels

static bool has_tensor_cores(int device) {
    const int cc = ggml_cuda_info().devices[device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && cc >= GGML_CUDA_CC_AMPERE && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_AMPERE;
}

static tq_attention_kernel find(ggml_type k_type, ggml_type v_type, int head_dim, int n_rows, bool pairs) {
    tq_attention_kernel kernel = {};
    tq_dispatch(k_type, [&](auto k_kind, auto k_bits) {
        tq_dispatch(v_type, [&](auto v_kind, auto v_bits) {
            // values of _qjl types nobody has; who chooses a trellis for one side does for the other
            if constexpr (v_kind == (k_kind == TQ_KIND_TCQ ? TQ_KIND_TCQ : TQ_KIND_MSE)) {
                kernel = tq_attention_find<k_kind, k_bits, v_kind>(v_bits, head_dim, n_rows, pairs);
            }
        });
    });
    return kernel;
}

static bool aligned(const ggml_tensor * t, int n_heads) { // rows of so many, as tq_row_layout::align asks; buffers are
    const size_t n = tq_row_align((int) (n_heads*t->ne[0]));
    return t->view_offs % n == 0 && t->nb[1] % n == 0 && n_heads*t->nb[2] % n == 0 && t->nb[3] % n == 0;
}

// whether rows of two heads are one row, as in a cache
static bool has_pairs(const ggml_tensor * t) {
    return t->ne[2] % 2 == 0 && t->nb[2] == ggml_row_size(t->type, t->ne[0]) && aligned(t, 2);
}

static tq_attention_kernel kernel_of(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const bool pairs = k->ne[1]*k->ne[2]*k->ne[3] >= TQ_ATTENTION_MIN_PAIRS && has_pairs(k) && has_pairs(v);
    return find(k->type, v->type, (int) k->ne[0], (int) (q->ne[1]*(q->ne[2]/k->ne[2])), pairs);
}

bool ggml_tq_cuda_attention_supported(int device, const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    if (!ggml_tq_is_type(k->type) || !ggml_tq_is_type(v->type) || !has_tensor_cores(device)) {
        return false;
    }
    const int64_t n_rows = q->ne[1]*(q->ne[2]/k->ne[2]);
    if (q->ne[0] != k->ne[0] || k->ne[0] != v->ne[0] || n_rows > TQ_ATTENTION_MAX_ROWS || k->ne[1] == 0 || k->ne[1] > INT_MAX/2 ||
            q->ne[3] != k->ne[3] || q->ne[3] != v->ne[3] || q->ne[2] % k->ne[2] != 0 || k->ne[2] != v->ne[2] || q->ne[3] > 65535) {
        return false;
    }
    for (const ggml_tensor * t : { k, v }) {
        if (!aligned(t, 1) || t->nb[1] > INT_MAX/TQ_TILE || t->ne[1]*t->nb[1] > UINT32_MAX) { // offsets of cells have 32 bits
            return false;
        }
    }
    if (q->nb[0] != sizeof(float) || (mask && (mask->ne[2] != 1 || mask->nb[0] != sizeof(half)))) {
        return false;
    }
    if (ggml_get_op_params_i32(dst, 4) > 0) { // sparse attention
        return false;
    }
    const tq_attention_kernel kernel = kernel_of(dst);
    const size_t shared_bytes = kernel.shared_bytes + (dst->src[5] ? kernel.center_bytes : 0) + 256; // 256: what is not of the dynamic kind
    return kernel.launch && shared_bytes <= ggml_cuda_info().devices[device].smpbo && ggml_tq_cuda_center_supported(dst, k, 5);
}

// Counters of blocks that are done, zero between kernels. Kernels of one stream follow each other; those of others may run at
// the same time, so each stream has its own. They are few, and stay.
static int * counters_of(ggml_backend_cuda_context & ctx, size_t n) {
    struct counters {
        int  * data = nullptr;
        size_t n    = 0;
    };
    static std::mutex mutex;
    static std::map<std::pair<int, cudaStream_t>, counters> all;
    std::lock_guard<std::mutex> lock(mutex);
    counters & c = all[{ ctx.device, ctx.stream() }];
    if (c.n < n) { // the smaller ones stay too: a captured graph may have them
        c.n = std::max<size_t>(n, 16384);
        CUDA_CHECK(cudaMalloc((void **) &c.data, c.n*sizeof(int)));
        CUDA_CHECK(cudaMemsetAsync(c.data, 0, c.n*sizeof(int), ctx.stream()));
    }
    return c.data;
}

// How all tiles of a block's key heads are divided: among CUDA blocks, so that all multiprocessors are busy in as few rounds as can be,
// and in a block among warps. Few tiles go to few warps of many blocks.
struct tq_attention_split {
    int n_splits, n_warps, n_iter;
};

static tq_attention_split choose_split(int n_units, int n_all, const tq_attention_kernel & kernel, int n_sm) {
    tq_attention_split best = {};
    double best_cost = INFINITY;
    for (int n = 1; n <= n_all && n <= 4*n_sm; ++n) {
        const int n_tiles_of_block = (n_all + n - 1)/n;
        const int n_iter   = (n_tiles_of_block + kernel.n_warps*kernel.n_tiles - 1)/(kernel.n_warps*kernel.n_tiles);
        const int n_warps  = (n_tiles_of_block + n_iter*kernel.n_tiles - 1)/(n_iter*kernel.n_tiles);
        const int n_splits = (n_all + n_iter*n_warps*kernel.n_tiles - 1)/(n_iter*n_warps*kernel.n_tiles); // none is empty
        const int n_rounds = (n_units*n_splits + n_sm - 1)/n_sm;
        // in turns of a full block: a warp alone takes a third of one; what a block does besides takes two, less if nothing is combined
        const double cost = n_rounds*(n_iter*(0.35 + 0.65*n_warps/kernel.n_warps) + (n_splits > 1 ? 2.0 : 1.4) + 0.02*n_splits);
        if (cost < best_cost) {
            best      = { n_splits, n_warps, n_iter };
            best_cost = cost;
        }
    }
    return best;
}

void ggml_tq_cuda_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    tq_attention_args a = {};
    a.k = (const char *) k->data;
    a.v = (const char *) v->data;
    a.q = (const float *) q->data;
    for (int i = 0; i < 3; ++i) {
        a.k_nb[i] = k->nb[i + 1];
        a.v_nb[i] = v->nb[i + 1];
        a.q_nb[i] = q->nb[i + 1];
    }
    if (mask) {
        a.mask     = (const half *) mask->data;
        a.mask_nb1 = mask->nb[1];
        a.mask_nb3 = mask->nb[3];
        a.mask_ne3 = (int) mask->ne[3];
    }
    a.scale     = ggml_get_op_params_f32(dst, 0);
    a.max_bias  = ggml_get_op_params_f32(dst, 1);
    a.cap       = ggml_get_op_params_f32(dst, 2);
    a.n_kv      = (int) k->ne[1];
    a.n_q       = (int) q->ne[1];
    a.n_head    = (int) q->ne[2];
    a.n_head_kv = (int) k->ne[2];
    a.n_stream  = (int) q->ne[3];
    a.group_div   = init_fastdiv_values(a.n_head/a.n_head_kv);
    a.k_codec   = tq_make_codec(ggml_tq_params(), ggml_tq_type_of(k->type));
    a.v_codec   = tq_make_codec(ggml_tq_params(), ggml_tq_type_of(v->type));
    a.center    = tq_cuda_center(dst, 5);

    const int d      = (int) k->ne[0];
    const int n_rows = a.n_q*(a.n_head/a.n_head_kv);
    const tq_attention_kernel kernel = kernel_of(dst);
    a.head_kv_div = init_fastdiv_values(a.n_head_kv/kernel.n_heads);

    const int n_units     = a.n_head_kv/kernel.n_heads*((n_rows + kernel.n_rows - 1)/kernel.n_rows);
    const int n_tiles     = (a.n_kv + TQ_TILE - 1)/TQ_TILE;
    const int n_sm        = ggml_cuda_info().devices[ctx.device].nsm;
    const tq_attention_split split = choose_split(n_units*a.n_stream, n_tiles, kernel, n_sm);
    a.n_splits = split.n_splits;
    a.n_warps  = split.n_warps;
    a.n_iter   = split.n_iter;
    a.n_turn   = a.center.pos ? 4 : 1;
    a.n_stride = 64*a.n_warps*kernel.n_tiles;

    const int64_t n_out = (int64_t) a.n_head*a.n_q*a.n_stream;
    ggml_cuda_pool_alloc<float>  part_o (ctx.pool());
    ggml_cuda_pool_alloc<float2> part_ml(ctx.pool());
    if (a.n_splits > 1) {
        a.part_o  = part_o .alloc(n_out*a.n_splits*d);
        a.part_ml = part_ml.alloc(n_out*a.n_splits);
    }
    a.n_done  = counters_of(ctx, (size_t) n_units*a.n_stream);
    a.sinks   = sinks ? (const float *) sinks->data : nullptr;
    a.dst     = (float *) dst->data;

    kernel.launch(a, dim3(n_units, a.n_splits, a.n_stream), ctx.stream());
    CUDA_CHECK(cudaGetLastError());
}
