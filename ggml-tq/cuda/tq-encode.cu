#include "tq-kernel.cuh"
#include "tq-trellis.cuh"

#define TQ_ENCODE_WARPS 4  // a CUDA block, where a warp has a block of its own
#define TQ_MANY_BLOCKS  14 // for each multiprocessor: from here on threads search alone

struct tq_encode_args {
    tq_encode_job job  [2];
    tq_codec      codec[2];
    tq_rope_job   queries;
    int           n_queries; // CUDA blocks that turn queries
    int           n_first;   // of job[0]
};

struct tq_place {
    int     i1, i2, i3;
    int     ib;                // in the row
    int64_t floats;            // offset in bytes, of the row
    const int32_t * row;       // of the packed side; nullptr: i1
};

static __device__ __forceinline__ tq_place tq_find(const tq_rows & r, int i) {
    const uint2 by_n   = fast_div_modulo(i,        r.n);
    const uint2 by_ne1 = fast_div_modulo(by_n.x,   r.ne1);
    const uint2 by_ne2 = fast_div_modulo(by_ne1.x, r.ne2);
    tq_place p;
    p.ib = by_n.y;
    p.i1 = by_ne1.y;
    p.i2 = by_ne2.y;
    p.i3 = by_ne2.x;
    p.floats = p.i1*r.floats_nb[0] + p.i2*r.floats_nb[1] + p.i3*r.floats_nb[2];
    p.row = tq_index(r, p.i1, p.i2, p.i3);
    return p;
}

// earlier kernels may write it
static __device__ __forceinline__ int tq_row(const tq_place & p) {
    return p.row ? *p.row : p.i1;
}

// offset in bytes of the packed row
static __device__ __forceinline__ int64_t tq_packed(const tq_rows & r, const tq_place & p, int row) {
    return row*r.packed_nb[0] + p.i2*r.packed_nb[1] + p.i3*r.packed_nb[2];
}

// What an earlier kernel may write is read from here on. The next one may start when all earlier ones are done: then it
// prepares itself while rows are encoded. If it could before, a step of a model would take longer, not shorter.
static __device__ __forceinline__ void tq_wait() {
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
}

// A lane's coordinates. Positions, factors, centers and their table are inputs of the graph.
static __device__ __forceinline__ float2 tq_load(const tq_encode_job & job, const tq_place & at, int lane) {
    const tq_rope       & rope   = job.rope;
    const tq_key_center & center = job.center;
    if (!rope.pos && !center.pos) {
        const float * x = (const float *) (job.src + at.floats) + at.ib*64 + lane;
        tq_wait();
        return make_float2(x[0], x[32]);
    }
    const int head_dim = rope.pos ? rope.head_dim : center.head_dim;
    const int head     = at.ib*64/head_dim;
    const int i        = at.ib*64 - head*head_dim + lane;
    const float * x    = (const float *) (job.src + at.floats + head*(rope.pos ? rope.head_nb : head_dim*(int64_t) sizeof(float))) + i;
    tq_rope_place turned[2] = {};
    if (rope.pos) {
        const int p = rope.pos[at.i1];
        turned[0] = tq_rope_find(rope, i,      p);
        turned[1] = tq_rope_find(rope, i + 32, p);
    }
    float2 m = make_float2(0.0f, 0.0f);
    float2 s = make_float2(1.0f, 1.0f);
    if (center.pos) {
        const int p = center.pos[at.i1];
        m = make_float2(tq_center_at   (center, head, i, p), tq_center_at   (center, head, i + 32, p));
        s = make_float2(tq_center_scale(center, head, i, 1), tq_center_scale(center, head, i + 32, 1));
    }
    tq_wait();
    const float2 v = make_float2(tq_rope_apply(turned[0], x), tq_rope_apply(turned[1], x + 32));
    return center.pos ? make_float2(__fmul_rn(v.x - m.x, s.x), __fmul_rn(v.y - m.y, s.y)) : v;
}

