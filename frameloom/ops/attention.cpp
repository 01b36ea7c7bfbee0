// softmax(Q K^T / sqrt(K) + bias) V on a CPU with AVX-512, in float32 or (with AVX512-BF16) bfloat16.
//
// Online softmax over blocks of keys (arXiv:2205.14135). Products of bfloat16 numbers are summed in float32, logits and
// softmax stay in float32; only its weights are rounded before they meet the values, as torch's own kernel does.
// q, k, v and out are (batch, tokens, heads, dim) with dim innermost and dense; other strides are given in numbers.
// Loaded by frameloom/ops/native.py.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>

#include <immintrin.h>

namespace {

constexpr int LANES = 16;
constexpr int ROWS = 8;       // queries whose sums are in registers at a time
constexpr int PANEL = 48;     // columns whose sums are in registers at a time
constexpr int QUERIES = 128;  // that share the packing of a block of keys
constexpr int KEYS = 192;     // of a block: what a thread holds is near 400 KB
constexpr float LOG2_E = 1.44269504f;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef std::uint16_t bf16;

struct Shape {
    std::int64_t batch, queries, keys, heads, dim;
};

struct Strides {
    std::int64_t batch, token, head;
};

inline __m512 power_of_two(__m512 x) {  // 2^x to about one unit in the last place; 2^-inf is 0
    const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-160.0f));
    const __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(clamped, whole);
    __m512 p = _mm512_set1_ps(1.52527338e-5f);
    for (float c : {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f})
        p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}

// How a product of one dtype is made: `Left` rows are broadcast a step at a time, the right side is packed by steps.
struct Single {
    typedef float Number;
    static constexpr int STEP = 1;  // of the summed dimension that one instruction takes

    static inline __m512 multiply(__m512 sum, const float* left, const float* right) {
        return _mm512_fmadd_ps(_mm512_set1_ps(*left), _mm512_loadu_ps(right), sum);
    }
    static inline void narrow(float* to, __m512 from) { _mm512_storeu_ps(to, from); }
};

#ifdef __AVX512BF16__
struct Half {
    typedef bf16 Number;
    static constexpr int STEP = 2;

    static inline __m512 multiply(__m512 sum, const bf16* left, const bf16* right) {
        std::int32_t pair;
        std::memcpy(&pair, left, sizeof pair);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(right));
    }
    static inline void narrow(bf16* to, __m512 from) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(from));
    }
};
#endif

// out[ROWS][WIDE * LANES] (+)= left[ROWS][depth] panel[depth / STEP][WIDE * LANES][STEP]
template <class Kind, int WIDE, bool ADD>
inline void multiply_tile(const typename Kind::Number* left, std::int64_t left_stride,
                          const typename Kind::Number* panel, std::int64_t depth, float* out,
                          std::int64_t out_stride) {
    __m512 sums[ROWS][WIDE];
    for (int r = 0; r < ROWS; ++r)
        for (int w = 0; w < WIDE; ++w)
            sums[r][w] = ADD ? _mm512_loadu_ps(out + r * out_stride + w * LANES) : _mm512_setzero_ps();
    for (std::int64_t d = 0; d < depth; d += Kind::STEP) {
        const auto* from = panel + d * WIDE * LANES;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int w = 0; w < WIDE; ++w)
                sums[r][w] = Kind::multiply(sums[r][w], left + r * left_stride + d, from + w * LANES * Kind::STEP);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int w = 0; w < WIDE; ++w) _mm512_storeu_ps(out + r * out_stride + w * LANES, sums[r][w]);
}

