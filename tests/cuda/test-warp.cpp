// The device code that encodes and decodes a block, in an emulated warp, against the C library: bytes and floats must be
// equal. And the arithmetic on words that makes operands for tensor cores of packed blocks. Shows on machines without a GPU that the two do the same; what nvcc makes of it test-backend.cpp shows.
// usage: test-warp [blocks]

#include "warp.h"

#include "tq-quarter.cuh"
#include "tq-trellis.cuh"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" void tq_trellis_encode(int bits, int n_blocks, const float (* u)[64], uint8_t (* codes)[64]);

static const tq_params * params = tq_params_default();

template <tq_kind kind, int bits> static void encode(const tq_codec & codec, const float * x, uint16_t * block) {
    if constexpr (kind == TQ_KIND_TCQ) { // the kernel searches in a warp for each multiple
        static tq_search<bits> search;
        static uint16_t halfwords[TQ_N_MULTIPLES][32];
        float quality[TQ_N_MULTIPLES];
        for (int k = 0; k < TQ_N_MULTIPLES; ++k) {
            warp::run([&](int lane) {
                const tq_unit  n     = tq_normalize(codec, make_float2(x[lane], x[lane + 32]), lane);
                const tq_codes codes = tq_path(codec.table, n.u, tq_multiple(k), search, tq_prepare(search, codec.table, lane), lane);
                float q;
                halfwords[k][lane] = tq_halfword<kind, bits>(n, codes, q, lane);
                quality[k] = q;
            });
        }
        const int best = tq_best(quality);
        warp::run([&](int lane) { tq_store_block<bits>(halfwords[best][lane], block, lane); });
    } else {
        warp::run([&](int lane) {
            const tq_unit  n     = tq_normalize(codec, make_float2(x[lane], x[lane + 32]), lane);
            const tq_codes codes = tq_quantize<kind, bits>(codec, codec.table, n.u, lane);
            float q;
            tq_store_block<bits>(tq_halfword<kind, bits>(n, codes, q, lane), block, lane);
        });
    }
}

// TQ_SEARCH_BLOCKS blocks, as the kernel for many
template <int bits> static void encode_many(const tq_codec & codec, const float (* x)[64], uint16_t (* blocks)[17]) {
    static tq_searches<bits> s;
    tq_unit units[TQ_SEARCH_BLOCKS][32];
    for (int i = 0; i < s.n_labels/2*TQ_N_CELLS; ++i) {
        tq_fill_near(codec.table, s, i);
    }
    for (int b = 0; b < TQ_SEARCH_BLOCKS; ++b) {
        warp::run([&](int lane) {
            units[b][lane] = tq_normalize(codec, make_float2(x[b][lane], x[b][lane + 32]), lane);
            s.u[lane]     [b] = units[b][lane].u.x;
            s.u[lane + 32][b] = units[b][lane].u.y;
        });
    }
    for (int t = 0; t < TQ_SEARCH_THREADS; ++t) {
        tq_search_alone(s, t);
    }
    for (int b = 0; b < TQ_SEARCH_BLOCKS; ++b) {
        warp::run([&](int lane) { tq_store_block<bits>(tq_best_halfword(codec.table, s, units[b][lane], b, lane), blocks[b], lane); });
    }
}

// beside another block; i chooses the place and the lanes
template <tq_kind kind, int bits> static void decode(const tq_codec & codec, const uint16_t * block, const uint16_t * other, int i, float * x) {
    warp::run([&](int lane) {
        const uint16_t * blocks[2] = { i/8%2 ? other : block, i/8%2 ? block : other };
        float factors[16];
        tq_factors_of_quarter(codec.rotation, lane, factors);
        const tq_words words = tq_load_quarters<kind, bits>(blocks[0], blocks[1], lane);
        float v[16];
        tq_decode_quarter<kind>(codec, codec.table, factors, words, i/8%2, block[0], lane, v);
        if (lane/4 == i%8) {
            for (int c = 0; c < 16; ++c) {
                x[tq_first_of_quarter(lane) + (c < 8 ? c : c + 24)] = v[c];
            }
        }
    });
}

