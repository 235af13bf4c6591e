/* Products of a layer with bfloat16 weights, for processors that have AVX-512 but no instruction that multiplies bfloat16.

   Inputs and sums are float32; weights take two bytes and are widened as they are read, once for ROWS rows. Each output is one sum over
   its inputs in their order, whatever rows are beside it and whichever thread computes it: a row's bits do not depend on its company.

   Weights lie in bands of 32 outputs. For each input, a band holds 16 words of two weights: of output i below, of output 16 + i above. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, BAND = 2 * LANES, ROWS = 12, PANEL_FLOATS = 1 << 17 }; /* a panel of inputs stays in the second cache */

typedef uint16_t bfloat16;
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline bfloat16 to_bfloat16(float x) { /* to the nearest, of two the even one, as torch rounds */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* rows is a constant where this is inlined, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_tile(const float *input, const uint32_t *band, const float *bias,
                                                                bfloat16 *output, int64_t size, int64_t num_outputs, int width,
                                                                int rows) {
    vector low[ROWS], high[ROWS];
    for (int row = 0; row < rows; row++) low[row] = high[row] = (vector){0};
    for (int64_t k = 0; k < size; k++) {
        words both = *(const words *)(band + k * LANES);
        vector below = (vector)(both << 16), above = (vector)(both & 0xffff0000u);
        for (int row = 0; row < rows; row++) {
            float x = input[row * size + k];
            low[row] += x * below;
            high[row] += x * above;
        }
    }
    for (int row = 0; row < rows; row++) {
        float sums[BAND];
        *(vector *)sums = low[row];
        *(vector *)(sums + LANES) = high[row];
        for (int i = 0; i < width; i++) output[row * num_outputs + i] = to_bfloat16(bias ? sums[i] + bias[i] : sums[i]);
    }
}

#define CASE(N) \
    case N: multiply_tile(input, band, bias, output, size, num_outputs, width, N); break;

static void multiply_rows(const float *input, const uint32_t *band, const float *bias, bfloat16 *output, int64_t size,
                          int64_t num_outputs, int width, int rows) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(ROWS)
    }
}

/* input: num_rows x size floats; bands: as above; bias: num_outputs floats or NULL; output: num_rows x num_outputs. */
void multiply(const float *input, const uint32_t *bands, const float *bias, bfloat16 *output, int64_t num_rows, int64_t size,
              int64_t num_outputs, int num_threads) {
    int64_t panel = PANEL_FLOATS / size / ROWS * ROWS;
    if (panel < ROWS) panel = ROWS;
#pragma omp parallel num_threads(num_threads)
    for (int64_t first = 0; first < num_rows; first += panel) {
        int64_t end = first + panel < num_rows ? first + panel : num_rows;
#pragma omp for schedule(static) nowait
        for (int64_t column = 0; column < num_outputs; column += BAND) {
            int width = num_outputs - column < BAND ? (int)(num_outputs - column) : BAND;
            const uint32_t *band = bands + column / BAND * size * LANES;
            for (int64_t row = first; row < end; row += ROWS)
                multiply_rows(input + row * size, band, bias ? bias + column : 0, output + row * num_outputs + column, size, num_outputs,
                              width, end - row < ROWS ? (int)(end - row) : ROWS);
        }
    }
}