// out[rows][columns] (+)= left[rows][depth] right; rows is a multiple of ROWS, columns of LANES. The right side lies in
// panels of PANEL columns, the last one narrower; a panel goes through the steps of the depth.
template <class Kind, bool ADD>
void multiply(const typename Kind::Number* left, std::int64_t left_stride, const typename Kind::Number* right,
              std::int64_t columns, std::int64_t depth, float* out, std::int64_t rows) {
    static_assert(PANEL == 3 * LANES, "three vectors");
    for (std::int64_t c = 0; c < columns; c += PANEL) {
        const std::int64_t width = columns - c < PANEL ? columns - c : PANEL;
        const auto* panel = right + c * depth;
        for (std::int64_t r = 0; r < rows; r += ROWS) {
            const auto* row = left + r * left_stride;
            float* to = out + r * columns + c;
            if (width == PANEL) multiply_tile<Kind, 3, ADD>(row, left_stride, panel, depth, to, columns);
            else if (width == 2 * LANES) multiply_tile<Kind, 2, ADD>(row, left_stride, panel, depth, to, columns);
            else multiply_tile<Kind, 1, ADD>(row, left_stride, panel, depth, to, columns);
        }
    }
}

// 16 rows of 16 words, `stride` words apart, to 16 columns `to_stride` words apart.
inline void transpose(const std::int32_t* from, std::int64_t stride, std::int32_t* to, std::int64_t to_stride) {
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; ++j) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_si512(to + (j + 8) * to_stride, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
    }
}

// Keys as the right side of Q K^T: steps of the head dimension first, then the keys; those that are missing are zeros.
template <class Kind>
void pack_keys(const typename Kind::Number* from, std::int64_t stride, std::int64_t count, std::int64_t padded,
               std::int64_t dim, typename Kind::Number* to) {
    typedef typename Kind::Number Number;
    constexpr int WORD = Kind::STEP;  // numbers in four bytes
    static_assert(WORD * sizeof(Number) == sizeof(std::int32_t), "a step is a word");
    for (std::int64_t key = 0; key < padded; key += LANES) {
        const std::int64_t panel = key / PANEL * PANEL, width = padded - panel < PANEL ? padded - panel : PANEL;
        for (std::int64_t d = 0; d < dim; d += LANES * WORD) {
            auto* target = reinterpret_cast<std::int32_t*>(to + panel * dim + d * width) + key - panel;
            if (key + LANES <= count && d + LANES * WORD <= dim) {
                const auto* source = reinterpret_cast<const std::int32_t*>(from + key * stride + d);
                transpose(source, stride / WORD, target, width);
                continue;
            }
            std::int32_t edge[LANES * LANES] = {};
            const std::int64_t rows = count - key < LANES ? count - key : LANES;
            const std::int64_t columns = dim - d < LANES * WORD ? dim - d : LANES * WORD;
            for (std::int64_t row = 0; row < rows; ++row)
                std::memcpy(edge + row * LANES, from + (key + row) * stride + d, columns * sizeof(Number));
            std::int32_t turned[LANES * LANES];
            transpose(edge, LANES, turned, LANES);
            for (std::int64_t word = 0; word < columns / WORD; ++word)
                std::memcpy(target + word * width, turned + word * LANES, LANES * sizeof(std::int32_t));
        }
    }
}

// Values as the right side of P V: steps of keys first, then the head dimension; those that are missing are zeros.
inline void pack_values(const float* from, std::int64_t stride, std::int64_t count, std::int64_t padded,
                        std::int64_t dim, float* to) {
    for (std::int64_t c = 0; c < dim; c += PANEL) {
        const std::int64_t width = dim - c < PANEL ? dim - c : PANEL;
        float* panel = to + c * padded;
        for (std::int64_t key = 0; key < count; ++key)
            std::memcpy(panel + key * width, from + key * stride + c, width * sizeof(float));
        std::memset(panel + count * width, 0, (padded - count) * width * sizeof(float));
    }
}

inline void pack_values(const bf16* from, std::int64_t stride, std::int64_t count, std::int64_t padded,
                        std::int64_t dim, bf16* to) {
    for (std::int64_t c = 0; c < dim; c += PANEL) {
        const std::int64_t width = dim - c < PANEL ? dim - c : PANEL;
        for (std::int64_t key = 0; key < padded; key += 2) {
            const bf16 *first = from + key * stride + c, *second = first + stride;
            bf16* pair = to + c * padded + key * width;
            if (key + 2 <= count)
                for (std::int64_t d = 0; d < width; ++d) pair[2 * d] = first[d], pair[2 * d + 1] = second[d];
            else
                for (std::int64_t d = 0; d < width; ++d)
                    pair[2 * d] = key < count ? first[d] : bf16(0), pair[2 * d + 1] = 0;
        }
    }
}

