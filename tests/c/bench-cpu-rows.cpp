// Time of what the library does with rows, one thread: every implementation of this machine, beside the speed of its memory.
// Subjects are run in turn, round by round, so that a busy machine disturbs all alike; what is measured is the processor's time, not
// that of others. Shown are medians over rounds.

#include "ggml-tq.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

static const char * const usage =
    "usage: bench-cpu-rows [-n VALUES_A_ROW] [-m MIB_OF_FLOATS] [-g QUERIES] [-r ROUNDS] [--json] [TYPE...]\n"
    "\n"
    "  encode, decode  rows of floats to packed rows (tq_encode) and back (tq_decode)\n"
    "  dot             packed rows with a query each (tq_dot)\n"
    "  keys, values    tiles of 64 rows: unpacked, and multiplied with the numbers of QUERIES queries (tq_tile_*)\n"
    "  read, copy      memory alone: words summed up, and memcpy; bytes of a copy count once\n"
    "\n"
    "  -n  values a row, a multiple of 64 (1024); -m: floats in turn (32 MiB: more than caches hold); -g: 4; -r: 7\n"
    "  --json  a line a subject instead of a table\n"
    "  TYPE    tq4_tcq, ...; all without any\n";

struct options {
    int  n        = 1024;
    int  mib      = 32;
    int  n_q      = 4;
    int  n_rounds = 7;
    bool json     = false;
};

using runs = std::function<void(int64_t first, int64_t n)>; // rows

struct subject {
    std::string op;
    std::string type;
    std::string implementation;
    double      packed_bytes; // a row
    double      float_bytes;
    bool        tiles;
    runs        run;
    int64_t     at = 0; // the next row
    std::vector<double> seconds; // a row
};

static double median(std::vector<double> x) {
    std::nth_element(x.begin(), x.begin() + x.size()/2, x.end());
    return x[x.size()/2];
}

static std::vector<std::string> names(const char * (* of)(int)) {
    std::vector<std::string> result;
    for (int i = 0; of(i); ++i) {
        result.push_back(of(i));
    }
    return result;
}

// at least 20 ms of steps of so many rows
static void measure(subject & s, int64_t n_rows, int64_t step) {
    if (s.tiles) {
        tq_tile_use(s.implementation.c_str());
    } else if (!s.implementation.empty()) {
        tq_rows_use(s.implementation.c_str());
    }
    const std::clock_t start = std::clock();
    std::clock_t ticks = 0;
    int64_t n = 0;
    while (ticks < CLOCKS_PER_SEC/50) {
        s.run(s.at, step);
        n += step;
        s.at  = s.at + 2*step <= n_rows ? s.at + step : 0;
        ticks = std::clock() - start;
    }
    s.seconds.push_back((double) ticks/CLOCKS_PER_SEC/(double) n);
}

