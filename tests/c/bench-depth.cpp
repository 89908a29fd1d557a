// Speed of whole steps deep in a cache, types in turn, round by round, without the hours that filling it takes: a short prompt is
// computed, and its cells are copied up to the depth as a state of that many cells. What they hold does not change the time. Ratios are
// medians over rounds of a type's speed to the first one's in the same round; what is not attention takes as long as a step of
// the same round with an empty cache.
// usage: bench-depth MODEL [-d DEPTH] [-n TOKENS] [-p PROMPT] [-t THREADS] [-r ROUNDS] TYPE...
// Not in `make build`: cmake --build build --target bench-depth
// A type is one for keys and values, or K/V. Prints a table of generating TOKENS, one by one, and of PROMPT tokens at once if that is not 0.

#include "llama.h"

#include "../type-of.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct options {
    int depth     = 32768;
    int n_tokens  = 16;
    int n_prompt  = 0;
    int n_threads = 2;
    int n_rounds  = 5;
};

static constexpr int N_MADE = 512; // cells that are computed

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

static void decode(llama_context * ctx, int first, int n) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = 300 + (first + i)*7919 % 20000;
        batch.pos[i]       = first + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i == n - 1;
    }
    check(llama_decode(ctx, batch) == 0, "decoding failed");
    llama_synchronize(ctx);
    llama_batch_free(batch);
}

// a sequence's state as one of n_cells cells, which repeat the rows: header, count, (position, 1, sequence) of each cell, then layers
static std::vector<uint8_t> repeat_cells(const std::vector<uint8_t> & state, uint32_t n_cells) {
    std::vector<uint8_t> result;
    const uint8_t * p = state.data();
    const auto copy = [&](size_t size) {
        check(p + size <= state.data() + state.size(), "a state of unknown format");
        result.insert(result.end(), p, p + size);
        p += size;
    };
    const auto last = [&](auto value) {
        memcpy(&value, result.data() + result.size() - sizeof(value), sizeof(value));
        return value;
    };
    copy(4*sizeof(uint32_t)); // magic, sequence, streams, cells
    const uint32_t n = last(uint32_t());
    memcpy(result.data() + result.size() - sizeof(n_cells), &n_cells, sizeof(n_cells));
    for (uint32_t i = 0; i < n_cells; ++i) {
        const uint32_t meta[3] = { i, 1, 0 };
        result.insert(result.end(), (const uint8_t *) meta, (const uint8_t *) (meta + 3));
    }
    p += n*3*sizeof(uint32_t);
    copy(sizeof(uint32_t));
    check(last(uint32_t()) == 0, "values must not be transposed");
    copy(sizeof(uint32_t));
    const uint32_t n_layer = last(uint32_t());
    for (uint32_t i = 0; i < 2*n_layer; ++i) { // keys, then values
        copy(sizeof(int32_t) + sizeof(uint64_t));
        const uint64_t row = last(uint64_t());
        const uint8_t * rows = p;
        for (uint32_t j = 0; j < n_cells; ++j) {
            p = rows + j%n*row;
            copy(row);
        }
        p = rows + n*row;
    }
    check(p == state.data() + state.size(), "a state of unknown format");
    return result;
}

struct subject {
    std::string     name;
    llama_context * ctx[2]; // with an empty cache, with a deep one
    std::vector<double> step[2], prompt[2]; // seconds
};

static llama_context * make_context(llama_model * model, const std::string & name, const options & o, int depth) {
    const size_t slash = name.find('/');
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = depth + std::max({ o.n_tokens, o.n_prompt, N_MADE });
    params.n_batch         = params.n_ubatch = std::max(o.n_prompt, N_MADE);
    params.type_k          = type_of(name.substr(0, slash));
    params.type_v          = slash == std::string::npos ? params.type_k : type_of(name.substr(slash + 1));
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.n_threads       = params.n_threads_batch = o.n_threads;
    llama_context * ctx = llama_init_from_model(model, params);
    check(ctx, "no context");
    if (depth > 0) {
        decode(ctx, 0, std::min(depth, N_MADE));
        std::vector<uint8_t> state(llama_state_seq_get_size(ctx, 0));
        check(llama_state_seq_get_data(ctx, state.data(), state.size(), 0) == state.size(), "no state");
        state = repeat_cells(state, depth);
        check(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) == state.size(), "the state was refused");
    }
    return ctx;
}