// One row of logits (of base 2, as `scale` and `bias` make them) to weights: the running maximum and sum, and the factor by which what was summed before shrinks.
template <class Kind>
inline float soften(const float* logits, const float* bias, float scale, std::int64_t count, std::int64_t padded,
                    float& highest, float& total, typename Kind::Number* weights, float* scratch) {
    __m512 top = _mm512_set1_ps(NEVER);
    for (std::int64_t key = 0; key < padded; key += LANES) {
        const __mmask16 here = key + LANES <= count ? 0xffff : static_cast<__mmask16>((1u << (count - key)) - 1u);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(logits + key), _mm512_set1_ps(scale));
        if (bias) x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(here, bias + key), _mm512_set1_ps(LOG2_E), x);
        x = _mm512_mask_blend_ps(here, _mm512_set1_ps(NEVER), x);
        _mm512_storeu_ps(scratch + key, x);
        top = _mm512_max_ps(top, x);
    }
    const float before = highest, found = _mm512_reduce_max_ps(top), now = found > before ? found : before;
    const float base = now == NEVER ? 0.0f : now;  // a query that has seen no key yet
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t key = 0; key < padded; key += LANES) {
        const __m512 x = _mm512_loadu_ps(scratch + key);
        const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(NEVER), _CMP_NEQ_UQ);
        const __m512 weight = _mm512_maskz_mov_ps(seen, power_of_two(_mm512_sub_ps(x, _mm512_set1_ps(base))));
        sum = _mm512_add_ps(sum, weight);
        Kind::narrow(weights + key, weight);
    }
    float shrink = 0.0f;
    if (before != NEVER) shrink = _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(before - base)));
    highest = now;
    total = total * shrink + _mm512_reduce_add_ps(sum);
    return shrink;
}

inline void store(float* to, const float* from, float factor, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; d += LANES)
        _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(factor)));
}

#ifdef __AVX512BF16__
inline void store(bf16* to, const float* from, float factor, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; d += LANES)
        Half::narrow(to + d, _mm512_mul_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(factor)));
}
#endif

template <class Number>
Number* numbers(std::int64_t count) {
    const std::size_t bytes = (count * sizeof(Number) + 63) / 64 * 64;
    return static_cast<Number*>(std::aligned_alloc(64, bytes));
}

// What one thread works with.
template <class Kind>
struct Room {
    typedef typename Kind::Number Number;
    Number *q, *k, *v, *weights;
    float *logits, *out, *highest, *total, *scratch;

    explicit Room(std::int64_t dim)
        : q(numbers<Number>(QUERIES * dim)), k(numbers<Number>(KEYS * dim)), v(numbers<Number>(KEYS * dim)),
          weights(numbers<Number>(QUERIES * KEYS)), logits(numbers<float>(QUERIES * KEYS)),
          out(numbers<float>(QUERIES * dim)), highest(numbers<float>(QUERIES)), total(numbers<float>(QUERIES)),
          scratch(numbers<float>(KEYS)) {}
    bool whole() const { return q && k && v && weights && logits && out && highest && total && scratch; }
    ~Room() {
        for (void* part : {(void*)q, (void*)k, (void*)v, (void*)weights, (void*)logits, (void*)out, (void*)highest,
                           (void*)total, (void*)scratch})
            std::free(part);
    }
};

