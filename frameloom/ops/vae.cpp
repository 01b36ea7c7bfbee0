// The parts of the WanVAE that one pass over memory does better than a chain of tensor operations.
//
// Plain C functions on float32 arrays with the channels innermost: (frame, row, column, channel). A frame may begin
// anywhere (its stride is given in floats); inside a frame, memory is dense. Loaded by frameloom/ops/native.py.
//
// Winograd F(4x4, 3x3) over rows and columns and F(2, 3) over time: arXiv:1509.09308. The points of rows and columns are
// 0, +-5/8, +-3/2 and infinity, all exact in binary: with 0, +-1, +-2 the rounding error of one layer is twice as large.
// Those of time are 0, +-1 and infinity.

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

// One channel block of a tile's 6x6 pixels at its 36 points; pixels outside of the picture are zero. The picture may be
// an enlarged one, of which every pixel of memory makes SCALE x SCALE.
template <int SCALE = 1>
inline void frame_to_points(const float* frame, std::int64_t height, std::int64_t width, std::int64_t channels,
                            std::int64_t top, std::int64_t left, int count, Vec out[36]) {
    Vec columns[6][6];  // transformed down the rows: columns[point][column]
    for (int j = 0; j < 6; ++j) {
        Vec d[6], points[6];
        for (int i = 0; i < 6; ++i) {
            const std::int64_t row = top + i, column = left + j;
            const bool inside = row >= 0 && row < SCALE * height && column >= 0 && column < SCALE * width;
            d[i] = inside ? load(frame + (row / SCALE * width + column / SCALE) * channels, count) : Vec{};
        }
        to_points(d, points);
        for (int i = 0; i < 6; ++i) columns[i][j] = points[i];
    }
    for (int i = 0; i < 6; ++i) to_points(columns[i], out + 6 * i);
}

// The 36 points of one channel block of a tile back to those of its 4x4 pixels that lie in the picture, plus the bias.
inline void points_to_frame(const Vec points[36], const Vec& bias, std::int64_t height, std::int64_t width,
                            std::int64_t channels, std::int64_t top, std::int64_t left, int count, float* frame) {
    Vec rows[4][6];
    for (int j = 0; j < 6; ++j) {
        Vec m[6], y[4];
        for (int i = 0; i < 6; ++i) m[i] = points[6 * i + j];
        from_points(m, y);
        for (int i = 0; i < 4; ++i) rows[i][j] = y[i];
    }
    for (int i = 0; i < 4 && top + i < height; ++i) {
        Vec y[4];
        from_points(rows[i], y);
        for (int j = 0; j < 4 && left + j < width; ++j)
            store(frame + ((top + i) * width + left + j) * channels, y[j] + bias, count);
    }
}

// Where a value at the points lies: (point of time, point, pair of frames, tile, channel), one plane after the other.
// The planes of the fourth point of time have no place for an odd last frame.
struct Points {
    std::int64_t frames, tiles, channels;

    std::int64_t at(int time, int point, std::int64_t pair, std::int64_t tile) const {
        const std::int64_t pairs = time < 3 ? (frames + 1) / 2 : frames / 2;
        const std::int64_t before = time * 36 * ((frames + 1) / 2);
        return ((before + point * pairs + pair) * tiles + tile) * channels;
    }
};

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

// Tiles of 6x6 pixels, four apart, of pairs of frames to their 36 points, at four points of time: points (4, 36, pairs,
// tile_rows * tile_columns, channels). An odd last frame is half a pair, for which the fourth point of time is left out.
// Tile row 0 here is tile row `first_row` of the picture; pixels outside of it are zero. `frames` counts the results.
void frameloom_winograd_input(const float* x, std::int64_t x_stride, std::int64_t height, std::int64_t width,
                              std::int64_t channels, std::int64_t pad_rows, std::int64_t first_row,
                              std::int64_t frames, std::int64_t tile_rows, std::int64_t tile_columns, float* points) {
    const std::int64_t tiles = tile_rows * tile_columns, pairs = (frames + 1) / 2;
    const Points to{frames, tiles, channels};
#pragma omp parallel for schedule(static)
    for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t top = 4 * (first_row + t / tile_columns) - pad_rows, left = 4 * (t % tile_columns) - 1;
        for (std::int64_t c = 0; c < channels; c += LANES) {
            const int count = channels - c < LANES ? channels - c : LANES;
            Vec d[4][36];  // frames 2p to 2p + 3 at their points; the last two begin the next pair
            frame_to_points(x + c, height, width, channels, top, left, count, d[0]);
            frame_to_points(x + x_stride + c, height, width, channels, top, left, count, d[1]);
            for (std::int64_t p = 0; p < pairs; ++p) {
                const bool whole = 2 * p + 1 < frames;
                const float* next = x + (2 * p + 2) * x_stride + c;
                frame_to_points(next, height, width, channels, top, left, count, d[2]);
                if (whole) frame_to_points(next + x_stride, height, width, channels, top, left, count, d[3]);
                for (int k = 0; k < 36; ++k) {
                    store(points + to.at(0, k, p, t) + c, d[0][k] - d[2][k], count);
                    store(points + to.at(1, k, p, t) + c, d[1][k] + d[2][k], count);
                    store(points + to.at(2, k, p, t) + c, d[2][k] - d[1][k], count);
                    if (!whole) continue;
                    store(points + to.at(3, k, p, t) + c, d[1][k] - d[3][k], count);
                    d[0][k] = d[2][k];
                    d[1][k] = d[3][k];
                }
            }
        }
    }
}

