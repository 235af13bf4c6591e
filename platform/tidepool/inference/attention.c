/* What each step of decoding does in each layer: attention of one query a sequence over a paged cache, rotated positions, norms and
   gates, and the numbers around integer products.

   Each (sequence, group of heads) is computed by itself, in one order of additions that nothing else changes: a row's bits do not
   depend on the rows beside it. Numbers are float32 whatever the cache holds. A key and a value are read once for all heads that
   share them. Layouts are those of attention.py. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float to_float_bf16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline float same(float x) { return x; }
static inline bfloat16 to_bf16(float x) { /* to the nearest, of two the even one, as torch rounds */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* exp for x <= 0: 2^n times a polynomial, within two units in the last place; 0 below the smallest normal number. */
static inline float exp_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float n = __builtin_floorf(clamped * 1.44269504f + 0.5f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

/* One sequence and one group of heads. Sizes that are constants where it is inlined make the inner loops whole vectors. */
#define DEFINE(SUFFIX, T, LOAD, STORE)                                                                                      \
    static inline __attribute__((always_inline)) void attend_one_##SUFFIX(                                                  \
        const T *queries, int64_t query_head, const T *keys, const T *values, const int32_t *blocks, int first, int length, \
        T *output, int shared, int64_t key_stride, int64_t value_stride, int key_size, int value_size, int block_size,      \
        float scale, float *query, float *sums, float *row, float *scores, int longest) {                                   \
        for (int head = 0; head < shared; head++)                                                                           \
            for (int i = 0; i < key_size; i++) query[head * key_size + i] = LOAD(queries[head * query_head + i]) * scale;   \
        for (int t = first; t < length; t++) {                                                                              \
            const T *key = keys + ((int64_t)blocks[t / block_size] * block_size + t % block_size) * key_stride;             \
            for (int i = 0; i < key_size; i++) row[i] = LOAD(key[i]);                                                       \
            for (int head = 0; head < shared; head++) {                                                                     \
                float sum = 0;                                                                                              \
                for (int i = 0; i < key_size; i++) sum += query[head * key_size + i] * row[i];                              \
                scores[(size_t)head * longest + t] = sum;                                                                   \
            }                                                                                                               \
        }                                                                                                                   \
        for (int head = 0; head < shared; head++) {                                                                         \
            float *of_head = scores + (size_t)head * longest, highest = -INFINITY, total = 0;                               \
            for (int t = first; t < length; t++) highest = of_head[t] > highest ? of_head[t] : highest;                     \
            for (int t = first; t < length; t++) {                                                                          \
                of_head[t] = exp_negative(of_head[t] - highest);                                                            \
                total += of_head[t];                                                                                        \
            }                                                                                                               \
            for (int t = first; t < length; t++) of_head[t] /= total;                                                       \
        }                                                                                                                   \
        memset(sums, 0, sizeof(float) * shared * value_size);                                                               \
        for (int t = first; t < length; t++) {                                                                              \
            const T *value = values + ((int64_t)blocks[t / block_size] * block_size + t % block_size) * value_stride;       \
            for (int i = 0; i < value_size; i++) row[i] = LOAD(value[i]);                                                   \
            for (int head = 0; head < shared; head++) {                                                                     \
                float weight = scores[(size_t)head * longest + t];                                                          \
                for (int i = 0; i < value_size; i++) sums[head * value_size + i] += weight * row[i];                        \
            }                                                                                                               \
        }                                                                                                                   \
        for (int i = 0; i < shared * value_size; i++) output[i] = STORE(sums[i]);                                           \
    }                                                                                                                       \
    int attend_##SUFFIX(const T *queries, int64_t query_row, int64_t query_head, const T *keys, const T *values,            \
                        const int32_t *table, const int32_t *lengths, T *output, int num_rows, int num_columns,             \
                        int num_heads, int num_groups, int key_size, int value_size, int block_size, float scale,           \
                        int window, int num_threads) {                                                                      \
        int shared = num_heads / num_groups, longest = 0, failed = 0;                                                       \
        int widest = key_size > value_size ? key_size : value_size;                                                         \
        int64_t key_stride = (int64_t)num_groups * key_size, value_stride = (int64_t)num_groups * value_size;               \
        for (int row = 0; row < num_rows; row++)                                                                            \
            if (lengths[row] > longest) longest = lengths[row];                                                             \
        _Pragma("omp parallel num_threads(num_threads) reduction(|:failed)") {                                              \
            float *query = malloc(sizeof(float) * ((size_t)shared * (longest + key_size + value_size) + widest));           \
            failed |= !query;                                                                                               \
            _Pragma("omp for schedule(dynamic, 4)") for (int item = 0; item < num_rows * num_groups; item++) {              \
                if (!query) continue;                                                                                       \
                float *sums = query + shared * key_size, *buffer = sums + shared * value_size, *scores = buffer + widest;   \
                int row = item / num_groups, group = item % num_groups, length = lengths[row];                              \
                int first = window > 0 && length > window ? length - window : 0;                                            \
                const int32_t *blocks = table + (int64_t)row * num_columns;                                                 \
                const T *of_row = queries + row * query_row + (int64_t)group * shared * query_head;                         \
                const T *key = keys + (int64_t)group * key_size, *value = values + (int64_t)group * value_size;             \
                T *out = output + ((int64_t)row * num_heads + (int64_t)group * shared) * value_size;                        \
                CALL(SUFFIX, 64) else CALL(SUFFIX, 128) else CALL_ANY(SUFFIX)                                               \
            }                                                                                                               \
            free(query);                                                                                                    \
        }                                                                                                                   \
        return failed;                                                                                                      \
    }