static double median(std::vector<double> x) {
    std::nth_element(x.begin(), x.begin() + x.size()/2, x.end());
    return x[x.size()/2];
}

// of a's to b's, in the same round
static double ratio(const std::vector<double> & a, const std::vector<double> & b) {
    std::vector<double> r;
    for (size_t i = 0; i < a.size(); ++i) {
        r.push_back(a[i]/b[i]);
    }
    return median(r);
}

int main(int argc, char ** argv) {
    options o;
    std::vector<subject> subjects;
    for (int i = 2; i < argc; ++i) {
        const std::string arg = argv[i];
        int * value = arg == "-d" ? &o.depth : arg == "-n" ? &o.n_tokens : arg == "-p" ? &o.n_prompt : arg == "-t" ? &o.n_threads : arg == "-r" ? &o.n_rounds : nullptr;
        if (value && i + 1 < argc) {
            *value = atoi(argv[++i]);
        } else {
            subjects.push_back({ arg, {}, {}, {} });
        }
    }
    check(argc > 1 && !subjects.empty() && o.depth > 0 && o.n_tokens > 0 && o.n_prompt >= 0 && o.n_threads > 0 && o.n_rounds > 0, "usage: bench-depth MODEL [-d DEPTH] [-n TOKENS] [-p PROMPT] [-t THREADS] [-r ROUNDS] TYPE...");
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) { fputs(text, stderr); } }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    check(model, "no model");
    for (auto & s : subjects) {
        for (int deep = 0; deep < 2; ++deep) {
            s.ctx[deep] = make_context(model, s.name, o, deep ? o.depth : 0);
        }
    }
    for (int round = -1; round < o.n_rounds; ++round) { // the first one warms up
        for (auto & s : subjects) {
            for (int deep = 0; deep < 2; ++deep) {
                const int first = deep ? o.depth : 0;
                const auto time = [&](std::vector<double> & seconds, int n, int at_once) { // of a token
                    const auto start = std::chrono::steady_clock::now();
                    for (int i = 0; i < n; i += at_once) {
                        decode(s.ctx[deep], first + i, at_once);
                    }
                    if (round >= 0) {
                        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()/n);
                    }
                    llama_memory_seq_rm(llama_get_memory(s.ctx[deep]), 0, first, -1);
                };
                time(s.step[deep], o.n_tokens, 1);
                if (o.n_prompt > 0) {
                    time(s.prompt[deep], o.n_prompt, o.n_prompt);
                }
            }
        }
    }
    printf("%d threads, medians of %d rounds of %d tokens\n\n", o.n_threads, o.n_rounds, o.n_tokens);
    printf("| K/V | what | depth 0, tokens/s | ÷ %s | depth %d, tokens/s | ÷ %s | lowest, highest | attention's share |\n|---|---|--:|--:|--:|--:|--:|--:|\n",
        subjects[0].name.c_str(), o.depth, subjects[0].name.c_str());
    for (int prompt = 0; prompt < (o.n_prompt > 0 ? 2 : 1); ++prompt) {
        for (auto & s : subjects) {
            const auto * t     = prompt ? s.prompt : s.step;
            const auto * other = prompt ? subjects[0].prompt : subjects[0].step;
            double lowest = 1e9, highest = 0.0;
            for (int i = 0; i < o.n_rounds; ++i) {
                lowest  = std::min(lowest,  other[1][i]/t[1][i]);
                highest = std::max(highest, other[1][i]/t[1][i]);
            }
            printf("| %s | %s | %.1f | %.2f | %.2f | %.2f | %.2f, %.2f | %.0f %% |\n", s.name.c_str(), prompt ? "prompt" : "generating", 1.0/median(t[0]), ratio(other[0], t[0]),
                1.0/median(t[1]), ratio(other[1], t[1]), lowest, highest, 100.0*(1.0 - ratio(t[0], t[1])));
        }
    }
    for (auto & s : subjects) {
        llama_free(s.ctx[0]);
        llama_free(s.ctx[1]);
    }
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