// The points of each pair of frames back to 4x4 pixels per tile, plus the bias: points as above to `out`.
void frameloom_winograd_output(const float* points, const float* bias, std::int64_t frames, std::int64_t tile_rows,
                               std::int64_t tile_columns, std::int64_t channels, std::int64_t first_row, float* out,
                               std::int64_t out_stride, std::int64_t height, std::int64_t width) {
    const std::int64_t tiles = tile_rows * tile_columns, pairs = (frames + 1) / 2;
    const Points from{frames, tiles, channels};
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t p = 0; p < pairs; ++p) {
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t top = 4 * (first_row + t / tile_columns), left = 4 * (t % tile_columns);
            const bool whole = 2 * p + 1 < frames;
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const int count = channels - c < LANES ? channels - c : LANES;
                const Vec b = load(bias + c, count);
                Vec y[2][36];
                for (int k = 0; k < 36; ++k) {
                    const Vec m1 = load(points + from.at(1, k, p, t) + c, count);
                    const Vec m2 = load(points + from.at(2, k, p, t) + c, count);
                    y[0][k] = load(points + from.at(0, k, p, t) + c, count) + m1 + m2;
                    if (whole) y[1][k] = m1 - m2 - load(points + from.at(3, k, p, t) + c, count);
                }
                float* frame = out + 2 * p * out_stride + c;
                points_to_frame(y[0], b, height, width, channels, top, left, count, frame);
                if (whole) points_to_frame(y[1], b, height, width, channels, top, left, count, frame + out_stride);
            }
        }
    }
}

// Tiles of 6x6 pixels of the picture with its rows and columns doubled to their points (36, frames, tile_rows *
// tile_columns, channels). Without `pad_rows`, the first and last row of x are only there as neighbours.
void frameloom_upsample_input(const float* x, std::int64_t x_stride, std::int64_t height, std::int64_t width,
                              std::int64_t channels, std::int64_t pad_rows, std::int64_t first_row,
                              std::int64_t frames, std::int64_t tile_rows, std::int64_t tile_columns, float* points) {
    const std::int64_t tiles = tile_rows * tile_columns, plane = frames * tiles * channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t f = 0; f < frames; ++f) {
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t row = 4 * (first_row + t / tile_columns), left = 4 * (t % tile_columns) - 1;
            const std::int64_t top = row + (pad_rows ? -1 : 1);
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const int count = channels - c < LANES ? channels - c : LANES;
                Vec d[36];
                frame_to_points<2>(x + f * x_stride + c, height, width, channels, top, left, count, d);
                for (int k = 0; k < 36; ++k) store(points + k * plane + (f * tiles + t) * channels + c, d[k], count);
            }
        }
    }
}

// Those points back to 4x4 pixels per tile, plus the bias.
void frameloom_upsample_output(const float* points, const float* bias, std::int64_t frames, std::int64_t tile_rows,
                               std::int64_t tile_columns, std::int64_t channels, std::int64_t first_row, float* out,
                               std::int64_t out_stride, std::int64_t height, std::int64_t width) {
    const std::int64_t tiles = tile_rows * tile_columns, plane = frames * tiles * channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t f = 0; f < frames; ++f) {
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::int64_t top = 4 * (first_row + t / tile_columns), left = 4 * (t % tile_columns);
            for (std::int64_t c = 0; c < channels; c += LANES) {
                const int count = channels - c < LANES ? channels - c : LANES;
                Vec y[36];
                for (int k = 0; k < 36; ++k) y[k] = load(points + k * plane + (f * tiles + t) * channels + c, count);
                float* frame = out + f * out_stride + c;
                points_to_frame(y, load(bias + c, count), height, width, channels, top, left, count, frame);
            }
        }
    }
}

}  // extern "C"