#define CALL_WITH(SUFFIX, KEY_SIZE, VALUE_SIZE, BLOCK_SIZE)                                                                 \
    attend_one_##SUFFIX(of_row, query_head, key, value, blocks, first, length, out, shared, key_stride, value_stride,       \
                        KEY_SIZE, VALUE_SIZE, BLOCK_SIZE, scale, query, sums, buffer, scores, longest);
#define CALL(SUFFIX, SIZE) \
    if (key_size == SIZE && value_size == SIZE && block_size == 16) { CALL_WITH(SUFFIX, SIZE, SIZE, 16) }
#define CALL_ANY(SUFFIX) { CALL_WITH(SUFFIX, key_size, value_size, block_size) }

DEFINE(float32, float, same, same)
DEFINE(bfloat16, bfloat16, to_float_bf16, to_bf16)

#define DEFINE_INT8(SUFFIX, T, LOAD, STORE)                                                                                 \
    void quantize_##SUFFIX(const T *input, uint8_t *numbers, float *scales, int64_t num_rows, int64_t size, int num_threads) { \
        _Pragma("omp parallel for num_threads(num_threads)") for (int64_t row = 0; row < num_rows; row++) {                 \
            const T *from = input + row * size;                                                                             \
            int32_t bits = 0;      /* of the highest: numbers that are not negative are ordered as their bits are */            \
            for (int64_t i = 0; i < size; i++) {                                                                            \
                float x = fabsf(LOAD(from[i]));                                                                             \
                int32_t own;                                                                                                \
                memcpy(&own, &x, 4);                                                                                        \
                bits = own > bits ? own : bits;                                                                             \
            }                                                                                                               \
            float highest;                                                                                                  \
            memcpy(&highest, &bits, 4);                                                                                     \
            if (highest < 1e-30f) highest = 1e-30f;                                                                         \
            float factor = 127.0f / highest;                                                                                \
            scales[row] = highest / 127.0f;                                                                                 \
            for (int64_t i = 0; i < size; i++) numbers[row * size + i] = 128 + (int)__builtin_rintf(LOAD(from[i]) * factor); \
        }                                                                                                                   \
    }                                                                                                                       \
    void scale_##SUFFIX(const float *sums, const float *of_row, const float *bias, T *output, int64_t num_rows, int64_t size, \
                        int num_threads) {                                                                                  \
        _Pragma("omp parallel for num_threads(num_threads)") for (int64_t row = 0; row < num_rows; row++)                   \
            for (int64_t i = 0; i < size; i++) output[row * size + i] = STORE(sums[row * size + i] * of_row[row] + bias[i]); \
    }