// All keys for up to QUERIES queries of one head.
template <class Kind>
void attend_some(const typename Kind::Number* q, std::int64_t q_stride, const typename Kind::Number* k,
                 std::int64_t k_stride, const typename Kind::Number* v, std::int64_t v_stride, const float* bias,
                 typename Kind::Number* out, std::int64_t out_stride, std::int64_t count, const Shape& shape,
                 float scale, Room<Kind>& room) {
    typedef typename Kind::Number Number;
    const std::int64_t dim = shape.dim, rows = (count + ROWS - 1) / ROWS * ROWS;
    for (std::int64_t row = 0; row < rows; ++row) {
        if (row < count) std::memcpy(room.q + row * dim, q + row * q_stride, dim * sizeof(Number));
        else std::memset(room.q + row * dim, 0, dim * sizeof(Number));
        room.highest[row] = NEVER;
        room.total[row] = 0.0f;
    }
    std::memset(room.out, 0, rows * dim * sizeof(float));
    for (std::int64_t first = 0; first < shape.keys; first += KEYS) {
        const std::int64_t keys = shape.keys - first < KEYS ? shape.keys - first : KEYS;
        const std::int64_t padded = (keys + LANES - 1) / LANES * LANES;
        pack_keys<Kind>(k + first * k_stride, k_stride, keys, padded, dim, room.k);
        pack_values(v + first * v_stride, v_stride, keys, padded, dim, room.v);
        multiply<Kind, false>(room.q, dim, room.k, padded, dim, room.logits, rows);
        for (std::int64_t row = 0; row < rows; ++row) {
            const float shrink = soften<Kind>(room.logits + row * padded, bias ? bias + first : nullptr, scale, keys,
                                              padded, room.highest[row], room.total[row],
                                              room.weights + row * padded, room.scratch);
            if (shrink != 1.0f) store(room.out + row * dim, room.out + row * dim, shrink, dim);
        }
        multiply<Kind, true>(room.weights, padded, room.v, dim, padded, room.out, rows);
    }
    for (std::int64_t row = 0; row < count; ++row) {
        const float total = room.total[row];
        store(out + row * out_stride, room.out + row * dim, total > 0.0f ? 1.0f / total : 0.0f, dim);
    }
}

template <class Kind>
void attend(const void* q, const Strides& qs, const void* k, const Strides& ks, const void* v, const Strides& vs,
            const float* bias, std::int64_t bias_stride, void* out, const Strides& os, const Shape& shape,
            float scale, int* failed) {
    typedef typename Kind::Number Number;
    const std::int64_t pieces = (shape.queries + QUERIES - 1) / QUERIES;
    const std::int64_t tasks = shape.batch * shape.heads * pieces;
#pragma omp parallel
    {
        Room<Kind> room(shape.dim);
        if (!room.whole()) {
#pragma omp atomic write
            *failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t task = 0; task < tasks; ++task) {
            if (!room.whole()) continue;
            const std::int64_t piece = task % pieces, head = task / pieces % shape.heads;
            const std::int64_t batch = task / pieces / shape.heads, begin = piece * QUERIES;
            const std::int64_t count = shape.queries - begin < QUERIES ? shape.queries - begin : QUERIES;
            attend_some<Kind>(
                static_cast<const Number*>(q) + batch * qs.batch + begin * qs.token + head * qs.head, qs.token,
                static_cast<const Number*>(k) + batch * ks.batch + head * ks.head, ks.token,
                static_cast<const Number*>(v) + batch * vs.batch + head * vs.head, vs.token,
                bias ? bias + batch * bias_stride : nullptr,
                static_cast<Number*>(out) + batch * os.batch + begin * os.token + head * os.head, os.token, count,
                shape, scale * LOG2_E, room);
        }
    }
}

}  // namespace

// `strides`: batch, token, head of q, k, v and out, in this order. Returns 0; 1 where memory ran out, 2 where this build
// has no bfloat16.
extern "C" int frameloom_attention(const void* q, const void* k, const void* v, const float* bias, void* out,
                                   const std::int64_t* strides, std::int64_t bias_stride, std::int64_t batch,
                                   std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t dim,
                                   float scale, int half) {
    const Shape shape{batch, queries, keys, heads, dim};
    Strides s[4];
    for (int i = 0; i < 4; ++i) s[i] = {strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    int failed = 0;
    if (!half) {
        attend<Single>(q, s[0], k, s[1], v, s[2], bias, bias_stride, out, s[3], shape, scale, &failed);
        return failed;
    }
#ifdef __AVX512BF16__
    attend<Half>(q, s[0], k, s[1], v, s[2], bias, bias_stride, out, s[3], shape, scale, &failed);
    return failed;
#else
    return 2;
#endif
}