// a pair of coordinates of a query: thread i of those that turn them
static __device__ void tq_turn_queries(const tq_rope_job & job, int i) {
    if (i >= job.n_pairs) {
        return;
    }
    const tq_rope & rope = job.rope;
    const uint2 by_pair = fast_div_modulo(i,         job.pair_div);
    const uint2 by_head = fast_div_modulo(by_pair.x, job.head_div);
    const int   w       = 2*(int) by_pair.y - rope.n_offs;
    const bool  turns   = w >= 0 && w < rope.n_dims;
    const int   first   = turns && rope.neox ? rope.n_offs + w/2 : 2*by_pair.y;
    const int   second  = turns && rope.neox ? first + rope.n_dims/2 : first + 1;
    const float * x = (const float *) (job.src + by_head.y*rope.head_nb  + by_head.x*job.src_nb);
    float       * y = (float *)       (job.dst + by_head.y*job.dst_nb[0] + by_head.x*job.dst_nb[1]);
    const float2 turn = turns ? tq_rope_turn(rope, w/2, rope.pos[by_head.x]) : make_float2(1.0f, 0.0f);
    tq_wait();
    const float x0 = x[first];
    const float x1 = x[second];
    y[first]  = turns ? tq_rope_first (turn, x0, x1) : x0;
    y[second] = turns ? tq_rope_second(turn, x0, x1) : x1;
}

// The rows of a CUDA block: of which job, and which of its blocks. False if it turned queries instead. Its table is in shared memory.
struct tq_part {
    const tq_encode_job * job;
    const tq_codec      * codec;
    int                   block;
};

static __device__ __forceinline__ bool tq_begin(const tq_encode_args & args, float * table, tq_part & part) {
    int block = (int) blockIdx.x - args.n_queries;
    if (block < 0) {
        tq_turn_queries(args.queries, (int) (blockIdx.x*blockDim.x + threadIdx.x));
        return false;
    }
    const int second = block >= args.n_first;
    part = { &args.job[second], &args.codec[second], second ? block - args.n_first : block };
    tq_share_table(*part.codec, table);
    return true;
}

template <tq_kind kind, int bits>
static __device__ void tq_encode_scalar(const tq_encode_job & job, const tq_codec & codec, const float * table, int i, int lane) {
    const tq_place at    = tq_find(job.rows, i);
    const float2   x     = tq_load(job, at, lane);
    const int      row   = tq_row(at);
    const tq_unit  n     = tq_normalize(codec, x, lane);
    const tq_codes codes = tq_quantize<kind, bits>(codec, table, n.u, lane);
    float quality;
    const uint16_t half = tq_halfword<kind, bits>(n, codes, quality, lane);
    tq_store_block<bits>(half, job.dst + tq_packed(job.rows, at, row) + at.ib*tq_block_bytes<bits>, lane);
}

// _mse and _qjl: a warp a block
static __global__ void __launch_bounds__(32*TQ_ENCODE_WARPS) tq_encode_rows(const __grid_constant__ tq_encode_args args) {
    __shared__ float table[32];
    tq_part part;
    if (!tq_begin(args, table, part)) {
        return;
    }
    const tq_encode_job & job   = *part.job;
    const tq_codec      & codec = *part.codec;
    const int lane = threadIdx.x % 32;
    const int i    = part.block*TQ_ENCODE_WARPS + threadIdx.x/32;
    if (i >= job.rows.n_blocks) {
        return;
    }
    switch (job.type) {
        case GGML_TYPE_TQ2_MSE: tq_encode_scalar<TQ_KIND_MSE, 2>(job, codec, table, i, lane); break;
        case GGML_TYPE_TQ3_MSE: tq_encode_scalar<TQ_KIND_MSE, 3>(job, codec, table, i, lane); break;
        case GGML_TYPE_TQ4_MSE: tq_encode_scalar<TQ_KIND_MSE, 4>(job, codec, table, i, lane); break;
        case GGML_TYPE_TQ2_QJL: tq_encode_scalar<TQ_KIND_QJL, 2>(job, codec, table, i, lane); break;
        case GGML_TYPE_TQ3_QJL: tq_encode_scalar<TQ_KIND_QJL, 3>(job, codec, table, i, lane); break;
        case GGML_TYPE_TQ4_QJL: tq_encode_scalar<TQ_KIND_QJL, 4>(job, codec, table, i, lane); break;
        default: break;
    }
}

