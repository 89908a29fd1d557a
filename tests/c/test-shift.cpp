// Positions that move to and from 0, whose key has a center of its own (docs/format.md section 10): llama_memory_seq_add as an
// application may call it. Prints the mean KL divergence from an f16 cache that was moved alike, of the tokens after it.
//
//   test-shift MODEL TYPE_K

#include "llama.h"

#include "../type-of.h"

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

static const int32_t N_TOKENS = 40;
static const int32_t N_ASKED  = 24;

// logarithms of the next token's probabilities, for different last tokens, after `moves`
static std::vector<std::vector<double>> distributions(llama_model * model, ggml_type type_k, llama_pos end,
        const std::vector<std::function<void(llama_memory_t)>> & moves) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 256;
    params.type_k          = type_k;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.n_threads       = params.n_threads_batch = 2;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        exit(1);
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::mt19937 rng(4);
    const auto token = [&]() { return (llama_token) (300 + rng() % (n_vocab - 300)); };

    llama_batch batch = llama_batch_init(N_TOKENS, 0, 1);
    const auto decode = [&](int32_t n, llama_pos first) {
        batch.n_tokens = n;
        for (int32_t i = 0; i < n; ++i) {
            batch.token[i] = token();
            batch.pos[i]   = first + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = i == n - 1;
        }
        if (llama_decode(ctx, batch) != 0) {
            exit(1);
        }
    };
    decode(N_TOKENS, 0);
    llama_memory_t memory = llama_get_memory(ctx);
    for (const auto & move : moves) {
        move(memory);
        const llama_pos next = llama_memory_seq_pos_max(memory, 0) + 1;
        decode(1, next); // a shift is done when the cache is next used
        llama_memory_seq_rm(memory, 0, next, -1);
    }

    std::vector<std::vector<double>> found;
    for (int32_t k = 0; k < N_ASKED; ++k) {
        decode(1, end);
        const float * logits = llama_get_logits_ith(ctx, -1);
        double sum = 0.0;
        for (int32_t i = 0; i < n_vocab; ++i) {
            sum += exp(logits[i]);
        }
        std::vector<double> p(n_vocab);
        for (int32_t i = 0; i < n_vocab; ++i) {
            p[i] = logits[i] - log(sum);
        }
        found.push_back(std::move(p));
        llama_memory_seq_rm(memory, 0, end, -1);
    }
    llama_batch_free(batch);
    llama_free(ctx);
    return found;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL TYPE_K\n", argv[0]);
        return 1;
    }
    const ggml_type type_k = type_of(argv[2]);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    const auto leave  = [](llama_memory_t m) { llama_memory_seq_add(m, 0, 0, -1, 30); };
    const auto arrive = [](llama_memory_t m) { llama_memory_seq_rm(m, 0, 0, 7); llama_memory_seq_add(m, 0, 7, -1, -7); };
    const auto come   = [](llama_memory_t m) { llama_memory_seq_add(m, 0, 30, -1, -30); };
    const auto halve  = [](llama_memory_t m) { llama_memory_seq_div(m, 0, 0, -1, 2); };
    const struct { const char * name; llama_pos end; std::vector<std::function<void(llama_memory_t)>> moves; } cases[] = {
        { "still",   N_TOKENS,      { [](llama_memory_t) {} } },
        { "leaves",  N_TOKENS + 30, { leave } },
        { "arrives", N_TOKENS - 7,  { arrive } },
        { "returns", N_TOKENS,      { leave, come } },
        { "halves",  N_TOKENS/2,    { halve } },
    };
    for (const auto & c : cases) {
        const auto want = distributions(model, GGML_TYPE_F16, c.end, c.moves);
        const auto got  = distributions(model, type_k,        c.end, c.moves);
        double kl = 0.0;
        for (size_t k = 0; k < want.size(); ++k) {
            for (size_t i = 0; i < want[k].size(); ++i) {
                kl += exp(want[k][i])*(want[k][i] - got[k][i])/want.size();
            }
        }
        printf("%s %.6f\n", c.name, kl);
    }
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
