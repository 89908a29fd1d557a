#include "tq-kernel.cuh"

tq_key_center tq_cuda_center(const ggml_tensor * dst, int first) {
    const ggml_tensor * pos = dst->src[first];
    if (!pos) {
        return {};
    }
    const ggml_tensor * centers = dst->src[first + 1];
    const ggml_tensor * table   = dst->src[first + 2];
    GGML_ASSERT(table->ne[0] == std::max(1, ggml_get_op_params_i32(table, 1))); // a copy on another device has no parameters
    return {
        (const int32_t *) pos->data, (const float *) centers->data, (const float *) table->data,
        (int) centers->ne[0], ggml_get_op_params_i32(table, 1), ggml_get_op_params_i32(table, 0) == 1,
        (int) centers->ne[1],
    };
}

bool ggml_tq_cuda_center_supported(const ggml_tensor * dst, const ggml_tensor * k, int first) {
    const ggml_tensor * pos     = dst->src[first];
    const ggml_tensor * centers = dst->src[first + 1];
    const ggml_tensor * table   = dst->src[first + 2];
    if (!pos) {
        return true;
    }
    if (dst->op == GGML_OP_FLASH_ATTN_EXT) {
        const ggml_tensor * v = dst->src[2];
        const bool one_tensor = v->view_src && (v->view_src == k || v->view_src == k->view_src); // keys would be values
        if (one_tensor || pos->ne[0] != k->ne[1] || pos->ne[1] != k->ne[3] ||
                !centers || centers->ne[0] != k->ne[0] || centers->ne[1] != k->ne[2]) {
            return false;
        }
    }
    return ggml_tq_is_type(k->type) && centers && table &&
        pos->type == GGML_TYPE_I32 && centers->type == GGML_TYPE_F32 && table->type == GGML_TYPE_F32 &&
        ggml_is_contiguous(pos) && ggml_is_contiguous(centers) && ggml_is_contiguous(table) &&
        centers->ne[0] % TQ_BLOCK_SIZE == 0 && centers->ne[2] == 4 && k->ne[0] % centers->ne[0] == 0;
}

//
// shapes
//

// packed [ne0, ne1, ne2, ne3], floats of elements of size bytes, contiguous
static tq_rows rows_of(int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, size_t nb1, size_t nb2, size_t nb3, size_t size) {
    GGML_ASSERT(ne0 % TQ_BLOCK_SIZE == 0);
    const int64_t n_blocks = ne0/TQ_BLOCK_SIZE*ne1*ne2*ne3;
    GGML_ASSERT(n_blocks <= INT_MAX);
    const auto divisor = [](int64_t n) { return init_fastdiv_values(std::max<int64_t>(n, 1)); };
    tq_rows r = {};
    r.n_blocks = (int) n_blocks;
    r.n        = divisor(ne0/TQ_BLOCK_SIZE);
    r.ne1      = divisor(ne1);
    r.ne2      = divisor(ne2);
    r.packed_nb[0] = nb1;
    r.packed_nb[1] = nb2;
    r.packed_nb[2] = nb3;
    r.floats_nb[0] = ne0*size;
    r.floats_nb[1] = ne1*ne0*size;
    r.floats_nb[2] = ne2*ne1*ne0*size;
    return r;
}

static tq_rows rows_of_blocks(ggml_type type, int64_t n, size_t size) { // n floats, contiguous as the blocks are
    GGML_ASSERT(n % TQ_BLOCK_SIZE == 0);
    const int64_t n_blocks = n/TQ_BLOCK_SIZE;
    const size_t  nb       = ggml_type_size(type);
    return rows_of(TQ_BLOCK_SIZE, n_blocks, 1, 1, nb, n_blocks*nb, n_blocks*nb, size);
}

static tq_rows rows_of(const ggml_tensor * packed, const ggml_tensor * floats) { // rows in the order of floats
    tq_rows r = rows_of(floats->ne[0], floats->ne[1], floats->ne[2], floats->ne[3], packed->nb[1], packed->nb[2], packed->nb[3], 0);
    for (int d = 0; d < 3; ++d) {
        r.floats_nb[d] = floats->nb[d + 1];
    }
    return r;
}

static void set_index(tq_rows & r, const ggml_tensor * index) {
    r.index = (const char *) index->data;
    for (int d = 0; d < 2; ++d) {
        r.index_ne[d] = init_fastdiv_values(index->ne[d + 1]);
    }
    for (int d = 0; d < 3; ++d) {
        r.index_nb[d] = index->nb[d];
    }
}

//
// conversions; ggml's tables hold one function a type
//

template <typename T, ggml_type type>
static void convert(const void * x, T * y, int64_t k, cudaStream_t stream) {
    tq_cuda_decode(type, x, y, rows_of_blocks(type, k, sizeof(T)), {}, stream);
}

// s01..s03 in blocks
template <typename T, ggml_type type>
static void convert_nc(const void * x, T * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
        int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream) {
    const size_t ts = ggml_type_size(type);
    tq_cuda_decode(type, x, y, rows_of(ne00, ne01, ne02, ne03, s01*ts, s02*ts, s03*ts, sizeof(T)), {}, stream);
}

