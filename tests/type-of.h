#pragma once

#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <string>

// the type of that name; ends the program if there is none
static inline ggml_type type_of(const std::string & name) {
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        const char * known = ggml_type_name((ggml_type) t);
        if (known && name == known) {
            return (ggml_type) t;
        }
    }
    fprintf(stderr, "unknown type %s\n", name.c_str());
    exit(1);
}
