// Records the queries, keys and values of attention while a model reads a text.
//
// The evaluation callback sees every node of the graph before it is computed. Nothing here depends on an architecture or
// on the names it gives its tensors; what is looked at is three ops:
//
//   SET_ROWS into cache_k_l<N> or cache_v_l<N>   its rows are layer N's keys or values as the cache receives them
//   ROPE that such a key comes from              its input is the key before RoPE
//   FLASH_ATTN_EXT that reads cache_k_l<N>       its first operand holds the queries; scale, soft-cap, mask and sinks too
//
// The callback asks for every node to be computed by itself. So when it hears of a node, the node's operands are there,
// and nothing has been computed in their place yet (ROPE runs in place).
//
// A first pass over one token finds the layers and shapes. Then the file can be laid out and rows written where they
// belong as they come, so memory does not grow with the text.

#include "arg.h"
#include "build-info.h"
#include "common.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"
#include "llama-cpp.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <climits>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using json = nlohmann::ordered_json;

static const char * const USAGE =
    "usage: llama-tq-capture -m model.gguf -f text.txt -o out.safetensors [options]\n"
    "\n"
    "Record queries, keys and values of attention, as the cache receives them, while the model reads the text.\n"
    "\n"
    "  -m,  --model FILE       the model\n"
    "  -f,  --file FILE        the text\n"
    "  -o,  --output FILE      what to write (safetensors)\n"
    "  -c,  --ctx-size N       tokens a chunk; each chunk starts with an empty cache (default 2048)\n"
    "       --max-tokens N     stop after N tokens (default: one chunk)\n"
    "       --layers LIST      layers to record, e.g. 0,5,10 (default: all)\n"
    "       --dtype f32|f16    type of the recorded numbers (default f32)\n"
    "       --meta KEY=VALUE   a string for the file's metadata; may be repeated\n"
    "       --force            replace the output if it exists\n"
    "\n"
    "Other options, -t and -ngl for example, are those of llama.cpp's programs. The cache is f32 and flash attention is on.\n";

struct capture_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct options {
    std::string text_path;
    std::string out_path;
    std::string layers = "all";
    bool        f16    = false;
    bool        force  = false;
    int64_t     max_tokens = 0; // 0: one chunk

    std::vector<std::pair<std::string, std::string>> meta;
};

static std::atomic<bool> g_interrupted(false);

//
// tensors
//

