#include "tq-kernel.cuh"

#include "ggml-impl.h"

#include <algorithm>

#define TQ_MAX_QUERY_PAIRS (1 << 15) // that RoPE turns beside encoding: 16 tokens with 32 heads of 128

static const ggml_tensor * root(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// the node after i that does something; n_nodes if there is none
static int next(const ggml_cgraph * cgraph, int i) {
    do {
        i++;
    } while (i < cgraph->n_nodes && ggml_op_is_empty(cgraph->nodes[i]->op));
    return i;
}

static bool is_set_rows(const ggml_cgraph * cgraph, int i) {
    return i < cgraph->n_nodes && cgraph->nodes[i]->op == GGML_OP_SET_ROWS && ggml_tq_is_type(cgraph->nodes[i]->type) &&
        (cgraph->nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE);
}

// not the result of a node. It is read while earlier kernels may still run, so no node may write into it either.
static bool is_input(const ggml_tensor * t) {
    return !t || root(t)->op == GGML_OP_NONE;
}

// a RoPE that tq_rope describes, of [head_dim, n_head, n_tokens]
static bool is_rope(const ggml_cgraph * cgraph, int i) {
    if (i >= cgraph->n_nodes || cgraph->nodes[i]->op != GGML_OP_ROPE || !(cgraph->nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return false;
    }
    const ggml_tensor * rope = cgraph->nodes[i];
    const ggml_tensor * x    = rope->src[0];
    const int mode = ggml_get_op_params_i32(rope, 2);
    return (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) &&
        rope->type == GGML_TYPE_F32 && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[3] == 1 &&
        is_input(rope->src[1]) && is_input(rope->src[2]);
}

// RoPE of keys at node i, which nothing reads but SET_ROWS two nodes on, all heads of a token as one row
static bool is_rope_of_keys(const ggml_cgraph * cgraph, int i) {
    if (!is_rope(cgraph, i) || !is_set_rows(cgraph, i + 2) ||
            !ggml_can_fuse_subgraph(cgraph, i, { GGML_OP_ROPE, GGML_OP_VIEW, GGML_OP_SET_ROWS }, { i + 2 }) ||
            !ggml_check_edges(cgraph, i, { { 1, 0, 0 }, { 2, 0, 1 } })) { // a node's source is a node
        return false;
    }
    const ggml_tensor * rope   = cgraph->nodes[i];
    const ggml_tensor * view   = cgraph->nodes[i + 1];
    const ggml_tensor * center = cgraph->nodes[i + 2]->src[4];
    return ggml_is_contiguous(rope) && ggml_is_contiguous(view) && view->view_offs == 0 &&
        view->ne[0] == rope->ne[0]*rope->ne[1] && view->ne[1] == rope->ne[2] && ggml_nrows(view) == view->ne[1] &&
        rope->ne[0] % TQ_BLOCK_SIZE == 0 && (!center || center->ne[0] == rope->ne[0]);
}

static bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    return (const char *) a->data < (const char *) b->data + ggml_nbytes(b) && (const char *) b->data < (const char *) a->data + ggml_nbytes(a);
}

// a writes nothing that b reads, from its source first on
static bool spares(const ggml_tensor * a, const ggml_tensor * b, int first = 0) {
    for (int i = first; i < GGML_MAX_SRC; ++i) {
        // src[2] of SET_ROWS is the tensor that is written
        if (b->src[i] && !(i == 2 && b->op == GGML_OP_SET_ROWS) && overlap(a, b->src[i])) {
            return false;
        }
    }
    return true;
}

// Neither writes what the other one reads or writes. With RoPE of keys, the source of their SET_ROWS is neither written nor read.
static bool independent(const ggml_tensor * set_rows, const ggml_tensor * rope, const ggml_tensor * other) {
    return !overlap(set_rows, other) && spares(set_rows, other) && spares(other, set_rows, rope ? 1 : 0) && (!rope || spares(other, rope));
}

static tq_rope rope_of(const ggml_tensor * rope) {
    tq_rope r = {};
    r.pos      = (const int32_t *) rope->src[1]->data;
    r.factors  = rope->src[2] ? (const float *) rope->src[2]->data : nullptr;
    r.head_nb  = rope->src[0]->nb[1];
    r.head_dim = (int) rope->ne[0];
    r.n_dims   = ggml_get_op_params_i32(rope, 1);
    r.neox     = ggml_get_op_params_i32(rope, 2) == GGML_ROPE_TYPE_NEOX;
    r.n_offs   = ggml_get_op_params_i32(rope, 15);
    const float freq_base = ggml_get_op_params_f32(rope, 5);
    r.theta_scale = powf(freq_base, -2.0f/r.n_dims);
    r.freq_scale  = ggml_get_op_params_f32(rope, 6);
    r.ext_factor  = ggml_get_op_params_f32(rope, 7);
    r.attn_factor = ggml_get_op_params_f32(rope, 8);
    float dims[2];
    ggml_rope_yarn_corr_dims(r.n_dims, ggml_get_op_params_i32(rope, 4), freq_base,
        ggml_get_op_params_f32(rope, 9), ggml_get_op_params_f32(rope, 10), dims);
    r.low  = dims[0];
    r.high = dims[1];
    return r;
}

static tq_rope_job queries_job(const ggml_tensor * rope) {
    tq_rope_job job = {};
    job.src       = (const char *) rope->src[0]->data;
    job.dst       = (char *) rope->data;
    job.n_pairs   = (int) (ggml_nelements(rope)/2);
    job.pair_div  = init_fastdiv_values(rope->ne[0]/2);
    job.head_div  = init_fastdiv_values(rope->ne[1]);
    job.src_nb    = rope->src[0]->nb[2];
    job.dst_nb[0] = rope->nb[1];
    job.dst_nb[1] = rope->nb[2];
    job.rope      = rope_of(rope);
    return job;
}

int ggml_tq_cuda_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    if (ctx.curr_stream_no != 0) { // what is next may belong to another stream
        return 0;
    }
    ggml_tensor ** nodes = cgraph->nodes;
    const ggml_tensor * queries = nullptr;
    const ggml_tensor * rope    = nullptr; // of keys
    int keys = i;
    if (is_rope(cgraph, i) && !is_rope_of_keys(cgraph, i)) {
        queries = nodes[i];
        keys    = next(cgraph, i);
    }
    if (is_rope_of_keys(cgraph, keys)) {
        rope = nodes[keys];
        keys += 2;
    }
    if (!is_set_rows(cgraph, keys)) {
        return 0;
    }
    if (queries) {
        const ggml_tensor * x = queries->src[0];
        const bool in_place = queries->data == x->data && ggml_are_same_stride(queries, x);
        if (!rope || ggml_nelements(queries) > 2*TQ_MAX_QUERY_PAIRS || (!in_place && overlap(queries, x)) ||
                !independent(nodes[keys], rope, queries)) {
            return 0;
        }
    }
    int values = next(cgraph, keys);
    if (!is_set_rows(cgraph, values) || !tq_cuda_encode_together(nodes[keys]->type, nodes[values]->type) ||
            !independent(nodes[keys], rope, nodes[values]) || (queries && !independent(nodes[values], nullptr, queries))) {
        values = -1;
    }
    if (!rope && values < 0) {
        return 0;
    }

    tq_encode_job jobs[2] = { tq_cuda_set_rows_job(nodes[keys]), {} };
    if (rope) { // rows as they are before it
        jobs[0].src  = (const char *) rope->src[0]->data;
        jobs[0].rope = rope_of(rope);
        jobs[0].rows.floats_nb[0] = rope->src[0]->nb[2];
    }
    if (values >= 0) {
        jobs[1] = tq_cuda_set_rows_job(nodes[values]);
    }
    const tq_rope_job turned = queries ? queries_job(queries) : tq_rope_job();
    tq_cuda_encode(jobs, values >= 0 ? 2 : 1, queries ? &turned : nullptr, ctx.stream());
    return (values >= 0 ? values : keys) - i;
}