static void make_block(std::mt19937_64 & rng, int i, float * x) {
    std::normal_distribution<float> normal;
    static const float scales[] = { 1.0f, 1e-17f, 1e30f, 3e-19f, 100.0f, 1e-4f, 3e7f };
    const float scale = scales[i % 7];
    for (int j = 0; j < 64; ++j) {
        x[j] = normal(rng)*scale;
    }
    switch (i % 16) {
        case 1:  x[5] *= 1000.0f;                                        break; // an outlier
        case 2:  std::fill(x, x + 64, scale);                            break; // constant: one rotated coordinate a sign pattern
        case 3:  std::fill(x, x + 64, 0.0f); x[7] = scale;               break; // one coordinate: all rotated ones are equal in size
        case 4:  std::fill(x, x + 64, 0.0f);                             break;
        case 5:  x[63] = NAN;                                            break;
        case 6:  x[32] = -INFINITY;                                      break;
        case 7:  std::fill(x, x + 64, -3.4e38f);                         break; // saturates
        case 8:  std::fill(x, x + 64, 0.0f); x[0] = 0x1p-60f;            break; // the smallest that is not dropped, and drops d
        case 9:  for (int j = 0; j < 64; ++j) { x[j] = j % 2 ? 1e-42f : 1e38f; } break; // subnormals below
        case 10: for (int j = 0; j < 64; ++j) { x[j] = normal(rng)*7e-8f; }     break; // d is subnormal
        case 11: for (int j = 0; j < 64; ++j) { x[j] = std::round(x[j]/scale)*scale; } break; // ties
        default: break;
    }
}

// Both searches where much is equal: coordinates are zero, levels, or the midpoints of two.
template <int bits> static int test_ties(tq_type type, int n_runs) {
    const tq_codec codec = tq_make_codec(params, type);
    static tq_searches<bits> many;
    static tq_search<bits>   one;
    std::mt19937_64 rng(31 + type);
    for (int i = 0; i < many.n_labels/2*TQ_N_CELLS; ++i) {
        tq_fill_near(codec.table, many, i);
    }
    int n_bad[2] = {};
    for (int run = 0; run < n_runs; ++run) {
        float   u   [TQ_SEARCH_BLOCKS][64];
        uint8_t want[TQ_SEARCH_BLOCKS][64];
        for (int b = 0; b < TQ_SEARCH_BLOCKS; ++b) {
            float values[5] = { 0.0f };
            for (int k = 1; k < 5; ++k) {
                const int   x = rng() % 32;
                const int   y = k % 2 ? x : x ^ 1;
                const float m = k < 3 ? 1.0f : tq_multiple(rng() % TQ_N_MULTIPLES);
                values[k] = 0.5f*(codec.table[x] + codec.table[y])/m;
            }
            for (int i = 0; i < 64; ++i) {
                u[b][i] = values[rng() % (1 + b % 5)];
                many.u[i][b] = u[b][i];
            }
            tq_trellis_encode(bits, 1, &u[b], &want[b]);
        }
        for (int t = 0; t < TQ_SEARCH_THREADS; ++t) {
            tq_search_alone(many, t);
        }
        for (int b = 0; b < TQ_SEARCH_BLOCKS; ++b) {
            const auto compare = [&](int way, int lane, const tq_codes & got) {
                for (int h = 0; h < 2; ++h) {
                    n_bad[way] += (h ? got.y : got.x) != want[b][lane + 32*h];
                }
            };
            tq_codes codes[TQ_N_MULTIPLES][32];
            float    quality[TQ_N_MULTIPLES];
            for (int k = 0; k < TQ_N_MULTIPLES; ++k) {
                warp::run([&](int lane) {
                    const float2 v = make_float2(u[b][lane], u[b][lane + 32]);
                    codes[k][lane] = tq_path(codec.table, v, tq_multiple(k), one, tq_prepare(one, codec.table, lane), lane);
                    float x;
                    tq_halfword<TQ_KIND_TCQ, bits>({ v, 1.0f, 1.0f, 0, false }, codes[k][lane], x, lane);
                    quality[k] = x;
                });
                n_bad[1] += quality[k] != many.quality[TQ_N_MULTIPLES*b + k];
            }
            const int best = tq_best(quality);
            const int best_of_many = tq_best(many.quality + TQ_N_MULTIPLES*b);
            for (int lane = 0; lane < 32; ++lane) {
                compare(0, lane, codes[best][lane]);
                const float2 v = tq_scale(make_float2(u[b][lane], u[b][lane + 32]), tq_multiple(best_of_many));
                compare(1, lane, tq_codes_of_path<bits>(codec.table, v, __brevll(many.coded[TQ_N_MULTIPLES*b + best_of_many]), lane));
            }
        }
    }
    if (n_bad[0] || n_bad[1]) {
        printf("%s: ties: %d codes of a warp's search are not those of the C library, %d codes and qualities of a thread's\n", tq_get_type_info(type)->name, n_bad[0], n_bad[1]);
    }
    return n_bad[0] + n_bad[1];
}