static const ggml_tensor * root(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// N if the tensor is, or is a view of, <prefix>N; otherwise -1
static int cache_layer(const ggml_tensor * t, const char * prefix) {
    const char * name = root(t)->name;
    const size_t n    = strlen(prefix);
    if (strncmp(name, prefix, n) != 0 || name[n] < '0' || name[n] > '9') {
        return -1;
    }
    return atoi(name + n);
}

// the cached layer that an operand of attention comes from; upstream casts an f32 cache to f16 first
static int operand_layer(const ggml_tensor * t, const char * prefix) {
    while (t != nullptr) {
        const int il = cache_layer(t, prefix);
        if (il >= 0) {
            return il;
        }
        t = root(t);
        t = t->op == GGML_OP_CPY || t->op == GGML_OP_CONT || t->op == GGML_OP_DUP ? t->src[0] : nullptr;
    }
    return -1;
}

// the ROPE whose whole result the tensor is, in another shape at most; otherwise null
static const ggml_tensor * whole_rope(const ggml_tensor * t) {
    const int64_t n = ggml_nelements(t);
    while (t != nullptr && ggml_nelements(t) == n) {
        switch (t->op) {
            case GGML_OP_ROPE:
                return t;
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
            case GGML_OP_CONT:
            case GGML_OP_CPY:
            case GGML_OP_DUP:
                t = t->src[0];
                break;
            default:
                return nullptr;
        }
    }
    return nullptr;
}

// all elements as floats in the order of the axes `order`, outermost first
static std::vector<float> read(const ggml_tensor * t, const int (&order)[4] = { 3, 2, 1, 0 }) {
    if (t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_F16) {
        throw capture_error(std::string("cannot read '") + t->name + "' of type " + ggml_type_name(t->type));
    }
    std::vector<uint8_t> raw(ggml_nbytes(t)); // the span of a view, gaps included
    ggml_backend_tensor_get(t, raw.data(), 0, raw.size());

    std::vector<float> out;
    out.reserve(ggml_nelements(t));
    int64_t i[4];
    for (i[order[0]] = 0; i[order[0]] < t->ne[order[0]]; i[order[0]]++) {
        for (i[order[1]] = 0; i[order[1]] < t->ne[order[1]]; i[order[1]]++) {
            for (i[order[2]] = 0; i[order[2]] < t->ne[order[2]]; i[order[2]]++) {
                for (i[order[3]] = 0; i[order[3]] < t->ne[order[3]]; i[order[3]]++) {
                    const uint8_t * p = raw.data() + i[0]*t->nb[0] + i[1]*t->nb[1] + i[2]*t->nb[2] + i[3]*t->nb[3];
                    out.push_back(t->type == GGML_TYPE_F32 ? *(const float *) p : ggml_fp16_to_fp32(*(const ggml_fp16_t *) p));
                }
            }
        }
    }
    return out;
}

static float op_param_f32(const ggml_tensor * t, int i) {
    float x;
    memcpy(&x, t->op_params + i, sizeof(x));
    return x;
}

static json rope_params(const ggml_tensor * rope) {
    const int32_t * p = rope->op_params;
    return {
        { "n_dims",      p[1] },
        { "mode",        p[2] },
        { "n_ctx_orig",  p[4] },
        { "freq_base",   op_param_f32(rope, 5) },
        { "freq_scale",  op_param_f32(rope, 6) },
        { "ext_factor",  op_param_f32(rope, 7) },
        { "attn_factor", op_param_f32(rope, 8) },
        { "beta_fast",   op_param_f32(rope, 9) },
        { "beta_slow",   op_param_f32(rope, 10) },
        { "sections",    { p[11], p[12], p[13], p[14] } },
        { "offset",      p[15] },
    };
}

//
// what is known of a layer
//

struct layer_info {
    bool has_k      = false; // written to the cache
    bool has_v      = false;
    bool has_k_pre  = false;
    bool v_in_k     = false; // MLA: a value is the first part of its key
    int  n_readers  = 0;     // attention ops over this layer's cache: more than one where layers share it

    int64_t n_head   = 0;
    int64_t dim_q    = 0;
    int64_t n_head_k = 0;
    int64_t dim_k    = 0;
    int64_t n_head_v = 0;
    int64_t dim_v    = 0;

    float scale    = 0.0f;
    float max_bias = 0.0f;
    float soft_cap = 0.0f;

    json rope;
    std::vector<float> rope_factors;
    std::vector<float> sinks;

    std::vector<int32_t> visible; // cells that each recorded query may see
};

// 0: every query sees all before it; W: at most the last W; -1: something else
static int window_of(const std::vector<int32_t> & visible, const std::vector<int32_t> & positions) {
    const int32_t most = visible.empty() ? 0 : *std::max_element(visible.begin(), visible.end());
    bool full = true;
    bool sliding = true;
    for (size_t i = 0; i < visible.size(); i++) {
        full    = full    && visible[i] == positions[i] + 1;
        sliding = sliding && visible[i] == std::min(positions[i] + 1, most);
    }
    return full ? 0 : sliding ? most : -1;
}

//
// the file
//

class safetensors_writer {
  public:
    safetensors_writer(const std::string & path, bool f16) : f16(f16), path(path), tmp_path(path + ".tmp") {
        file.open(tmp_path, std::ios::binary | std::ios::trunc);
        if (!file) {
            throw capture_error("cannot write " + tmp_path + ": " + strerror(errno));
        }
    }

    ~safetensors_writer() {
        if (!done) {
            file.close();
            std::error_code ignored;
            std::filesystem::remove(tmp_path, ignored);
        }
    }

    void add(const std::string & name, const char * dtype, const std::vector<int64_t> & shape) {
        const size_t size = strcmp(dtype, "F16") == 0 ? 2 : 4;
        size_t n = 1;
        for (int64_t d : shape) {
            n *= d;
        }
        tensors[name] = { offset, n/shape[0]*size };
        header[name]  = { { "dtype", dtype }, { "shape", shape }, { "data_offsets", { offset, offset + n*size } } };
        offset += n*size;
    }

    // the header is written last, when all metadata is known; `spare` bytes are kept for what the metadata may grow by
    void layout(const json & metadata, size_t spare) {
        header_size = (with_metadata(metadata).size() + spare + 7)/8*8;
    }

    void put_raw(const std::string & name, int64_t first_row, const void * data, size_t size) {
        const auto & t = tensors.at(name);
        file.seekp(8 + header_size + t.offset + first_row*t.row_size);
        file.write((const char *) data, size);
        if (!file) {
            throw capture_error("cannot write " + tmp_path + ": " + strerror(errno));
        }
    }

    void put(const std::string & name, int64_t first_row, const std::vector<float> & x) {
        if (!f16) {
            put_raw(name, first_row, x.data(), x.size()*sizeof(float));
            return;
        }
        std::vector<ggml_fp16_t> half(x.size());
        ggml_fp32_to_fp16_row(x.data(), half.data(), x.size());
        put_raw(name, first_row, half.data(), half.size()*sizeof(ggml_fp16_t));
    }

    void finish(const json & metadata) {
        std::string text = with_metadata(metadata);
        GGML_ASSERT(text.size() <= header_size);
        text.resize(header_size, ' ');
        uint8_t size[8];
        for (int i = 0; i < 8; i++) {
            size[i] = (uint8_t) (header_size >> 8*i);
        }
        file.seekp(0);
        file.write((const char *) size, 8);
        file.write(text.data(), text.size());
        file.close();
        if (!file) {
            throw capture_error("cannot write " + tmp_path + ": " + strerror(errno));
        }
        std::error_code error;
        std::filesystem::rename(tmp_path, path, error);
        if (error) {
            throw capture_error("cannot rename " + tmp_path + " to " + path + ": " + error.message());
        }
        done = true;
    }

    const bool f16;

  private:
    struct place {
        size_t offset;
        size_t row_size;
    };

    std::string with_metadata(const json & metadata) const {
        json all;
        all["__metadata__"] = metadata;
        all.update(header);
        return all.dump(-1, ' ', false, json::error_handler_t::replace);
    }

    std::string path;
    std::string tmp_path;
    std::ofstream file;
    std::map<std::string, place> tensors;
    json   header      = json::object();
    size_t header_size = 0;
    size_t offset      = 0;
    bool   done        = false;
};

//
// the recorder
//

struct recorder {
    std::map<int, layer_info> layers;
    std::string error; // the first; exceptions must not pass through the scheduler

    safetensors_writer * out = nullptr; // null: find out what there is to record
    int64_t row      = 0;  // of the batch's first token in the file
    int64_t n_tokens = 0;  // in the batch

    std::unordered_map<const ggml_tensor *, std::vector<float>> before_rope;
    std::map<int, int> n_reads; // of a layer's cache in this batch

    void begin_batch(int64_t first_row, int64_t n) {
        row      = first_row;
        n_tokens = n;
        n_reads.clear();
        before_rope.clear();
    }

    bool wanted(int il) const {
        return out == nullptr || layers.count(il) > 0;
    }

    void see(const ggml_tensor * t) {
        if (t->op == GGML_OP_ROPE) {
            before_rope[t] = read(t->src[0]);
        } else if (t->op == GGML_OP_SET_ROWS) {
            const int il_k = cache_layer(t, "cache_k_l");
            const int il_v = cache_layer(t, "cache_v_l");
            if (il_k >= 0 && wanted(il_k)) {
                see_key(t, il_k);
            } else if (il_v >= 0 && wanted(il_v)) {
                see_value(t, il_v);
            }
        } else if (t->op == GGML_OP_FLASH_ATTN_EXT) {
            const int il = operand_layer(t->src[1], "cache_k_l");
            if (il >= 0 && wanted(il)) {
                see_attention(t, il);
            }
            before_rope.clear();
        }
    }

  private:
    static std::string name(const char * what, int il) {
        return std::string(what) + "." + std::to_string(il);
    }

    void check_rows(int64_t n, int il) const {
        if (n != n_tokens) {
            throw capture_error("layer " + std::to_string(il) + " handles " + std::to_string(n) + " tokens of a batch of " +
                std::to_string(n_tokens));
        }
    }

    void see_key(const ggml_tensor * t, int il) {
        check_rows(t->src[0]->ne[1], il);
        const ggml_tensor * rope = whole_rope(t->src[0]);
        if (out == nullptr) {
            layer_info & info = layers[il];
            info.has_k     = true;
            info.n_head_k  = t->src[0]->ne[0]; // divided by the head dim when attention shows that
            info.has_k_pre = rope != nullptr;
            if (rope != nullptr) {
                info.rope = rope_params(rope);
                if (rope->src[2] != nullptr) {
                    info.rope_factors = read(rope->src[2]);
                }
            }
            return;
        }
        out->put(name("k", il), row, read(t->src[0]));
        if (layers.at(il).has_k_pre) {
            if (before_rope.count(rope) == 0) {
                throw capture_error("layer " + std::to_string(il) + ": the graph changed between batches");
            }
            out->put(name("k_pre", il), row, before_rope[rope]);
        }
    }

    void see_value(const ggml_tensor * t, int il) {
        if (out == nullptr) {
            if (t->src[2]->ne[0] == 1) {
                throw capture_error("values are cached transposed: this model does not use flash attention");
            }
            layers[il].has_v    = true;
            layers[il].n_head_v = t->src[0]->ne[0];
            return;
        }
        check_rows(t->src[0]->ne[1], il);
        out->put(name("v", il), row, read(t->src[0]));
    }

    void see_attention(const ggml_tensor * t, int il) {
        const ggml_tensor * q    = t->src[0];
        const ggml_tensor * k    = t->src[1];
        const ggml_tensor * v    = t->src[2];
        const ggml_tensor * mask = t->src[3];
        check_rows(q->ne[1], il);
        const int reader = n_reads[il]++;
        if (out == nullptr) {
            layer_info & info = layers[il];
            info.n_readers = n_reads[il];
            if (reader > 0) {
                return;
            }
            if (!info.has_k || q->ne[3] != 1) {
                throw capture_error("layer " + std::to_string(il) + " reads keys that were not written for this batch");
            }
            info.n_head    = q->ne[2];
            info.dim_q     = q->ne[0];
            info.dim_k     = k->ne[0];
            info.dim_v     = v->ne[0];
            info.n_head_k /= k->ne[0];
            info.n_head_v /= v->ne[0];
            info.v_in_k    = !info.has_v && operand_layer(v, "cache_k_l") == il;
            info.scale     = op_param_f32(t, 0);
            info.max_bias  = op_param_f32(t, 1);
            info.soft_cap  = op_param_f32(t, 2);
            if (t->src[4] != nullptr) {
                info.sinks = read(t->src[4]);
            }
            return;
        }
        if (reader > 0) {
            return;
        }
        out->put(name("q", il), row, read(q, { 3, 1, 2, 0 })); // from [head][token] to [token][head]

        layer_info & info = layers.at(il);
        if (mask == nullptr) {
            info.visible.insert(info.visible.end(), n_tokens, -1);
            return;
        }
        const std::vector<float> m = read(mask);
        for (int64_t i = 0; i < n_tokens; i++) {
            const float * p = m.data() + i*mask->ne[0];
            info.visible.push_back((int32_t) std::count_if(p, p + mask->ne[0], [](float x) { return x != -INFINITY; }));
        }
    }
};

static bool on_node(ggml_tensor * t, bool ask, void * user_data) {
    recorder * rec = (recorder *) user_data;
    if (!ask) {
        return true;
    }
    if (rec->error.empty()) {
        try {
            rec->see(t);
        } catch (const std::exception & e) {
            rec->error = e.what();
        }
    }
    return t->op != GGML_OP_NONE && t->op != GGML_OP_VIEW && t->op != GGML_OP_RESHAPE && t->op != GGML_OP_PERMUTE &&
           t->op != GGML_OP_TRANSPOSE;
}

//
// command line
//

static int64_t parse_count(const std::string & option, const std::string & value) {
    size_t end = 0;
    int64_t n = 0;
    try {
        n = std::stoll(value, &end);
    } catch (const std::exception &) {
        end = 0;
    }
    if (end == 0 || end != value.size() || n <= 0) {
        throw capture_error(option + " " + value + ": want a positive number");
    }
    return n;
}

// takes out this program's own options; what stays in args is for llama.cpp's parser
static options parse_own(std::vector<char *> & args) {
    options opt;
    std::vector<char *> rest = { args[0] };
    for (size_t i = 1; i < args.size(); i++) {
        const std::string a = args[i];
        const auto value = [&]() -> std::string {
            if (i + 1 >= args.size()) {
                throw capture_error(a + " needs a value");
            }
            return args[++i];
        };
        if (a == "-h" || a == "--help") {
            printf("%s", USAGE);
            exit(0);
        } else if (a == "-f" || a == "--file") {
            opt.text_path = value();
        } else if (a == "-o" || a == "--output") {
            opt.out_path = value();
        } else if (a == "--layers") {
            opt.layers = value();
        } else if (a == "--max-tokens") {
            opt.max_tokens = parse_count(a, value());
        } else if (a == "--force") {
            opt.force = true;
        } else if (a == "--dtype") {
            const std::string type = value();
            if (type != "f32" && type != "f16") {
                throw capture_error("--dtype " + type + ": want f32 or f16");
            }
            opt.f16 = type == "f16";
        } else if (a == "--meta") {
            const std::string pair = value();
            const size_t eq = pair.find('=');
            if (eq == std::string::npos || eq == 0) {
                throw capture_error("--meta " + pair + ": want KEY=VALUE");
            }
            opt.meta.emplace_back(pair.substr(0, eq), pair.substr(eq + 1));
        } else {
            rest.push_back(args[i]);
        }
    }
    args = rest;
    return opt;
}

static std::set<int> parse_layers(const std::string & list, int n_layer) {
    std::set<int> layers;
    size_t begin = 0;
    while (begin <= list.size()) {
        const size_t end = std::min(list.find(',', begin), list.size());
        const std::string item = list.substr(begin, end - begin);
        if (item.empty() || item.size() > 6 || item.find_first_not_of("0123456789") != std::string::npos) {
            throw capture_error("--layers " + list + ": want numbers with commas between them, or all");
        }
        const int il = std::stoi(item);
        if (il >= n_layer) {
            throw capture_error("--layers " + list + ": the model's layers are 0 to " + std::to_string(n_layer - 1));
        }
        layers.insert(il);
        begin = end + 1;
    }
    return layers;
}

static std::string read_text(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (!in.is_open() || in.bad() || std::filesystem::is_directory(path)) {
        throw capture_error("cannot read " + path);
    }
    return text;
}

//
// the run
//

static void decode(llama_context * ctx, recorder & rec, const std::vector<llama_token> & tokens, int64_t first, int64_t n, int32_t pos) {
    rec.begin_batch(first, n);
    common_batch batch(ctx);
    for (int64_t i = 0; i < n; i++) {
        batch.add(tokens[first + i], pos + i, 0, i == n - 1);
    }
    const int status = llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch.get());
    if (g_interrupted) {
        throw capture_error("interrupted");
    }
    if (!rec.error.empty()) {
        throw capture_error(rec.error);
    }
    if (status != 0) {
        throw capture_error("evaluation failed with status " + std::to_string(status));
    }
}

