#include "llama-tq.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <stdexcept>

static bool check_head_dims(const llama_model & model, ggml_type type, char role) {
    const auto & hparams = model.hparams;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il)) {
            continue;
        }
        const uint32_t n_head_kv = hparams.n_head_kv(il);
        const uint32_t head_dim  = role == 'K' ? hparams.n_embd_head_k(il) : hparams.n_embd_head_v(il);
        if (n_head_kv > 0 && head_dim % TQ_BLOCK_SIZE != 0) {
            LLAMA_LOG_ERROR("%s: cache type %s does not support this model's %c head dim of %u (layer %u): supported are "
                "multiples of %d (64, 128, 192, 256, 512, 576, ...); use another type for %c, such as q8_0\n",
                __func__, ggml_type_name(type), role, head_dim, il, TQ_BLOCK_SIZE, role);
            return false;
        }
    }
    return true;
}

bool llama_tq_check(const llama_model & model, llama_context_params & params) {
    const bool by_role = ggml_tq_is_type(params.type_k) && ggml_tq_is_type(params.type_v) &&
        params.type_k - GGML_TYPE_TQ2_QJL == params.type_v - GGML_TYPE_TQ2_MSE;
    if (model.hparams.is_mla() && by_role) {
        LLAMA_LOG_WARN("%s: this model (MLA) caches keys and values in one tensor: its type is %s\n",
            __func__, ggml_type_name(params.type_k));
        params.type_v = params.type_k;
    }
    if (ggml_tq_is_type(params.type_k) && !check_head_dims(model, params.type_k, 'K')) {
        return false;
    }
    if (ggml_tq_is_type(params.type_v) && !model.hparams.is_mla() && !check_head_dims(model, params.type_v, 'V')) {
        return false;
    }
    // as a warning, because the programs do not show the library's other messages by default
    if (ggml_tq_is_type(params.type_k) || ggml_tq_is_type(params.type_v)) {
        LLAMA_LOG_WARN("%s: cache types: %s\n", __func__, ggml_tq_describe(params.type_k, params.type_v).c_str());
    }
    return true;
}

void llama_tq_require_device(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v) {
    // ask the device itself whether it can write rows of the type
    for (const ggml_type type : { type_k, type_v }) {
        if (!ggml_tq_is_type(type)) {
            continue;
        }
        ggml_init_params params = { 4*ggml_tensor_overhead(), nullptr, true };
        ggml_context_ptr ctx { ggml_init(params) };
        ggml_tensor * op = ggml_set_rows(ctx.get(),
            ggml_new_tensor_2d(ctx.get(), type,          TQ_BLOCK_SIZE, 1),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, TQ_BLOCK_SIZE, 1),
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1));
        if (!ggml_backend_dev_supports_op(dev, op)) {
            throw std::runtime_error(std::string("cache type ") + ggml_type_name(type) + " is not supported on device " +
                ggml_backend_dev_name(dev) + "; supported: the CPU (--no-kv-offload, or -ngl 0)");
        }
    }
}

static std::string describe(int32_t state_type) {
    const int32_t type = state_type & 0xffff;
    if (type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0) {
        return "an unknown type (" + std::to_string(state_type) + ")";
    }
    const std::string name = ggml_type_name((ggml_type) type);
    return ggml_tq_is_type((ggml_type) type) ? name + ", format version " + std::to_string((state_type >> 16) - 1) : name;
}

std::string llama_tq_state_mismatch(int32_t expected, int32_t found) {
    return "the file holds " + describe(found) + "; this context uses " + describe(expected);
}