template <tq_kind kind, int bits> static int test(tq_type type, int n_blocks) {
    const tq_codec codec = tq_make_codec(params, type);
    const size_t   size  = tq_get_type_info(type)->block_size;
    std::mt19937_64 rng(17 + type);
    int n_bad = 0;
    float    many     [TQ_SEARCH_BLOCKS][64];
    uint16_t many_want[TQ_SEARCH_BLOCKS][17];
    uint16_t many_got [TQ_SEARCH_BLOCKS][17];
    for (int i = 0; i < n_blocks; ++i) {
        float * x = many[i % TQ_SEARCH_BLOCKS];
        make_block(rng, i, x);
        uint16_t want[17] = {};
        uint16_t got [17] = {};
        tq_encode(params, type, x, want, 64);
        encode<kind, bits>(codec, x, got);
        if (memcmp(want, got, size) != 0) {
            printf("%s: block %d: encoded otherwise than the C library does\n", tq_get_type_info(type)->name, i);
            n_bad++;
        }
        if constexpr (kind == TQ_KIND_TCQ) {
            memcpy(many_want[i % TQ_SEARCH_BLOCKS], want, size);
            if (i % TQ_SEARCH_BLOCKS == TQ_SEARCH_BLOCKS - 1) {
                encode_many<bits>(codec, many, many_got);
                for (int b = 0; b < TQ_SEARCH_BLOCKS; ++b) {
                    if (memcmp(many_want[b], many_got[b], size) != 0) {
                        printf("%s: block %d: encoded among many otherwise than the C library does\n", tq_get_type_info(type)->name, i + 1 - TQ_SEARCH_BLOCKS + b);
                        n_bad++;
                    }
                }
            }
        }
        if (i % 4 == 3) { // any bytes decode
            for (size_t b = 0; b < size/2; ++b) {
                want[b] = (uint16_t) rng();
            }
        }
        float want_x[64];
        float got_x [64];
        tq_decode(params, type, want, want_x, 64);
        decode<kind, bits>(codec, want, got, i, got_x);
        for (int j = 0; j < 64; ++j) {
            if (memcmp(&want_x[j], &got_x[j], sizeof(float)) != 0 && !(std::isnan(want_x[j]) && std::isnan(got_x[j]))) {
                printf("%s: block %d: coordinate %d decoded to %a, want %a\n", tq_get_type_info(type)->name, i, j, got_x[j], want_x[j]);
                n_bad++;
                break;
            }
        }
    }
    return n_bad;
}

//
// operands of attention
//

// bits 16*half .. 16*half + 15 of plane p are halfword 1 + 4*p + half of a block
static int tq_plane_bit(const uint16_t * block, int p, int i) {
    return (block[1 + 4*p + i/16] >> i%16) & 1;
}

// level and sign of the sketch of a coordinate, the plain way
template <tq_kind kind, int bits> static float level_of(const tq_codec & codec, const uint16_t * block, int i, bool & sign) {
    constexpr int code_bits = kind == TQ_KIND_MSE ? bits : bits - 1;
    int code = 0;
    for (int p = 0; p < code_bits; ++p) {
        code |= tq_plane_bit(block, p, i) << p;
    }
    if (kind == TQ_KIND_TCQ) {
        const uint16_t * plane = block + 1 + 4*code_bits;
        const uint64_t coded = (uint64_t) plane[0] | (uint64_t) plane[1] << 16 | (uint64_t) plane[2] << 32 | (uint64_t) plane[3] << 48;
        code |= tq_label<bits>(tq_register(__brevll(coded), i)) << code_bits;
    }
    sign = kind == TQ_KIND_QJL && tq_plane_bit(block, code_bits, i);
    return codec.table[code];
}

// number h of a pair that is looked up: the low or the high one
template <tq_kind kind> static float looked_up(const tq_codec & codec, uint32_t offset, uint32_t signs, int h) {
    const float level = codec.table[offset >> (8 + 4*h) & 15];
    return kind == TQ_KIND_TCQ && (signs >> (15 + 16*h) & 1) ? -level : level;
}

// an 8x8 matrix of halfwords, as movmatrix transposes it
static void transpose(const uint32_t * x, uint32_t * y) {
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane/4;
        const int j = lane%4;
        y[lane] = 0;
        for (int e = 0; e < 2; ++e) { // number 2*j + e of row g was number g of row 2*j + e
            y[lane] |= (x[4*(2*j + e) + g/2] >> 16*(g%2) & 0xffff) << 16*e;
        }
    }
}