// drops the layers that are not asked for; complains about those that are not there
static void choose_layers(recorder & rec, const std::string & list, int n_layer) {
    std::string have;
    for (auto it = rec.layers.begin(); it != rec.layers.end();) {
        if (it->second.n_readers == 0) { // written, never read by flash attention
            it = rec.layers.erase(it);
            continue;
        }
        have += (have.empty() ? "" : ",") + std::to_string(it->first);
        ++it;
    }
    if (rec.layers.empty()) {
        throw capture_error("no layer of this model caches keys and reads them with flash attention");
    }
    if (list == "all") {
        return;
    }
    const std::set<int> wanted = parse_layers(list, n_layer);
    for (int il : wanted) {
        if (rec.layers.count(il) == 0) {
            throw capture_error("layer " + std::to_string(il) + " has no attention cache of its own; these have: " + have);
        }
    }
    for (auto it = rec.layers.begin(); it != rec.layers.end();) {
        it = wanted.count(it->first) ? std::next(it) : rec.layers.erase(it);
    }
}

static json describe_layers(const recorder & rec, const std::vector<int32_t> & positions) {
    json all = json::object();
    for (const auto & [il, info] : rec.layers) {
        json j = {
            { "n_head",     info.n_head },
            { "n_head_kv",  info.n_head_k },
            { "head_dim_k", info.dim_k },
            { "head_dim_v", info.dim_v },
            { "v_in_k",     info.v_in_k },
            { "readers",    info.n_readers },
            { "scale",      info.scale },
            { "soft_cap",   info.soft_cap },
            { "max_bias",   info.max_bias },
            { "window",     info.visible.empty() ? 0 : window_of(info.visible, positions) },
        };
        if (info.has_k_pre) {
            j["rope"] = info.rope;
        }
        all[std::to_string(il)] = j;
    }
    return all;
}

