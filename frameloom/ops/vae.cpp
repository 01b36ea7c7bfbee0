// The parts of the WanVAE that one pass over memory does better than a chain of tensor operations.
//
// Plain C functions on float32 arrays with the channels innermost: (frame, row, column, channel). A frame may begin
// anywhere (its stride is given in floats); inside a frame, memory is dense. Loaded by frameloom/ops/native.py.
//
// Winograd F(4x4, 3x3): arXiv:1509.09308. The interpolation points are 0, +-5/8, +-3/2 and infinity, all exact in
// binary: with 0, +-1, +-2 the rounding error of one layer is twice as large.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef std::int32_t IntVec __attribute__((vector_size(LANES * sizeof(std::int32_t))));

constexpr float A = 0.625f, B = 1.5f;
constexpr float A2 = A * A, B2 = B * B, SUM = A2 + B2, PRODUCT = A2 * B2;

inline Vec load(const float* from, int count) {
    Vec v = {};
    if (count == LANES) std::memcpy(&v, from, sizeof v);
    else std::memcpy(&v, from, count * sizeof(float));
    return v;
}

inline void store(float* to, const Vec& v, int count) {
    if (count == LANES) std::memcpy(to, &v, sizeof v);
    else std::memcpy(to, &v, count * sizeof(float));
}

// e^x to about one unit in the last place, between the numbers that float32 can hold; NaN stays NaN.
inline Vec exponential(Vec x) {
    x = x > 88.0f ? Vec{} + 88.0f : x;
    x = x < -87.0f ? Vec{} - 87.0f : x;
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    const Vec whole = shifted - 12582912.0f;
    const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = Vec{} + 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    const IntVec exponent = (__builtin_convertvector(whole, IntVec) + 127) << 23;
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return p * power;
}

// B^T d: six values to the six interpolation points.
inline void to_points(const Vec d[6], Vec out[6]) {
    const Vec even_a = d[4] - B2 * d[2], odd_a = A * (d[3] - B2 * d[1]);
    const Vec even_b = d[4] - A2 * d[2], odd_b = B * (d[3] - A2 * d[1]);
    out[0] = d[4] - SUM * d[2] + PRODUCT * d[0];
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = d[5] - SUM * d[3] + PRODUCT * d[1];
}

// A^T m: six interpolation points to four values.
inline void from_points(const Vec m[6], Vec out[4]) {
    const Vec sum_a = m[1] + m[2], difference_a = A * (m[1] - m[2]);
    const Vec sum_b = m[3] + m[4], difference_b = B * (m[3] - m[4]);
    out[0] = m[0] + sum_a + sum_b;
    out[1] = difference_a + difference_b;
    out[2] = A2 * sum_a + B2 * sum_b;
    out[3] = A2 * difference_a + B2 * difference_b + m[5];
}

}  // namespace

extern "C" {

// out = silu(x / rms(x) * gamma) per pixel; rms over the channels, never below 1e-12 / sqrt(channels).
void frameloom_norm_silu(const float* x, std::int64_t x_stride, float* out, std::int64_t out_stride,
                         const float* gamma, std::int64_t frames, std::int64_t pixels, std::int64_t channels) {
    const float root = __builtin_sqrtf(static_cast<float>(channels));
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t f = 0; f < frames; ++f) {
        for (std::int64_t p = 0; p < pixels; ++p) {
            const float* in = x + f * x_stride + p * channels;
            float* to = out + f * out_stride + p * channels;
            Vec squares = {};
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const Vec v = load(in + c, channels - c < LANES ? channels - c : LANES);
                squares += v * v;
            }
            float total = 0;
            for (int i = 0; i < LANES; ++i) total += squares[i];
            const float length = __builtin_sqrtf(total);
            const float scale = root / (length < 1e-12f ? 1e-12f : length);
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const int count = channels - c < LANES ? channels - c : LANES;
                const Vec v = load(in + c, count) * scale * load(gamma + c, count);
                store(to + c, v / (1.0f + exponential(-v)), count);
            }
        }
    }
}

// Tiles of 6x6 pixels, four apart, to their 36 points: points (36, frames, tile_rows * tile_columns, channels).
// Tile row 0 here is tile row `first_row` of the picture; pixels outside of it are zero.
void frameloom_winograd_input(const float* x, std::int64_t x_stride, std::int64_t height, std::int64_t width,
                              std::int64_t channels, std::int64_t pad_rows, std::int64_t first_row,
                              std::int64_t frames, std::int64_t tile_rows, std::int64_t tile_columns, float* points) {
    const std::int64_t tiles = tile_rows * tile_columns, plane = frames * tiles * channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t f = 0; f < frames; ++f) {
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t top = 4 * (first_row + t / tile_columns) - pad_rows, left = 4 * (t % tile_columns) - 1;
            const float* frame = x + f * x_stride;
            float* to = points + (f * tiles + t) * channels;
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const int count = channels - c < LANES ? channels - c : LANES;
                Vec columns[6][6];  // transformed down the rows: columns[point][column]
                for (int j = 0; j < 6; ++j) {
                    Vec d[6], points_of_column[6];
                    for (int i = 0; i < 6; ++i) {
                        const std::int64_t row = top + i, column = left + j;
                        const bool inside = row >= 0 && row < height && column >= 0 && column < width;
                        d[i] = inside ? load(frame + (row * width + column) * channels + c, count) : Vec{};
                    }
                    to_points(d, points_of_column);
                    for (int i = 0; i < 6; ++i) columns[i][j] = points_of_column[i];
                }
                for (int i = 0; i < 6; ++i) {
                    Vec row_points[6];
                    to_points(columns[i], row_points);
                    for (int j = 0; j < 6; ++j) store(to + (6 * i + j) * plane + c, row_points[j], count);
                }
            }
        }
    }
}

// The 36 points of each tile back to 4x4 pixels, plus the bias: points (36, frames, tiles, channels) to `out`.
void frameloom_winograd_output(const float* points, const float* bias, std::int64_t frames, std::int64_t tile_rows,
                               std::int64_t tile_columns, std::int64_t channels, std::int64_t first_row, float* out,
                               std::int64_t out_stride, std::int64_t height, std::int64_t width) {
    const std::int64_t tiles = tile_rows * tile_columns, plane = frames * tiles * channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t f = 0; f < frames; ++f) {
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t top = 4 * (first_row + t / tile_columns), left = 4 * (t % tile_columns);
            const float* from = points + (f * tiles + t) * channels;
            float* frame = out + f * out_stride;
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const int count = channels - c < LANES ? channels - c : LANES;
                Vec rows[4][6];
                for (int j = 0; j < 6; ++j) {
                    Vec m[6], y[4];
                    for (int i = 0; i < 6; ++i) m[i] = load(from + (6 * i + j) * plane + c, count);
                    from_points(m, y);
                    for (int i = 0; i < 4; ++i) rows[i][j] = y[i];
                }
                const Vec b = load(bias + c, count);
                for (int i = 0; i < 4 && top + i < height; ++i) {
                    Vec y[4];
                    from_points(rows[i], y);
                    for (int j = 0; j < 4 && left + j < width; ++j)
                        store(frame + ((top + i) * width + left + j) * channels + c, y[j] + b, count);
                }
            }
        }
    }
}

}  // extern "C"