template <tq_kind kind, int bits> static int test_operands(tq_type type) {
    const tq_codec codec = tq_make_codec(params, type);
    std::mt19937_64 rng(23 + type);
    uint16_t blocks[16][17]; // of 16 cells
    for (auto & block : blocks) {
        for (uint16_t & h : block) {
            h = (uint16_t) rng();
        }
    }
    int n_bad = 0;
    const auto check = [&](const char * what, int cell, int i, float got, bool got_sign) {
        bool sign;
        const float want = level_of<kind, bits>(codec, blocks[cell], i, sign);
        if (got != want || (kind == TQ_KIND_QJL && got_sign != sign)) {
            printf("%s: %s, cell %d, coordinate %d: %g%c, want %g%c\n", tq_get_type_info(type)->name, what, cell, i,
                got, got_sign ? '-' : '+', want, sign ? '-' : '+');
            n_bad++;
        }
    };
    tq_words words[32];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane/4;
        const int j = lane%4;
        uint32_t x[bits], y[bits];
        for (int p = 0; p < bits; ++p) {
            x[p] = blocks[g    ][1 + 4*p + j];
            y[p] = blocks[g + 8][1 + 4*p + j];
        }
        const int before = 1 + 4*(bits - 1) + (j + 3)%4;
        words[lane] = tq_unpack<kind, bits>(x, y, blocks[g][before] | x[bits - 1] << 16, blocks[g + 8][before] | y[bits - 1] << 16);

        const tq_pair_signs signs = tq_signs_of_keys(words[lane].signs);
        for (int s = 0; s < 4; ++s) {
            for (int i = 0; i < 4; ++i) {
                const uint32_t offset = tq_pair_offset(words[lane].codes[s], i, 4*lane);
                const uint32_t sign   = tq_sign_of_key(signs, s, i);
                if ((offset & 0xff) != 4u*lane || offset/256 >= tq_pairs<kind, bits>::n_entries || (sign & ~0x80008000u) != 0) {
                    printf("%s: offset %x, signs %x\n", tq_get_type_info(type)->name, offset, sign);
                    n_bad++;
                }
                for (int h = 0; h < 2; ++h) {
                    check("key", g + 8*(i/2), 16*j + s + 8*(i%2) + 4*h, looked_up<kind>(codec, offset, sign, h), sign >> (15 + 16*h) & 1);
                }
            }
        }
    }
    if (kind == TQ_KIND_QJL) {
        return n_bad; // no values
    }
    uint32_t in[32], ab[2][32], cd[2][32], signs_ab[32], signs_cd[32];
    const auto turn = [&](auto of, uint32_t * out) {
        for (int lane = 0; lane < 32; ++lane) {
            in[lane] = of(words[lane]);
        }
        transpose(in, out);
    };
    for (int h = 0; h < 2; ++h) {
        turn([&](const tq_words & w) { return tq_both_low (w.codes[2*h], w.codes[2*h + 1]); }, ab[h]);
        turn([&](const tq_words & w) { return tq_both_high(w.codes[2*h], w.codes[2*h + 1]); }, cd[h]);
    }
    turn([&](const tq_words & w) { return __byte_perm(w.signs, 0, 0x1010); }, signs_ab);
    turn([&](const tq_words & w) { return __byte_perm(w.signs, 0, 0x3232); }, signs_cd);
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane/4;
        const int j = lane%4;
        for (int h = 0; h < 2; ++h) {
            const tq_value_pairs pairs = tq_pairs_of_values(ab[h][lane], cd[h][lane]);
            for (int n = 0; n < 4; ++n) { // coordinates 4*n + 2*h + g%2 of halfword g/2
                for (int k = 0; k < 4; ++k) { // cells a to d
                    const uint32_t offset = tq_pair_offset(n%2 ? pairs.odd : pairs.even, n/2 + 2*(k/2), 4*lane);
                    const uint32_t sign   = ((k < 2 ? signs_ab : signs_cd)[lane] >> g%2 << (15 - 4*n - 2*h)) & 0x80008000;
                    check("value", 2*j + k%2 + 8*(k/2), 16*(g/2) + 4*n + 2*h + g%2, looked_up<kind>(codec, offset, sign, k%2), false);
                }
            }
        }
    }
    return n_bad;
}