template <int bits>
static __device__ void tq_encode_trellis(const tq_encode_job & job, const tq_codec & codec, const float * table, int i,
        tq_search<bits> * searches, float * quality, int lane, int warp) {
    const tq_place at = tq_find(job.rows, i);
    const tq_searcher<bits> searcher = tq_prepare(searches[warp], table, lane);
    const float2   x     = tq_load(job, at, lane);
    const int      row   = tq_row(at);
    const tq_unit  n     = tq_normalize(codec, x, lane);
    const tq_codes codes = tq_path(table, n.u, tq_multiple(warp), searches[warp], searcher, lane);
    const uint16_t half  = tq_halfword<TQ_KIND_TCQ, bits>(n, codes, quality[warp], lane);
    __syncthreads();
    if (warp == tq_best(quality)) {
        tq_store_block<bits>(half, job.dst + tq_packed(job.rows, at, row) + at.ib*tq_block_bytes<bits>, lane);
    }
}

// _tcq: a warp for each multiple of a block, the best one writes it
static __global__ void __launch_bounds__(32*TQ_N_MULTIPLES, 1) tq_encode_rows_tcq(const __grid_constant__ tq_encode_args args) {
    __shared__ float table[32];
    __shared__ float quality[TQ_N_MULTIPLES];
    extern __shared__ float2 searches[];
    tq_part part;
    if (!tq_begin(args, table, part)) {
        return;
    }
    const tq_encode_job & job   = *part.job;
    const tq_codec      & codec = *part.codec;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int i    = part.block;
    switch (job.type) {
        case GGML_TYPE_TQ2_TCQ: tq_encode_trellis<2>(job, codec, table, i, (tq_search<2> *) searches, quality, lane, warp); break;
        case GGML_TYPE_TQ3_TCQ: tq_encode_trellis<3>(job, codec, table, i, (tq_search<3> *) searches, quality, lane, warp); break;
        case GGML_TYPE_TQ4_TCQ: tq_encode_trellis<4>(job, codec, table, i, (tq_search<4> *) searches, quality, lane, warp); break;
        default: break;
    }
}

template <int bits>
static __device__ void tq_encode_trellises(const tq_encode_job & job, const tq_codec & codec, const float * table, int first,
        tq_searches<bits> & s, tq_unit * units, int lane, int warp) {
    const int n_blocks = min(job.rows.n_blocks - first, TQ_SEARCH_BLOCKS);
    for (int i = threadIdx.x; i < s.n_labels/2*TQ_N_CELLS; i += TQ_SEARCH_THREADS) {
        tq_fill_near(table, s, i);
    }
    for (int b = warp; b < TQ_SEARCH_BLOCKS; b += TQ_SEARCH_THREADS/32) {
        const tq_place at = tq_find(job.rows, first + min(b, n_blocks - 1));
        const tq_unit  n  = tq_normalize(codec, tq_load(job, at, lane), lane);
        s.u[lane]     [b] = n.u.x;
        s.u[lane + 32][b] = n.u.y;
        if (lane == 0) {
            units[b] = n;
        }
    }
    __syncthreads();
    tq_search_alone(s, threadIdx.x);
    __syncthreads();
    for (int b = warp; b < n_blocks; b += TQ_SEARCH_THREADS/32) {
        const tq_place at = tq_find(job.rows, first + b);
        const int     row = tq_row(at);
        tq_unit n = units[b];
        n.u = make_float2(s.u[lane][b], s.u[lane + 32][b]);
        const uint16_t half = tq_best_halfword(table, s, n, b, lane);
        tq_store_block<bits>(half, job.dst + tq_packed(job.rows, at, row) + at.ib*tq_block_bytes<bits>, lane);
    }
}

