/* Products of a layer's weights, float32 or bfloat16, with float32 sums; for processors with AVX-512. bfloat16 takes two bytes and is
   widened as it is read, once for ROWS rows: for processors that have no instruction to multiply it.

   Each output is one sum over its inputs in their order, whatever rows are beside it and whichever thread computes it: a row's bits do
   not depend on its company. That is why this file is compiled without leave to reorder additions.

   Weights lie in bands of 32 outputs. For each input a band holds 32 numbers (float32), or 16 words of two (bfloat16): of output i below,
   of output 16 + i above. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, BAND = 2 * LANES, ROWS = 12, PANEL_FLOATS = 1 << 17 }; /* a panel of inputs stays in the second cache */

typedef uint16_t bfloat16;
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline float to_float32(float x) { return x; }
static inline bfloat16 to_bfloat16(float x) { /* to the nearest, of two the even one, as torch rounds */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void load_float32(const float *band, vector *below, vector *above) {
    *below = *(const vector *)band;
    *above = *(const vector *)(band + LANES);
}
static inline void load_bfloat16(const bfloat16 *band, vector *below, vector *above) {
    words both = *(const words *)band;
    *below = (vector)(both << 16);
    *above = (vector)(both & 0xffff0000u);
}

#define CASE(SUFFIX, N)                                                                                                     \
    case N:                                                                                                                 \
        multiply_tile_##SUFFIX(input, band, bias, output, size, num_outputs, width, N);                                     \
        break;

/* rows is a constant where a tile is inlined, so that its sums stay in registers.
   multiply: input: num_rows x size floats; bands: as above; bias: num_outputs floats or NULL; output: num_rows x num_outputs. */
#define DEFINE(SUFFIX, T)                                                                                                   \
    static inline __attribute__((always_inline)) void multiply_tile_##SUFFIX(                                               \
        const float *input, const T *band, const float *bias, T *output, int64_t size, int64_t num_outputs, int width,      \
        int rows) {                                                                                                         \
        vector low[ROWS], high[ROWS];                                                                                       \
        for (int row = 0; row < rows; row++) low[row] = high[row] = (vector){0};                                            \
        for (int64_t k = 0; k < size; k++) {                                                                                \
            vector below, above;                                                                                            \
            load_##SUFFIX(band + k * BAND, &below, &above);                                                                 \
            for (int row = 0; row < rows; row++) {                                                                          \
                float x = input[row * size + k];                                                                            \
                low[row] += x * below;                                                                                      \
                high[row] += x * above;                                                                                     \
            }                                                                                                               \
        }                                                                                                                   \
        for (int row = 0; row < rows; row++) {                                                                              \
            float sums[BAND];                                                                                               \
            *(vector *)sums = low[row];                                                                                     \
            *(vector *)(sums + LANES) = high[row];                                                                          \
            for (int i = 0; i < width; i++)                                                                                 \
                output[row * num_outputs + i] = to_##SUFFIX(bias ? sums[i] + bias[i] : sums[i]);                            \
        }                                                                                                                   \
    }                                                                                                                       \
    static void multiply_rows_##SUFFIX(const float *input, const T *band, const float *bias, T *output, int64_t size,       \
                                       int64_t num_outputs, int width, int rows) {                                          \
        switch (rows) {                                                                                                     \
            CASE(SUFFIX, 1)                                                                                                 \
            CASE(SUFFIX, 2)                                                                                                 \
            CASE(SUFFIX, 3)                                                                                                 \
            CASE(SUFFIX, 4)                                                                                                 \
            CASE(SUFFIX, 5)                                                                                                 \
            CASE(SUFFIX, 6)                                                                                                 \
            CASE(SUFFIX, 7)                                                                                                 \
            CASE(SUFFIX, 8)                                                                                                 \
            CASE(SUFFIX, 9)                                                                                                 \
            CASE(SUFFIX, 10)                                                                                                \
            CASE(SUFFIX, 11)                                                                                                \
            CASE(SUFFIX, ROWS)                                                                                              \
        }                                                                                                                   \
    }                                                                                                                       \
    void multiply_##SUFFIX(const float *input, const T *bands, const float *bias, T *output, int64_t num_rows,              \
                           int64_t size, int64_t num_outputs, int num_threads) {                                            \
        int64_t panel = PANEL_FLOATS / size / ROWS * ROWS;                                                                  \
        if (panel < ROWS) panel = ROWS;                                                                                     \
        _Pragma("omp parallel num_threads(num_threads)") for (int64_t first = 0; first < num_rows; first += panel) {        \
            int64_t end = first + panel < num_rows ? first + panel : num_rows;                                              \
            _Pragma("omp for schedule(static) nowait") for (int64_t column = 0; column < num_outputs; column += BAND) {     \
                int width = num_outputs - column < BAND ? (int)(num_outputs - column) : BAND;                               \
                const T *band = bands + column * size;                                                                      \
                for (int64_t row = first; row < end; row += ROWS)                                                           \
                    multiply_rows_##SUFFIX(input + row * size, band, bias ? bias + column : 0,                              \
                                           output + row * num_outputs + column, size, num_outputs, width,                   \
                                           end - row < ROWS ? (int)(end - row) : ROWS);                                     \
            }                                                                                                               \
        }                                                                                                                   \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