static int test_center() {
    std::mt19937_64 rng(3);
    std::normal_distribution<float> normal;
    int n_bad = 0;
    for (int n_rot : { 0, 64, 96, 128 }) {
        std::vector<double> freqs(n_rot/2);
        for (int i = 0; i < n_rot/2; ++i) {
            freqs[i] = std::pow(10000.0, -2.0*i/n_rot);
        }
        std::vector<float> table(std::max(1, n_rot)*TQ_CENTER_ROWS);
        tq_center_make_table(freqs.data(), n_rot, table.data());
        std::vector<float> m(4*128); // four planes of one head
        for (float & v : m) {
            v = normal(rng);
        }
        for (int neox = 0; neox < 2; ++neox) {
            for (int pos : { 0, 1, 255, 256, 257, 65535, 65536, 65537, 1000000, 0xffffff, 0x1000001, -1 }) {
                const tq_center     center = { 128, n_rot, neox, table.data() };
                const tq_key_center device = { &pos, m.data(), table.data(), 128, n_rot, neox != 0, 1 };
                std::vector<float> want(128, 0.0f);
                tq_center_add(&center, m.data() + (pos > 0 ? 0 : 3*128), pos, 1.0f, want.data());
                for (int i = 0; i < 128; ++i) {
                    if (want[i] != tq_center_at(device, 0, i, pos)) {
                        printf("center: n_rot %d, position %d, coordinate %d: %a, want %a\n", n_rot, pos, i, tq_center_at(device, 0, i, pos), want[i]);
                        n_bad++;
                        break;
                    }
                }
            }
        }
    }
    return n_bad;
}

int main(int argc, char ** argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 256;
    int n_bad = 0;
    for (int set = 0; set < 2; ++set) {
        n_bad += test<TQ_KIND_MSE, 2>(TQ_TYPE_TQ2_MSE, n);
        n_bad += test<TQ_KIND_MSE, 3>(TQ_TYPE_TQ3_MSE, n);
        n_bad += test<TQ_KIND_MSE, 4>(TQ_TYPE_TQ4_MSE, n);
        n_bad += test<TQ_KIND_QJL, 2>(TQ_TYPE_TQ2_QJL, n);
        n_bad += test<TQ_KIND_QJL, 3>(TQ_TYPE_TQ3_QJL, n);
        n_bad += test<TQ_KIND_QJL, 4>(TQ_TYPE_TQ4_QJL, n);
        n_bad += test<TQ_KIND_TCQ, 2>(TQ_TYPE_TQ2_TCQ, n);
        n_bad += test<TQ_KIND_TCQ, 3>(TQ_TYPE_TQ3_TCQ, n);
        n_bad += test<TQ_KIND_TCQ, 4>(TQ_TYPE_TQ4_TCQ, n);
        n_bad += test_operands<TQ_KIND_MSE, 2>(TQ_TYPE_TQ2_MSE);
        n_bad += test_operands<TQ_KIND_MSE, 3>(TQ_TYPE_TQ3_MSE);
        n_bad += test_operands<TQ_KIND_MSE, 4>(TQ_TYPE_TQ4_MSE);
        n_bad += test_operands<TQ_KIND_QJL, 2>(TQ_TYPE_TQ2_QJL);
        n_bad += test_operands<TQ_KIND_QJL, 3>(TQ_TYPE_TQ3_QJL);
        n_bad += test_operands<TQ_KIND_QJL, 4>(TQ_TYPE_TQ4_QJL);
        n_bad += test_operands<TQ_KIND_TCQ, 2>(TQ_TYPE_TQ2_TCQ);
        n_bad += test_operands<TQ_KIND_TCQ, 3>(TQ_TYPE_TQ3_TCQ);
        n_bad += test_operands<TQ_KIND_TCQ, 4>(TQ_TYPE_TQ4_TCQ);
        // and once more with parameters that a model brings
        static tq_params own = *tq_params_default();
        const float codebook[4] = { -2.0f, -0.25f, 0.5f, 1.0f };
        tq_params_set_seeds(&own, 1, 2);
        tq_params_set_codebook(&own, TQ_TYPE_TQ2_MSE, codebook, 4);
        tq_params_set_codebook(&own, TQ_TYPE_TQ3_QJL, codebook, 4);
        tq_params_set_kappa(&own, TQ_TYPE_TQ3_QJL, 0.75f);
        params = &own;
    }
    n_bad += test_ties<2>(TQ_TYPE_TQ2_TCQ, n/32);
    n_bad += test_ties<3>(TQ_TYPE_TQ3_TCQ, n/32);
    n_bad += test_ties<4>(TQ_TYPE_TQ4_TCQ, n/32);
    n_bad += test_center();
    printf("%d blocks a type: %s\n", n, n_bad ? "FAILED" : "OK");
    return n_bad ? 1 : 0;
}
