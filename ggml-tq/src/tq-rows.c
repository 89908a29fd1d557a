// Which implementation is in use, of rows and of what else a program brings several of: the fastest that the machine has, or the
// one that was asked for.

#include "tq-internal.h"

#include <string.h>

// threads that are first at the same time find the same
#if defined(__GNUC__) || defined(__clang__)
#define LOAD(p)     __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, x) __atomic_store_n(p, x, __ATOMIC_RELEASE)
#else
#define LOAD(p)     (*(p))
#define STORE(p, x) (*(p) = (x))
#endif

const char * tq_choice_name(const struct tq_choice * choice, int i) {
    for (const struct tq_implementation * const * one = choice->all; *one; ++one) {
        if ((*one)->available() && i-- == 0) {
            return (*one)->name;
        }
    }
    return NULL;
}

const char * tq_choice_use(struct tq_choice * choice, const char * name) {
    if (!name) {
        return tq_choice_current(choice)->name;
    }
    for (const struct tq_implementation * const * one = choice->all; *one; ++one) {
        if (strcmp((*one)->name, name) == 0 && (*one)->available()) {
            STORE(&choice->current, *one);
            return name;
        }
    }
    return NULL;
}

const struct tq_implementation * tq_choice_current(struct tq_choice * choice) {
    const struct tq_implementation * current = LOAD(&choice->current);
    if (!current) {
        tq_choice_use(choice, tq_choice_name(choice, 0));
        current = LOAD(&choice->current);
    }
    return current;
}

static const struct tq_implementation * const all_rows[] = {
#ifdef TQ_X86
    &tq_rows_avx512.base,
    &tq_rows_avx2.base,
#endif
    &tq_rows_portable.base,
    NULL,
};

static struct tq_choice rows = { all_rows, NULL };

const char * tq_rows_name(int i) {
    return tq_choice_name(&rows, i);
}

const char * tq_rows_use(const char * name) {
    return tq_choice_use(&rows, name);
}

const struct tq_rows_functions * tq_rows(void) {
    return (const struct tq_rows_functions *) tq_choice_current(&rows);
}