DEFINE_INT8(float32, float, same, same)
DEFINE_INT8(bfloat16, bfloat16, to_float_bf16, to_bf16)

/* x times the logistic function of x (silu, kind 0), or of gelu's tanh argument (kind 1), times the second half of the row. */
static inline float gate(float x, int kind) {
    float y = kind ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
    float e = exp_negative(-fabsf(y));
    return x * (y < 0 ? e : 1.0f) / (1.0f + e);
}

#define DEFINE_ROWS(SUFFIX, T, LOAD, STORE)                                                                                 \
    void gate_##SUFFIX(const T *input, T *output, int64_t num_rows, int64_t size, int kind, int num_threads) {              \
        _Pragma("omp parallel for num_threads(num_threads)") for (int64_t row = 0; row < num_rows; row++) {                 \
            const T *first = input + row * 2 * size, *second = first + size;                                                \
            for (int64_t i = 0; i < size; i++)                                                                              \
                output[row * size + i] = STORE(LOAD(STORE(gate(LOAD(first[i]), kind))) * LOAD(second[i]));                  \
        }                                                                                                                   \
    }                                                                                                                       \
    /* The root mean square norm. rounds_first: as Llama does, the normal values are rounded before they are weighed. */   \
    void norm_##SUFFIX(const T *input, const float *weight, T *output, int64_t num_rows, int64_t size, float epsilon,       \
                       int rounds_first, int num_threads) {                                                                 \
        _Pragma("omp parallel for num_threads(num_threads)") for (int64_t row = 0; row < num_rows; row++) {                 \
            const T *from = input + row * size;                                                                             \
            float sum = 0;                                                                                                  \
            for (int64_t i = 0; i < size; i++) sum += LOAD(from[i]) * LOAD(from[i]);                                        \
            float factor = 1.0f / sqrtf(sum / size + epsilon);                                                              \
            if (rounds_first)                                                                                               \
                for (int64_t i = 0; i < size; i++)                                                                          \
                    output[row * size + i] = STORE(LOAD(STORE(LOAD(from[i]) * factor)) * weight[i]);                        \
            else                                                                                                            \
                for (int64_t i = 0; i < size; i++) output[row * size + i] = STORE(LOAD(from[i]) * factor * weight[i]);      \
        }                                                                                                                   \
    }

DEFINE_ROWS(float32, float, same, same)
DEFINE_ROWS(bfloat16, bfloat16, to_float_bf16, to_bf16)

/* Rotary positions: each head's first half and second half, turned by the angles of its token; heads lie together in the output. */
#define DEFINE_ROTATE(SUFFIX, T, LOAD, STORE)                                                                               \
    void rotate_##SUFFIX(const T *input, int64_t token_stride, int64_t head_stride, const T *cosines, const T *sines,       \
                         T *output, int64_t num_tokens, int64_t num_heads, int64_t size, int num_threads) {                 \
        int64_t half = size / 2;                                                                                            \
        _Pragma("omp parallel for num_threads(num_threads) if (num_tokens * num_heads * size > 65536)")                     \
        for (int64_t token = 0; token < num_tokens; token++) {                                                              \
            const T *cosine = cosines + token * size, *sine = sines + token * size;                                         \
            for (int64_t head = 0; head < num_heads; head++) {                                                              \
                const T *from = input + token * token_stride + head * head_stride;                                          \
                T *to = output + (token * num_heads + head) * size;                                                         \
                for (int64_t i = 0; i < half; i++) {                                                                        \
                    float x = LOAD(from[i]), y = LOAD(from[half + i]);                                                      \
                    to[i] = STORE(LOAD(STORE(x * LOAD(cosine[i]))) - LOAD(STORE(y * LOAD(sine[i]))));                       \
                    to[half + i] = STORE(LOAD(STORE(y * LOAD(cosine[half + i]))) + LOAD(STORE(x * LOAD(sine[half + i]))));  \
                }                                                                                                           \
            }                                                                                                               \
        }                                                                                                                   \
    }

DEFINE_ROTATE(float32, float, same, same)
DEFINE_ROTATE(bfloat16, bfloat16, to_float_bf16, to_bf16)
