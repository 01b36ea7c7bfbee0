// The denoiser's chains of elementwise operations, each in one pass over memory: float32 or bfloat16, sums in float32.
//
// A row is a token; its channels lie side by side. An operand may be a modulation that several tokens share: it is read
// where it lies, at batch * `batch` + (token / every) * `stride` numbers. What the reference rounds is rounded here.
// Loaded by frameloom/ops/native.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef std::uint16_t bf16;

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, bf16& to) {  // to the nearest, ties to even; NaN stays NaN
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to = static_cast<bf16>(x == x ? rounded : 0x7fc0u);
}

template <class Number>
inline float rounded(float x) {
    Number y;
    narrow(x, y);
    return widen(y);
}

// Must match `_Operand` in ops/native_dit.py.
struct Operand {
    const void* data;
    std::int64_t batch, stride, every;

    template <class Number>
    const Number* row(std::int64_t b, std::int64_t token) const {
        return static_cast<const Number*>(data) + b * batch + token / every * stride;
    }
};

// Must match `_Angles` in ops/native_dit.py: cosines or sines of the pairs of a head, the same for all heads where `head`
// is 0, for all samples where `batch` is.
struct Angles {
    const float* data;
    std::int64_t batch, head, stride;

    const float* of(std::int64_t b, std::int64_t h, std::int64_t token) const {
        return data + b * batch + h * head + token * stride;
    }
};

struct Shape {
    std::int64_t batch, length, width;
};

// s = x + branch * gate, rounded; returned in float32.
template <class Number>
inline void add_row(const Number* x, const Number* branch, const float* gate, std::int64_t width, float* s) {
    if (!branch) {
#pragma omp simd
        for (std::int64_t d = 0; d < width; ++d) s[d] = widen(x[d]);
    } else if (!gate) {
#pragma omp simd
        for (std::int64_t d = 0; d < width; ++d) s[d] = rounded<Number>(widen(x[d]) + widen(branch[d]));
    } else {
#pragma omp simd
        for (std::int64_t d = 0; d < width; ++d) s[d] = rounded<Number>(widen(x[d]) + widen(branch[d]) * gate[d]);
    }
}

// s to (s - mean) / sqrt(variance + eps), or for the root mean square s / sqrt(mean(s^2) + eps).
inline void norm_row(float* s, std::int64_t width, float eps, bool rms) {
    float sum = 0.0f, squares = 0.0f;
    if (!rms) {
#pragma omp simd reduction(+ : sum)
        for (std::int64_t d = 0; d < width; ++d) sum += s[d];
    }
    const float mean = sum / width;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t d = 0; d < width; ++d) squares += (s[d] - mean) * (s[d] - mean);
    const float factor = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
    for (std::int64_t d = 0; d < width; ++d) s[d] = (s[d] - mean) * factor;
}

inline void multiply_row(float* s, const float* by, float more, std::int64_t width) {
#pragma omp simd
    for (std::int64_t d = 0; d < width; ++d) s[d] *= more + by[d];
}

inline void shift_row(float* s, const float* by, std::int64_t width) {
#pragma omp simd
    for (std::int64_t d = 0; d < width; ++d) s[d] += by[d];
}

template <class Number>
void add_norm(const Operand& x, const Operand& branch, const Operand& gate, const Operand& scale, const Operand& shift,
              const float* weight, const float* bias, Number* summed, Number* out, const Shape& shape, float eps,
              bool rms) {
#pragma omp parallel
    {
        std::vector<float> room(shape.width);
        float* s = room.data();
#pragma omp for
        for (std::int64_t row = 0; row < shape.batch * shape.length; ++row) {
            const std::int64_t b = row / shape.length, token = row % shape.length;
            add_row<Number>(x.row<Number>(b, token), branch.data ? branch.row<Number>(b, token) : nullptr,
                            gate.data ? gate.row<float>(b, token) : nullptr, shape.width, s);
            if (summed)
                for (std::int64_t d = 0; d < shape.width; ++d) narrow(s[d], summed[row * shape.width + d]);
            if (!out) continue;
            norm_row(s, shape.width, eps, rms);
            if (weight) multiply_row(s, weight, 0.0f, shape.width);
            if (bias) shift_row(s, bias, shape.width);
            if (scale.data) multiply_row(s, scale.row<float>(b, token), 1.0f, shape.width);
            if (shift.data) shift_row(s, shift.row<float>(b, token), shape.width);
            for (std::int64_t d = 0; d < shape.width; ++d) narrow(s[d], out[row * shape.width + d]);
        }
    }
}

