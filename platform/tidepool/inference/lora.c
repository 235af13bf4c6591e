/* Adapters' low-rank products beside a layer's own: output += scale * (input A') B', for rows of many adapters in one call.

   A group is up to four rows of one adapter, computed by one thread, so that its matrices are read once for all of them. A row's
   additions stand in one order whatever is in its group, beside it, or in other threads: its bits do not depend on its company.
   That is why this file is compiled without leave to reorder additions. Numbers are float32 between input and output. Matrices lie as
   lora.py says, in the order in which they are read here. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, ROWS = 4, RANKS = 4, TILE = 4 }; /* TILE vectors of outputs are computed at a time */

typedef uint16_t bfloat16;
typedef float vector __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t vector_bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t vector_bfloat16 __attribute__((vector_size(2 * LANES), may_alias));

static inline float load_float32(const float *x) { return *x; }
static inline void store_float32(float *x, float y) { *x = y; }
static inline vector load_vector_float32(const float *x) { return *(const vector *)x; }
static inline float load_bfloat16(const bfloat16 *x) {
    uint32_t bits = (uint32_t)*x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline void store_bfloat16(bfloat16 *x, float y) { /* to the nearest, of two the even one, as torch rounds */
    uint32_t bits;
    memcpy(&bits, &y, 4);
    *x = y != y ? 0x7fc0 : (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline vector load_vector_bfloat16(const bfloat16 *x) {
    return (vector)(__builtin_convertvector(*(const vector_bfloat16 *)x, vector_bits) << 16);
}

static inline float sum_of(vector x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

static inline int64_t up_to(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

/* rows is a constant where these are inlined. x: ROWS x width floats; y: ROWS x num_ranks floats. */
#define DEFINE(SUFFIX, T)                                                                                                   \
    static inline __attribute__((always_inline)) void shrink_##SUFFIX(const float *x, int64_t width, const T *a,            \
                                                                      int num_ranks, float scale, float *y, int rows) {     \
        for (int first = 0; first < num_ranks; first += RANKS) {                                                            \
            vector sums[RANKS][ROWS] = {0};                                                                                 \
            for (int64_t i = 0; i < width; i += LANES)                                                                      \
                for (int rank = 0; rank < RANKS; rank++) {                                                                  \
                    vector weight = load_vector_##SUFFIX(a + first * width + i * RANKS + rank * LANES);                     \
                    for (int row = 0; row < rows; row++) sums[rank][row] += weight * *(const vector *)(x + row * width + i);\
                }                                                                                                           \
            for (int rank = 0; rank < RANKS; rank++)                                                                        \
                for (int row = 0; row < rows; row++) y[row * num_ranks + first + rank] = scale * sum_of(sums[rank][row]);   \
        }                                                                                                                   \
    }                                                                                                                       \
    static inline __attribute__((always_inline)) void expand_##SUFFIX(const float *y, int num_ranks, const T *b,            \
                                                                      int64_t size, T *output, int64_t output_row, int rows) {\
        for (int64_t first = 0; first < size; first += TILE * LANES) {                                                      \
            vector sums[ROWS][TILE] = {0};                                                                                  \
            for (int rank = 0; rank < num_ranks; rank++)                                                                    \
                for (int part = 0; part < TILE; part++) {                                                                   \
                    vector weight = load_vector_##SUFFIX(b + first * num_ranks + (rank * TILE + part) * LANES);             \
                    for (int row = 0; row < rows; row++) sums[row][part] += y[row * num_ranks + rank] * weight;             \
                }                                                                                                           \
            int64_t count = size - first < TILE * LANES ? size - first : TILE * LANES;                                      \
            for (int row = 0; row < rows; row++) {                                                                          \
                T *to = output + row * output_row + first;                                                                  \
                const float *from = (const float *)sums[row];                                                               \
                for (int64_t i = 0; i < count; i++) store_##SUFFIX(to + i, load_##SUFFIX(to + i) + from[i]);                \
            }                                                                                                               \
        }                                                                                                                   \
    }                                                                                                                       \
    /* groups: (first row, number of rows, slot). Of each slot and part of the layer: the addresses of A and B, the rank    \
       (0: it does not change this part) and the scale. columns: the first column and the number of columns of each part.   \
       Returns 0, or 1 if there is no memory. */                                                                            \
    int lora_##SUFFIX(const T *input, int64_t input_row, int64_t input_size, T *output, int64_t output_row,                 \
                          const int32_t *groups, int num_groups, const int64_t *addresses, const int32_t *ranks,            \
                          const float *scales, const int64_t *columns, int num_parts, int stride, int most_ranks,           \
                          int num_threads) {                                                                                \
        int failed = 0;                                                                                                     \
        int64_t width = up_to(input_size, LANES);                                                                           \
        _Pragma("omp parallel num_threads(num_threads) reduction(|:failed)") {                                              \
            float *x = aligned_alloc(64, up_to(sizeof(float) * ROWS * (width + most_ranks), 64)), *y = x + ROWS * width;    \
            failed |= !x;                                                                                                   \
            _Pragma("omp for schedule(dynamic, 1)") for (int group = 0; group < num_groups; group++) {                      \
                if (!x) continue;                                                                                           \
                int first = groups[3 * group], rows = groups[3 * group + 1], slot = groups[3 * group + 2], is_read = 0;     \
                for (int part = 0; part < num_parts; part++) {                                                              \
                    int entry = slot * stride + part, num_ranks = ranks[entry];                                             \
                    if (!num_ranks) continue;                                                                               \
                    if (!is_read)                                                                                           \
                        for (int row = 0; row < rows; row++) {                                                              \
                            const T *from = input + (first + row) * input_row;                                              \
                            for (int64_t i = 0; i < input_size; i++) x[row * width + i] = load_##SUFFIX(from + i);          \
                            for (int64_t i = input_size; i < width; i++) x[row * width + i] = 0;                            \
                        }                                                                                                   \
                    is_read = 1;                                                                                            \
                    const T *a = (const T *)addresses[2 * entry], *b = (const T *)addresses[2 * entry + 1];                 \
                    T *to = output + first * output_row + columns[2 * part];                                                \
                    CALL(SUFFIX, 1) else CALL(SUFFIX, 2) else CALL(SUFFIX, 3) else CALL(SUFFIX, 4)                          \
                }                                                                                                           \
            }                                                                                                               \
            free(x);                                                                                                        \
        }                                                                                                                   \
        return failed;                                                                                                      \
    }
#define CALL(SUFFIX, COUNT)                                                                                                 \
    if (rows == COUNT) {                                                                                                    \
        shrink_##SUFFIX(x, width, a, num_ranks, scales[entry], y, COUNT);                                                   \
        expand_##SUFFIX(y, num_ranks, b, columns[2 * part + 1], to, output_row, COUNT);                                     \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