static void declare_tensors(safetensors_writer & out, const recorder & rec, int64_t n) {
    const char * type = out.f16 ? "F16" : "F32";
    for (const char * name : { "tokens", "positions", "chunk" }) {
        out.add(name, "I32", { n });
    }
    for (const auto & [il, info] : rec.layers) {
        const std::string suffix = "." + std::to_string(il);
        out.add("q" + suffix, type, { n, info.n_head,   info.dim_q });
        out.add("k" + suffix, type, { n, info.n_head_k, info.dim_k });
        if (info.has_v) {
            out.add("v" + suffix, type, { n, info.n_head_v, info.dim_v });
        }
        if (info.has_k_pre) {
            out.add("k_pre" + suffix, type, { n, info.n_head_k, info.dim_k });
        }
        if (!info.rope_factors.empty()) {
            out.add("rope_factors" + suffix, "F32", { (int64_t) info.rope_factors.size() });
        }
        if (!info.sinks.empty()) {
            out.add("sinks" + suffix, "F32", { (int64_t) info.sinks.size() });
        }
    }
}

static std::string first_llama_error; // the later ones say that something failed, not why

static void on_log(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && first_llama_error.empty()) {
        first_llama_error = text;
        while (!first_llama_error.empty() && isspace((unsigned char) first_llama_error.back())) {
            first_llama_error.pop_back();
        }
    }
}