void ggml_tq_cuda_graph_optimize(ggml_cgraph * cgraph) {
    int queries = -1; // the RoPE before
    for (int keys = 0; keys < cgraph->n_nodes; ++keys) {
        if (cgraph->nodes[keys]->op != GGML_OP_ROPE) {
            continue;
        }
        if (queries < 0 || !is_rope_of_keys(cgraph, keys)) {
            queries = keys;
            continue;
        }
        ggml_tensor * rope = cgraph->nodes[queries];
        // upstream has a kernel for a norm and RoPE
        bool moves = is_rope(cgraph, queries) && !rope->view_src &&
            rope->src[0]->op != GGML_OP_MUL && cgraph->nodes[keys]->src[0]->op != GGML_OP_MUL;
        for (int i = queries + 1; moves && i < keys; ++i) {
            const ggml_tensor * node = cgraph->nodes[i];
            moves = root(node) != rope;
            for (int s = 0; s < GGML_MAX_SRC; ++s) {
                moves = moves && !(node->src[s] && root(node->src[s]) == rope) && // reads what RoPE writes, or writes what it reads
                    !(rope->src[s] && root(rope->src[s]) == root(node) && !ggml_op_is_empty(node->op));
            }
        }
        if (moves) {
            std::rotate(cgraph->nodes + queries, cgraph->nodes + queries + 1, cgraph->nodes + keys);
        }
        queries = -1;
    }
}