// _tcq, many blocks: a thread for each multiple of a block
static __global__ void __launch_bounds__(TQ_SEARCH_THREADS, 5) tq_encode_many_tcq(const __grid_constant__ tq_encode_args args) {
    __shared__ float   table[32];
    __shared__ tq_unit units[TQ_SEARCH_BLOCKS];
    extern __shared__ float2 searches[];
    tq_part part;
    if (!tq_begin(args, table, part)) {
        return;
    }
    const tq_encode_job & job   = *part.job;
    const tq_codec      & codec = *part.codec;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int first = part.block*TQ_SEARCH_BLOCKS;
    switch (job.type) {
        case GGML_TYPE_TQ2_TCQ: tq_encode_trellises(job, codec, table, first, *(tq_searches<2> *) searches, units, lane, warp); break;
        case GGML_TYPE_TQ3_TCQ: tq_encode_trellises(job, codec, table, first, *(tq_searches<3> *) searches, units, lane, warp); break;
        case GGML_TYPE_TQ4_TCQ: tq_encode_trellises(job, codec, table, first, *(tq_searches<4> *) searches, units, lane, warp); break;
        default: break;
    }
}

static bool is_tcq(ggml_type type) {
    return type == GGML_TYPE_TQ2_TCQ || type == GGML_TYPE_TQ3_TCQ || type == GGML_TYPE_TQ4_TCQ;
}

template <int bits> static int search_bytes(bool many) {
    return (int) (many ? sizeof(tq_searches<bits>) : TQ_N_MULTIPLES*sizeof(tq_search<bits>));
}

bool tq_cuda_encode_together(ggml_type a, ggml_type b) {
    return ggml_tq_is_type(a) && ggml_tq_is_type(b) && is_tcq(a) == is_tcq(b);
}

void tq_cuda_encode(const tq_encode_job * jobs, int n_jobs, const tq_rope_job * queries, cudaStream_t stream) {
    int64_t n_all = 0;
    for (int j = 0; j < n_jobs; ++j) {
        n_all += jobs[j].rows.n_blocks;
    }
    const bool tcq      = is_tcq(jobs[0].type);
    const bool many     = tcq && n_all >= ggml_cuda_info().devices[ggml_cuda_get_device()].nsm*TQ_MANY_BLOCKS;
    const int  n_blocks = many ? TQ_SEARCH_BLOCKS : tcq ? 1 : TQ_ENCODE_WARPS; // a CUDA block
    tq_encode_args args = {};
    int64_t n      = 0;
    int     shared = 0;
    for (int j = 0; j < n_jobs; ++j) {
        args.job  [j] = jobs[j];
        args.codec[j] = tq_make_codec(ggml_tq_params(), ggml_tq_type_of(jobs[j].type));
        n += (jobs[j].rows.n_blocks + n_blocks - 1)/n_blocks;
        if (j == 0) {
            args.n_first = (int) n;
        }
        switch (jobs[j].type) {
            case GGML_TYPE_TQ2_TCQ: shared = std::max(shared, search_bytes<2>(many)); break;
            case GGML_TYPE_TQ3_TCQ: shared = std::max(shared, search_bytes<3>(many)); break;
            case GGML_TYPE_TQ4_TCQ: shared = std::max(shared, search_bytes<4>(many)); break;
            default: break;
        }
    }
    const int n_threads = many ? TQ_SEARCH_THREADS : tcq ? 32*TQ_N_MULTIPLES : 32*TQ_ENCODE_WARPS;
    if (queries) {
        args.queries   = *queries;
        args.n_queries = (queries->n_pairs + n_threads - 1)/n_threads;
        n += args.n_queries;
    }
    if (n == 0) {
        return;
    }
    GGML_ASSERT(n <= INT_MAX);
    const ggml_cuda_kernel_launch_params params((int) n, n_threads, shared, stream);
    if (many) {
        ggml_cuda_kernel_launch(tq_encode_many_tcq, params, args);
    } else if (tcq) {
        ggml_cuda_kernel_launch(tq_encode_rows_tcq, params, args);
    } else {
        ggml_cuda_kernel_launch(tq_encode_rows, params, args);
    }
}