static std::string because(const std::string & what) {
    return first_llama_error.empty() ? what : what + ": " + first_llama_error;
}

static void run(const options & opt, common_params & params) {
    if (params.model.path.empty() || opt.text_path.empty() || opt.out_path.empty()) {
        throw capture_error("want a model (-m), a text (-f) and an output (-o); see --help");
    }
    if (!std::filesystem::is_regular_file(params.model.path)) {
        throw capture_error("no model " + params.model.path);
    }
    if (std::filesystem::is_directory(opt.out_path)) {
        throw capture_error(opt.out_path + " is a directory");
    }
    if (!opt.force && std::filesystem::exists(opt.out_path)) {
        throw capture_error(opt.out_path + " exists; --force replaces it");
    }
    const std::string text = read_text(opt.text_path);
    if (opt.layers != "all") {
        parse_layers(opt.layers, INT_MAX); // before the model is loaded
    }

    recorder rec;
    const int32_t n_chunk = params.n_ctx > 0 ? params.n_ctx : 2048;
    params.n_ctx             = n_chunk;
    params.n_parallel        = 1;
    params.n_batch           = std::min(params.n_ubatch, n_chunk); // a batch is one graph
    params.n_ubatch          = params.n_batch;
    params.cache_type_k      = GGML_TYPE_F32;
    params.cache_type_v      = GGML_TYPE_F32;
    params.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval           = on_node;
    params.cb_eval_user_data = &rec;

    llama_log_set(on_log, nullptr);
    llama_backend_init();
    llama_numa_init(params.numa);

    llama_model_ptr model(llama_model_load_from_file(params.model.path.c_str(), common_model_params_to_llama(params)));
    if (!model) {
        throw capture_error(because("cannot load " + params.model.path));
    }
    if (llama_model_has_encoder(model.get())) {
        throw capture_error("encoder-decoder models are not supported");
    }
    llama_context_ptr ctx(llama_init_from_model(model.get(), common_context_params_to_llama(params)));
    if (!ctx) {
        throw capture_error(because("cannot make a context"));
    }
    llama_set_abort_callback(ctx.get(), [](void *) -> bool { return g_interrupted; }, nullptr);

    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    std::vector<llama_token> tokens = common_tokenize(vocab, text, llama_vocab_get_add_bos(vocab), false);
    tokens.resize(std::min<size_t>(tokens.size(), opt.max_tokens > 0 ? opt.max_tokens : n_chunk));
    if (tokens.empty()) {
        throw capture_error(opt.text_path + " has no tokens");
    }
    const int64_t n = tokens.size();
    std::vector<int32_t> positions(n);
    std::vector<int32_t> chunk(n);
    for (int64_t i = 0; i < n; i++) {
        positions[i] = i % n_chunk;
        chunk[i]     = i / n_chunk;
        if (positions[i] == 0 && llama_vocab_get_add_bos(vocab)) {
            tokens[i] = llama_vocab_bos(vocab); // each chunk starts as a text does; upstream's perplexity does the same
        }
    }

    llama_memory_t mem = llama_get_memory(ctx.get());
    if (mem == nullptr) {
        throw capture_error("this model has no cache");
    }
    decode(ctx.get(), rec, tokens, 0, 1, 0);
    choose_layers(rec, opt.layers, llama_model_n_layer(model.get()));

    json meta = {
        { "format",     "ggml-tq-capture 1" },
        { "model",      std::filesystem::path(params.model.path).filename().string() },
        { "model_size", std::to_string(std::filesystem::file_size(params.model.path)) },
        { "text",       std::filesystem::path(opt.text_path).filename().string() },
        { "n_ctx",      std::to_string(n_chunk) },
        { "cache_type", "f32" },
        { "llama_cpp",  llama_commit() },
    };
    for (const auto & [key, meta_key] : { std::pair("general.architecture", "arch"), std::pair("general.name", "model_name") }) {
        char value[256];
        if (llama_model_meta_val_str(model.get(), key, value, sizeof(value)) >= 0) {
            meta[meta_key] = value;
        }
    }
    for (const auto & [key, value] : opt.meta) {
        meta[key] = value;
    }
    meta["layers"] = describe_layers(rec, positions).dump();

    safetensors_writer out(opt.out_path, opt.f16);
    declare_tensors(out, rec, n);
    out.layout(meta, 16*rec.layers.size()); // the windows are known at the end
    out.put_raw("tokens",    0, tokens.data(),    n*sizeof(int32_t));
    out.put_raw("positions", 0, positions.data(), n*sizeof(int32_t));
    out.put_raw("chunk",     0, chunk.data(),     n*sizeof(int32_t));
    for (const auto & [il, info] : rec.layers) {
        if (!info.rope_factors.empty()) {
            out.put_raw("rope_factors." + std::to_string(il), 0, info.rope_factors.data(), info.rope_factors.size()*sizeof(float));
        }
        if (!info.sinks.empty()) {
            out.put_raw("sinks." + std::to_string(il), 0, info.sinks.data(), info.sinks.size()*sizeof(float));
        }
    }

    rec.out = &out;
    for (int64_t first = 0; first < n;) {
        if (positions[first] == 0) {
            llama_memory_clear(mem, true);
        }
        const int64_t size = std::min<int64_t>({ params.n_batch, n - first, n_chunk - positions[first] });
        decode(ctx.get(), rec, tokens, first, size, positions[first]);
        first += size;
        fprintf(stderr, "%lld of %lld tokens\n", (long long) first, (long long) n);
    }
    meta["layers"] = describe_layers(rec, positions).dump();
    out.finish(meta);
    printf("%s: %zu layers, %lld tokens\n", opt.out_path.c_str(), rec.layers.size(), (long long) n);
}

int main(int argc, char ** argv) {
    std::signal(SIGINT,  [](int) { g_interrupted = true; });
    std::signal(SIGTERM, [](int) { g_interrupted = true; });
    try {
        std::vector<char *> args(argv, argv + argc);
        const options opt = parse_own(args);
        common_params params;
        params.n_ctx = 0;
        if (!common_params_parse((int) args.size(), args.data(), params, LLAMA_EXAMPLE_COMMON)) {
            return 1;
        }
        run(opt, params);
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
    return 0;
}