// Norm over all heads, rounded; then each pair of channels turned by its angle: neighbours, or the halves of a head.
template <class Number>
void norm_rotate(const Operand& x, const float* weight, const Angles& cosines, const Angles& sines, Number* out,
                 const Shape& shape, std::int64_t head, float eps, bool halves) {
    const std::int64_t pairs = head / 2;
#pragma omp parallel
    {
        std::vector<float> room(shape.width);
        float* s = room.data();
#pragma omp for
        for (std::int64_t row = 0; row < shape.batch * shape.length; ++row) {
            const std::int64_t b = row / shape.length, token = row % shape.length;
            add_row<Number>(x.row<Number>(b, token), nullptr, nullptr, shape.width, s);
            norm_row(s, shape.width, eps, true);
#pragma omp simd
            for (std::int64_t d = 0; d < shape.width; ++d) s[d] = rounded<Number>(s[d] * weight[d]);
            for (std::int64_t first = 0; first < shape.width; first += head) {
                const float *c = cosines.of(b, first / head, token), *n = sines.of(b, first / head, token);
                const float* from = s + first;
                Number* to = out + row * shape.width + first;
                if (halves) {
#pragma omp simd
                    for (std::int64_t p = 0; p < pairs; ++p) {
                        narrow(from[p] * c[p] - from[p + pairs] * n[p], to[p]);
                        narrow(from[p + pairs] * c[p] + from[p] * n[p], to[p + pairs]);
                    }
                } else {
#pragma omp simd
                    for (std::int64_t p = 0; p < pairs; ++p) {
                        narrow(from[2 * p] * c[p] - from[2 * p + 1] * n[p], to[2 * p]);
                        narrow(from[2 * p] * n[p] + from[2 * p + 1] * c[p], to[2 * p + 1]);
                    }
                }
            }
        }
    }
}

}  // namespace

// `operands`: x, branch, gate, scale, shift; without data they are left out, as are null weight, bias, summed and out.
extern "C" void frameloom_add_norm(const Operand* operands, const float* weight, const float* bias, void* summed,
                                   void* out, std::int64_t batch, std::int64_t length, std::int64_t width, float eps,
                                   int rms, int half) {
    const Shape shape{batch, length, width};
    const Operand *x = operands, *branch = operands + 1, *gate = operands + 2, *scale = operands + 3;
    const Operand* shift = operands + 4;
    if (half)
        add_norm<bf16>(*x, *branch, *gate, *scale, *shift, weight, bias, static_cast<bf16*>(summed),
                       static_cast<bf16*>(out), shape, eps, rms);
    else
        add_norm<float>(*x, *branch, *gate, *scale, *shift, weight, bias, static_cast<float*>(summed),
                        static_cast<float*>(out), shape, eps, rms);
}

// `angles`: cosines, sines.
extern "C" void frameloom_norm_rotate(const Operand* x, const float* weight, const Angles* angles, void* out,
                                      std::int64_t batch, std::int64_t length, std::int64_t width, std::int64_t head,
                                      float eps, int halves, int half) {
    const Shape shape{batch, length, width};
    const Angles &cosines = angles[0], &sines = angles[1];
    if (half) norm_rotate<bf16>(*x, weight, cosines, sines, static_cast<bf16*>(out), shape, head, eps, halves);
    else norm_rotate<float>(*x, weight, cosines, sines, static_cast<float*>(out), shape, head, eps, halves);
}
