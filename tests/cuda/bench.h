#pragma once

// What the benchmarks of single ops share.

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static ggml_backend_t backend;
static int repetitions = 5;

// the device of that name, with a backend; nullptr, and said, if there is none
static ggml_backend_dev_t open_device(const std::string & name) {
    ggml_backend_load_all();
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(name.c_str());
    if (!dev) {
        fprintf(stderr, "no device %s\n", name.c_str());
        return nullptr;
    }
    backend = ggml_backend_dev_init(dev, nullptr);
    return dev;
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static std::vector<std::string> split(const std::string & s, char at) {
    std::vector<std::string> parts(1);
    for (const char c : s) {
        if (c == at) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

static std::vector<int64_t> numbers(const std::string & s) {
    std::vector<int64_t> v;
    for (const std::string & part : split(s, ',')) {
        v.push_back(atoll(part.c_str()));
    }
    return v;
}

// median seconds of the graph
static double time_of(ggml_cgraph * graph) {
    for (int i = 0; i < 3; ++i) {
        ggml_backend_graph_compute(backend, graph);
    }
    ggml_backend_synchronize(backend);
    std::vector<double> seconds;
    for (int i = 0; i < repetitions; ++i) {
        const double start = now();
        ggml_backend_graph_compute(backend, graph);
        ggml_backend_synchronize(backend);
        seconds.push_back(now() - start);
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size()/2];
}
