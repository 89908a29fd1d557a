// Which implementation of rows is in use: the fastest that the machine has, or the one that was asked for.

#include "tq-internal.h"

#include <string.h>

// the fastest first
static const struct tq_rows_functions * const all_rows[] = {
#ifdef TQ_X86
    &tq_rows_avx512,
    &tq_rows_avx2,
#endif
    &tq_rows_portable,
};

const char * tq_rows_name(int i) {
    for (size_t k = 0; k < sizeof(all_rows)/sizeof(all_rows[0]); ++k) {
        if (all_rows[k]->available() && i-- == 0) {
            return all_rows[k]->name;
        }
    }
    return NULL;
}

// threads that are first at the same time find the same
#if defined(__GNUC__) || defined(__clang__)
#define LOAD(p)     __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, x) __atomic_store_n(p, x, __ATOMIC_RELEASE)
#else
#define LOAD(p)     (*(p))
#define STORE(p, x) (*(p) = (x))
#endif

static const struct tq_rows_functions * volatile current;

const char * tq_rows_use(const char * name) {
    if (!name) {
        return tq_rows()->name;
    }
    for (size_t k = 0; k < sizeof(all_rows)/sizeof(all_rows[0]); ++k) {
        if (strcmp(all_rows[k]->name, name) == 0 && all_rows[k]->available()) {
            STORE(&current, all_rows[k]);
            return name;
        }
    }
    return NULL;
}

const struct tq_rows_functions * tq_rows(void) {
    const struct tq_rows_functions * rows = LOAD(&current);
    if (!rows) {
        tq_rows_use(tq_rows_name(0));
        rows = LOAD(&current);
    }
    return rows;
}