#define TQ_CUDA_CONVERT_CASE(TYPE, name)    case GGML_TYPE_##TYPE: return convert   <T, GGML_TYPE_##TYPE>;
#define TQ_CUDA_CONVERT_NC_CASE(TYPE, name) case GGML_TYPE_##TYPE: return convert_nc<T, GGML_TYPE_##TYPE>;

template <typename T> to_t_cuda_t<T> ggml_tq_cuda_get_to(ggml_type type) {
    switch (type) {
        GGML_TQ_FOR_EACH(TQ_CUDA_CONVERT_CASE)
        default: return nullptr;
    }
}

template <typename T> to_t_nc_cuda_t<T> ggml_tq_cuda_get_to_nc(ggml_type type) {
    switch (type) {
        GGML_TQ_FOR_EACH(TQ_CUDA_CONVERT_NC_CASE)
        default: return nullptr;
    }
}

template to_fp16_cuda_t    ggml_tq_cuda_get_to<half>          (ggml_type);
template to_bf16_cuda_t    ggml_tq_cuda_get_to<nv_bfloat16>   (ggml_type);
template to_fp32_cuda_t    ggml_tq_cuda_get_to<float>         (ggml_type);
template to_fp16_nc_cuda_t ggml_tq_cuda_get_to_nc<half>       (ggml_type);
template to_bf16_nc_cuda_t ggml_tq_cuda_get_to_nc<nv_bfloat16>(ggml_type);
template to_fp32_nc_cuda_t ggml_tq_cuda_get_to_nc<float>      (ggml_type);

//
// ops
//

tq_encode_job tq_cuda_set_rows_job(const ggml_tensor * dst) {
    tq_encode_job job = {
        (const char *) dst->src[0]->data, (char *) dst->data, dst->type, rows_of(dst, dst->src[0]), tq_cuda_center(dst, 3), {},
    };
    set_index(job.rows, dst->src[1]);
    return job;
}

void ggml_tq_cuda_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const tq_encode_job job = tq_cuda_set_rows_job(dst);
    tq_cuda_encode(&job, 1, nullptr, ctx.stream());
}

bool ggml_tq_cuda_set_rows_supported(const ggml_tensor * dst) {
    const ggml_tensor * src   = dst->src[0];
    const ggml_tensor * index = dst->src[1];
    return src->type == GGML_TYPE_F32 && src->nb[0] == sizeof(float) &&
        (index->type == GGML_TYPE_I64 || index->type == GGML_TYPE_I32) &&
        (!dst->src[3] || src->ne[2]*src->ne[3] == 1) && ggml_tq_cuda_center_supported(dst, dst, 3);
}

void ggml_tq_cuda_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    GGML_ASSERT(dst->nb[0] == ggml_type_size(dst->type));
    tq_rows rows = rows_of(src, dst);
    set_index(rows, dst->src[1]);
    switch (dst->type) {
        case GGML_TYPE_F32:  tq_cuda_decode(src->type, src->data, (float *)       dst->data, rows, {}, ctx.stream()); break;
        case GGML_TYPE_F16:  tq_cuda_decode(src->type, src->data, (half *)        dst->data, rows, {}, ctx.stream()); break;
        case GGML_TYPE_BF16: tq_cuda_decode(src->type, src->data, (nv_bfloat16 *) dst->data, rows, {}, ctx.stream()); break;
        default: GGML_ABORT("%s: unsupported dst type: %s", __func__, ggml_type_name(dst->type));
    }
}

bool ggml_tq_cuda_cpy_supported(const ggml_tensor * src, const ggml_tensor * dst) {
    const bool encode = ggml_tq_is_type(dst->type) && src->type == GGML_TYPE_F32;
    const bool decode = ggml_tq_is_type(src->type) && dst->type == GGML_TYPE_F32;
    const ggml_tensor * floats = encode ? src : dst;
    return (encode || decode) && floats->nb[0] == sizeof(float) &&
        (ggml_are_same_shape(src, dst) || (ggml_is_contiguous(src) && ggml_is_contiguous(dst)));
}

void ggml_tq_cuda_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const bool encode = ggml_tq_is_type(dst->type);
    const ggml_tensor * packed = encode ? dst : src;
    const ggml_tensor * floats = encode ? src : dst;
    tq_rows rows;
    if (ggml_are_same_shape(src, dst)) {
        rows = rows_of(packed, floats);
    } else {
        rows = rows_of_blocks(packed->type, ggml_nelements(packed), sizeof(float));
    }
    if (encode) {
        const tq_encode_job job = { (const char *) floats->data, (char *) packed->data, packed->type, rows, {}, {} };
        tq_cuda_encode(&job, 1, nullptr, ctx.stream());
    } else {
        tq_cuda_decode(packed->type, packed->data, (float *) floats->data, rows, {}, ctx.stream());
    }
}

const char * ggml_tq_cuda_keys_to_f16(const ggml_tensor * dst, half * k_f16, size_t & nb1, size_t & nb2, size_t & nb3, cudaStream_t stream) {
    const ggml_tensor * k = dst->src[1];
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type));
    const tq_rows rows = rows_of(k->ne[0], k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], sizeof(half));
    tq_cuda_decode(k->type, k->data, k_f16, rows, tq_cuda_center(dst, 5), stream);
    nb1 = rows.floats_nb[0];
    nb2 = rows.floats_nb[1];
    nb3 = rows.floats_nb[2];
    return (const char *) k_f16;
}