int main(int argc, char ** argv) {
    options o;
    std::vector<tq_type> types;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        int * value = arg == "-n" ? &o.n : arg == "-m" ? &o.mib : arg == "-g" ? &o.n_q : arg == "-r" ? &o.n_rounds : nullptr;
        if (value && i + 1 < argc) {
            *value = atoi(argv[++i]);
        } else if (arg == "--json") {
            o.json = true;
        } else if (tq_type_from_name(argv[i], 'k') != TQ_TYPE_COUNT) {
            types.push_back(tq_type_from_name(argv[i], 'k'));
        } else {
            fputs(usage, arg == "--help" || arg == "-h" ? stdout : stderr);
            return arg == "--help" || arg == "-h" ? 0 : 1;
        }
    }
    if (o.n < 64 || o.n%64 != 0 || o.mib < 1 || o.n_q < 1 || o.n_rounds < 1) {
        fputs(usage, stderr);
        return 1;
    }
    for (int t = 0; types.empty() || (t < TQ_TYPE_COUNT && (int) types.size() == t); ++t) {
        types.push_back((tq_type) t);
    }

    const tq_params * params = tq_params_default();
    const int64_t n      = o.n;
    const int64_t n_rows = std::max((int64_t) o.mib*262144/n/64*64, (int64_t) 256);
    std::vector<float> x(n_rows*n), y(n_rows*n);
    std::vector<tq_query_block> query(n/64);
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    for (float & v : x) { v = normal(rng); }
    tq_encode_query(params, x.data(), query.data(), n);

    volatile float   sink_float = 0.0f; // what is computed is used
    volatile int64_t sink_int   = 0;

    std::vector<subject> subjects;
    std::vector<std::vector<uint8_t>> packed(types.size());
    const double row_bytes = (double) (n*sizeof(float));
    subjects.push_back({ "read", "f32", "", 0.0, row_bytes, false, [&](int64_t first, int64_t count) {
        const uint32_t * p = (const uint32_t *) &x[first*n];
        uint32_t sums[64] = { 0 };
        for (int64_t i = 0; i < count*n; i += 64) {
            for (int j = 0; j < 64; ++j) { sums[j] += p[i + j]; }
        }
        for (uint32_t s : sums) { sink_int = sink_int + s; }
    }, 0, {} });
    subjects.push_back({ "copy", "f32", "", 0.0, row_bytes, false, [&](int64_t first, int64_t count) {
        memcpy(&y[first*n], &x[first*n], count*n*sizeof(float));
    }, 0, {} });
    for (size_t i = 0; i < types.size(); ++i) {
        const tq_type     type = types[i];
        const std::string name = tq_get_type_info(type)->name;
        const size_t      size = tq_row_size(type, n);
        std::vector<uint8_t> & rows = packed[i];
        rows.resize(n_rows*size);
        tq_encode(params, type, x.data(), rows.data(), n_rows*n);
        for (const std::string & implementation : names(tq_rows_name)) {
            subjects.push_back({ "encode", name, implementation, (double) size, row_bytes, false, [&, type, size](int64_t first, int64_t count) {
                for (int64_t r = first; r < first + count; ++r) {
                    tq_encode(params, type, &x[r*n], &rows[r*size], n);
                }
            }, 0, {} });
            subjects.push_back({ "decode", name, implementation, (double) size, row_bytes, false, [&, type, size](int64_t first, int64_t count) {
                for (int64_t r = first; r < first + count; ++r) {
                    tq_decode(params, type, &rows[r*size], &y[r*n], n);
                }
            }, 0, {} });
            subjects.push_back({ "dot", name, implementation, (double) size, 0.0, false, [&, type, size](int64_t first, int64_t count) {
                for (int64_t r = first; r < first + count; ++r) {
                    sink_float = sink_float + tq_dot(params, type, &rows[r*size], query.data(), n);
                }
            }, 0, {} });
        }
        const tq_tile_type tile = tq_tile_type_init(params, type);
        for (const std::string & implementation : names(tq_tile_name)) {
            for (const bool values : { false, true }) {
                subjects.push_back({ values ? "values" : "keys", name, implementation, (double) size, 0.0, true,
                        [&, tile, type, size, values](int64_t first, int64_t count) {
                    alignas(64) static int8_t  bytes[2][TQ_TILE_SIZE];
                    alignas(64) static int32_t sums[64*64];
                    memset(sums, 0, sizeof(sums)); // some implementations add to them
                    std::vector<tq_tile_numbers> numbers(o.n_q);
                    for (int q = 0; q < o.n_q; ++q) {
                        tq_tile_split(values, &x[q%16*64], nullptr, 8.0f, &numbers[q]);
                    }
                    for (int64_t r = first; r < first + count; r += 64) {
                        for (int64_t b = 0; b < n/64; ++b) {
                            tq_tile_unpack(&tile, values, &rows[r*size + b*tq_row_size(type, 64)], size, 64, bytes);
                            for (int part = 0; part < tile.n_parts; ++part) {
                                for (int q = 0; q < o.n_q; q += 64) {
                                    tq_tile_multiply(bytes[part], &numbers[q], std::min(o.n_q - q, 64), sums, 64);
                                }
                            }
                        }
                    }
                    sink_int = sink_int + sums[0];
                }, 0, {} });
            }
        }
    }
    for (int round = -1; round < o.n_rounds; ++round) { // the first does not count
        for (auto & s : subjects) {
            measure(s, n_rows, 256);
            if (round < 0) {
                s.seconds.clear();
            }
        }
    }
    if (!o.json) {
        printf("rows of %d, %d MiB of floats, %d queries of tiles, processor time of one thread, median of %d rounds\n", o.n, o.mib, o.n_q, o.n_rounds);
        printf("| | type | implementation | ns a value | packed GB/s | float GB/s |\n|---|---|---|--:|--:|--:|\n");
    }
    for (auto & s : subjects) {
        const double t      = median(s.seconds);
        const double least  = *std::min_element(s.seconds.begin(), s.seconds.end());
        const double packed = s.packed_bytes/t*1e-9;
        const double floats = s.float_bytes/t*1e-9;
        if (o.json) {
            printf("{\"op\": \"%s\", \"type\": \"%s\", \"implementation\": \"%s\", \"row\": %d, \"mib\": %d, \"queries\": %d, \"rounds\": %d, "
                "\"ns\": %.4f, \"least_ns\": %.4f, \"packed_gb_s\": %.3f, \"float_gb_s\": %.3f}\n", s.op.c_str(), s.type.c_str(),
                s.implementation.c_str(), o.n, o.mib, o.n_q, o.n_rounds, t*1e9/n, least*1e9/n, packed, floats);
        } else {
            printf("| %s | %s | %s | %.3f | %.2f | %.2f |\n", s.op.c_str(), s.type.c_str(), s.implementation.c_str(), t*1e9/n, packed, floats);
        }
    }
    return 0;
}
